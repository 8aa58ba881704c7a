"""What keeps a policy's entropy up, of the tokens of one update and from each update to the next.

quantile   an update trains on the tokens with H_t ≥ the (1 − ρ)-quantile of all its tokens' H        arXiv 2506.01939
bonus      the objective has + c H̄, H̄ the mean entropy
target     after an update   c ← min(c + Δ, c_max)  where H̄ ≤ the target,  else  max(c − Δ, 0)        arXiv 2505.22312
           and the next one has + c H̄ in the first case alone
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import numpy as np


class EntropyBonus(NamedTuple):
    """How the weight of the entropy stands before an update, where it is steered towards a target."""

    coef: float  # c
    entropy: float = inf  # nats a token, of the update before; before the first it isn't known, and nothing is paid

    def paid(self, target: float) -> float:
        """The weight that the update's loss has."""
        return self.coef if self.entropy <= target else 0.0

    def after(self, entropy: float, target: float, delta: float, most: float) -> "EntropyBonus":
        """What follows an update whose mean entropy was `entropy`."""
        coef = min(self.coef + delta, most) if entropy <= target else max(self.coef - delta, 0.0)
        return EntropyBonus(coef, entropy)


def entropy_threshold(entropies: Sequence[np.ndarray], share: float) -> float:
    """The entropy that the highest `share` of all tokens reach, in nats: a quantile, interpolated linearly.

    `entropies` are those of an update's tokens, in any parts; -inf where there is no token.
    """
    found = np.concatenate(entropies)
    return float(np.quantile(found.astype(np.float64), 1 - share)) if len(found) else -inf
