r"""Shuffle-R1: which completions of a group are trained on, and how often a step takes them (arXiv 2508.05612).

Pairwise trajectory sampling. The 2N advantages of a group, sorted downwards, make N pairs, the best with the worst:

    (A_1, A_2N), (A_2, A_2N−1), …, (A_N, A_N+1)          of which the first α N are trained on

Advantage-based batch shuffle. Over all pairs of a step, W = |A| + |A'| of a pair and Φ = W / Σ W. S sub-batches,
together as large as the step, are drawn one after the other, each by Φ without replacement within itself: a pair may
come in several of them. A group of equals has W = 0 and is never drawn.
"""

from collections.abc import Sequence

import numpy as np


def paired(advantages: Sequence[float]) -> list[tuple[int, int]]:
    """The pairs of a group with these advantages (2N), as places in it, with the widest pair first.

    Equal advantages keep their order, so that ranks agree on the pairs. Raises ValueError for an odd number.
    """
    if len(advantages) % 2:
        raise ValueError(f"{len(advantages)} completions can't be paired: their number must be even.")
    order = sorted(range(len(advantages)), key=lambda i: -advantages[i])
    half = len(order) // 2
    return list(zip(order[:half], order[: half - 1 : -1], strict=True))


def pair_count(size: int, share: float) -> int:
    """How many of the pairs of a group of `size` completions make up this share of them, rounded."""
    return round(share * (size // 2))


def kept_by_pairs(advantages: Sequence[float], share: float) -> tuple[bool, ...]:
    """Which completions (2N) of a group are in the first `share` of its pairs."""
    kept = {i for pair in paired(advantages)[: pair_count(len(advantages), share)] for i in pair}
    return tuple(i in kept for i in range(len(advantages)))


def drawn_pairs(weights: Sequence[float], parts: int, rng: np.random.Generator) -> list[int]:
    """Numbers of pairs with these weights W (P) in the order of `parts` sub-batches, which are P pairs together.

    Ours: where fewer than a sub-batch's size have a weight, it is those, each once, since others would train nothing.
    """
    count, found = len(weights), []
    chances = np.asarray(weights, dtype=np.float64)
    drawable = int(np.count_nonzero(chances))
    for part in range(parts):
        size = min(count * (part + 1) // parts - count * part // parts, drawable)
        if size:
            found += rng.choice(count, size, replace=False, p=chances / chances.sum()).tolist()
    return found
