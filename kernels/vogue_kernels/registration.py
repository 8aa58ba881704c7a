"""The torch.library operators: schema, fake and autograd, around a backend that sees only tokens that count.

Under ZeRO-3 the weight is gathered before a module's forward, released after it and gathered again before its
backward, each time by exchanging the parameter's `.data`. So the weight itself is saved for the backward pass, never a
view, copy or cast of it, and is read there anew.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import implementation
from .branches import Branch, Head, Needs, Scaling, compute_dtype, one_branch, two_branches
from .checks import check_arguments
from .inputs import IGNORE, heads_of
from .kept_logits import kept_bytes, serve


def _forward(backend: str, hiddens: list[Tensor], heads: list[Head], targets, scaling, keep) -> tuple[Tensor, ...]:
    """Run a backend on the tokens that aren't skipped; the skipped ones get zeros. The kept logits come last."""
    weight = heads[0].weight
    buffers = _empty_buffers(backend, weight, len(targets), scaling, keep)
    scored, length = _scored(targets, len(weight)), len(targets)
    if scored is not None:
        hiddens, targets = [hidden[scored] for hidden in hiddens], targets[scored]
    if len(targets) == 0:
        rows = _empty_rows(weight, length, 6 if len(hiddens) == 1 else 15)
        return *(torch.zeros_like(x) for x in rows), *buffers
    with _as_it_is(weight):
        results = implementation(backend, weight).forward(hiddens, heads, targets, scaling, buffers)
    return *(_restore(scored, result.to(compute_dtype(weight)), length) for result in results), *buffers


def _backward(
    backend: str, branches: list[Branch], heads: list[Head], targets, scaling, needed: Sequence[bool], buffers
) -> list[Any]:
    """The gradients that are needed, of the branches' hidden states, then of each head's weight and bias; contiguous,
    as the fakes say.
    """
    n, of_heads = len(branches), needed[len(branches) :][: 2 * len(heads)]
    needs = Needs(list(needed[:n]), list(of_heads[::2]), list(of_heads[1::2]))
    weight, length = heads[0].weight, len(targets)
    scored = _scored(targets, len(weight))
    if scored is not None:
        branches, targets = [branch.select(scored) for branch in branches], targets[scored]
    if len(targets) == 0 or not any(needs.of_logits(branches)):
        hiddens = [weight.new_empty(length, branch.hidden.shape[1]) for branch in branches]
        inputs = *hiddens, *(tensor for head in heads for tensor in head)
        return [gradient.zero_() for gradient in _empty_gradients(needed[: len(inputs)], inputs)]
    if not serve(branches):
        buffers = [buffer[:0] for buffer in buffers]
    with _as_it_is(weight):
        grads_hidden, grads_weight, grads_bias = implementation(backend, weight).backward(
            branches, heads, targets, scaling, needs, buffers
        )
    grads_hidden = [None if grad is None else _restore(scored, grad, length) for grad in grads_hidden]
    of_heads = [grad for pair in zip(grads_weight, grads_bias, strict=True) for grad in pair]
    return [grad.contiguous() for grad in (*grads_hidden, *of_heads) if grad is not None]


def _as_it_is(weight: Tensor):
    """Autocast switched off: backends choose each product's dtype themselves."""
    return torch.autocast(weight.device.type, enabled=False)


def _scored(targets: Tensor, vocab: int) -> Tensor | None:
    """Indices of the positions that aren't skipped, or None where that is all of them (then nothing is copied).

    Raises ValueError for a target outside the vocabulary. Both are found with one wait for the GPU.
    """
    if targets.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("vogue_kernels can't run inside a CUDA graph: it waits for the GPU to find targets to skip")
    if len(targets) == 0:
        return None
    lowest, highest = torch.stack(torch.aminmax(targets)).tolist()
    if lowest >= 0 and highest < vocab:
        return None
    skipped = targets == IGNORE
    bad = (((targets < 0) | (targets >= vocab)) & ~skipped).nonzero()
    if len(bad):
        position = int(bad[0])
        raise ValueError(
            f"targets[{position}] = {int(targets[position])} is outside [0, {vocab}); "
            f"only {IGNORE} marks a position to skip"
        )
    return (~skipped).nonzero().squeeze(1)


def _restore(scored: Tensor | None, tensor: Tensor, length: int) -> Tensor:
    """Put the scored positions back among zeros."""
    if scored is None:
        return tensor
    return tensor.new_zeros(length, *tensor.shape[1:]).index_copy_(0, scored, tensor)


# ---------------------------------------------------------------------------------------------------- linear_logprob

# Each operator returns its results first, then what the backward pass needs besides them. All wait for the GPU, which
# the tag tells torch.compile, so that mode="reduce-overhead" leaves them out of its CUDA graphs.
_TAGS = (torch.Tag.cudagraph_unsafe,)


def _empty_rows(weight: Tensor, length: int, count: int) -> tuple[Tensor, ...]:
    return tuple(weight.new_empty(length, dtype=compute_dtype(weight)) for _ in range(count))


def _empty_buffers(
    backend: str, weight: Tensor, length: int, scaling: Scaling, keep: Sequence[int]
) -> tuple[Tensor, ...]:
    """A buffer for each branch's kept logits, of bytes that the backend alone understands."""
    bits = implementation(backend, weight).kept_bits(weight.dtype, scaling)
    return tuple(weight.new_empty(kept_bytes(length, weight, bits, most), dtype=torch.uint8) for most in keep)


def _empty_gradients(needs: Sequence[bool], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Empty gradients of the inputs that need one, contiguous; an operator can't return None for the others."""
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for need, x in zip(needs, inputs, strict=True)
        if need and x is not None
    ]


def _spread(needs: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, with None where none is needed."""
    given = iter(gradients)
    return [next(given) if need else None for need in needs]


def _needs(ctx, *positions: int) -> list[bool]:
    """Whether the arguments at these positions need a gradient. torch drops the last ones that have their default."""
    given = ctx.needs_input_grad
    return [i < len(given) and given[i] for i in positions]


@torch.library.custom_op("vogue::linear_logprob", mutates_args=(), tags=_TAGS)
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    backend: str,
    keep: Sequence[int],
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, scaling = [Head(weight, bias)], Scaling(temperature, softcap)
    check_arguments({"hidden": hidden}, heads, targets, scaling)
    return _forward(backend, [hidden], heads, targets, scaling, keep)  # pyright: ignore[reportReturnType]


@_linear_logprob.register_fake
def _(hidden, weight, targets, bias, temperature, backend, keep, softcap=None):
    scaling, length = Scaling(temperature, softcap), targets.shape[0]
    check_arguments({"hidden": hidden}, [Head(weight, bias)], targets, scaling)
    return *_empty_rows(weight, length, 6), *_empty_buffers(backend, weight, length, scaling, keep)


@torch.library.custom_op("vogue::linear_logprob_backward", mutates_args=(), tags=_TAGS)
def _linear_logprob_backward(
    grads: Sequence[Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    backend: str,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    softcap: float | None = None,
) -> list[Tensor]:
    *saved, buffer = saved
    branches = one_branch(grads, hidden, saved, temperature)
    scaling = Scaling(temperature, softcap)
    return _backward(backend, branches, [Head(weight, bias)], targets, scaling, needs, [buffer])


@_linear_logprob_backward.register_fake
def _(grads, hidden, weight, targets, bias, temperature, backend, saved, needs, softcap=None):
    return _empty_gradients(needs, (hidden, weight, bias))


def _linear_logprob_setup(ctx, inputs, output):
    hidden, weight, targets, bias, ctx.temperature, ctx.backend, _, ctx.softcap = inputs
    ctx.set_materialize_grads(False)  # None is how a result says that nobody asks for its gradient
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(hidden, weight, targets, bias, output[1], *output[4:])


def _linear_logprob_autograd(ctx, *grads):
    hidden, weight, targets, bias, *saved = ctx.saved_tensors
    needs = _needs(ctx, 0, 1, 3)
    gradients = torch.ops.vogue.linear_logprob_backward(
        grads[:3], hidden, weight, targets, bias, ctx.temperature, ctx.backend, saved, needs, ctx.softcap
    )
    grad_hidden, grad_weight, grad_bias = _spread(needs, gradients)
    return grad_hidden, grad_weight, None, grad_bias, None, None, None, None


_linear_logprob.register_autograd(_linear_logprob_autograd, setup_context=_linear_logprob_setup)


# ---------------------------------------------------------------------------------------------- linear_branch_stats


@torch.library.custom_op("vogue::linear_branch_stats", mutates_args=(), tags=_TAGS)
def _linear_branch_stats(
    hidden_p: Tensor,
    hidden_q: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    backend: str,
    keep: Sequence[int],
    softcap: float | None = None,
    weight_q: Tensor | None = None,
    bias_q: Tensor | None = None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    heads, scaling = heads_of(weight, bias, weight_q, bias_q), Scaling(temperature, softcap)
    check_arguments({"hidden_p": hidden_p, "hidden_q": hidden_q}, heads, targets, scaling)
    results = _forward(backend, [hidden_p, hidden_q], heads, targets, scaling, keep)
    return results  # pyright: ignore[reportReturnType]


@_linear_branch_stats.register_fake
def _(hidden_p, hidden_q, weight, targets, bias, temperature, backend, keep, softcap=None, weight_q=None, bias_q=None):
    heads, hiddens = heads_of(weight, bias, weight_q, bias_q), {"hidden_p": hidden_p, "hidden_q": hidden_q}
    scaling, length = Scaling(temperature, softcap), targets.shape[0]
    check_arguments(hiddens, heads, targets, scaling)
    return *_empty_rows(weight, length, 15), *_empty_buffers(backend, weight, length, scaling, keep)


@torch.library.custom_op("vogue::linear_branch_stats_backward", mutates_args=(), tags=_TAGS)
def _linear_branch_stats_backward(
    grads: Sequence[Tensor | None],
    hidden_p: Tensor,
    hidden_q: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    backend: str,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    softcap: float | None = None,
    weight_q: Tensor | None = None,
    bias_q: Tensor | None = None,
) -> list[Tensor]:
    *saved, buffer_p, buffer_q = saved
    branches = two_branches(grads, hidden_p, hidden_q, saved, temperature)
    heads, scaling = heads_of(weight, bias, weight_q, bias_q), Scaling(temperature, softcap)
    return _backward(backend, branches, heads, targets, scaling, needs, [buffer_p, buffer_q])


@_linear_branch_stats_backward.register_fake
def _(
    grads, hidden_p, hidden_q, weight, targets, bias, temperature, backend, saved, needs,
    softcap=None, weight_q=None, bias_q=None,
):  # fmt: skip
    return _empty_gradients(needs, (hidden_p, hidden_q, weight, bias, weight_q, bias_q))


def _linear_branch_stats_setup(ctx, inputs, output):
    hidden_p, hidden_q, weight, targets, bias, ctx.temperature, ctx.backend, _, ctx.softcap, weight_q, bias_q = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[9:])
    ctx.save_for_backward(hidden_p, hidden_q, weight, targets, bias, weight_q, bias_q, *output[2:6], *output[11:])


def _linear_branch_stats_autograd(ctx, *grads):
    hidden_p, hidden_q, weight, targets, bias, weight_q, bias_q, *saved = ctx.saved_tensors
    needs = _needs(ctx, 0, 1, 2, 4, 9, 10)
    gradients = torch.ops.vogue.linear_branch_stats_backward(
        grads[:9], hidden_p, hidden_q, weight, targets, bias, ctx.temperature, ctx.backend, saved, needs,
        ctx.softcap, weight_q, bias_q,
    )  # fmt: skip
    grad_p, grad_q, grad_weight, grad_bias, grad_weight_q, grad_bias_q = _spread(needs, gradients)
    return grad_p, grad_q, grad_weight, None, grad_bias, None, None, None, None, grad_weight_q, grad_bias_q


_linear_branch_stats.register_autograd(_linear_branch_stats_autograd, setup_context=_linear_branch_stats_setup)
