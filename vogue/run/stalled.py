"""A run that learns nothing: for many steps no group has completions that are worth different things.

Every advantage is 0 then, and so is every gradient, but for those of advantage.kind=gae. The metrics say why.
"""

from collections import deque
from collections.abc import Mapping

from vogue.config import Config

STEPS = 10  # in a row
MANY = 0.5  # share of completions or groups that is told as a reason


class Stalled:
    """Follows a run's metrics, and says once that nothing is learned."""

    def __init__(self, config: Config):
        self.config = config
        self._last: deque[Mapping[str, float]] = deque(maxlen=STEPS)
        self._told = False

    def reasons(self, metrics: Mapping[str, float]) -> str | None:
        """What to tell after a step with these metrics: the likely reasons why nothing is learned, or None."""
        self._last.append(metrics)
        learns = self.config.advantage.valued or any(row["differing_share"] for row in self._last)
        if self._told or len(self._last) < STEPS or learns:
            return None
        self._told = True
        means = {name: sum(row[name] for row in self._last) / STEPS for name in metrics if self._is_in_all(name)}
        found = "; ".join(likely_reasons(self.config, means)) or "each group's rewards are equal, whatever they are"
        return f"nothing was learned in {STEPS} steps: no group has completions with different rewards. {found}"

    def _is_in_all(self, name: str) -> bool:
        return all(name in row for row in self._last)


def likely_reasons(config: Config, means: Mapping[str, float]) -> list[str]:
    """What the means of some steps say of why all rewards in each group are equal."""
    found, cut = [], 1 - means["finished"]
    if means["alike_share"] >= MANY:
        found.append(
            f"in {means['alike_share']:.0%} of the groups all completions are the same: "
            f"rollout.temperature={config.rollout.temperature:g} may be too low, or the model too sure"
        )
    if cut >= MANY:
        found.append(f"{cut:.0%} of the completions were cut off at rollout.max_tokens={config.rollout.max_tokens}")
    if means["accuracy"] == 1:
        found.append("every answer is right: the samples are too easy for this model")
    if means["accuracy"] == 0:
        found.append("no answer is right: the samples may be too hard, or their answers of another form")
        if means["answered"] < MANY:
            found.append(
                f"in {1 - means['answered']:.0%} of the completions no answer was found where reward.design="
                f"{config.reward.design} asks for it"
            )
        if means["format"] < MANY:
            found.append(f"{1 - means['format']:.0%} of the completions don't have the form that is asked for")
    if config.reward.function:
        found.append(f"reward.function gave {means['reward']:g} on average")
    return found
