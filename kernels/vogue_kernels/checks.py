"""What the operators' arguments must be, with the error that names what isn't."""

import torch
from torch import Tensor

from .branches import Head, Scaling, of_branch
from .inputs import mix, named

_LOWEST_TEMPERATURE = 1e-6  # below it the rounding of a float32 logit is worth more than a nat
_SOFTCAPS = 1e-6, 1e6  # below nothing is left of the logits, and above nothing of the cap


def check_arguments(hiddens: dict[str, Tensor], heads: list[Head], targets: Tensor, scaling: Scaling):
    """Raises TypeError for a dtype, ValueError for a shape, device, temperature or softcap that can't be used.

    Only what a trace knows is checked here; targets are when the operator runs.
    """
    weight = heads[0].weight
    for name, tensor in named(heads).items():
        if name.startswith("weight"):
            _check_weight(name, tensor, weight)
    if targets.dim() != 1:
        raise ValueError(f"targets must be (N,), got {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    # Never len() of a tensor: torch.compile would take the number of tokens for a constant, and compile for each anew.
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        name: (hidden, (targets.shape[0], of_branch(heads, i).weight.shape[1]))
        for i, (name, hidden) in enumerate(hiddens.items())
    }
    expected |= {name: (tensor, (weight.shape[0],)) for name, tensor in named(heads).items() if name.startswith("bias")}
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            own = "weight_q" if len(heads) == 2 and name.endswith("_q") else "weight"
            raise ValueError(
                f"{name} must be {shape}, got {tuple(tensor.shape)}, "
                f"with {own} {tuple(named(heads)[own].shape)} and targets {tuple(targets.shape)}"
            )
        bias = name.startswith("bias")
        if tensor.dtype != weight.dtype and not (bias and mix(tensor, weight)):  # all backends add in float32
            raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {tensor.dtype}")
    for name, tensor in {**{name: tensor for name, (tensor, _) in expected.items()}, "targets": targets}.items():
        _check_device(name, tensor, weight)
    _check_scaling(scaling)


def _check_weight(name: str, tensor: Tensor, weight: Tensor) -> None:
    """Of a head; `weight` is the first one's."""
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise ValueError(
            f"{name} must be (V, D) and not empty, got {tuple(tensor.shape)}; under ZeRO-3 call the operator inside "
            "the forward of the module that owns the weight, so that it is gathered"
        )
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{name} must have the vocabulary of weight, {weight.shape[0]} words, got {tuple(tensor.shape)}; only the "
            "widths of two heads may differ"
        )
    if tensor.dtype != weight.dtype:
        raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {tensor.dtype}; cast one of them")
    _check_device(name, tensor, weight)


def _check_device(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {tensor.device}")


def _check_scaling(scaling: Scaling) -> None:
    temperature, softcap = scaling
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if temperature < _LOWEST_TEMPERATURE:
        raise ValueError(f"temperature must be at least {_LOWEST_TEMPERATURE}, got {temperature}")
    lowest, highest = _SOFTCAPS
    if softcap is not None and not lowest <= softcap <= highest:
        raise ValueError(
            f"softcap must be from {lowest:.0e} to {highest:.0e}, got {softcap}; None leaves the logits uncapped"
        )
