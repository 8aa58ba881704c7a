r"""MMR1's variance-aware sampling: prompts of which the policy is undecided come more often (arXiv 2509.21268).

P      the share of a prompt's N completions that are right
OVS    = P (1 − P)                          outcome: the variance of a reward of right and wrong, at most 1/4
TDS    = distinct n-grams / all n-grams     diversity: of all N completions together, n = 3
VPS    = α OVS + β TDS
B      prompts of a step: ⌊λ B⌋ with replacement, each with a chance in proportion to its VPS; the others uniformly

The authors' code takes OVS alone, and scales it over the data set from 0 (the lowest) to 1 (the highest) first.

Ours: n-grams are of token ids; a prompt without any has a TDS of 0; where all VPS are 0 all chances are alike; the
prompts that are drawn by their scores lie evenly among the others, so that each update of a step has its part.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NGRAM = 3
UNSEEN = (0.25, 1.0)  # outcome and diversity of a prompt that nothing is known of: the most that each can be


def unseen(count: int) -> Tensor:
    """OVS and TDS (S, 2) float32 of `count` prompts that nothing is known of."""
    return torch.tensor([UNSEEN]).repeat(count, 1)


def outcome_variance(right: int, count: int) -> float:
    """OVS of a prompt with so many right completions of `count` ≥ 1."""
    rate = right / count
    return rate * (1 - rate)


def distinct(completions: Sequence[Sequence[int]], n: int = NGRAM) -> float:
    """TDS: the share of distinct n-grams among those of a prompt's completions, as token ids; 0 where there is none."""
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def scores(measured: Tensor, outcome: float, diversity: float, *, normalise: bool) -> Tensor:
    """VPS (S,) float64 of S prompts from their OVS and TDS (S, 2), with the weights α = `outcome`, β = `diversity`.

    normalise  scales OVS and TDS over the prompts first, the lowest of each to 0 and the highest to 1
    """
    found = measured.double()
    if normalise:
        low, high = found.amin(dim=0), found.amax(dim=0)
        found = (found - low) / torch.where(high > low, high - low, 1.0)
    return found @ torch.tensor([outcome, diversity], dtype=torch.float64)


def drawn(found: Tensor, count: int, rng: np.random.Generator) -> list[int]:
    """`count` numbers of prompts, with replacement, in proportion to their scores (S,) ≥ 0."""
    weights = found.numpy() if bool(found.sum() > 0) else np.ones(len(found))
    return rng.choice(len(weights), count, p=weights / weights.sum()).tolist()


def interleaved(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """All of both in one list, each in its own order, with those of `first` spread evenly over it."""
    size, order = len(first) + len(second), []
    parts = iter(first), iter(second)
    for i in range(size):
        is_first = (i + 1) * len(first) // size > i * len(first) // size
        order.append(next(parts[0] if is_first else parts[1]))
    return order
