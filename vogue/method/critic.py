r"""CDE's critic (arXiv 2509.09675): K value heads V_1 … V_K, whose mean is the baseline and whose spread is a bonus.

    V̄_t = mean_j V_j(q, o_<t)                          the state before token t, of T
    δ_t = r_t + γ V̄_{t+1} − V̄_t                        r_t = 0 but for the last token's, V̄ after which is 0
    Ã_t = Σ_l (γλ)^l δ_{t+l}                           generalised advantages (arXiv 1506.02438)
    A_t = Ã_t + ω min(|Ã_t| / κ, α std_j V_j(q, o_≤t))   the state after token t; no bonus at the last one

std is the population's. A head learns the completion's reward at each prefix that it gets, a share ζ of all:

    L = 1 / (K ζ Σ_i T_i) Σ_j Σ_{(i, t) of j} (V_j(q_i, o_i,<t) − r_i)²
"""

import numpy as np
import torch
from torch import Tensor


def generalised_advantages(values: Tensor, reward: float, gamma: float, lam: float) -> Tensor:
    """Ã (T,) of a completion that earned `reward`, from V̄ (T,) of the states before its tokens; λ is `lam`."""
    after = torch.cat([values[1:], values.new_zeros(1)])
    deltas = gamma * after - values
    deltas[-1] += reward
    found, ahead = torch.empty_like(deltas), deltas.new_zeros(())
    for t in range(len(deltas) - 1, -1, -1):
        ahead = deltas[t] + gamma * lam * ahead
        found[t] = ahead
    return found


def curious_advantages(
    values: Tensor, reward: float, *, gamma: float, lam: float, weight: float, alpha: float, cap: float
) -> Tensor:
    """A (T,) of a completion from its heads' values (T, K); ω is `weight`, κ `cap`."""
    plain = generalised_advantages(values.mean(dim=1), reward, gamma, lam)
    spread = values.std(dim=1, correction=0)
    after = torch.cat([spread[1:], spread.new_zeros(1)])
    return plain + weight * torch.minimum(plain.abs() / cap, alpha * after)


def prefixes_of_a_head(length: int, share: float) -> int:
    """Of how many of a completion's prefixes each head learns: the share ζ, rounded, and one at least."""
    return max(1, round(share * length))


def dealt_prefixes(length: int, heads: int, share: float, generator: np.random.Generator) -> Tensor:
    """Which head (T, K) bool learns of which prefix: each of as many, drawn without replacement."""
    count, dealt = prefixes_of_a_head(length, share), torch.zeros(length, heads, dtype=torch.bool)
    for head in range(heads):
        dealt[torch.from_numpy(generator.permutation(length)[:count]), head] = True
    return dealt


def value_loss(values: Tensor, rewards: Tensor, dealt: Tensor) -> Tensor:
    """Σ (V_j − r)² () over the prefixes `dealt` (N, K) bool to each head, of `values` (N, K) and `rewards` (N,)."""
    return (dealt * (values - rewards[:, None]).square()).sum()
