"""The entropy's weight in the loss, with `loss.entropy_target` steered from update to update; the state keeps it.

`vogue.method.entropy` has the rule.
"""

from vogue.config.method_sections import LossConfig
from vogue.method.entropy import EntropyBonus
from vogue.metrics import Means
from vogue.step.objective import PAID
from vogue.step.run_state import RunState

BONUS = "entropy_bonus"  # the run's state under this name: an `EntropyBonus`


def entropy_coef(state: RunState, loss: LossConfig) -> float | None:
    """The weight of the entropy in the next update's loss; None where it is the setting."""
    return None if loss.entropy_target is None else _bonus(state, loss).paid(loss.entropy_target)


def steer_entropy(state: RunState, loss: LossConfig, told: Means) -> None:
    """Move the entropy's weight by what an update tells, where `loss.entropy_target` asks for it; collective."""
    if loss.entropy_target is None:
        return
    found = told.over_ranks()
    if PAID in found:  # an update of no token says nothing
        settings = loss.entropy_target, loss.entropy_coef_delta, loss.entropy_coef_max
        state.current[BONUS] = list(_bonus(state, loss).after(found[PAID], *settings))


def _bonus(state: RunState, loss: LossConfig) -> EntropyBonus:
    return EntropyBonus(*state.current.get(BONUS, (loss.entropy_coef,)))
