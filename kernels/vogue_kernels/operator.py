"""The operators that users call: exact statistics of one or two branches, per token, without logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import registration  # noqa: F401  torch.ops.vogue is complete once it is imported
from .inputs import IGNORE, Rows, as_rows


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
    keep_logits_bytes: int = 0,
    ignore_index: int = IGNORE,
    shift: bool = False,
) -> BranchStats:
    """Log-probabilities, entropies and both KL directions of two branches in one pass over the vocabulary.

    With p = softmax((W h_p + bias) / τ) and q the same of h_q; exact, with no (N, V) tensor.

    hidden_p, hidden_q: (..., D), with the dimensions of targets before D. weight: (V, D). targets: (...) integers; at
    -100, and at ignore_index, every result is 0 and no gradient flows. bias: (V,). All are on one device. Hidden states
    of another dtype are cast to the weight's, never the weight to theirs; a bias of any dtype is added in float32;
    float64 mixes with nothing. Under torch.autocast all three are cast as `torch.nn.functional.linear` casts them.
    temperature: τ, divides the logits. backend: "auto" (the fastest that can run), "torch", "cpu" or "triton". shift:
    targets are the tokens of the sequences themselves, (..., T); each hidden state is scored on the next one, and
    results are (..., T − 1).

    keep_logits_bytes: memory to spend on a faster backward pass. Within it the logits of the first words of the
    vocabulary, all N · V of them at most, are kept in the inputs' dtype; the others are computed again. Only those of a
    branch whose hidden states require a gradient are kept (of both, if only weight or bias do), and none where no
    gradient is recorded. The results don't depend on it; gradients do by the rounding of what is kept. It helps where a
    loss is of log-probabilities and entropies: gradients of a divergence are computed without what is kept.

    Results have the shape of targets and are float32 (float64 for float64 inputs), differentiable in the hidden states,
    weight and bias (once: there is no second derivative). The KLs are never negative, and 0 where the branches are
    identical. Only gradients that are asked for are computed.

    Raises TypeError for a dtype, ValueError for a shape, device, temperature, target or backend that can't be used, and
    for a weight that isn't whole: a DTensor, or a parameter that ZeRO-3 has partitioned. Raises RuntimeError while a
    CUDA graph is captured: finding the positions to skip waits for the GPU.
    """
    rows = as_rows({"hidden_p": hidden_p, "hidden_q": hidden_q}, weight, targets, bias, ignore_index, shift)
    keep = _shares(keep_logits_bytes, rows)
    args = (*rows.hiddens, rows.weight, rows.targets, rows.bias, float(temperature), backend, keep)
    return BranchStats(*rows.restore(torch.ops.vogue.linear_branch_stats(*args)[: len(BranchStats._fields)]))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    *,
    keep_logits_bytes: int = 0,
    ignore_index: int = IGNORE,
    shift: bool = False,
) -> LogprobStats:
    """Log-probability of the target and entropy of softmax((W h + bias) / τ) per token.

    hidden: (..., D); all else as in `linear_branch_stats`.
    """
    rows = as_rows({"hidden": hidden}, weight, targets, bias, ignore_index, shift)
    keep = _shares(keep_logits_bytes, rows)
    args = (*rows.hiddens, rows.weight, rows.targets, rows.bias, float(temperature), backend, keep)
    return LogprobStats(*rows.restore(torch.ops.vogue.linear_logprob(*args)[: len(LogprobStats._fields)]))


def _shares(keep_logits_bytes: int, rows: Rows) -> list[int]:
    """Bytes for each branch's logits: nothing where no gradient can flow, as nothing would ever read them."""
    if keep_logits_bytes < 0:
        raise ValueError(f"keep_logits_bytes must not be negative, got {keep_logits_bytes}")
    trained = [hidden.requires_grad for hidden in rows.hiddens]
    if not any(trained):
        trained = [any(x is not None and x.requires_grad for x in (rows.weight, rows.bias))] * len(trained)
    share = keep_logits_bytes // max(sum(trained), 1) if torch.is_grad_enabled() else 0
    return [share if on else 0 for on in trained]
