"""Estimates from samples: pass@k, bootstrap intervals, and an exact test of paired differences.

    pass@k = mean over problems of 1 - C(n - c, k) / C(n, k)      n samples, c of them right (arXiv 2107.03374)

The estimator is unbiased for every k <= n. An interval of one model resamples *problems*, since samples of one problem
are not independent. Of several runs that answer the same problems, Y[s, i] is pass@k of the run of seed s on problem i,
S seeds and P problems; both are a draw from many:

    mean        m(Y) = 1/(S P) Σ_s Σ_i Y[s, i]
    interval    S seeds s' and P problems i' drawn with replacement, each by itself: the 2.5% and 97.5% quantiles of
                1/(S P) Σ_s' Σ_i' Y[s', i']             (the pigeonhole bootstrap: Owen, Ann. Appl. Stat. 1(2), 2007)
    difference  mean and interval of D = Y - Y_first, seed by seed and problem by problem
    p           d_s = mean of D[s, :]; the share of the 2^S sign vectors ε with |Σ_s ε_s d_s| >= |Σ_s d_s|

The test is exact where a seed's difference is as likely to be -d as d if the variants are alike; p is two-sided and at
least 2 / 2^S. A bootstrap of S seeds has the variance of their mean times (S - 1) / S: with few seeds its intervals are
too narrow, and with one they speak of the problems alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, isnan

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95% interval; NaN where there is nothing to take it of."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "–" if isnan(self.value) else f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n samples, drawn without putting back, hold one of the `right` ones."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, there are {n}")
    return 1 - comb(n - right, k) / comb(n, k)


def estimate(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Sum of values / sum of weights, 1 each by default, with a 95% percentile-bootstrap interval over problems."""
    above, below = np.asarray(values), np.ones(len(values)) if weights is None else np.asarray(weights)
    if not below.any():
        return Estimate(np.nan, np.nan, np.nan)
    drawn = np.random.default_rng(0).integers(len(above), size=(RESAMPLES, len(above)))
    with np.errstate(invalid="ignore"):  # 0 / 0 where only problems without weight were drawn
        low, high = np.nanquantile(above[drawn].sum(axis=1) / below[drawn].sum(axis=1), [0.025, 0.975])
    return Estimate(float(above.sum() / below.sum()), float(low), float(high))


def powers_of_two(n: int) -> tuple[int, ...]:
    """1, 2, 4 … up to n."""
    return tuple(2**power for power in range(n.bit_length()))


def interval(values: np.ndarray) -> Estimate:
    """Mean of (S, P) values, of S seeds on P problems, and its 95% interval."""
    rng = np.random.default_rng(0)
    seeds, problems = (rng.multinomial(size, np.full(size, 1 / size), RESAMPLES) for size in values.shape)
    means = (seeds @ values * problems).sum(axis=1) / values.size
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p of the exact test that flips the signs of (S,) differences in all 2^S ways."""
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-12))  # sums[0] itself, however it rounds
