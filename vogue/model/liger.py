"""Liger's Triton kernels in a model's text body (arXiv 2410.10989): norms, MLPs and rotations, one kernel each.

    RMSNorm    w x / sqrt(mean x² + eps)         SwiGLU    silu(a) b         rotary    x cos + rotated(x) sin

Each is one pass over memory where PyTorch makes several, and keeps less for the backward pass. Weights stay where they
are, under their names: modules get another class, so that adapters, ZeRO-3's hooks and checkpoints see no difference.
Neither the head nor the loss is Liger's. Its own patches of whole models aren't used: they replace the classes of later
models too, and of transformers 5 they miss the rotation, which has another name there.
"""

import importlib.util
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vogue.settings import ConfigError

KNOWN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # whose layers are of the three kinds above
ROTATION = "apply_rotary_pos_emb"  # of a family's module in transformers


class FusedRMSNorm(nn.Module):
    """A norm of the family's, by Liger's kernel: the mean in float32, the product with the weight in its dtype."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_rms_norm

        # Not in place: that would write over the gradient of the output, which isn't always this norm's alone.
        return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, casting_mode="llama", in_place=False)


class FusedMLP(nn.Module):
    """An MLP of the family's with Liger's kernel between its products."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_swiglu

        return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))


def check_liger(model: PreTrainedModel) -> None:
    """Raise `ConfigError` where `model.liger` can't be had for this model on this machine."""
    kind, text = model.config.model_type, model.config.get_text_config()
    why = None
    if kind not in KNOWN:
        why = f"it is for {', '.join(KNOWN)}, not for {kind}"
    elif text.hidden_act != "silu":
        why = f"the MLPs' activation is {text.hidden_act}, not silu"
    elif not importlib.util.find_spec("liger_kernel"):
        why = "liger-kernel isn't installed; the extra [gpu] has it"
    elif not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        why = "Triton's kernels need a GPU"
    if why:
        raise ConfigError(f"model.liger=true: {why}")


def apply_liger(model: PreTrainedModel) -> None:
    """Let Liger's kernels compute a loaded model's text body; raises `ConfigError` where they can't."""
    check_liger(model)
    from liger_kernel.transformers.functional import liger_rope

    body: Any = model.model.language_model
    for layer in body.layers:
        layer.mlp.__class__ = FusedMLP
    for module in body.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = FusedRMSNorm
    # The rotation is a function of the family's module: all models of the family in this process take it from now on,
    # which are this one and the copy of an engine of transformers, on the same GPU.
    family = sys.modules[type(body.layers[0].self_attn).__module__]
    if not hasattr(family, ROTATION):
        raise ConfigError(f"model.liger=true: {family.__name__} has no {ROTATION}, as transformers 5.19 has")
    setattr(family, ROTATION, liger_rope)
