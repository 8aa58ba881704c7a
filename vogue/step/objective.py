r"""The loss of a batch from its signals: VOGUE's shaped advantage, a surrogate, and what is logged of them.

    Â    = A + g_out + z sign g_per                     `vogue_kernels.capped_bonus` has g
    loss = Σ_t w_t (c_t L(ρ_t, Â_t) − η H_t + β KL_t)   `vogue_kernels.surrogates` has L and c, `vogue.method.kl` KL

L is −min(ρ Â, clip(ρ, 1 − ε_low, 1 + ε_high) Â), or another surrogate; ρ = π / π_old, with the policy before the step's
first update, or of a replayed token with the one that generated it, or the geometric mean of a completion's; c corrects
for the engine's π where `loss.importance_cap` or `importance_floor` is set, else it is 1; η is `loss.entropy_coef`, and
H the exact entropy, with gradient; β is `kl.coef`, and KL the divergence from a reference; w is the token's weight in
the batch. PAPO's terms are in `_perceived`, ROMA's in `_robust`. All functions here are pure.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vogue.config.method_sections import KlConfig, LossConfig
from vogue.config.view_sections import CreditConfig, PerceptionConfig, RobustConfig
from vogue.method.credit import Gather, token_factors
from vogue.method.entropy import entropy_threshold
from vogue.method.kl import Reference, divergence
from vogue.method.robust import worst_divergence
from vogue.method.uncertainty import OtherBranch, Signals, TokenStats, perception_uncertainty
from vogue.metrics import Mean, mean_over
from vogue.model.packing import Batch
from vogue_kernels import (
    CorrectionConfig,
    GuidanceConfig,
    Sequences,
    SurrogateConfig,
    engine_correction,
    policy_loss,
    shaped_advantage,
)

NO_KL, NO_PERCEPTION, NO_ROBUST = KlConfig(), PerceptionConfig(), RobustConfig()  # pyright: ignore[reportCallIssue]
PAID = "entropy_paid"  # the metric: nats, the mean entropy of the tokens that a bonus is paid to


class Objective(NamedTuple):
    loss: Tensor  # () weighted sum over the batch's tokens, with gradient
    metrics: dict[str, Mean]


def has_gradient(advantages: Tensor) -> bool:
    """Whether the loss of a completion with these advantages (T,) has a gradient, so that it needs a forward."""
    return bool((advantages != 0).any())


def reads_all(settings: LossConfig) -> bool:
    """Whether the loss reads completions whose advantages are 0, too, so that all of them need a forward."""
    return settings.entropy_coef != 0 or settings.entropy_target is not None or settings.top_entropy_quantile < 1


def objective(
    batch: Batch,
    signals: Signals,
    settings: LossConfig,
    guidance: GuidanceConfig,
    sign: float,
    *,
    first: bool,
    entropy_coef: float | None = None,
    kl: KlConfig = NO_KL,
    perception: PerceptionConfig = NO_PERCEPTION,
    robust: RobustConfig = NO_ROBUST,
) -> Objective:
    """The batch's loss and its metrics.

    first         no update came before, so that ρ should be 1, and is measured
    entropy_coef  the entropy's weight in this update; None: `loss.entropy_coef`
    kl            of what the loss has where the signals have a reference
    perception    of what it has where they have another branch
    robust        of what it has where they have degraded ones
    """
    old = batch.old or signals._replace(logprob=signals.logprob.detach())
    metrics: dict[str, Mean] = {}
    fresh = torch.ones_like(batch.noisy)
    if batch.behaviour is not None:  # π_old of what is replayed is the policy that generated it
        fresh = batch.behaviour.isnan()
        old = old._replace(logprob=torch.where(fresh, old.logprob, batch.behaviour))
    shaped = shaped_advantage(batch.advantages, old.u_out, old.u_per, batch.paid, guidance, sign)
    sequences = sequences_of(batch)
    surrogate = SurrogateConfig(**_of(settings, SurrogateConfig))
    token_loss, clipped = policy_loss(signals.logprob, old.logprob, shaped.advantage, surrogate, sequences)
    # The engine's log-probability says nothing of the trained view where it saw another one.
    comparable = ~batch.engine_logprob.isnan()
    mismatch = torch.where(comparable, old.logprob - batch.engine_logprob, 0.0)
    trained = sending_gradient(batch)
    if (correction := CorrectionConfig(**_of(settings, CorrectionConfig))).on:
        factor, outside = engine_correction(mismatch, correction, sequences)
        token_loss = token_loss * factor
        metrics["mismatch/outside"] = mean_over(trained, outside)
    # A token that isn't chosen leaves the loss and not its divisor, so that the others' weights stay as they are.
    weights = batch.weights if old.chosen is None else batch.weights * old.chosen
    loss = (weights * token_loss).sum()
    if settings.entropy_coef != 0 or settings.entropy_target is not None:
        coef = settings.entropy_coef if entropy_coef is None else entropy_coef
        entropy = cast(Tensor, signals.entropy)
        if coef != 0:  # else the backward pass would compute the entropy's gradient for nothing
            loss = loss - coef * (weights * entropy).sum()
        metrics |= {PAID: mean_over(acted_on(batch), entropy.detach()), "entropy_coef": Mean(coef, 1)}
    if signals.reference is not None:
        found = divergence(signals.logprob, old.logprob, signals.reference, kl.estimator)
        loss = loss + kl.coef * (batch.weights * found).sum()
        metrics["kl"] = mean_over(batch.weights > 0, signals.reference.kl.detach())
    if perception.on and signals.other is not None:
        loss = loss - _perceived(batch, signals, old.logprob, signals.other, perception)
        compared = batch.weights[: len(signals.other.logprob)] > 0
        metrics["perception_kl"] = mean_over(compared, signals.other.kl_own_other.detach())
    if robust.on and signals.degraded:
        held, found, worst = _robust(batch, signals.degraded, robust)
        loss = loss + found
        metrics["robust_kl"] = mean_over(held, worst)

    metrics |= {
        "loss": Mean(float(loss.detach()), float(batch.weights.sum())),
        "clip_fraction": mean_over(trained, clipped),
        "out_capped": mean_over(trained, shaped.out_capped),
        "mismatch/logprob": mean_over(trained & comparable, mismatch.abs()),
        "mismatch/kl": mean_over(trained & comparable, mismatch.expm1() - mismatch),
    }
    if first:
        metrics["ratio_error"] = mean_over(trained & fresh, (signals.logprob.detach() - old.logprob).expm1().abs())
    if batch.behaviour is not None:
        metrics |= _staleness(trained & ~fresh, signals.logprob.detach() - old.logprob, clipped)
    if signals.u_per is not None:
        metrics["per_capped"] = mean_over(trained & batch.paid, shaped.per_capped)
    return Objective(loss, metrics)


def _staleness(replayed: Tensor, log_ratio: Tensor, clipped: Tensor) -> dict[str, Mean]:
    """How far the policy has left those that generated the replayed tokens: KL(π_b‖π) in nats, and who is clipped."""
    estimate = log_ratio.expm1() - log_ratio  # k3, whose mean over tokens of π_b is that KL
    return {"replay/kl": mean_over(replayed, estimate), "replay/clip_fraction": mean_over(replayed, clipped)}


def _of(settings: LossConfig, kind: type[SurrogateConfig] | type[CorrectionConfig]) -> dict[str, Any]:
    """Those of the settings that a configuration of `vogue_kernels` has, by the names that both give them."""
    return settings.model_dump(include={field.name for field in fields(kind)})


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


def _robust(batch: Batch, views: Sequence[OtherBranch], settings: RobustConfig) -> tuple[Tensor, Tensor, Tensor]:
    """What ROMA adds to the loss, of the tokens that are held to degraded views: (M,) bool, the term, and D (M,).

    β max_k KL(π(·|x)‖π(·|x_k)) − γ A log π(·|x_1) + η mean_k H(π(·|x_k)); x_1 is a random one of a prompt's views.
    """
    m = len(views[0].logprob)
    held = batch.weights[:m] > 0
    if settings.completions == "right":
        held = held & batch.right[:m]
    worst = worst_divergence([view.kl_own_other for view in views])
    found = settings.kl_coef * worst - settings.policy_coef * batch.advantages[:m] * views[0].logprob
    if settings.entropy_coef:
        found = found + settings.entropy_coef * torch.stack([view.entropy for view in views]).mean(dim=0)
    return held, (batch.weights[:m] * held * found).sum(), worst.detach()


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


def with_chosen(batches: Sequence[Batch], share: float, gather: Gather) -> list[Batch]:
    """An update's batches with the tokens that are trained on: the `share` of highest entropies, of all ranks'."""
    olds = [cast(Signals, batch.old) for batch in batches]
    entropies = [cast(Tensor, old.entropy) for old in olds]
    mine = [values.cpu()[acted_on(batch)] for batch, values in zip(batches, entropies, strict=True)]
    threshold = entropy_threshold([part.numpy() for of_rank in gather(mine) for part in of_rank], share)
    return [
        replace(batch, old=old._replace(chosen=values.double() >= threshold))
        for batch, old, values in zip(batches, olds, entropies, strict=True)
    ]


def sequences_of(batch: Batch) -> Sequences:
    """The batch's completions, each a sequence of its tokens."""
    lengths = torch.tensor([len(completion.token_ids) for completion in batch.completions])
    ids = torch.arange(len(lengths)).repeat_interleave(lengths)  # here, where no GPU has to be waited for
    return Sequences(ids.to(batch.advantages.device), lengths.to(batch.advantages.device))


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
    """Which tokens (N,) the surrogate sends a gradient of."""
    return acted_on(batch) & (batch.advantages != 0)


def acted_on(batch: Batch) -> Tensor:
    """Which tokens (N,) the loss acts on, be it by their entropy alone."""
    found = batch.weights > 0
    return found if batch.old is None or batch.old.chosen is None else found & batch.old.chosen
