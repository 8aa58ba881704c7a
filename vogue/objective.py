r"""The loss of a batch from its signals: VOGUE's shaped advantage, a surrogate, and what is logged of them.

    Â    = A + g_out + z sign g_per                     `vogue_kernels.loss` has the bonuses
    loss = Σ_t w_t (c_t L(ρ_t, Â_t) − η H_t)            `vogue_kernels.surrogates` has L and c

L is −min(ρ Â, clip(ρ, 1 − ε_low, 1 + ε_high) Â), or another surrogate; ρ = π / π_old, with the policy before the step's
first update, or the geometric mean of a completion's; c corrects for the engine's π where `loss.importance_cap` or
`importance_floor` is set, else it is 1; η is `loss.entropy_coef`, and H the exact entropy, with gradient; w is the
token's weight in the batch. All functions here are pure.
"""

from dataclasses import fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vogue.method.uncertainty import Signals, TokenStats
from vogue.metrics import Mean, mean_over
from vogue.model.packing import Batch
from vogue.sections import LossConfig
from vogue_kernels import (
    CorrectionConfig,
    GuidanceConfig,
    Sequences,
    SurrogateConfig,
    engine_correction,
    policy_loss,
    shaped_advantage,
)

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
) -> Objective:
    """The batch's loss and its metrics.

    first         no update came before, so that ρ should be 1, and is measured
    entropy_coef  the entropy's weight in this update; None: `loss.entropy_coef`
    """
    old = batch.old or signals._replace(logprob=signals.logprob.detach())
    shaped = shaped_advantage(batch.advantages, old.u_out, old.u_per, batch.paid, guidance, sign)
    sequences = sequences_of(batch)
    surrogate = SurrogateConfig(**_of(settings, SurrogateConfig))
    token_loss, clipped = policy_loss(signals.logprob, old.logprob, shaped.advantage, surrogate, sequences)
    # The engine's log-probability says nothing of the trained view where it saw another one.
    comparable = ~batch.engine_logprob.isnan()
    mismatch = torch.where(comparable, old.logprob - batch.engine_logprob, 0.0)
    trained = sending_gradient(batch)
    metrics = {}
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

    metrics |= {
        "loss": Mean(float(loss.detach()), float(batch.weights.sum())),
        "clip_fraction": mean_over(trained, clipped),
        "out_capped": mean_over(trained, shaped.out_capped),
        "mismatch/logprob": mean_over(trained & comparable, mismatch.abs()),
        "mismatch/kl": mean_over(trained & comparable, mismatch.expm1() - mismatch),
    }
    if first:
        metrics["ratio_error"] = mean_over(trained, (signals.logprob.detach() - old.logprob).expm1().abs())
    if signals.u_per is not None:
        metrics["per_capped"] = mean_over(trained & batch.paid, shaped.per_capped)
    return Objective(loss, metrics)


def _of(settings: LossConfig, kind: type[SurrogateConfig] | type[CorrectionConfig]) -> dict[str, Any]:
    """Those of the settings that a configuration of `vogue_kernels` has, by the names that both give them."""
    return settings.model_dump(include={field.name for field in fields(kind)})


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
        compared, u_per = slice(len(stats.other.symmetric_kl)), stats.other.symmetric_kl
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
