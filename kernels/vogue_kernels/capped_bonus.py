"""VOGUE's bonuses (arXiv 2510.01444): what a token gains where the policy is unsure, and where the image decides.

    g_out = min(|A| / β_out, α_out u_out)        u_out = H(π)                          every token
    g_per = min(|A| / β_per, α_per u_per)        u_per = ½ (KL(p‖q) + KL(q‖p))         tokens that the draw z pays it to
    Â     = A + g_out + z g_per                  uncertainties are stop-gradient

p = π(·|x) looks at the image, q = π(·|x') at its perturbed copy. Tensors are per token, of any one shape, float32. A
bonus is never negative, and 0 where A is; with both β = 2 a negative advantage rises to 0 at most and a positive one at
most doubles.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .surrogates import one_of

ORDERS = ("parallel", "sequential")


@dataclass(frozen=True)
class GuidanceConfig:
    """Scale α (advantage per nat) and cap divisor β of both guidance signals; α = 0 switches a signal off.

    order: "parallel" caps both by |A| (the paper's), "sequential" caps g_out by |A + g_per| (the authors' code's).
    """

    alpha_out: float = 0.4
    beta_out: float = 2.0
    alpha_per: float = 1.0
    beta_per: float = 2.0
    order: str = "parallel"

    def __post_init__(self):
        one_of("order", self.order, ORDERS)
        for name in ("alpha_out", "alpha_per"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta_out", "beta_per"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


PAPER = GuidanceConfig()


class ShapedAdvantage(NamedTuple):
    advantage: Tensor  # Â
    out_capped: Tensor  # bool: the cap of g_out binds
    per_capped: Tensor  # bool: the cap of g_per binds; False where it isn't paid


def guidance(advantage: Tensor, uncertainty: Tensor, alpha: float, beta: float) -> Tensor:
    """The bonus of one uncertainty u: min(|A| / β, α · stopgrad(u))."""
    return torch.minimum(advantage.abs() / beta, alpha * uncertainty.detach())


def shaped_advantage(
    advantage: Tensor,
    entropy: Tensor,
    perception: Tensor | None,
    paid: Tensor,
    config: GuidanceConfig,
    sign: float = 1.0,
) -> ShapedAdvantage:
    """The advantage with both bonuses: Â = A + g_out + z · sign · g_per.

    advantage, paid (z, bool): anything that broadcasts to entropy's shape. entropy, perception: u_out and u_per in
    nats; perception may be None where g_per is paid nowhere or alpha_per is 0. sign: from 1, which rewards tokens that
    the perturbation changes, to -1, which rewards those that it leaves alone. Raises ValueError where perception is
    None but needed.
    """
    advantage = advantage.expand_as(entropy)
    if perception is not None:
        per = torch.where(paid, sign * guidance(advantage, perception, config.alpha_per, config.beta_per), 0.0)
        per_capped = paid & (config.alpha_per * perception.detach() > advantage.abs() / config.beta_per)
    elif config.alpha_per > 0 and paid.any():
        raise ValueError("tokens that g_per is paid to need their perception uncertainty; pass it, or set alpha_per=0")
    else:
        per, per_capped = torch.zeros_like(advantage), torch.zeros_like(advantage, dtype=torch.bool)
    capping = advantage + per if config.order == "sequential" else advantage
    out = guidance(capping, entropy, config.alpha_out, config.beta_out)
    out_capped = config.alpha_out * entropy.detach() > capping.abs() / config.beta_out
    return ShapedAdvantage(advantage + out + per, out_capped, per_capped)
