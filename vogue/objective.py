r"""The loss of a batch from its signals: VOGUE's shaped advantage, PPO's clipped surrogate, and what is logged of them.

    Â    = A + g_out + z sign g_per                     `vogue_kernels.loss` has the bonuses
    loss = Σ_t w_t (c_t · −min(ρ_t Â_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) Â_t) + coef KL_t)

ρ = π / π_old, with the policy before the step's first update, or the geometric mean of a completion's (GSPO, arXiv
2507.18071); c corrects for the engine's π where `loss.importance_cap` is set (`engine_correction`), else it is 1; KL is
to a reference, where `kl` asks for one; w is the token's weight in the batch. All functions here are pure.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vogue.method.credit import Gather, token_factors
from vogue.method.kl import Reference, divergence
from vogue.method.uncertainty import OtherBranch, Signals, TokenStats, perception_uncertainty
from vogue.metrics import Mean, mean_over
from vogue.model.packing import Batch
from vogue.sections import LossConfig
from vogue.training_sections import CreditConfig, KlConfig, PerceptionConfig
from vogue_kernels import GuidanceConfig, clipped_surrogate, shaped_advantage

NO_KL, NO_PERCEPTION = KlConfig(), PerceptionConfig()  # pyright: ignore[reportCallIssue]


class Objective(NamedTuple):
    loss: Tensor  # () weighted sum over the batch's tokens, with gradient
    metrics: dict[str, Mean]


def has_gradient(advantages: Tensor) -> bool:
    """Whether the loss of a completion with these advantages (T,) has a gradient, so that it needs a forward."""
    return bool((advantages != 0).any())


def objective(
    batch: Batch,
    signals: Signals,
    settings: LossConfig,
    guidance: GuidanceConfig,
    sign: float,
    *,
    first: bool,
    kl: KlConfig = NO_KL,
    perception: PerceptionConfig = NO_PERCEPTION,
) -> Objective:
    """The batch's loss and its metrics. `first`: no update came before, so that ρ should be 1, and is measured.

    kl          of what the loss has where the signals have a reference
    perception  of what it has where they have another branch
    """
    old = batch.old or signals._replace(logprob=signals.logprob.detach())
    shaped = shaped_advantage(batch.advantages, old.u_out, old.u_per, batch.paid, guidance, sign)
    clips = settings.clip_low, settings.clip_high, settings.clip_dual
    logprob = signals.logprob
    if settings.importance_level == "sequence":
        logprob = with_sequence_ratio(logprob, old.logprob, lengths_of(batch))
    token_loss, clipped = clipped_surrogate(logprob, old.logprob, shaped.advantage, *clips)
    # The engine's log-probability says nothing of the trained view where it saw another one.
    comparable = ~batch.engine_logprob.isnan()
    mismatch = torch.where(comparable, old.logprob - batch.engine_logprob, 0.0)
    if settings.importance_cap is not None:
        token_loss = token_loss * engine_correction(mismatch, batch, settings.importance_cap, settings.importance_mode)
    if signals.reference is not None:
        token_loss = token_loss + kl.coef * divergence(signals.logprob, old.logprob, signals.reference, kl.estimator)
    loss = (batch.weights * token_loss).sum()
    if perception.on and signals.other is not None:
        loss = loss - _perceived(batch, signals, old.logprob, signals.other, perception)

    trained = sending_gradient(batch)
    metrics = {
        "loss": Mean(float(loss.detach()), float(batch.weights.sum())),
        "clip_fraction": mean_over(trained, clipped),
        "out_capped": mean_over(trained, shaped.out_capped),
        "mismatch/logprob": mean_over(trained & comparable, mismatch.abs()),
        "mismatch/kl": mean_over(trained & comparable, mismatch.expm1() - mismatch),
    }
    if first:
        metrics["ratio_error"] = mean_over(trained, (signals.logprob.detach() - old.logprob).expm1().abs())
    if signals.reference is not None:
        metrics["kl"] = mean_over(batch.weights > 0, signals.reference.kl.detach())
    if perception.on and signals.other is not None:
        m = len(signals.other.logprob)
        metrics["perception_kl"] = mean_over(batch.weights[:m] > 0, signals.other.kl_own_other.detach())
    if signals.u_per is not None:
        metrics["per_capped"] = mean_over(trained & batch.paid, shaped.per_capped)
    return Objective(loss, metrics)


def with_sequence_ratio(logprob: Tensor, old_logprob: Tensor, lengths: Tensor) -> Tensor:
    """Log-probabilities (N,) whose ratio to the old ones is that of their whole completion, of `lengths` (S,) tokens.

    s = exp(mean_t (log π_t − log π_old,t)), and at every token the gradient s ∇ log π_t: GSPO-token (arXiv 2507.18071,
    eq. 14), which is GSPO where a completion's tokens have one advantage, and takes VOGUE's where they haven't.
    """
    found = logprob.detach()
    means = per_completion(found - old_logprob, lengths) / lengths.repeat_interleave(lengths)
    return old_logprob + means + (logprob - found)


def _perceived(
    batch: Batch, signals: Signals, old_logprob: Tensor, other: OtherBranch, settings: PerceptionConfig
) -> Tensor:
    """What PAPO adds to the objective: γ KL(π(·|x)‖π(·|T(x))) − η H(π(·|T(x))), of the tokens with an image."""
    m = len(other.logprob)
    if settings.direction == "reverse":
        found = other.kl_other_own
    else:
        reference = Reference(other.logprob.detach(), other.kl_own_other)
        found = divergence(signals.logprob[:m], old_logprob[:m], reference, settings.estimator)
    found = settings.kl_coef * found - settings.entropy_coef * other.entropy
    return (batch.weights[:m] * found).sum()


def dependence(batch: Batch, stats: TokenStats, estimator: str) -> Tensor:
    """S (M,) = KL(raw‖noisy) in nats of the batch's first M tokens, which are compared: "exact", or "k3"."""
    if stats.other is None:
        return stats.logprob[:0]
    m = len(stats.other.logprob)
    return perception_uncertainty(stats.logprob[:m], stats.other, batch.noisy[:m], estimator, "forward")


def credited(
    batches: Sequence[Batch], dependences: Sequence[Tensor], settings: CreditConfig, gather: Gather
) -> list[Batch]:
    """A rank's batches of an update, with each token's part of the advantage by its S of `dependences`.

    Completions without images, and those that send no gradient, stay as they are and aren't counted.
    """
    places = [
        (i, here)
        for i, (batch, known) in enumerate(zip(batches, dependences, strict=True))
        for here in batch.slices
        if here.stop <= len(known) and sending_gradient(batch)[here].any()
    ]
    factors = token_factors(
        [dependences[i][here] for i, here in places], gather, **settings.model_dump(exclude={"estimator"})
    )
    advantages = [batch.advantages.clone() for batch in batches]
    for (i, here), factor in zip(places, factors, strict=True):
        advantages[i][here] *= factor
    return [replace(batch, advantages=a) for batch, a in zip(batches, advantages, strict=True)]


def engine_correction(mismatch: Tensor, batch: Batch, cap: float, mode: str) -> Tensor:
    """What multiplies the tokens' loss (N,) since the engine's policy generated them and not the trainer's.

    mismatch  (N,) nats, log (π_old / π_engine) of each token; of a sequence, their sum over the completion
    mode      `loss.importance_mode`: ratios above `cap` become it (truncate), or 0 (mask)
    """
    if mode.startswith("sequence"):
        mismatch = per_completion(mismatch, lengths_of(batch))
    if mode.endswith("mask"):
        return torch.where(mismatch.exp() <= cap, mismatch.exp(), 0.0)
    return mismatch.exp().clamp(max=cap)


def lengths_of(batch: Batch) -> Tensor:
    """Tokens (S,) of each of the batch's completions."""
    return torch.tensor([len(c.token_ids) for c in batch.completions], device=batch.advantages.device)


def per_completion(values: Tensor, lengths: Tensor) -> Tensor:
    """At each token (N,) the sum of `values` (N,) over its completion; `lengths` (S,) add up to N."""
    owner = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    return values.new_zeros(len(lengths)).index_add(0, owner, values)[owner]


def uncertainties(batch: Batch, stats: TokenStats, *, measuring: bool) -> dict[str, Mean]:
    """Means of the exact entropy and symmetric divergence, whatever estimates of them guide.

    They are over the tokens that send a gradient, of u_per those that it is paid to; with `measuring` also over all
    that went through a forward.
    """
    trained, entropy = sending_gradient(batch), stats.entropy.detach()
    metrics = {"entropy": mean_over(trained, entropy)}
    if measuring:
        metrics["measured/entropy"] = mean_over(batch.weights > 0, entropy)
    if stats.other is not None:
        compared, u_per = slice(len(stats.other.symmetric_kl)), stats.other.symmetric_kl.detach()
        metrics["u_per"] = mean_over((trained & batch.paid)[compared], u_per)
        if measuring:
            metrics["measured/u_per"] = mean_over((batch.weights > 0)[compared], u_per)
    return metrics


def sending_gradient(batch: Batch) -> Tensor:
    """Which tokens (N,) send a gradient."""
    return (batch.weights > 0) & (batch.advantages != 0)
