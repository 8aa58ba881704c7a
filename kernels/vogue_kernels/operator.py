"""The operators that users call: exact statistics of one or two branches, per token, without logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import registration  # noqa: F401  torch.ops.vogue is complete once it is imported
from .branches import Head, Scaling
from .inputs import IGNORE, Rows, as_rows, heads_of
from .kept_logits import worth_keeping


class LogprobStats(NamedTuple):
    """Per-token statistics of one branch, each of the shape of the targets, in nats."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor  # log Σ e^logits
    top_logprob: Tensor  # that of the likeliest token, which the target is where logprob equals it; without gradient


class BranchStats(NamedTuple):
    """Per-token statistics of two branches, p and q, each of the shape of the targets, in nats."""

    logprob_p: Tensor
    logprob_q: Tensor
    entropy_p: Tensor
    entropy_q: Tensor
    kl_pq: Tensor  # KL(p‖q)
    kl_qp: Tensor  # KL(q‖p)
    symmetric_kl: Tensor  # ½ (KL(p‖q) + KL(q‖p))
    lse_p: Tensor  # log Σ e^logits
    lse_q: Tensor
    top_logprob_p: Tensor  # that of the likeliest token, which the target is where logprob equals it; without gradient
    top_logprob_q: Tensor


def linear_branch_stats(
    hidden_p: Tensor,
    hidden_q: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    *,
    softcap: float | None = None,
    weight_q: Tensor | None = None,
    bias_q: Tensor | None = None,
    keep_logits_bytes: int = 0,
    ignore_index: int = IGNORE,
    shift: bool = False,
) -> BranchStats:
    """Log-probabilities, entropies and both KL directions of two branches in one pass over the vocabulary.

    With p = softmax((W h_p + bias) / τ) and q the same of h_q; exact, with no (N, V) tensor. With a softcap c,
    p = softmax(c tanh((W h_p + bias) / c) / τ), and q the same.

    hidden_p, hidden_q: (..., D), with the dimensions of targets before D. weight: (V, D). targets: (...) integers; at
    -100, and at ignore_index, every result is 0 and no gradient flows. bias: (V,). All are on one device. Hidden states
    of another dtype are cast to the weight's, never the weight to theirs; a bias of any dtype is added in float32;
    float64 mixes with nothing. Under torch.autocast all three are cast as `torch.nn.functional.linear` casts them.
    temperature: τ, divides the logits. backend: "auto" (the fastest that can run), "torch", "cpu" or "triton". shift:
    targets are the tokens of the sequences themselves, (..., T); each hidden state is scored on the next one, and
    results are (..., T − 1).

    softcap: c, bounds every logit by ±c before the temperature (Gemma 2's `final_logit_softcapping`); None leaves them
    as they are. There is no scale of the logits besides: a factor s is temperature τ / s, and one before the cap is
    softcap c / s and temperature τ / s.

    weight_q, bias_q: a head of its own for branch q, such as a teacher's, (V, D_q) and (V,); hidden_q is then
    (..., D_q). The vocabulary and the dtype are those of `weight`. Without weight_q both branches have `weight` and
    `bias`; with it q has no bias but bias_q. Temperature and softcap are of both.

    keep_logits_bytes: memory to spend on a faster backward pass. Within it the logits of the first words of the
    vocabulary, all N · V of them at most, are kept in the inputs' dtype (on a CPU without a softcap: bfloat16 in eight
    bits, float32 in twenty); the others are computed again. Only those of a branch whose hidden states or own
    head require a gradient are kept (of both, if only a common weight or bias does), and none where no gradient is
    recorded. The results don't depend on it; gradients do by the rounding of what is kept. It helps where a loss is
    of log-probabilities and entropies: gradients of a divergence are computed without what is kept. With a softcap
    below 16 τ nothing is kept: rounded, it would not be exact enough.

    Results have the shape of targets and are float32 (float64 for float64 inputs), differentiable in the hidden states,
    weights and biases (once: there is no second derivative). The KLs are never negative, and 0 where the branches are
    identical. Only gradients that are asked for are computed.

    Raises TypeError for a dtype, ValueError for a shape, device, temperature, softcap, target or backend that can't be
    used, for a bias_q without weight_q, and for a weight that isn't whole: a DTensor, or a parameter that ZeRO-3 has
    partitioned. Raises RuntimeError while a CUDA graph is captured: finding the positions to skip waits for the GPU.
    """
    heads = heads_of(weight, bias, weight_q, bias_q)
    rows = as_rows({"hidden_p": hidden_p, "hidden_q": hidden_q}, heads, targets, ignore_index, shift)
    head, *own = rows.heads
    scaling = _scaling(temperature, softcap)
    args = (*rows.hiddens, head.weight, rows.targets, head.bias, scaling.temperature, backend)
    rest = _shares(keep_logits_bytes, rows, scaling), scaling.softcap, *(own[0] if own else ())
    return BranchStats(*rows.restore(torch.ops.vogue.linear_branch_stats(*args, *rest)[: len(BranchStats._fields)]))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    *,
    softcap: float | None = None,
    keep_logits_bytes: int = 0,
    ignore_index: int = IGNORE,
    shift: bool = False,
) -> LogprobStats:
    """Log-probability of the target and entropy of softmax((W h + bias) / τ) per token.

    hidden: (..., D); all else as in `linear_branch_stats`.
    """
    rows = as_rows({"hidden": hidden}, [Head(weight, bias)], targets, ignore_index, shift)
    (head,) = rows.heads
    scaling = _scaling(temperature, softcap)
    args = (*rows.hiddens, head.weight, rows.targets, head.bias, scaling.temperature, backend)
    rest = _shares(keep_logits_bytes, rows, scaling), scaling.softcap
    return LogprobStats(*rows.restore(torch.ops.vogue.linear_logprob(*args, *rest)[: len(LogprobStats._fields)]))


def _scaling(temperature: float, softcap: float | None) -> Scaling:
    return Scaling(float(temperature), None if softcap is None else float(softcap))


def _shares(keep_logits_bytes: int, rows: Rows, scaling: Scaling) -> list[int]:
    """Bytes for each branch's logits: nothing where no gradient can flow, as nothing would ever read them."""
    if keep_logits_bytes < 0:
        raise ValueError(f"keep_logits_bytes must not be negative, got {keep_logits_bytes}")
    trained = [hidden.requires_grad for hidden in rows.hiddens]
    heads = [any(x is not None and x.requires_grad for x in head) for head in rows.heads]
    if len(heads) == 2:
        trained = [hidden or head for hidden, head in zip(trained, heads, strict=True)]
    elif not any(trained):
        trained = heads * len(trained)
    share = keep_logits_bytes // max(sum(trained), 1) if torch.is_grad_enabled() and worth_keeping(scaling) else 0
    return [share if on else 0 for on in trained]
