"""What the operators' arguments must be, with the error that names what isn't."""

import torch
from torch import Tensor

from .inputs import mix

_LOWEST_TEMPERATURE = 1e-6  # below it the rounding of a float32 logit is worth more than a nat


def check_arguments(hiddens: dict[str, Tensor], weight: Tensor, targets: Tensor, bias: Tensor | None, temperature):
    """Raises TypeError for a dtype, ValueError for a shape, device or temperature that can't be used.

    Only what a trace knows is checked here; targets are when the operator runs.
    """
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight must be (V, D) and not empty, got {tuple(weight.shape)}; under ZeRO-3 call the operator inside "
            "the forward of the module that owns the weight, so that it is gathered"
        )
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if targets.dim() != 1:
        raise ValueError(f"targets must be (N,), got {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    # Never len() of a tensor: torch.compile would take the number of tokens for a constant, and compile for each anew.
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        name: (hidden, (targets.shape[0], weight.shape[1])) for name, hidden in hiddens.items()
    }
    if bias is not None:
        expected["bias"] = (bias, (weight.shape[0],))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape}, got {tuple(tensor.shape)}, "
                f"with weight {tuple(weight.shape)} and targets {tuple(targets.shape)}"
            )
        if tensor.dtype != weight.dtype and not (name == "bias" and mix(tensor, weight)):  # all backends add in float32
            raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {tensor.dtype}")
    for name, tensor in {**{name: tensor for name, (tensor, _) in expected.items()}, "targets": targets}.items():
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {tensor.device}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if temperature < _LOWEST_TEMPERATURE:
        raise ValueError(f"temperature must be at least {_LOWEST_TEMPERATURE}, got {temperature}")
