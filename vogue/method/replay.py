r"""AVATAR's replay: completions of earlier steps train again beside today's (arXiv 2508.03100).

A group of a prompt q is what the policy generates of it today, and some of what it generated of it before:

    R̄(q)  = mean of the rewards of the last 20 completions that were generated of q, today's among them
    A_on  = (r − mean r) / std r         of today's completions, among themselves
    A_off = α (r − R̄(q)) / σ             of the replayed ones; σ is the sample std of their rewards
    ρ     = π / π_b                      of the replayed ones; π_b is the policy that generated them

Prompts lie in tiers by R̄: the lowest 40% of those with something stored are hard, the next 35% medium, the others
easy. Each tier has as large a share of the buffer's room, and of the prompts that are drawn from it.

Ours: where the replayed rewards are alike, σ is the std of them and of the rewards in R̄ together, since their mean may
still lie far from R̄; where that is 0, too, A_off is 0. A tier's free room is lent to the others, and in one that has
too much the oldest completions go first.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vogue.method.advantage import over

Shares = tuple[float, float, float]  # of the tiers easy, medium and hard; together 1


def off_policy_advantages(
    rewards: Sequence[float], recent: Sequence[float], *, scaled: bool, weight: float = 1.0
) -> Tensor:
    """A_off (M,) float32 of M replayed completions.

    rewards  (M,) that they earned when they were generated
    recent   of the completions that R̄ is the mean of, at least one
    scaled   whether they are divided by σ
    weight   α
    """
    values = torch.tensor(rewards, dtype=torch.float64)
    known = torch.tensor(recent, dtype=torch.float64)
    advantages = values - known.mean()
    if scaled:
        alike = len(values) < 2 or bool((values == values[0]).all())
        spread = torch.cat([values, known]) if alike else values
        std = spread.std()
        advantages = over(advantages, std) if std > 0 else torch.zeros_like(advantages)
    return (weight * advantages).float()


def tiers(means: Sequence[float], shares: Shares) -> list[int]:
    """The tier of each prompt with these R̄: 0 easy, 1 medium, 2 hard. Equal means keep their order."""
    order = sorted(range(len(means)), key=lambda i: means[i])
    hard, harder = _parts(len(means), shares)
    found = [0] * len(means)
    for place, i in enumerate(order):
        found[i] = 2 if place < hard else 1 if place < hard + harder else 0
    return found


def surplus(counts: Sequence[int], size: int, shares: Shares) -> list[int]:
    """How many of the completions of each tier have to go, so that at most `size` are left in all of them."""
    left = list(counts)
    while sum(left) > size:
        fullest = max(range(len(left)), key=lambda tier: left[tier] - shares[tier] * size)
        left[fullest] -= 1
    return [before - after for before, after in zip(counts, left, strict=True)]


def drawn_by_tier(means: Sequence[float], count: int, shares: Shares, rng: np.random.Generator) -> list[int]:
    """`count` of the prompts with these R̄, each once, by the tiers' shares; all of them where there are no more.

    What a tier has too few of comes from the others.
    """
    hard, medium = _parts(min(count, len(means)), shares)
    wanted = (min(count, len(means)) - hard - medium, medium, hard)
    order = rng.permutation(len(means)).tolist()
    found, taken = tiers(means, shares), [0, 0, 0]
    chosen, others = [], []
    for i in order:
        if taken[found[i]] < wanted[found[i]]:
            taken[found[i]] += 1
            chosen.append(i)
        else:
            others.append(i)
    return chosen + others[: sum(wanted) - len(chosen)]


def _parts(count: int, shares: Shares) -> tuple[int, int]:
    """How many of `count` are hard and medium; each bound is rounded, so that the three of them are all."""
    hard = round(shares[2] * count)
    return hard, round((shares[1] + shares[2]) * count) - hard
