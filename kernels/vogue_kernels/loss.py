"""VOGUE's loss (arXiv 2510.01444): guidance signals, shaped advantage, surrogate, aggregation.

    Â     = A + g_out + z g_per                  `capped_bonus.py`
    loss  = Σ_t w_t · −min(r_t Â_t, clip(r_t, 1 − ε_low, 1 + ε_high) Â_t)              r = π / π_old

`surrogates.py` has that last one, others that may take its place, and what corrects for the engine's probabilities.

p = π(·|x) looks at the image, q = π(·|x') at its perturbed copy. There are two readings of z = 1. In the paper's
Algorithm 1 ("drawn") such a completion is generated from x' and trained on it. In the authors' code ("raw") every
completion is generated from x and trained on it, and x' serves to measure u_per alone.

Tensors are per token, of any one shape, float32. A bonus is never negative, and 0 where A is; with both β = 2 a
negative advantage rises to 0 at most and a positive one at most doubles.
"""

import torch
from torch import Tensor, nn

from .capped_bonus import PAPER, GuidanceConfig, shaped_advantage
from .operator import IGNORE, linear_branch_stats, linear_logprob
from .surrogates import (
    CorrectionConfig,
    Sequences,
    SurrogateConfig,
    engine_correction,
    one_of,
    policy_loss,
    ratio_of,
)

AGGREGATIONS = ("token-mean", "sequence-mean", "constant")
ROLLOUTS = ("raw", "drawn")
ENTROPIES = ("trained", "drawn")

# What `linear_branch_stats` calls them.
DIVERGENCES = {"symmetric": "symmetric_kl", "forward": "kl_pq", "reverse": "kl_qp"}


def token_weights(
    lengths: Tensor, how: str, num_items: Tensor | float | None = None, max_tokens: int | None = None
) -> Tensor:
    """The weight of one token of each sequence, so that the loss is Σ weight · per-token loss.

    lengths: (S,) tokens counted in each sequence; returns (S,) float32, to be indexed by each token's sequence.

    "token-mean": 1 / num_items, by default Σ lengths. "sequence-mean": the mean of each sequence's token mean, that is
    1 / (num_items · lengths), by default the number of sequences that have a token. "constant": 1 / (num_items ·
    max_tokens), of the same number, with the most tokens that a sequence may have (Dr. GRPO, arXiv 2503.20783). A
    sequence without tokens weighs 0.

    num_items: a number or a () tensor. Without it `lengths` has to hold the whole global batch, of all micro-batches
    and ranks. With it, any part of that batch does, and the parts' losses sum to the loss of the whole.

    Raises ValueError for another `how`, where num_items is negative or NaN, and for "constant" without max_tokens.
    """
    one_of("aggregation", how, AGGREGATIONS)
    lengths = lengths.float()
    if num_items is None:
        num_items = lengths.sum() if how == "token-mean" else (lengths > 0).sum()
    elif not num_items >= 0:
        raise ValueError(f"the number of items of the batch must not be negative, got {num_items}")
    weights = 1 / torch.as_tensor(num_items, device=lengths.device).clamp(min=1)  # 0 of them: all weigh 0 below
    weights = weights.expand_as(lengths)
    if how == "sequence-mean":
        weights = weights / lengths.clamp(min=1)
    if how == "constant":
        weights = weights / _most_tokens(max_tokens)
    return torch.where(lengths > 0, weights, 0.0)


def _most_tokens(max_tokens: int | None) -> int:
    if max_tokens is None or not max_tokens >= 1:
        raise ValueError(f"aggregation=constant divides by the most tokens of a sequence, but max_tokens={max_tokens}")
    return max_tokens


class VogueLoss(nn.Module):
    """VOGUE's loss from hidden states and the output head's weight, for any trainer.

    guidance: GuidanceConfig. clip_low, clip_high: ε on both sides of the ratio 1 (the paper gives none; these are
    PPO's). kind, clip_dual, importance_level, sapo_temperature_pos, sapo_temperature_neg: as in `SurrogateConfig`, and
    importance_cap, importance_floor, importance_mode as in `CorrectionConfig`. temperature: the one the completions
    were sampled at. aggregation, max_tokens: as in `token_weights`. divergence: "symmetric" (the paper's), "forward"
    KL(raw‖noisy) or "reverse" KL(noisy‖raw). rollout: the branch that tokens with z = 1 were generated from and are
    trained on, "drawn" (noisy, Algorithm 1's) or "raw" (the authors' code's). entropy: u_out of the branch that is
    "trained", or "drawn", that of the noisy one where z = 1. backend, softcap, keep_logits_bytes: as in
    `linear_branch_stats`; the trained branch's logits are what is kept. Raises ValueError for an unknown name and for
    what those configurations refuse.
    """

    def __init__(
        self,
        guidance: GuidanceConfig = PAPER,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        temperature: float = 1.0,
        aggregation: str = "token-mean",
        divergence: str = "symmetric",
        backend: str = "auto",
        *,
        rollout: str = "raw",
        entropy: str = "trained",
        kind: str = "ppo",
        clip_dual: float | None = None,
        importance_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        importance_cap: float | None = None,
        importance_floor: float | None = None,
        importance_mode: str = "token_truncate",
        max_tokens: int | None = None,
        softcap: float | None = None,
        keep_logits_bytes: int = 0,
    ):
        super().__init__()
        one_of("aggregation", aggregation, AGGREGATIONS)
        one_of("divergence", divergence, DIVERGENCES)
        one_of("rollout", rollout, ROLLOUTS)
        one_of("entropy", entropy, ENTROPIES)
        if aggregation == "constant":
            _most_tokens(max_tokens)
        self.guidance = guidance
        self.surrogate = SurrogateConfig(
            kind, clip_low, clip_high, clip_dual, importance_level, sapo_temperature_pos, sapo_temperature_neg
        )
        self.correction = CorrectionConfig(importance_cap, importance_floor, importance_mode)
        self.temperature, self.softcap = temperature, softcap
        self.aggregation, self.max_tokens = aggregation, max_tokens
        self.divergence = divergence
        self.rollout, self.entropy = rollout, entropy
        self.backend, self.keep_logits_bytes = backend, keep_logits_bytes

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        advantages: Tensor,
        *,
        old_logprob: Tensor | None = None,
        engine_logprob: Tensor | None = None,
        mask: Tensor | None = None,
        hidden_other: Tensor | None = None,
        noisy: bool | Tensor | None = None,
        bias: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (the loss, a dict of detached scalars).

        Tokens may be packed in one row, (N,), or padded, (B, T): what is (N,) below is of either shape.

        hidden: (N, D), the branch that generated, which gets the gradient. weight: (V, D). targets: (N,) int64, -100 to
        skip. advantages: (N,) or broadcastable to it, as (B, 1). old_logprob: (N,), None for a ratio of 1.
        engine_logprob: (N,), by the engine that sampled, NaN where unknown; needed with importance_cap or _floor. mask:
        (N,) bool, False to skip. hidden_other: (N, D), the other branch, which gets none; needed where z is 1. noisy:
        the draw z of all tokens or of each; `rollout` says what it decides. bias: (V,). sequence_ids: (N,) int64 in
        [0, S), needed where packed tokens are to be told apart by their sequence: "sequence-mean", "constant",
        importance_level="sequence" and the modes of whole sequences; of padded ones each row is a sequence.

        num_items_in_batch: what the loss is divided by: for "token-mean" a number of tokens, else one of sequences.
        None counts those of this call, which is right only where it has the whole global batch. With the global batch's
        number, the losses of its micro-batches, on all ranks, sum to the loss of the whole; multiply them by what the
        trainer divides by (ranks, for gradients averaged over them). It is also how other means are chosen:
        "sequence-mean" over all S counts the sequences that are wholly masked, as TRL's "grpo" does, and "token-mean"
        over S × max_tokens is "constant" over S.

        Metrics, over the tokens not skipped: entropy (nats, u_out), clip_fraction, out_capped, ratio_mean, ratio_max
        (of tokens, whatever importance_level is), and importance_outside where the engine is corrected for; over those
        of them with z = 1: u_per (nats), per_capped. Without such a token they are 0.

        Raises ValueError for a missing hidden_other, sequence_ids or engine_logprob, an engine_logprob that nothing
        reads, a shape that doesn't fit, and what the operators and `token_weights` raise.
        """
        kept = targets != IGNORE
        if mask is not None:
            kept = kept & _per_token("mask", mask.bool(), targets)
        noisy = torch.as_tensor(bool(noisy) if noisy is None else noisy, device=targets.device)
        noisy = _per_token("noisy", noisy, targets) & kept
        logprob, entropy, perception = self._statistics(
            hidden, hidden_other, weight, targets.masked_fill(~kept, IGNORE), bias, noisy
        )
        advantages = _per_token("advantages", advantages.detach(), targets)
        shaped = shaped_advantage(advantages, entropy, perception, noisy, self.guidance)
        if old_logprob is not None:  # a skipped position may hold anything, NaN too
            old_logprob = torch.where(kept, _per_token("old_logprob", old_logprob, targets), logprob).detach()
        sequences = self._sequences(kept, sequence_ids)
        per_token, clipped = policy_loss(logprob, old_logprob, shaped.advantage, self.surrogate, sequences)
        generated = logprob.detach() if old_logprob is None else old_logprob
        metrics = {}
        if self.correction.on or engine_logprob is not None:
            correction, outside = self._correction(generated, engine_logprob, kept, sequences)
            per_token = per_token * correction
            metrics["importance_outside"] = _mean(outside, kept)
        weights = self._weights(kept, sequences, num_items_in_batch)
        loss = (weights * torch.where(kept, per_token, 0.0)).sum()

        ratio = ratio_of(logprob.detach(), generated)
        metrics |= {
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
        """(logprob, u_out, u_per or None) of the trained branch; the other one is read only where it's needed."""
        rest = weight, targets, bias, self.temperature, self.backend
        options = {"softcap": self.softcap, "keep_logits_bytes": self.keep_logits_bytes}
        entropy_drawn = self.entropy == "drawn" and self.rollout == "raw" and self.guidance.alpha_out > 0
        if not noisy.any() or not (self.guidance.alpha_per > 0 or entropy_drawn):
            stats = linear_logprob(hidden, *rest, **options)
            return stats.logprob, stats.entropy.detach(), None
        if hidden_other is None:
            raise ValueError("tokens with z = 1 need hidden_other, the hidden states of the other branch")
        other = hidden_other.detach()
        if self.rollout == "raw":
            stats = linear_branch_stats(hidden, other, *rest, **options)
            entropy = torch.where(noisy, stats.entropy_q, stats.entropy_p) if entropy_drawn else stats.entropy_p
            logprob = stats.logprob_p
        else:
            stats = linear_branch_stats(other, hidden, *rest, **options)
            logprob, entropy = stats.logprob_q, stats.entropy_q
        return logprob, entropy.detach(), getattr(stats, DIVERGENCES[self.divergence]).detach()

    def _correction(self, generated, engine_logprob, kept, sequences):
        """`engine_correction` of each token, with `generated`, its log-probability by the policy as it generated."""
        if engine_logprob is None:
            raise ValueError("importance_cap and importance_floor need engine_logprob, by the engine that sampled")
        if not self.correction.on:
            raise ValueError("engine_logprob is read with importance_cap or importance_floor alone: set one of them")
        engine_logprob = _per_token("engine_logprob", engine_logprob.detach(), kept)
        known = kept & ~engine_logprob.isnan()
        return engine_correction(torch.where(known, generated - engine_logprob, 0.0), self.correction, sequences)

    def _sequences(self, kept, sequence_ids) -> Sequences | None:
        """The sequences of the tokens, None where they are packed without ids."""
        if sequence_ids is None:
            if kept.dim() == 1:
                return None
            ids = torch.arange(len(kept), device=kept.device).unsqueeze(-1).expand_as(kept)
            return Sequences(ids, kept.sum(-1))
        ids = _per_token("sequence_ids", sequence_ids, kept)
        return Sequences(ids, torch.bincount(ids.flatten(), weights=kept.flatten().float()))

    def _weights(self, kept, sequences, num_items):
        """The weights of `token_weights`, of each token."""
        if self.aggregation == "token-mean":
            return token_weights(kept.sum().unsqueeze(0), "token-mean", num_items)
        if sequences is None:
            raise ValueError(f"{self.aggregation} of packed tokens needs sequence_ids")
        return token_weights(sequences.lengths, self.aggregation, num_items, self.max_tokens)[sequences.ids]


def _per_token(name: str, values: Tensor, targets: Tensor) -> Tensor:
    """`values` in the shape of `targets`. (B,) isn't spread over (B, T): where B = T it would be misread in silence."""
    fits = values.dim() == targets.dim() and all(x in (1, n) for x, n in zip(values.shape, targets.shape, strict=True))
    if values.dim() and not fits:
        raise ValueError(f"{name} must have the shape of targets, {tuple(targets.shape)}, got {tuple(values.shape)}")
    return values.expand_as(targets)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values.detach().float(), 0.0).sum() / where.sum().clamp(min=1)
