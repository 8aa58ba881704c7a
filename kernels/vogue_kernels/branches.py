"""What the backends have in common: heads, branches in the backward pass, the running sums of the compiled kernels.

A backend is a module with three functions; the latter two take checked arguments and tokens none of which is skipped:

    kept_bits(dtype, scaling)
        in how many bits it keeps a logit of inputs of this type.
    forward(hiddens, heads, targets, scaling, buffers)
        one branch: the results of LogprobStats, then maximum and logsum; two: the results of BranchStats, then maximum
        and logsum of each; all (N,). Maximum and logsum are for the backward pass, which alone understands them.
        So are the logits that it writes to the buffers, one for each branch, as far as they have room (kept_logits.py).
    backward(branches, heads, targets, scaling, needs, buffers)
        (gradients of the branches' hidden states, of the heads' weights, of their biases), three lists with None where
        `needs` says that they aren't needed.

There is one head, of both branches, or one for each. Two have one vocabulary and one dtype; their widths may differ.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

LN2 = math.log(2)
T = TypeVar("T")


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the computation and of its results."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class Head(NamedTuple):
    """An output projection: its logits are z = W h + bias."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)


class HeadGradients(NamedTuple):
    """Gradients of a head, or parts of them, where they are needed."""

    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


class Scaling(NamedTuple):
    """What becomes of a logit z before the softmax: l / τ, where l = c tanh(z / c) with a softcap c, else z.

    A gradient of l times the slope ∂l/∂z = 1 − (l / c)² is one of z.
    """

    temperature: float
    softcap: float | None


def of_branch(each: Sequence[T], i: int) -> T:
    """What belongs to the head of branch i, of one for each head."""
    return each[-1] if i else each[0]  # the second branch has the last head, be it its own or the only one


class Branch(NamedTuple):
    """One branch in the backward pass: p is its own softmax, q the other's. All but `hidden` are (N,)."""

    hidden: Tensor
    maximum: Tensor
    logsum: Tensor
    entropy: Tensor
    kl: Tensor | None  # KL(p‖q)
    g_logprob: Tensor | None  # what arrives at a result, over τ: ∂/∂l = ∂/∂(l / τ) / τ
    g_entropy: Tensor | None
    g_kl: Tensor | None  # of KL(p‖q)
    g_kl_other: Tensor | None  # of KL(q‖p)
    g_lse: Tensor | None

    @property
    def crosses(self) -> bool:
        """Whether the gradient of this branch's logits depends on the other branch."""
        return self.g_kl is not None or self.g_kl_other is not None

    @property
    def used(self) -> bool:
        """Whether this branch's logits have a gradient."""
        return self.crosses or any(g is not None for g in (self.g_logprob, self.g_entropy, self.g_lse))

    def select(self, index) -> "Branch":
        return Branch(*(field if field is None else field[index] for field in self))  # pyright: ignore[reportArgumentType]


class Needs(NamedTuple):
    """Which gradients are asked for: of each branch's hidden states, of each head's weight and bias."""

    hidden: list[bool]
    weight: list[bool]
    bias: list[bool]

    def of_logits(self, branches: list[Branch]) -> list[bool]:
        """Of which branches' logits the gradient is computed: it isn't 0, and something is asked for that it's in."""
        return [
            branch.used and (hidden or of_branch(self.weight, i) or of_branch(self.bias, i))
            for i, (branch, hidden) in enumerate(zip(branches, self.hidden, strict=True))
        ]


def one_branch(grads, hidden, saved, temperature) -> list[Branch]:
    """Collect what the backward pass of `linear_logprob` needs.

    grads: gradients that arrive at (logprob, entropy, lse), each (N,) or None. saved: (entropy, maximum, logsum).
    """
    entropy, maximum, logsum = saved
    g_logprob, g_entropy, g_lse = _over(grads, temperature)
    return [Branch(hidden, maximum, logsum, entropy, None, g_logprob, g_entropy, None, None, g_lse)]


def two_branches(grads, hidden_p, hidden_q, saved, temperature) -> list[Branch]:
    """Collect what the backward pass of `linear_branch_stats` needs of both branches.

    grads: gradients that arrive at the nine results before the likeliest tokens', each (N,) or None.
    saved: (entropy_p, entropy_q, kl_pq, kl_qp, then maximum and logsum of p and of q).
    """
    g_logp_p, g_logp_q, g_ent_p, g_ent_q, g_forward, g_reverse, g_symmetric, *g_lse = _over(grads, temperature)
    ent_p, ent_q, kl_forward, kl_reverse, max_p, logsum_p, max_q, logsum_q = saved
    if g_symmetric is not None:
        half = g_symmetric / 2
        g_forward = half if g_forward is None else g_forward + half
        g_reverse = half if g_reverse is None else g_reverse + half
    of_p = (g_logp_p, g_ent_p, g_forward, g_reverse, g_lse[0])
    of_q = (g_logp_q, g_ent_q, g_reverse, g_forward, g_lse[1])
    return [
        Branch(hidden_p, max_p, logsum_p, ent_p, kl_forward, *of_p),
        Branch(hidden_q, max_q, logsum_q, ent_q, kl_reverse, *of_q),
    ]


def _over(grads, temperature) -> list[Tensor | None]:
    """Divide gradients by the temperature; doing it to the (N,) ones saves a pass over every tile."""
    return [None if grad is None else grad / temperature for grad in grads]


# ----------------------------------------------------------------------------------------- the compiled kernels

# They work in bits on l = z, before the division by τ: e = 2^((l − max) scale), scale = 1 / (τ ln 2). With a softcap c
# they work on l = tanh(z / c), and the scale has the factor c: so nothing is multiplied by it, and what is subtracted
# from a logit can't be fused with such a product, whose rounding error would be left where equal branches must give 0.


def log2_scale(scaling: Scaling) -> float:
    """log₂(e) / τ, times a softcap, rounded to float32 as in the kernels, so that the merge agrees with them."""
    return ctypes.c_float((scaling.softcap or 1.0) / (scaling.temperature * LN2)).value


def merge(partial: Tensor, target_logits: Tensor, scale: float) -> tuple[Tensor, ...]:
    """The results of `forward`, float64, from the running sums of shares of the vocabulary.

    partial: (branches, 3 or 4, shares, N) float64: maximum, Σ e, Σ e log₂ e and, with two branches, Σ e (log₂ e − log₂
    of the other branch's e), each relative to the share's own maxima. target_logits: (branches, N) float64.
    The maximum that is returned is that of l, the logsum is in bits.
    """
    maximum, total, weighted = partial[:, 0], partial[:, 1], partial[:, 2]
    top = maximum.amax(1)
    shift = (maximum - top.unsqueeze(1)) * scale
    factor = shift.exp2()
    weighted = (factor * (weighted + total * shift)).sum(1)
    if len(partial) == 2:
        cross = (factor * (partial[:, 3] + total * (shift[0] - shift[1]))).sum(1)
    total = (factor * total).sum(1)
    logsum = total.log2()
    logprob = ((target_logits - top) * scale - logsum) * LN2
    entropy = (logsum - weighted / total) * LN2
    lse = (top * scale + logsum) * LN2
    top_logprob = -logsum * LN2
    if len(partial) == 1:
        return logprob[0], entropy[0], lse[0], top_logprob[0], top[0], logsum[0]
    expected = cross / total
    difference = logsum[0] - logsum[1]
    divergences = (expected[0] - difference, difference - expected[1], (expected[0] - expected[1]) / 2)
    divergences = [(x * LN2).clamp(min=0) for x in divergences]  # one below zero is rounding
    return *logprob, *entropy, *divergences, *lse, *top_logprob, top[0], logsum[0], top[1], logsum[1]


def numbers(branch: Branch) -> Tensor:
    """(7, N) float32: m, log₂ s, c₀ ... c₄ of a branch, with which the gradient of its logits is

    p (c₀ + c₁ log₂ p + c₂ (log₂ p − log₂ q)) − c₃ q + c₄ 1[v=y]
    """
    zero = torch.zeros_like(branch.maximum)
    given = (branch.g_logprob, branch.g_entropy, branch.g_kl, branch.g_kl_other, branch.g_lse)
    g_logprob, g_entropy, g_kl, g_kl_other, g_lse = (zero if g is None else g for g in given)
    constant = g_lse + g_kl_other - g_logprob - g_entropy * branch.entropy
    if branch.kl is not None:
        constant = constant - g_kl * branch.kl
    return torch.stack(
        [branch.maximum, branch.logsum, constant, -LN2 * g_entropy, LN2 * g_kl, g_kl_other, g_logprob]
    ).float()
