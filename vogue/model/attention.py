"""Attention of rows that share a prompt (see packing): the prompt is attended to once for all its completions.

A completion's token attends to the prompt, all of it, and to its own completion up to itself. The softmax over both
is the mixture of the softmax over each, weighed by its share of the normaliser (arXiv 2205.14135): with (o, l) and
(o', l') the outputs and log-normalisers over prompt and completion,

    l* = log(e^l + e^l')        o* = e^(l - l*) o + e^(l' - l*) o'

so no score between two completions is ever computed, where a mask would compute and then discard it. The backward pass
gives every part the whole o* and l*: a flash kernel's gradient, P (dP - rowsum(dO O)) with P = e^(s - l*), is then that
of the part's own keys.

`attention_inputs` gives a transformers model whatever its attention implementation takes: this layout on a CPU, that
of `vogue.model.varlen` on a GPU, FlexAttention's block mask, or a boolean mask for plain SDPA.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward

from vogue.model.varlen import VarlenAttention, VarlenLayout, varlen_layout, why_not_flash

PAD = -1  # segment of padding
# Names under which transformers finds them; it offers its own flex_attention to some models only.
PARTS, VARLEN, FLEX = "shared_prefix", "shared_prefix_varlen", "shared_prefix_flex"
OWN = (PARTS, VARLEN, FLEX)
MASKED = ("sdpa", FLEX)  # those that take any mask
IMPLEMENTATIONS = (*OWN, "sdpa")


@dataclass(frozen=True)
class Layout:
    """Where prompts and completions lie in (B, L) segments, whose B L tokens count as one sequence.

    `shortest`, `longest`: tokens of a prompt. `in_prompt` (B, L) bool. `prompt_bias` (B, 1, 1, longest): added to the
    scores of the first `longest` keys, -inf past the row's prompt; None where all prompts are as long.
    `tokens` (N,): the completions' tokens. `padded` (C, T): the tokens of each of C completions, its first one once
    more for each that it has less than T. `inside` (N,): which of those C T are meant, and `past_end` (C, 1, T, 1) bool
    which aren't; None where all are. `tail` (N,) and `padded_tail` (C, T): `tokens` and `padded` in rows without their
    first `shortest` tokens.
    """

    shortest: int
    longest: int
    in_prompt: Tensor
    prompt_bias: Tensor | None
    tokens: Tensor
    padded: Tensor
    inside: Tensor | None
    past_end: Tensor | None
    tail: Tensor
    padded_tail: Tensor


def automatic(dtype: torch.dtype, head_size: int) -> str:
    """The implementation for a model of this dtype and size of heads, on this machine's GPU or, without one, its CPU.

    On a GPU it is the one that compiles nothing: FlexAttention is compiled again for new shapes, and after too many
    of them runs without fusing, with all scores in memory.
    """
    if not torch.cuda.is_available():
        return PARTS
    return "sdpa" if why_not_flash(dtype, head_size) else VARLEN


def attention_inputs(implementation: str, segments: Tensor, dtype: torch.dtype) -> dict:
    """Inputs of a transformers model that let token i attend to j <= i of its row's prompt and its own completion.

    segments (B, L) int64: 0 prompt, 1, 2, ... completions, -1 padding, which attends to padding alone.
    """
    if implementation == PARTS:
        return {"shared_prefix": _layout(segments, dtype)}
    if implementation == VARLEN:
        return {"shared_prefix": varlen_layout(segments)}
    if implementation == FLEX:
        return {"attention_mask": _block_mask(segments)}
    return {"attention_mask": boolean_mask(segments)}


def boolean_mask(segments: Tensor) -> Tensor:
    """(B, L) segments to a (B, 1, L, L) mask, true where attention is allowed."""
    length = segments.shape[1]
    at = torch.arange(length, device=segments.device)
    return _allowed(segments[:, :, None], segments[:, None, :], at[:, None] >= at)[:, None]


def layer_masks(implementation: str, segments: Tensor, types: Tensor, positions: Tensor, window: int) -> dict:
    """What each kind of Gemma 3's layers takes as its mask: token i attends to j of its prompt and its own completion,

        in layers of full attention      where j <= i, or i and j are of the same image
        in those of sliding windows      where, besides, position(i) - position(j) < window

    The second completion of a row lies further behind the prompt than its positions say; a window counts positions.
    segments, types (1 at image tokens), positions: (B, L) int64. `implementation` is one of `MASKED`.
    """
    begins = torch.ones_like(types, dtype=torch.bool)
    begins[:, 1:] = types[:, 1:] != types[:, :-1]
    images = begins.cumsum(dim=1).masked_fill(types != 1, -1)  # (B, L): a number for each image of a row

    def full(row, head, query, key):
        same_image = (images[row, query] == images[row, key]) & (images[row, key] >= 0)
        return _allowed(segments[row, query], segments[row, key], (query >= key) | same_image)

    def sliding(row, head, query, key):
        return full(row, head, query, key) & (positions[row, query] - positions[row, key] < window)

    return {
        name: _mask_of(rule, implementation, segments)
        for name, rule in (("full_attention", full), ("sliding_attention", sliding))
    }


def _mask_of(rule, implementation: str, segments: Tensor):
    """The mask of a rule of (row, head, query, key), as an implementation takes it."""
    batch, length = segments.shape
    if implementation == FLEX:
        return create_block_mask(rule, batch, None, length, length, device=segments.device)
    at = torch.arange(length, device=segments.device)
    row = torch.arange(batch, device=segments.device)[:, None, None, None]
    return rule(row, None, at[:, None], at)


def _block_mask(segments: Tensor):
    def allowed(row, head, query, key):
        return _allowed(segments[row, query], segments[row, key], query >= key)

    batch, length = segments.shape
    return create_block_mask(allowed, batch, None, length, length, device=segments.device)


def _allowed(query: Tensor, key: Tensor, causal: Tensor) -> Tensor:
    # Padding attends to padding, so that no row of the softmax is empty.
    return causal & ((key == query) | ((key == 0) & (query != PAD)))


def _layout(segments: Tensor, dtype: torch.dtype) -> Layout:
    batch, length = segments.shape
    in_prompt = segments == 0
    prompt = in_prompt.sum(dim=1)
    shortest, longest = int(prompt.min()), int(prompt.max())
    bias = None
    if shortest < longest:
        bias = torch.zeros(batch, longest, dtype=dtype, device=segments.device)
        bias = bias.masked_fill(~in_prompt[:, :longest], float("-inf"))[:, None, None]
    tokens = (segments > 0).flatten().nonzero()[:, 0]
    # Completions lie one after the other; a new one begins where the segment, or the row, changes.
    _, lengths = (tokens // length * (length + 1) + segments.flatten()[tokens]).unique_consecutive(return_counts=True)
    starts = tokens[lengths.cumsum(0) - lengths][:, None]
    offset = torch.arange(int(lengths.max()), device=segments.device)
    real = offset < lengths[:, None]
    padded = torch.where(real, starts + offset, starts)
    inside = past_end = None
    if not real.all():
        inside, past_end = real.flatten().nonzero()[:, 0], ~real[:, None, :, None]
    at = torch.arange(batch * length, device=segments.device)
    at -= (at // length + 1) * shortest
    return Layout(shortest, longest, in_prompt, bias, tokens, padded, inside, past_end, at[tokens], at[padded])


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    shared_prefix: Layout | VarlenLayout,
    **_,
) -> tuple[Tensor, None]:
    """(B, H, L, D) queries and (B, H / groups, L, D) keys and values to (B, L, H, D); of no use at padding.

    Raises ValueError for dropout.
    """
    if dropout:
        raise ValueError(f"attention_dropout is {dropout}: rows that share a prompt need it to be 0")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(shared_prefix, VarlenLayout):
        return VarlenAttention.apply(query, key, value, shared_prefix, scaling), None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    return _SharedPrefixAttention.apply(query, key, value, shared_prefix, scaling), None


AttentionInterface.register(PARTS, shared_prefix_attention)
AttentionInterface.register(VARLEN, shared_prefix_attention)
AttentionInterface.register(FLEX, flex_attention_forward)

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _SharedPrefixAttention(torch.autograd.Function):
    """Three calls of the flash kernel: prompts on themselves, what follows on prompts, completions on themselves.

    The first two take slices of the rows, which where prompts differ in length hold tokens of the other kind; what
    those get is overwritten, and they pass no gradient on.
    """

    @staticmethod
    def forward(ctx, query, key, value, layout: Layout, scale: float):
        head, tail = slice(0, layout.longest), slice(layout.shortest, None)
        prompt = [query[:, :, head], key[:, :, head], value[:, :, head]]
        out_prompt, lse_prompt = _forward(*prompt, 0.0, True, scale=scale)
        out_tail, lse_tail = _forward(
            query[:, :, tail], *prompt[1:], 0.0, False, attn_mask=layout.prompt_bias, scale=scale
        )
        own = [_completions(x, layout) for x in (query, key, value)]
        of_own = _forward(*own, 0.0, True, scale=scale)
        out_own, lse_own = (_only(x.transpose(1, 2).flatten(0, 1), layout) for x in of_own)

        lse_tail = lse_tail.transpose(1, 2).contiguous()  # (B, L - shortest, H)
        before_lse = lse_tail.flatten(0, 1)[layout.tail]
        before = out_tail.transpose(1, 2).flatten(0, 1)[layout.tail]
        share = (lse_own - before_lse).sigmoid()[..., None].to(before.dtype)
        lse_tail.flatten(0, 1).index_copy_(0, layout.tail, torch.logaddexp(before_lse, lse_own))
        out = _zeros_like(query)
        out[:, head] = out_prompt.transpose(1, 2)
        out.flatten(0, 1).index_copy_(0, layout.tokens, torch.lerp(before, out_own, share))
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(query, key, value, out, lse_prompt, lse_tail)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse_prompt, lse_tail = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        head, tail = slice(0, layout.longest), slice(layout.shortest, None)
        to_prompt = to_tail = grad
        if layout.prompt_bias is not None:
            to_prompt = grad.where(layout.in_prompt[..., None, None], 0)
            to_tail = grad - to_prompt
        out = out.transpose(1, 2)
        to_prompt, to_tail = to_prompt.transpose(1, 2), to_tail.transpose(1, 2)
        prompt = [query[:, :, head], key[:, :, head], value[:, :, head]]
        of_prompt = _backward(to_prompt[:, :, head], *prompt, out[:, :, head], lse_prompt, 0.0, True, scale=scale)
        of_tail = _backward(
            *(to_tail[:, :, tail], query[:, :, tail], *prompt[1:], out[:, :, tail], lse_tail.transpose(1, 2)),
            *(0.0, False),
            attn_mask=layout.prompt_bias,
            scale=scale,
        )
        own = [_completions(x, layout) for x in (to_tail, query, key, value, out)]
        if layout.past_end is not None:  # passes no gradient on
            own[0] = own[0].masked_fill(layout.past_end, 0)
        own_lse = lse_tail.flatten(0, 1)[layout.padded_tail].transpose(1, 2)
        of_own = _backward(*own, own_lse, 0.0, True, scale=scale)

        grads = []
        for i in range(3):
            total = _zeros_like(query)
            total[:, head] = of_prompt[i].transpose(1, 2)
            total[:, tail if i == 0 else head] += of_tail[i].transpose(1, 2)
            total.flatten(0, 1).index_add_(0, layout.tokens, _only(of_own[i].transpose(1, 2).flatten(0, 1), layout))
            grads.append(total.transpose(1, 2))
        return *grads, None, None


def _zeros_like(x: Tensor) -> Tensor:
    """(B, H, L, D) to zeros (B, L, H, D)."""
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3])


def _completions(x: Tensor, layout: Layout) -> Tensor:
    """(B, H, L, D) to (C, H, T, D): every completion's own tokens."""
    return x.transpose(1, 2).flatten(0, 1)[layout.padded].transpose(1, 2)


def _only(x: Tensor, layout: Layout) -> Tensor:
    """(C T, ...) to (N, ...): without what stands past a completion's end."""
    return x if layout.inside is None else x[layout.inside]
