"""Attention of rows that share a prompt on GPUs: two calls of torch's flash attention of sequences of any lengths.

The first takes every prompt and every completion as a sequence of its own, causally; the second lets a row's
completions attend to its prompt, all of it. The log-normalisers merge both, as `vogue.model.attention` says. There is
no mask, and nothing is compiled: a layout costs a few int32 numbers a row, whatever the lengths.

Tokens of all rows lie in one line, (T, H, D); `Spans` says which of them are a sequence. Keys and values may have fewer
heads than queries. Away from GPUs the same calls are made in plain torch, one sequence at a time, for tests.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """S sequences of a flash call: queries[i] up to queries[i + 1] attend to keys[i] up to keys[i + 1]."""

    queries: Tensor  # (S + 1,) int32, 0 first
    keys: Tensor  # (S + 1,) int32
    longest_query: int  # tokens
    longest_key: int
    causal: bool  # of two spans that are as long


@dataclass(frozen=True)
class VarlenLayout:
    """Where prompts and completions lie in (B, L) segments, whose B L tokens count as one line.

    `own`: every prompt, completion and piece of padding, which so attends to padding alone. `before`: each row's
    completions on its prompt, whose tokens are `completions` (N,) and `prompts` (P,), int64, in the line's order.
    """

    own: Spans
    before: Spans
    completions: Tensor
    prompts: Tensor


def varlen_layout(segments: Tensor) -> VarlenLayout:
    """segments (B, L) int64: 0 prompt, 1, 2, ... completions, -1 padding."""
    batch, length = segments.shape
    rows = torch.arange(batch, device=segments.device)[:, None]
    # A number for every segment of every row: a sequence ends where it changes.
    _, own = (rows * (length + 2) + segments).flatten().unique_consecutive(return_counts=True)
    in_completion, in_prompt = segments > 0, segments == 0
    completion, prompt = in_completion.sum(dim=1), in_prompt.sum(dim=1)
    # One transfer for all three.
    longest, longest_completion, longest_prompt = torch.stack([own.max(), completion.max(), prompt.max()]).tolist()
    ends = _ends(own)
    return VarlenLayout(
        Spans(ends, ends, longest, longest, causal=True),
        Spans(_ends(completion), _ends(prompt), longest_completion, longest_prompt, causal=False),
        in_completion.flatten().nonzero()[:, 0],
        in_prompt.flatten().nonzero()[:, 0],
    )


def _ends(lengths: Tensor) -> Tensor:
    """(S,) lengths to (S + 1,) int32: where each sequence begins, and where the last one ends."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


class VarlenAttention(torch.autograd.Function):
    """(B, H, L, D) queries, (B, H / groups, L, D) keys and values to (B, L, H, D)."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float):
        batch, heads, length, size = query.shape
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        completions, prompts = layout.completions, layout.prompts
        out, lse = flash(query, key, value, layout.own, scale)
        out_before, lse_before = flash(query[completions], key[prompts], value[prompts], layout.before, scale)
        lse_own = lse.index_select(1, completions)
        share = (lse_before - lse_own).sigmoid().T[..., None].to(out.dtype)
        out.index_copy_(0, completions, torch.lerp(out[completions], out_before, share))
        lse.index_copy_(1, completions, torch.logaddexp(lse_own, lse_before))
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(query, key, value, out, lse)
        return out.view(batch, length, heads, size)

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, out, lse = ctx.saved_tensors
        layout, scale, (batch, length) = ctx.layout, ctx.scale, grad.shape[:2]
        completions, prompts = layout.completions, layout.prompts
        grad = grad.flatten(0, 1)
        # Both calls are given the merged outputs and normalisers: a part's gradient is then that of its own keys.
        totals = flash_backward(grad, query, key, value, out, lse, layout.own, scale)
        parts = flash_backward(
            *(grad[completions], query[completions], key[prompts], value[prompts]),
            *(out[completions], lse.index_select(1, completions), layout.before, scale),
        )
        for total, part, tokens in zip(totals, parts, (completions, prompts, prompts), strict=True):
            total[tokens] += part
        return *(x.unflatten(0, (batch, length)).transpose(1, 2) for x in totals), None, None


# -------------------------------------------------------------------------------------------------- the flash kernel


def why_not_flash(dtype: torch.dtype, head_size: int) -> str | None:
    """Why torch's flash attention can't run on this machine's GPU with such heads; None if it can."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no NVIDIA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not in {dtype}"
    if head_size % 8 or head_size > 256:
        return f"a head's size must be a multiple of 8 up to 256, not {head_size}"
    return None


def flash(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    """(T, H, D) queries, (U, H / groups, D) keys and values to outputs (T, H, D) and log-normalisers (H, T) float32."""
    if not query.is_cuda:
        return _plain(query, key, value, spans, scale)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *_sequences(spans), 0.0, spans.causal, False, scale=scale
    )
    return out, lse


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, P (dP - rowsum(dO O)) with P = e^(s - lse).

    grad and out (T, H, D), lse (H, T): of the whole softmax, of which the keys may be a part.
    """
    if not query.is_cuda:
        return _plain_backward(grad, query, key, value, out, lse, spans, scale)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse, *_sequences(spans), 0.0, spans.causal, *no_dropout, scale=scale
    )


def _sequences(spans: Spans) -> tuple[Tensor, Tensor, int, int]:
    # Where no sequence has a second query the kernel takes another path, which reshapes by the number of sequences
    # and has no place for an empty one. The length is only an upper bound.
    return spans.queries, spans.keys, max(spans.longest_query, 2), spans.longest_key


def _plain(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query)
    lse = out.new_empty(query.shape[1], query.shape[0], dtype=torch.promote_types(query.dtype, torch.float32))
    for queries, keys in _slices(spans):
        q, k, v = (_by_head(x, query.shape[1]) for x in (query[queries], key[keys], value[keys]))
        scores = _scores(q, k, spans.causal, scale)
        lse[:, queries] = scores.logsumexp(dim=2)
        out[queries] = (scores.softmax(dim=2) @ v).transpose(0, 1).to(out.dtype)
    return out, lse


def _plain_backward(grad, query, key, value, out, lse, spans, scale) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for queries, keys in _slices(spans):
        given = query[queries], key[keys], value[keys], grad[queries], out[queries]
        q, k, v, g, o = (_by_head(x, query.shape[1]) for x in given)
        weights = (_scores(q, k, spans.causal, scale) - lse[:, queries, None]).exp()
        of_scores = weights * (g @ v.mT - (g * o).sum(dim=2, keepdim=True)) * scale
        grads[0][queries] = (of_scores @ k).transpose(0, 1).to(query.dtype)
        for total, part in zip(grads[1:], (of_scores.mT @ q, weights.mT @ g), strict=True):
            total[keys] = part.unflatten(0, (total.shape[1], -1)).sum(dim=1).transpose(0, 1).to(key.dtype)
    return grads


def _slices(spans: Spans):
    queries, keys = spans.queries.tolist(), spans.keys.tolist()
    for i in range(len(queries) - 1):
        yield slice(*queries[i : i + 2]), slice(*keys[i : i + 2])


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(n, H / groups, D) to (H, n, D), float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    """(H, n, D) queries and (H, m, D) keys to (H, n, m)."""
    scores = scale * query @ key.mT
    later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")) if causal else scores
