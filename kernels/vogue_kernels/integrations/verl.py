"""A plugin of verl 0.9.1: a backend of its fused head, and VOGUE's policy loss.

    Â = A + min(|A| / β_out, α_out u_out) + min(|A| / β_per, α_per u_per)          arXiv 2510.01444

Importing this file registers both, which verl does by itself through the entry point `verl.plugins`, or with
VERL_USE_EXTERNAL_MODULES=vogue_kernels.integrations.verl, which doesn't hide an error. What verl had before stays as it
is.

    actor_rollout_ref.model.use_fused_kernels=true
    actor_rollout_ref.model.fused_kernel_options.impl_backend=vogue
    actor_rollout_ref.actor.policy_loss.loss_mode=vogue        # or vogue_entropy: u_out alone
    actor_rollout_ref.actor.calculate_entropy=true

The loss is verl's own `vanilla` on Â, and its equal with both α = 0. u_out is the head's exact entropy. For u_per the
model's forward takes a second image: `other_pixel_values` among the `multi_modal_inputs`, of the shape of
`pixel_values`. Where they are the same, u_per is 0: a prompt that isn't drawn has its own image there.

verl's engine has places for a head's log-probabilities and entropy alone, so that u_per goes past it, from the forward
of a micro-batch to its loss, which follows at once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import verl.models.transformers.monkey_patch as monkey_patch  # pyright: ignore[reportMissingImports]
import verl.utils.experimental.torch_functional as torch_functional  # pyright: ignore[reportMissingImports]
import verl.workers.utils.losses as losses  # pyright: ignore[reportMissingImports]
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn, register_policy_loss  # pyright: ignore[reportMissingImports]
from verl.workers.utils.padding import no_padding_2_padding  # pyright: ignore[reportMissingImports]

from ..capped_bonus import GuidanceConfig, shaped_advantage
from ..operator import linear_branch_stats, linear_logprob

BACKEND = "vogue"


@dataclass
class Handover:
    """What goes from a micro-batch's forward to its loss; each is taken once."""

    keeps_hidden: bool = False  # the forward at hand is of the other image: only its hidden states count
    other_hidden: Tensor | None = None  # (..., D), of the other image
    symmetric_kl: Tensor | None = None  # (...) nats, of every position
    uncertainties: Callable[[], tuple[Tensor, Tensor | None]] | None = None  # u_out and u_per, each (B, T) nats

    def take(self, name: str):
        value = getattr(self, name)
        setattr(self, name, None)
        return value


handover = Handover()


class FusedLinearForPPO(torch_functional.FusedLinearForPPO):
    """verl's head with the backend "vogue": exact statistics in float32, of two branches where there are two."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__(chunk_size, "torch" if impl_backend == BACKEND else impl_backend)
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each input_ids (...) and entropy, from hidden_states (..., D) and vocab_weights (V, D).

        Raises what `linear_logprob` raises.
        """
        if self.impl_backend != BACKEND:
            return super().forward(hidden_states, vocab_weights, input_ids, temperature)
        if handover.keeps_hidden:
            handover.other_hidden = hidden_states
            return hidden_states[..., 0], hidden_states[..., 0]
        other = handover.take("other_hidden")
        if other is None:
            alone = linear_logprob(hidden_states, vocab_weights, input_ids, temperature=temperature)
            return alone.logprob, alone.entropy
        stats = linear_branch_stats(hidden_states, other, vocab_weights, input_ids, temperature=temperature)
        handover.symmetric_kl = stats.symmetric_kl.detach()
        return stats.logprob_p, stats.entropy_p


def compare_images(forward: Callable) -> Callable:
    """A model's fused forward that takes `other_pixel_values`, and in a training step computes them first."""

    @functools.wraps(forward)
    def compared(self, *args, other_pixel_values: Tensor | None = None, **kwargs):
        handover.other_hidden = handover.symmetric_kl = None
        if other_pixel_values is not None and torch.is_grad_enabled():  # old log-probabilities read one image
            handover.keeps_hidden = True
            try:
                with torch.no_grad():
                    forward(self, *args, **(kwargs | {"pixel_values": other_pixel_values}))
            finally:
                handover.keeps_hidden = False
        return forward(self, *args, **kwargs)

    return compared


def patch_forward_with_backends(
    original: Callable, model, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
) -> None:
    """verl's, which gives a model the fused forward of its family; with the backend "vogue" one that compares."""
    if not use_fused_kernels or fused_kernels_backend != BACKEND:
        return original(model, use_fused_kernels, fused_kernels_backend)
    original(model, use_fused_kernels, "torch")
    model._verl_fused_kernels_backend = BACKEND
    model.__class__.forward = compare_images(model.__class__.forward)


def ppo_loss(original: Callable, config, model_output: dict[str, Tensor], data, dp_group=None):
    """verl's, which calls the policy loss; beside it the uncertainties that it has no argument for."""
    handover.uncertainties = lambda: _uncertainties(model_output, data)
    try:
        return original(config, model_output, data, dp_group)
    finally:
        handover.uncertainties = handover.symmetric_kl = None


def _uncertainties(model_output: dict[str, Tensor], data) -> tuple[Tensor, Tensor | None]:
    """u_out (B, T), and u_per where two images were compared, at the tokens of the responses."""
    if model_output.get("entropy") is None:
        raise ValueError("VOGUE's loss reads the head's entropy: set actor_rollout_ref.actor.calculate_entropy=true")
    u_out = no_padding_2_padding(model_output["entropy"].detach(), data)
    symmetric_kl = handover.take("symmetric_kl")
    return u_out, None if symmetric_kl is None else no_padding_2_padding(_unpadded(symmetric_kl, data), data)


def _unpadded(values: Tensor, data) -> Tensor:
    """Values of all sequences' tokens in a row, from sequences that are packed, (1, L), or padded, (B, L)."""
    lengths = data["input_ids"].offsets().diff()
    if len(values) == len(lengths) > 1:
        return values[torch.arange(values.shape[1], device=values.device) < lengths.unsqueeze(1)]
    total = int(lengths.sum())
    if values.numel() < total:
        raise ValueError(
            f"the head saw {values.numel()} of the micro-batch's {total} tokens: sequence parallelism isn't supported"
        )
    return values.flatten()[:total]


def vogue_policy_loss(guidance: GuidanceConfig) -> Callable:
    """A policy loss for `register_policy_loss`: verl's "vanilla" on shaped advantages.

    It takes verl's arguments; advantages (B, T). Beside vanilla's metrics: `actor/u_out` and `actor/u_per` (nats), and
    `actor/out_capped` and `actor/per_capped`, the shares of tokens whose bonus is at its cap.

    Raises RuntimeError where no fused head of this file ran before, ValueError for what it lacks.
    """

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config=None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if handover.uncertainties is None:
            raise RuntimeError("VOGUE's loss was called from outside of verl.workers.utils.losses.ppo_loss")
        u_out, u_per = handover.uncertainties()
        if u_per is None and guidance.alpha_per > 0:
            raise ValueError(
                "u_per isn't known: it takes other_pixel_values among the multi_modal_inputs and "
                f"fused_kernel_options.impl_backend={BACKEND}; loss_mode=vogue_entropy does without"
            )
        paid = torch.tensor(guidance.alpha_per > 0, device=advantages.device)
        shaped = shaped_advantage(advantages, u_out, u_per, paid, guidance)
        loss, metrics = get_policy_loss_fn("vanilla")(
            old_log_prob, log_prob, shaped.advantage, response_mask, loss_agg_mode, config, rollout_is_weights
        )
        told = {"u_out": u_out, "u_per": u_per, "out_capped": shaped.out_capped, "per_capped": shaped.per_capped}
        kept = response_mask.bool()
        means = {f"actor/{name}": x[kept].float().mean().item() for name, x in told.items() if x is not None}
        return loss, metrics | means

    return policy_loss


torch_functional.FusedLinearForPPO = FusedLinearForPPO
monkey_patch.patch_forward_with_backends = functools.partial(
    patch_forward_with_backends, monkey_patch.patch_forward_with_backends
)
losses.ppo_loss = functools.partial(ppo_loss, losses.ppo_loss)
register_policy_loss("vogue")(vogue_policy_loss(GuidanceConfig()))
register_policy_loss("vogue_entropy")(vogue_policy_loss(GuidanceConfig(alpha_per=0.0)))
