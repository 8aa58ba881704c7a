"""From the tensors that a trainer has to those that the operators take: rows of tokens, int64 targets, one dtype.

But for autocast nothing here touches a weight. A copy or a cast of it would be as large as it is, and would keep the
backward pass from reading it anew, as ZeRO-3 and FSDP2 need (registration.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .branches import Head, of_branch

IGNORE = -100  # the target of a position to skip, as in torch.nn.functional.cross_entropy


class Rows(NamedTuple):
    """Tokens in rows, whatever dimensions they came in."""

    hiddens: list[Tensor]  # (N, D) each
    heads: list[Head]
    targets: Tensor  # (N,) int64
    shape: torch.Size  # of the targets as they came, which results get again

    def restore(self, results):
        """The results (N,) in the shape of the targets."""
        return (result.view(self.shape) for result in results)


def heads_of(weight: Tensor, bias: Tensor | None, weight_q: Tensor | None, bias_q: Tensor | None) -> list[Head]:
    """One head, or a second one for branch q. Raises ValueError for a bias_q without its weight."""
    if weight_q is None and bias_q is not None:
        raise ValueError("bias_q needs weight_q: without it both branches have one head, weight and bias")
    return [Head(weight, bias), *([] if weight_q is None else [Head(weight_q, bias_q)])]


def named(heads: list[Head]) -> dict[str, Tensor]:
    """The heads' tensors by the names of the operators' arguments; without a bias that is None."""
    names = ("weight", "bias", "weight_q", "bias_q")
    tensors = [tensor for head in heads for tensor in head]
    # As many names as tensors: torch 2.8 compiles no zip of others.
    return {name: x for name, x in zip(names[: len(tensors)], tensors, strict=True) if x is not None}


def as_rows(hiddens: dict[str, Tensor], heads: list[Head], targets: Tensor, ignore_index: int, shift: bool) -> Rows:
    """hiddens: (..., D) by name; targets: (...) of integers. Raises as the operators' docstrings say."""
    for name, tensor in {**hiddens, **named(heads), "targets": targets}.items():
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{name} is a DTensor, spread over ranks; call the operator inside the forward of the module that owns "
                f"it, where FSDP2 has gathered it, or pass {name}.full_tensor()"
            )
    if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    for i, (name, hidden) in enumerate(hiddens.items()):
        if hidden.shape[:-1] != targets.shape:
            weight = of_branch(heads, i).weight
            expected = (*targets.shape, weight.shape[-1] if weight.dim() else "D")
            raise ValueError(
                f"{name} must be {expected}, got {tuple(hidden.shape)}, "
                f"with weight {tuple(weight.shape)} and targets {tuple(targets.shape)}"
            )
    rows = list(hiddens.values())
    if shift:
        if targets.dim() == 0 or targets.shape[-1] == 0:
            raise ValueError(f"shift needs a position to predict from, got targets {tuple(targets.shape)}")
        rows, targets = [hidden[..., :-1, :] for hidden in rows], targets[..., 1:]
    device = heads[0].weight.device.type
    heads = [Head(*_as_linear_casts(device, head)) for head in heads]
    weight, rows = heads[0].weight, _as_linear_casts(device, rows)
    rows = [hidden.to(weight.dtype) if mix(hidden, weight) else hidden for hidden in rows]
    rows = [hidden.reshape(-1, hidden.shape[-1]) for hidden in rows]
    shape, targets = targets.shape, targets.reshape(-1).long()
    if ignore_index != IGNORE:
        targets = targets.masked_fill(targets == ignore_index, IGNORE)
    return Rows(rows, heads, targets, shape)


def _as_linear_casts(device: str, tensors: Sequence[Any]) -> list[Any]:
    """The tensors as torch.nn.functional.linear takes them: in autocast's dtype where it is on, but for float64."""
    # While it compiles, torch before 2.13 can't ask whether a device has autocast at all; meta is the one without.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if x is not None and mix(x) else x for x in tensors]


def mix(*tensors: Tensor) -> bool:
    """Whether these may be of several dtypes, or cast: not with float64, which is for checks."""
    return all(x.dtype.is_floating_point and x.dtype != torch.float64 for x in tensors)
