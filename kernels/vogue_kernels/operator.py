"""The torch.library operators: schema, fake, autograd, input checks and the choice of the backend.

Under ZeRO-3 the weight is gathered before a module's forward, released after it and gathered again before its
backward, each time by exchanging the parameter's `.data`. So the weight itself is saved for the backward pass, never a
view, copy or cast of it, and is read there anew.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .branches import Branch, compute_dtype, one_branch, two_branches
from .kept import kept_bytes, serves

IGNORE = -100  # the target of a position to skip, as in torch.nn.functional.cross_entropy


class LogprobStats(NamedTuple):
    """Per-token statistics of one branch, each (N,), in nats."""

    logprob: Tensor
    entropy: Tensor


class BranchStats(NamedTuple):
    """Per-token statistics of two branches, p and q, each (N,), in nats."""

    logprob_p: Tensor
    logprob_q: Tensor
    entropy_p: Tensor
    entropy_q: Tensor
    kl_pq: Tensor  # KL(p‖q)
    kl_qp: Tensor  # KL(q‖p)
    symmetric_kl: Tensor  # ½ (KL(p‖q) + KL(q‖p))


def linear_branch_stats(
    hidden_p: Tensor,
    hidden_q: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    keep_logits_bytes: int = 0,
) -> BranchStats:
    """Log-probabilities, entropies and both KL directions of two branches in one pass over the vocabulary.

    With p = softmax((W h_p + bias) / τ) and q the same of h_q; exact, with no (N, V) tensor.

    hidden_p, hidden_q: (N, D); weight: (V, D), bias: (V,), all of one dtype and device. targets: (N,) int64; at
    -100 every result is 0 and no gradient flows. temperature: τ, divides the logits.
    backend: "auto" (the fastest that can run), "torch", "cpu" or "triton".
    keep_logits_bytes: memory to spend on a faster backward pass. Within it the logits of the first words of the
    vocabulary, all N · V of them at most, are kept in the inputs' dtype; the others are computed again. Only those of a
    branch whose hidden states require a gradient are kept (of both, if only weight or bias do), and none where no
    gradient is recorded. The results don't depend on it; gradients do by the rounding of what is kept. In 16 bits those
    of a divergence are computed without it: it helps where a loss is of log-probabilities and entropies.

    Results are (N,) float32 (float64 for float64 inputs), differentiable in the hidden states, weight and bias (once:
    there is no second derivative). The KLs are never negative, and 0 where the branches are identical. Only gradients
    that are asked for are computed.

    Raises TypeError for a dtype, ValueError for a shape, device, temperature, target or backend that can't be used.
    """
    keep = _shares(keep_logits_bytes, [hidden_p, hidden_q], [weight, bias])
    args = (hidden_p, hidden_q, weight, targets, bias, float(temperature), backend, keep)
    return BranchStats(*torch.ops.vogue.linear_branch_stats(*args)[:7])


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    keep_logits_bytes: int = 0,
) -> LogprobStats:
    """Log-probability of the target and entropy of softmax((W h + bias) / τ) per token.

    hidden: (N, D); all else as in `linear_branch_stats`.
    """
    keep = _shares(keep_logits_bytes, [hidden], [weight, bias])
    args = (hidden, weight, targets, bias, float(temperature), backend, keep)
    return LogprobStats(*torch.ops.vogue.linear_logprob(*args)[:2])


def _shares(keep_logits_bytes: int, hiddens: list[Tensor], shared: list[Tensor | None]) -> list[int]:
    """Bytes for each branch's logits: nothing where no gradient can flow, as nothing would ever read them."""
    if keep_logits_bytes < 0:
        raise ValueError(f"keep_logits_bytes must not be negative, got {keep_logits_bytes}")
    trained = [hidden.requires_grad for hidden in hiddens]
    if not any(trained):
        trained = [any(x is not None and x.requires_grad for x in shared)] * len(hiddens)
    share = keep_logits_bytes // max(sum(trained), 1) if torch.is_grad_enabled() else 0
    return [share if on else 0 for on in trained]


# ---------------------------------------------------------------------------------------------------- backends

_BACKENDS = {"triton": ".gpu", "cpu": ".cpu", "torch": ".reference"}  # the fastest first; imported when first used


def available_backends() -> dict[str, str | None]:
    """Every backend, the fastest first: None if it can run here, else the reason why it can't."""
    return {
        "triton": _why_not_triton(),
        "cpu": _why_not_cpu(),
        "torch": None,
    }


def _why_not_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton isn't installed"
    if not torch.cuda.is_available() and not _interpreting():
        return "no GPU (TRITON_INTERPRET=1 runs its kernels on the CPU, for tests)"
    return None


def _why_not_cpu() -> str | None:
    return importlib.import_module(".cpu", __package__).why_not()


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _refusal(name: str, weight: Tensor) -> str | None:
    """Why a backend can't take tensors like this one."""
    if name != "torch" and weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32; use torch for {weight.dtype}"
    if name == "cpu" and weight.device.type != "cpu":
        return f"the tensors are on {weight.device}"
    if name == "triton" and not weight.is_cuda and not _interpreting():
        return f"the tensors are on {weight.device}"
    return None


@cache
def _warn_of_reference(reason: str) -> None:
    warnings.warn(f"vogue_kernels runs with PyTorch operators, not with compiled kernels: {reason}", stacklevel=2)


def _implementation(backend: str, weight: Tensor):
    reasons = {name: reason or _refusal(name, weight) for name, reason in available_backends().items()}
    if backend == "auto":  # the interpreter is for those who ask for it
        backend = next(name for name, reason in reasons.items() if not reason and (weight.is_cuda or name != "triton"))
        if backend == "torch" and weight.device.type == "cpu" and (reason := available_backends()["cpu"]):
            _warn_of_reference(reason)
    elif backend not in reasons:
        raise ValueError(f"unknown backend {backend!r}: choose one of auto, {', '.join(reasons)}")
    elif reasons[backend] is not None:
        raise ValueError(f"backend {backend!r} can't run: {reasons[backend]}")
    return importlib.import_module(_BACKENDS[backend], __package__)


def _forward(backend: str, hiddens: list[Tensor], weight, targets, bias, temperature, keep) -> tuple[Tensor, ...]:
    """Run a backend on the tokens that aren't skipped; the skipped ones get zeros. The kept logits come last."""
    buffers = _empty_buffers(weight, len(targets), keep)
    kept, length = _kept(targets), len(targets)
    if kept is not None:
        hiddens, targets = [hidden[kept] for hidden in hiddens], targets[kept]
    if len(targets) == 0:
        rows = _empty_rows(weight, length, 4 if len(hiddens) == 1 else 11)
        return *(torch.zeros_like(x) for x in rows), *buffers
    results = _implementation(backend, weight).forward(hiddens, weight, targets, bias, temperature, buffers)
    return *(_restore(kept, result.to(compute_dtype(weight)), length) for result in results), *buffers


def _backward(backend: str, branches: list[Branch], weight, targets, bias, temperature, needs, buffers) -> list[Any]:
    """The gradients of hidden states, weight and bias that are needed, in this order."""
    *needs_hidden, needs_weight, needs_bias = needs
    kept, length = _kept(targets), len(targets)
    if kept is not None:
        branches, targets = [branch.select(kept) for branch in branches], targets[kept]
    wanted = [need or needs_weight or needs_bias for need in needs_hidden]
    if len(targets) == 0 or not any(branch.used and want for branch, want in zip(branches, wanted, strict=True)):
        hiddens = [weight.new_zeros(length, weight.shape[1])] * len(branches)
        return [torch.zeros_like(x) for need, x in zip(needs, (*hiddens, weight, bias), strict=True) if need]
    if not serves(branches, weight):
        buffers = [buffer[:0] for buffer in buffers]
    grads_hidden, grad_weight, grad_bias = _implementation(backend, weight).backward(
        branches, weight, targets, bias, temperature, needs_hidden, needs_weight, needs_bias, buffers
    )
    grads_hidden = [None if grad is None else _restore(kept, grad, length) for grad in grads_hidden]
    return [grad for need, grad in zip(needs, (*grads_hidden, grad_weight, grad_bias), strict=True) if need]


def _kept(targets: Tensor) -> Tensor | None:
    """Indices of the positions that aren't skipped, or None where that is all of them (then nothing is copied)."""
    kept = (targets != IGNORE).nonzero().squeeze(1)
    return None if len(kept) == len(targets) else kept


def _restore(kept: Tensor | None, tensor: Tensor, length: int) -> Tensor:
    """Put the kept positions back among zeros."""
    if kept is None:
        return tensor
    return tensor.new_zeros(length, *tensor.shape[1:]).index_copy_(0, kept, tensor)


# ---------------------------------------------------------------------------------------------------- checks


def _check_shapes(hiddens: dict[str, Tensor], weight: Tensor, targets: Tensor, bias: Tensor | None, temperature):
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
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        name: (hidden, (len(targets), weight.shape[1])) for name, hidden in hiddens.items()
    }
    if bias is not None:
        expected["bias"] = (bias, (len(weight),))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape}, got {tuple(tensor.shape)}, "
                f"with weight {tuple(weight.shape)} and targets {tuple(targets.shape)}"
            )
        if tensor.dtype != weight.dtype:
            raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {tensor.dtype}")
    for name, tensor in {**{name: tensor for name, (tensor, _) in expected.items()}, "targets": targets}.items():
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {tensor.device}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _check_targets(targets: Tensor, vocab: int):
    bad = ((targets < 0) | (targets >= vocab)) & (targets != IGNORE)
    if bad.any():  # waits for the GPU, as finding the positions to skip does
        position = int(bad.nonzero()[0])
        raise ValueError(
            f"targets[{position}] = {int(targets[position])} is outside [0, {vocab}); "
            f"only {IGNORE} marks a position to skip"
        )


# ---------------------------------------------------------------------------------------------------- linear_logprob

# Each operator returns its results first, then what the backward pass needs besides them.


def _empty_rows(weight: Tensor, length: int, count: int) -> tuple[Tensor, ...]:
    return tuple(weight.new_empty(length, dtype=compute_dtype(weight)) for _ in range(count))


def _empty_buffers(weight: Tensor, length: int, keep: Sequence[int]) -> tuple[Tensor, ...]:
    """A buffer for each branch's kept logits, opaque bytes, so that their size doesn't depend on the backend."""
    return tuple(weight.new_empty(kept_bytes(length, weight, at_most), dtype=torch.uint8) for at_most in keep)


def _empty_gradients(needs: Sequence[bool], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Empty gradients of the inputs that need one; an operator can't return None for the others."""
    return [torch.empty_like(x) for need, x in zip(needs, inputs, strict=True) if need and x is not None]


def _spread(needs: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, with None where none is needed."""
    given = iter(gradients)
    return [next(given) if need else None for need in needs]


@torch.library.custom_op("vogue::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    backend: str,
    keep: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_shapes({"hidden": hidden}, weight, targets, bias, temperature)
    _check_targets(targets, len(weight))
    return _forward(backend, [hidden], weight, targets, bias, temperature, keep)  # pyright: ignore[reportReturnType]


@_linear_logprob.register_fake
def _(hidden, weight, targets, bias, temperature, backend, keep):
    _check_shapes({"hidden": hidden}, weight, targets, bias, temperature)
    return *_empty_rows(weight, targets.shape[0], 4), *_empty_buffers(weight, targets.shape[0], keep)


@torch.library.custom_op("vogue::linear_logprob_backward", mutates_args=())
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
) -> list[Tensor]:
    *saved, buffer = saved
    branches = one_branch(grads, hidden, saved, temperature)
    return _backward(backend, branches, weight, targets, bias, temperature, needs, [buffer])


@_linear_logprob_backward.register_fake
def _(grads, hidden, weight, targets, bias, temperature, backend, saved, needs):
    return _empty_gradients(needs, (hidden, weight, bias))


def _linear_logprob_setup(ctx, inputs, output):
    hidden, weight, targets, bias, ctx.temperature, ctx.backend, _ = inputs
    ctx.set_materialize_grads(False)  # None is how a result says that nobody asks for its gradient
    ctx.save_for_backward(hidden, weight, targets, bias, *output[1:])


def _linear_logprob_autograd(ctx, *grads):
    hidden, weight, targets, bias, *saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = torch.ops.vogue.linear_logprob_backward(
        grads[:2], hidden, weight, targets, bias, ctx.temperature, ctx.backend, saved, needs
    )
    grad_hidden, grad_weight, grad_bias = _spread(needs, gradients)
    return grad_hidden, grad_weight, None, grad_bias, None, None, None


_linear_logprob.register_autograd(_linear_logprob_autograd, setup_context=_linear_logprob_setup)


# ---------------------------------------------------------------------------------------------- linear_branch_stats


@torch.library.custom_op("vogue::linear_branch_stats", mutates_args=())
def _linear_branch_stats(
    hidden_p: Tensor,
    hidden_q: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    backend: str,
    keep: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_shapes({"hidden_p": hidden_p, "hidden_q": hidden_q}, weight, targets, bias, temperature)
    _check_targets(targets, len(weight))
    results = _forward(backend, [hidden_p, hidden_q], weight, targets, bias, temperature, keep)
    return results  # pyright: ignore[reportReturnType]


@_linear_branch_stats.register_fake
def _(hidden_p, hidden_q, weight, targets, bias, temperature, backend, keep):
    _check_shapes({"hidden_p": hidden_p, "hidden_q": hidden_q}, weight, targets, bias, temperature)
    return *_empty_rows(weight, targets.shape[0], 11), *_empty_buffers(weight, targets.shape[0], keep)


@torch.library.custom_op("vogue::linear_branch_stats_backward", mutates_args=())
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
) -> list[Tensor]:
    *saved, buffer_p, buffer_q = saved
    branches = two_branches(grads, hidden_p, hidden_q, saved, temperature)
    return _backward(backend, branches, weight, targets, bias, temperature, needs, [buffer_p, buffer_q])


@_linear_branch_stats_backward.register_fake
def _(grads, hidden_p, hidden_q, weight, targets, bias, temperature, backend, saved, needs):
    return _empty_gradients(needs, (hidden_p, hidden_q, weight, bias))


def _linear_branch_stats_setup(ctx, inputs, output):
    hidden_p, hidden_q, weight, targets, bias, ctx.temperature, ctx.backend, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_p, hidden_q, weight, targets, bias, *output[2:6], *output[7:])


def _linear_branch_stats_autograd(ctx, *grads):
    hidden_p, hidden_q, weight, targets, bias, *saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    gradients = torch.ops.vogue.linear_branch_stats_backward(
        grads[:7], hidden_p, hidden_q, weight, targets, bias, ctx.temperature, ctx.backend, saved, needs
    )
    grad_p, grad_q, grad_weight, grad_bias = _spread(needs, gradients)
    return grad_p, grad_q, grad_weight, None, grad_bias, None, None, None


_linear_branch_stats.register_autograd(_linear_branch_stats_autograd, setup_context=_linear_branch_stats_setup)
