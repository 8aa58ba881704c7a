"""What is wrong with a run, told by its metrics alone: one source for `vogue watch`, its page and the report.

Each alarm is a pure function of a run's rows of metrics.jsonl. It says of every step whether something is wrong there,
judged by the WINDOW steps up to it, and neighbouring such steps are one `Alarm`. Thresholds are wide: what varies in a
healthy run is no alarm.

    nothing to learn     no group of WINDOW steps has completions with different rewards: every advantage is 0
    entropy collapse     the entropy of tokens trained on fell below COLLAPSED of what it was in the first WINDOW steps
    engine mismatch      KL(trainer ‖ engine), estimated on the engine's own tokens, is above MISMATCH nats a token: the
                         completions are another policy's than the one that is trained
    cut off              more than CUT of the completions end at rollout.max_tokens
    skipped updates      gradients weren't finite, and the updates weren't applied
    memory               the peak is above FULL of what there is
    no step              nothing was written for LATE times a step's median time: `stalled`, which needs a clock
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median

from vogue.config import Config
from vogue.run.stalled import STEPS, likely_reasons
from vogue.run.step_times import duration, seconds_of

WINDOW = STEPS  # as long as a run itself waits before it says that nothing is learned
COLLAPSED = 0.1
MISMATCH = 0.02  # nats; bfloat16 engines are at about a twentieth of it
CUT = 0.5
FULL = 0.92
LATE, LEAST_LATE = 10.0, 60.0  # times a step's median, and seconds

Row = Mapping[str, float]


@dataclass(frozen=True)
class Alarm:
    """Something that is wrong from step `first` to step `last`, both included; `on`: it still is, or was at the end."""

    name: str
    first: int
    last: int
    text: str
    on: bool


def alarms(rows: Sequence[Row], config: Config) -> list[Alarm]:
    """All alarms of a run, those that are on first, and of either kind those that began last."""
    found = [
        *nothing_to_learn(rows, config),
        *entropy_collapse(rows),
        *engine_mismatch(rows),
        *cut_off(rows, config),
        *skipped_updates(rows),
        *memory_near_limit(rows),
    ]
    return sorted(found, key=lambda alarm: (alarm.on, alarm.first), reverse=True)


def nothing_to_learn(rows: Sequence[Row], config: Config) -> list[Alarm]:
    """No group has completions with different rewards, with the likely reasons."""

    def told(window: Sequence[Row]) -> str:
        means = {name: _mean(window, name) for name in window[-1] if all(name in row for row in window)}
        why = "; ".join(likely_reasons(config, means)) if "alike_share" in means else ""
        return f"no group has completions with different rewards{why and f': {why}'}"

    def wrong(window: Sequence[Row]) -> bool:
        return all(row.get("differing_share", 1.0) == 0 for row in window)

    found = _stretches("nothing to learn", rows, wrong, told)
    return [replace(alarm, first=alarm.first - WINDOW + 1) for alarm in found]  # all of a window's steps are such ones


def entropy_collapse(rows: Sequence[Row]) -> list[Alarm]:
    """The mean entropy of tokens trained on is below COLLAPSED of that of the first WINDOW steps."""
    known = [row for row in rows if _known(row, "entropy")]
    if len(known) < 2 * WINDOW:
        return []
    before = _mean(known[:WINDOW], "entropy")

    def told(window: Sequence[Row]) -> str:
        return f"{_mean(window, 'entropy'):.3g} nats a token, {before:.3g} in the first {WINDOW} steps"

    return _stretches("entropy collapse", known, lambda w: _mean(w, "entropy") < COLLAPSED * before, told)


def engine_mismatch(rows: Sequence[Row]) -> list[Alarm]:
    """The trainer's log-probabilities of the completions aren't those that the engine sampled them with."""
    known = [row for row in rows if _known(row, "mismatch/kl")]

    def told(window: Sequence[Row]) -> str:
        return f"KL of trainer and engine {_mean(window, 'mismatch/kl'):.3g} nats a token, more than {MISMATCH:g}"

    return _stretches("engine mismatch", known, lambda w: _mean(w, "mismatch/kl") > MISMATCH, told)


def cut_off(rows: Sequence[Row], config: Config) -> list[Alarm]:
    """Completions end at `rollout.max_tokens`, and not by themselves."""
    known = [row for row in rows if _known(row, "finished")]

    def told(window: Sequence[Row]) -> str:
        cut = 1 - _mean(window, "finished")
        return f"{cut:.0%} of the completions were cut off at rollout.max_tokens={config.rollout.max_tokens}"

    return _stretches("cut off", known, lambda w: 1 - _mean(w, "finished") > CUT, told)


def skipped_updates(rows: Sequence[Row]) -> list[Alarm]:
    """Updates whose gradient wasn't finite."""

    def told(window: Sequence[Row]) -> str:
        return f"{window[-1]['skipped_updates']:.0%} of the step's updates had no finite gradient and weren't applied"

    return _stretches("skipped updates", rows, lambda w: w[-1].get("skipped_updates", 0.0) > 0, told, window=1)


def memory_near_limit(rows: Sequence[Row]) -> list[Alarm]:
    """The peak of memory is near the end of what there is."""
    known = [row for row in rows if _known(row, "memory_gb") and _known(row, "memory_gb_limit")]

    def told(window: Sequence[Row]) -> str:
        return f"{window[-1]['memory_gb']:.1f} GB at the peak, of {window[-1]['memory_gb_limit']:.1f} GB"

    def wrong(window: Sequence[Row]) -> bool:
        return window[-1]["memory_gb"] > FULL * window[-1]["memory_gb_limit"]

    return _stretches("memory", known, wrong, told, window=1)


def stalled(rows: Sequence[Row], silent: float) -> Alarm | None:
    """No step for `silent` seconds, in a run that hasn't ended; None where that may be a step's time."""
    times = [seconds_of(row) for row in rows]
    if not times or silent <= max(LEAST_LATE, LATE * median(times)):
        return None
    step = int(rows[-1]["step"])
    return Alarm(
        "no step", step, step, f"nothing for {duration(silent)}; a step takes {duration(median(times))}", on=True
    )


def _stretches(
    name: str,
    rows: Sequence[Row],
    wrong: Callable[[Sequence[Row]], bool],
    told: Callable[[Sequence[Row]], str],
    window: int = WINDOW,
) -> list[Alarm]:
    """Neighbouring steps at which it is `wrong` in the window up to them, `told` as it was at the last of them."""
    wrongs = [wrong(rows[end - window : end]) for end in range(window, len(rows) + 1)]
    found: list[Alarm] = []
    for is_wrong, stretch in groupby(range(len(wrongs)), key=wrongs.__getitem__):
        if is_wrong:
            places = [start + window - 1 for start in stretch]  # of the last row of each window
            first, last = (int(rows[place]["step"]) for place in (places[0], places[-1]))
            seen = rows[places[-1] - window + 1 : places[-1] + 1]
            found.append(Alarm(name, first, last, told(seen), on=places[-1] == len(rows) - 1))
    return found


def _known(row: Row, name: str) -> bool:
    return name in row and math.isfinite(row[name])


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
