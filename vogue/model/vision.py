"""The vision tower of Qwen's kind: attention of windows in few calls, and patches embedded by a matrix product.

A patch attends to its own window, or to its own image, and to nothing else. transformers calls its attention once a
window, in every layer; a picture of a megapixel has 70 windows. Here one variable-length call does all of them on a
GPU, and one call for each distinct length of a window elsewhere.

The patch embedding is a convolution whose kernel is as large as a patch, so that it slides over nothing:

    y = W x + b        x (patches, channels frames height width), W the kernel, flat

The product has the same weight, in name and shape, and so the same checkpoints.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, PreTrainedModel

from vogue.families import Family
from vogue.model.varlen import why_not_flash

# The name under which transformers finds it. Where a name has "flash" in it, a tower hands over all windows at once.
WINDOWS = "windows_like_flash"


def prepare_tower(model: PreTrainedModel, family: Family) -> None:
    """Let a loaded model's vision tower work in this way, where it is one of patches and was loaded with "sdpa".

    No weight changes its name, shape or value; results change by rounding.
    """
    if not family.patches:  # whole squares, all as long, and a kernel that slides
        return
    if model.config.vision_config._attn_implementation == "sdpa":
        model.set_attn_implementation({"vision_config": WINDOWS})
    embedding: Any = getattr(model.model, family.tower).patch_embed
    embedding.proj.__class__ = PatchProjection


class PatchProjection(nn.Conv3d):
    """(patches, C, T, H, W) to (patches, D, 1, 1, 1), where T, H and W are the kernel's."""

    def forward(self, input: Tensor) -> Tensor:
        # Of a convolution over one position there is neither a fast kernel in bfloat16 nor need.
        return linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def windows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_,
) -> tuple[Tensor, None]:
    """(1, H, T, D) queries, keys and values of T patches to (1, T, H, D).

    cu_seq_lens_q: (S + 1,) int32, where each of S windows begins, and where the last one ends. max_length_q: the
    longest window's patches. Raises ValueError for dropout.
    """
    if dropout:
        raise ValueError(f"the vision tower's attention_dropout is {dropout}: it needs to be 0")
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if query.is_cuda and why_not_flash(query.dtype, query.shape[-1]) is None:
        ends, longest = cu_seq_lens_q, max_length_q
        found: Any = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling)
        return found.unsqueeze(0), None
    return _by_length(query, key, value, cu_seq_lens_q, scaling).unsqueeze(0), None


AttentionInterface.register(WINDOWS, windows_attention)


class _Plan(NamedTuple):
    """Windows by their length: `sizes` and `counts` of each, and an order (T,) of patches with the shortest first."""

    sizes: list[int]
    counts: list[int]
    order: Tensor | None  # None where all are as long
    back: Tensor | None  # its inverse


# By the tensor of the windows' ends, while it lives: all layers of a forward, recomputed ones too, have the same one.
_plans = WeakIdKeyDictionary()


def _plan(ends: Tensor) -> _Plan:
    if ends not in _plans:
        lengths = ends.diff()
        sizes, counts = (x.tolist() for x in lengths.unique(return_counts=True))
        order = lengths.repeat_interleave(lengths).argsort(stable=True) if len(sizes) > 1 else None
        _plans[ends] = _Plan(sizes, counts, order, None if order is None else order.argsort())
    return _plans[ends]


def _by_length(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    """(T, H, D) to (T, H, D), the windows of each length in a call of their own."""
    sizes, counts, order, back = _plan(ends)
    if order is None:
        return _of_one_length(query, key, value, sizes[0], scale)
    parts = [size * count for size, count in zip(sizes, counts, strict=True)]
    sorted_parts = zip(*(_Permuted.apply(x, order, back).split(parts) for x in (query, key, value)), strict=True)
    found = [_of_one_length(q, k, v, size, scale) for (q, k, v), size in zip(sorted_parts, sizes, strict=True)]
    return _Permuted.apply(torch.cat(found), back, order)


def _of_one_length(query: Tensor, key: Tensor, value: Tensor, size: int, scale: float) -> Tensor:
    query, key, value = (x.unflatten(0, (-1, size)).transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(0, 1)


class _Permuted(torch.autograd.Function):
    """x[order]; its gradient is picked by the inverse, where indexing would add up rows one at a time."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.inverse), None, None
