r"""Advantages of a group's responses against each other, without a value model.

group    A_i = (r_i − mean(r)) / (std(r) + ε)                    GRPO, arXiv 2402.03300
         A_i = r_i − mean(r)                                     the same unscaled: Dr. GRPO, arXiv 2503.20783
         A_i = (r_i − mean(r)) / (std of all groups' r + ε)      the same over one std a step: arXiv 2508.08221
rloo     A_i = r_i − mean(r_j, j ≠ i)                            REINFORCE leave-one-out, arXiv 2402.14740
passk    R = 1 − C(N⁻, k) / C(N, k),   s = √(R (1 − R))          Pass@k Training, arXiv 2508.10751
         A⁺ = (1 − R) / s                                        right responses
         A⁻ = (1 − R − C(N⁻ − 1, k − 1) / C(N − 1, k − 1)) / s   the N⁻ wrong ones of N

over a completion's tokens t of L: A_t = A (1 + λ (2 t / (L − 1) − 1)²)      AVATAR's shape, arXiv 2508.03100
"""

from collections.abc import Iterable
from math import comb, sqrt

import torch
from torch import Tensor

EPS = 1e-6  # ε, which a std is never less than


def group_advantages(rewards: Tensor, *, scaled: bool = True) -> Tensor:
    """GRPO's advantages (P, G) of the rewards (P, G) of P groups of G responses; exactly 0 in a group of equals.

    Not `scaled`, they aren't divided by the std, which weighs groups of nearly equal rewards up (Dr. GRPO).

    std is the sample one (divided by G − 1). The papers only say "std"; TRL, verl and EasyR1,
    from whose runs the published settings come, all take torch.std's default, and at G = 5 the
    population's would make every advantage 12% larger.

    Raises ValueError for groups of fewer than two and for a reward that is not finite.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; they must be (P, G) with G ≥ 2.")
    if not rewards.isfinite().all():
        group, response = (~rewards.isfinite()).nonzero()[0].tolist()
        value = rewards[group, response].item()
        raise ValueError(f"the reward of response {response} in group {group} is {value}.")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scaled:
        advantages = over(advantages, rewards.std(dim=1, keepdim=True))
    # The mean of equal rewards may differ from them in the last bit.
    return advantages.where(mixed(rewards)[:, None], 0)


def over(advantages: Tensor, std: Tensor | float) -> Tensor:
    """Unscaled advantages over a standard deviation of rewards."""
    return advantages / (std + EPS)


def deviation(rewards: Iterable[float]) -> float:
    """The sample standard deviation of two or more rewards, to the last bit the same in whatever order they come."""
    return float(torch.tensor(sorted(rewards), dtype=torch.float64).std())


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Each reward (P, G) without the mean of the others of its group: G / (G − 1) times its deviation from all's mean.

    Raises ValueError as `group_advantages` does.
    """
    return group_advantages(rewards, scaled=False) * (rewards.shape[1] / (rewards.shape[1] - 1))


def passk_advantages(right: Tensor, k: int) -> Tensor:
    """Advantages (P, G) float32 of right (P, G) bool, by the reward 1 of every k responses with a right one among them.

    A response's is the mean over all the k-subsets that hold it, each standardised over all C(G, k). 0 where each
    subset earns the same: in a group all right or all wrong, and in one with fewer than k wrong responses.

    Raises ValueError unless 1 ≤ k ≤ G.
    """
    size = right.shape[1]
    if not 1 <= k <= size:
        raise ValueError(f"k is {k}; it must be from 1 to the {size} responses of a group.")
    return torch.stack([_passk(row, size, k) for row in right])


def _passk(right: Tensor, size: int, k: int) -> Tensor:
    wrong = size - int(right.sum())
    mean = 1 - comb(wrong, k) / comb(size, k)
    if not 0 < mean < 1:
        return torch.zeros(size)
    fails = comb(wrong - 1, k - 1) / comb(size - 1, k - 1)  # of the subsets that hold a given wrong response
    return torch.where(right, 1 - mean, 1 - mean - fails) / sqrt(mean * (1 - mean))


def over_tokens(advantage: float, length: int, shape: float) -> Tensor:
    """A completion's advantage at each of its `length` ≥ 1 tokens (T,) float32, larger at its beginning and its end.

    The weight is 1 + `shape` at both ends and 1 in the middle (AVATAR's temporal advantage shaping, λ = `shape`), so
    that a step is larger by 1 + λ / 3. A single token is an end (ours). A shape of 0 leaves the advantage as it is.
    """
    advantages = torch.full((length,), advantage, dtype=torch.float32)
    if shape == 0:
        return advantages
    place = torch.linspace(-1, 1, length) if length > 1 else torch.ones(1)
    return advantages * (1 + shape * place**2)


def mixed(rewards: Tensor) -> Tensor:
    """Which groups (P,) bool of scores (P, G) are not all equal, so that they carry a gradient.

    DAPO's dynamic sampling (arXiv 2503.14476) keeps these groups, and judges them by accuracy alone.
    """
    return rewards.amax(dim=1) != rewards.amin(dim=1)
