"""VOGUE's loss (arXiv 2510.01444): guidance signals, shaped advantage, clipped surrogate, aggregation.

    g_out = min(|A| / β_out, α_out u_out)        u_out = H(π)                          every token
    g_per = min(|A| / β_per, α_per u_per)        u_per = ½ (KL(p‖q) + KL(q‖p))         tokens of the noisy branch
    Â     = A + g_out + [noisy] g_per            uncertainties are stop-gradient
    loss  = Σ_t w_t · −min(r_t Â_t, clip(r_t, 1 − ε_low, 1 + ε_high) Â_t)              r = π / π_old

Tensors are per token, of any one shape, float32. A bonus is never negative, and 0 where A is; with both β = 2 a
negative advantage rises to 0 at most and a positive one at most doubles.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .operator import IGNORE, linear_branch_stats, linear_logprob

AGGREGATIONS = ("token-mean", "sequence-mean")

# Results of linear_branch_stats(other, behaviour), read of noisy tokens, whose other branch is the raw one.
DIVERGENCES = {"symmetric": "symmetric_kl", "forward": "kl_raw_noisy", "reverse": "kl_noisy_raw"}


@dataclass(frozen=True)
class GuidanceConfig:
    """Scale α (advantage per nat) and cap divisor β of both guidance signals; α = 0 switches a signal off."""

    alpha_out: float = 0.4
    beta_out: float = 2.0
    alpha_per: float = 1.0
    beta_per: float = 2.0

    def __post_init__(self):
        for name in ("alpha_out", "alpha_per"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta_out", "beta_per"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class ShapedAdvantage(NamedTuple):
    advantage: Tensor  # Â
    out_capped: Tensor  # bool: the cap |A| / β_out binds
    per_capped: Tensor  # bool: the cap |A| / β_per binds; False off the noisy branch


def guidance(advantage: Tensor, uncertainty: Tensor, alpha: float, beta: float) -> Tensor:
    """min(|A| / β, α · stopgrad(u))."""
    return torch.minimum(advantage.abs() / beta, alpha * uncertainty.detach())


def shaped_advantage(
    advantage: Tensor, entropy: Tensor, perception: Tensor | None, noisy: Tensor, config: GuidanceConfig
) -> ShapedAdvantage:
    """Â = A + g_out + [noisy] g_per.

    advantage, noisy (bool): anything that broadcasts to entropy's shape. entropy, perception: u_out and u_per in nats;
    perception may be None where no token is noisy or alpha_per is 0. Raises ValueError if it's None but needed.
    """
    advantage = advantage.expand_as(entropy)
    out = guidance(advantage, entropy, config.alpha_out, config.beta_out)
    out_capped = config.alpha_out * entropy.detach() > advantage.abs() / config.beta_out
    if perception is None:
        if config.alpha_per > 0 and noisy.any():
            raise ValueError("noisy tokens need their perception uncertainty; pass it, or set alpha_per to 0")
        return ShapedAdvantage(advantage + out, out_capped, torch.zeros_like(out_capped))
    per = torch.where(noisy, guidance(advantage, perception, config.alpha_per, config.beta_per), 0.0)
    per_capped = noisy & (config.alpha_per * perception.detach() > advantage.abs() / config.beta_per)
    return ShapedAdvantage(advantage + out + per, out_capped, per_capped)


def clipped_surrogate(
    logprob: Tensor, old_logprob: Tensor | None, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """(−min(r A, clip(r, 1 − clip_low, 1 + clip_high) A), whether the clipped term is the one taken), per token.

    r = exp(logprob − old_logprob); old_logprob None means the policy that generated is the one trained: r is exactly 1
    and its gradient that of the log-probability.
    """
    old_logprob = logprob.detach() if old_logprob is None else old_logprob
    ratio = (logprob - old_logprob).exp()
    surrogate = ratio * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    return -torch.minimum(surrogate, clipped), clipped.detach() < surrogate.detach()


def token_weights(lengths: Tensor, how: str) -> Tensor:
    """The weight of one token of each sequence, so that the loss is Σ weight · per-token loss.

    lengths: (S,) tokens counted in each sequence of the whole global batch, over all micro-batches and ranks; returns
    (S,) float32, to be indexed by each token's sequence. Any split of the tokens then sums to the same loss.

    "token-mean": 1 / Σ lengths. "sequence-mean": 1 / (S' lengths), the mean over the S' sequences that have a token of
    each one's token mean. A sequence without tokens weighs 0. Raises ValueError for another `how`.
    """
    lengths = lengths.float()
    if how == "token-mean":
        weights = 1 / lengths.sum().clamp(min=1).expand_as(lengths)
    elif how == "sequence-mean":
        weights = 1 / (lengths.clamp(min=1) * (lengths > 0).sum().clamp(min=1))
    else:
        raise ValueError(f"unknown aggregation {how!r}: choose one of {', '.join(AGGREGATIONS)}")
    return torch.where(lengths > 0, weights, 0.0)


class VogueLoss(nn.Module):
    """VOGUE's loss from hidden states and the output head's weight, for any trainer.

    guidance: GuidanceConfig. clip_low, clip_high: ε on both sides of the ratio 1 (the paper gives none; these are
    PPO's). temperature: the one the completions were sampled at. aggregation: as in `token_weights`.
    divergence: "symmetric" (the paper's), "forward" KL(raw‖noisy) or "reverse" KL(noisy‖raw).
    backend: as in `linear_branch_stats`. Raises ValueError for an unknown aggregation or divergence.
    """

    def __init__(
        self,
        guidance: GuidanceConfig = GuidanceConfig(),
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        temperature: float = 1.0,
        aggregation: str = "token-mean",
        divergence: str = "symmetric",
        backend: str = "auto",
    ):
        super().__init__()
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"unknown aggregation {aggregation!r}: choose one of {', '.join(AGGREGATIONS)}")
        if divergence not in DIVERGENCES:
            raise ValueError(f"unknown divergence {divergence!r}: choose one of {', '.join(DIVERGENCES)}")
        self.guidance = guidance
        self.clip_low, self.clip_high = clip_low, clip_high
        self.temperature = temperature
        self.aggregation = aggregation
        self.divergence = divergence
        self.backend = backend

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        advantages: Tensor,
        *,
        old_logprob: Tensor | None = None,
        mask: Tensor | None = None,
        hidden_other: Tensor | None = None,
        noisy: bool | Tensor | None = None,
        bias: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (the loss, a dict of detached scalars).

        hidden: (N, D), the branch that generated, which gets the gradient. weight: (V, D). targets: (N,) int64, -100 to
        skip. advantages: (N,) or broadcastable. old_logprob: (N,), None for a ratio of 1. mask: (N,) bool, False to
        skip. hidden_other: (N, D), the other branch, which gets none; needed where a token is noisy. noisy: which
        tokens were generated from the noisy image, for all or for each. bias: (V,). sequence_ids: (N,) int64 in [0, S),
        needed for "sequence-mean".

        Metrics, over the tokens not skipped: entropy (nats), clip_fraction, out_capped, ratio_mean, ratio_max; over the
        noisy ones of them: u_per (nats), per_capped. Without such a token they are 0.

        Raises ValueError for a missing hidden_other or sequence_ids, and what the operators raise.
        """
        kept = targets != IGNORE
        if mask is not None:
            kept = kept & mask.bool()
        noisy = torch.as_tensor(bool(noisy) if noisy is None else noisy, device=targets.device).expand_as(kept) & kept
        logprob, entropy, perception = self._statistics(
            hidden, hidden_other, weight, targets.masked_fill(~kept, IGNORE), bias, noisy
        )
        shaped = shaped_advantage(advantages.detach(), entropy, perception, noisy, self.guidance)
        if old_logprob is not None:  # a skipped position may hold anything, NaN too
            old_logprob = torch.where(kept, old_logprob, logprob).detach()
        per_token, clipped = clipped_surrogate(logprob, old_logprob, shaped.advantage, self.clip_low, self.clip_high)
        weights = self._weights(kept, sequence_ids)
        loss = (weights * torch.where(kept, per_token, 0.0)).sum()

        ratio = torch.ones_like(logprob) if old_logprob is None else (logprob.detach() - old_logprob).exp()
        metrics = {
            "entropy": _mean(entropy, kept),
            "u_per": _mean(torch.zeros_like(entropy) if perception is None else perception, noisy),
            "clip_fraction": _mean(clipped, kept),
            "out_capped": _mean(shaped.out_capped, kept),
            "per_capped": _mean(shaped.per_capped, noisy),
            "ratio_mean": _mean(ratio, kept),
            "ratio_max": torch.where(kept, ratio, 0.0).amax(),
        }
        return loss, metrics

    def _statistics(self, hidden, hidden_other, weight, targets, bias, noisy):
        """(logprob, entropy, u_per or None) of the behaviour branch; the other branch is read only if it's needed."""
        if self.guidance.alpha_per == 0 or not noisy.any():
            stats = linear_logprob(hidden, weight, targets, bias, self.temperature, self.backend)
            return stats.logprob, stats.entropy.detach(), None
        if hidden_other is None:
            raise ValueError("noisy tokens need hidden_other, the hidden states of the raw branch")
        stats = linear_branch_stats(
            hidden_other.detach(), hidden, weight, targets, bias, self.temperature, self.backend
        )
        perception = getattr(stats, DIVERGENCES[self.divergence])
        return stats.logprob_noisy, stats.entropy_noisy.detach(), perception.detach()

    def _weights(self, kept, sequence_ids):
        if self.aggregation == "token-mean":
            return token_weights(kept.sum().unsqueeze(0), "token-mean")
        if sequence_ids is None:
            raise ValueError("sequence-mean needs sequence_ids")
        return token_weights(torch.bincount(sequence_ids, weights=kept.float()), "sequence-mean")[sequence_ids]


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values.detach().float(), 0.0).sum() / where.sum().clamp(min=1)
