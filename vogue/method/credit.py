r"""What each token's advantage is multiplied by, from how much the image matters to it: S = KL(π(·|x)‖π(·|T(x))).

vppo  m_i,t = α_i [S_i,t is among the ⌈k L_i⌉ largest of completion i]                    arXiv 2510.09285
      α_i   = β_min + (β_max − β_min) (S̄_i − min S̄) / (max S̄ − min S̄),  S̄_i = mean_t S_i,t
      β_max = β_min + (1 − β_min) / mean of that fraction, so that the mean of α is 1; all 1 where all S̄ are equal
pgpo  I     = (log(1 + S) − min) / (max − min) in the completion                          arXiv 2604.01840
      m     = I / τ where I ≤ τ, else 1 + β (I − τ) / (1 − τ); scaled so that its sum is L_i

Means, least and largest values of `vppo` are over all completions of an update that send a gradient, of all ranks; its
authors' code takes those of a micro-batch, so that packing changes them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gather = Callable[[list], list[list]]  # what every rank gives, on all ranks


def token_factors(
    dependences: Sequence[Tensor],
    gather: Gather,
    kind: str,
    *,
    tokens: float = 0.4,
    floor: float = 0.9,
    divisor: str = "all",
    threshold: float = 0.4,
    boost: float = 2.0,
) -> list[Tensor]:
    """What the tokens' advantages are multiplied by, in each of this rank's completions of an update.

    dependences       S (T,) of each completion's tokens
    kind              "vppo", with k = `tokens`, β_min = `floor`, or "pgpo", with τ = `threshold`, β = `boost`
    divisor           "kept": times all tokens / those that vppo keeps, for a loss that is divided by all of them

    All ranks call it.
    """
    if kind == "pgpo":
        return [pgpo_factors(s, threshold, boost) for s in dependences]
    means = [float(s.double().mean()) for s in dependences]
    kept = [kept_tokens(s, tokens) for s in dependences]
    counts = [(len(mask), int(mask.sum())) for mask in kept]
    everyone = [found for part in gather(list(zip(means, counts, strict=True))) for found in part]
    if not everyone:
        return []
    scale = 1.0
    if divisor == "kept":
        scale = sum(count for _, (count, _) in everyone) / sum(count for _, (_, count) in everyone)
    alphas = completion_factors(means, floor, [mean for mean, _ in everyone])
    return [scale * alpha * mask for alpha, mask in zip(alphas, kept, strict=True)]


def kept_tokens(dependence: Tensor, share: float) -> Tensor:
    """Which of a completion's tokens (T,) bool are the ⌈share T⌉ of largest S; among equals the first ones."""
    count = _ceil(share * len(dependence))
    order = torch.sort(dependence, descending=True, stable=True).indices
    kept = torch.zeros_like(dependence, dtype=torch.bool)
    kept[order[:count]] = True
    return kept


def completion_factors(means: Sequence[float], least: float, everyone: Sequence[float]) -> list[float]:
    """α of completions with these S̄ among `everyone`'s, those of the whole update.

    The order of `everyone` changes no bit, so that ranks and packing don't.
    """
    known = sorted(everyone)
    low, high = known[0], known[-1]
    if high == low:
        return [1.0] * len(means)
    average = sum((value - low) / (high - low) for value in known) / len(known)
    most = least + (1 - least) / average
    return [least + (most - least) * (value - low) / (high - low) for value in means]


def pgpo_factors(dependence: Tensor, threshold: float, boost: float) -> Tensor:
    """m (T,) of a completion's tokens with S (T,) ≥ 0; all 1 where all S are equal."""
    scale = dependence.clamp(min=0).log1p()
    low, high = scale.min(), scale.max()
    if low == high:
        return torch.ones_like(dependence)
    inner = (scale - low) / (high - low)
    found = torch.where(inner <= threshold, inner / threshold, 1 + boost * (inner - threshold) / (1 - threshold))
    return found * (len(found) / found.sum())


def _ceil(value: float) -> int:
    """The least integer that isn't below, but for rounding: 0.4 · 5 is 2 tokens."""
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 else int(value) + 1
