"""The Triton kernel that merges the shares of the vocabulary, in float64, into the results of the forward pass."""

import math

import triton
import triton.language as tl

from .kernels import LOWEST

LN2 = tl.constexpr(math.log(2))


@triton.jit(do_not_specialize=["N", "splits"])
def merge_kernel(
    partial,  # of the forward kernel, as the next
    target_logits,
    logprob_p,  # this and all that follow: (N,) float32; unused are those of q and the divergences unless BOTH
    logprob_q,
    entropy_p,
    entropy_q,
    kl_pq,
    kl_qp,
    symmetric_kl,
    lse_p,
    lse_q,
    top_logprob_p,
    top_logprob_q,
    max_p,
    logsum_p,  # log2 s
    max_q,
    logsum_q,
    N,
    splits,
    log2_scale,
    BOTH: tl.constexpr,
    TOKENS: tl.constexpr,
    SHARES: tl.constexpr,  # that are loaded at once: one after the other would wait for memory each time
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside, safe = rows < N, tl.minimum(rows, N - 1)
    field = splits.to(tl.int64) * N
    fields_q = partial + 4 * field
    scale = tl.cast(log2_scale, tl.float64)
    top_p = _top(partial + safe, N, splits, TOKENS, SHARES)
    top_q = _top(fields_q + safe, N, splits, TOKENS, SHARES) if BOTH else top_p

    zero = tl.zeros((TOKENS,), tl.float64)
    sum_p, weighted_p, cross_p = zero, zero, zero
    sum_q, weighted_q, cross_q = zero, zero, zero
    for first in range(0, splits, SHARES):
        share = first + tl.arange(0, SHARES)
        known = (share < splits)[:, None]
        offsets = share.to(tl.int64)[:, None] * N + safe[None, :]
        moved_p, factor_p, shares_p = _share(partial + offsets, field, known, top_p, scale)
        sum_p += tl.sum(factor_p * shares_p, 0)
        weighted_p += tl.sum(factor_p * (_load64(partial + 2 * field + offsets, known) + shares_p * moved_p), 0)
        if BOTH:
            moved_q, factor_q, shares_q = _share(fields_q + offsets, field, known, top_q, scale)
            sum_q += tl.sum(factor_q * shares_q, 0)
            weighted_q += tl.sum(factor_q * (_load64(fields_q + 2 * field + offsets, known) + shares_q * moved_q), 0)
            moved = moved_p - moved_q
            cross_p += tl.sum(factor_p * (_load64(partial + 3 * field + offsets, known) + shares_p * moved), 0)
            cross_q += tl.sum(factor_q * (_load64(fields_q + 3 * field + offsets, known) + shares_q * moved), 0)

    bits_p = _store_results(
        target_logits + safe, top_p, sum_p, weighted_p, scale,
        logprob_p + rows, entropy_p + rows, lse_p + rows, top_logprob_p + rows, max_p + rows, logsum_p + rows, inside,
    )  # fmt: skip
    if BOTH:
        bits_q = _store_results(
            target_logits + N + safe, top_q, sum_q, weighted_q, scale,
            logprob_q + rows, entropy_q + rows, lse_q + rows, top_logprob_q + rows, max_q + rows, logsum_q + rows,
            inside,
        )  # fmt: skip
        expected_p, expected_q, difference = cross_p / sum_p, cross_q / sum_q, bits_p - bits_q
        _store_divergence(kl_pq + rows, expected_p * scale - difference, inside)
        _store_divergence(kl_qp + rows, difference - expected_q * scale, inside)
        _store_divergence(symmetric_kl + rows, (expected_p - expected_q) * scale / 2, inside)


@triton.jit
def _load64(pointers, mask):
    return tl.load(pointers, mask, 0.0).to(tl.float64)


@triton.jit
def _top(maxima, N, splits, TOKENS: tl.constexpr, SHARES: tl.constexpr):
    """The maximum of all shares, (TOKENS,) float32."""
    top = tl.full((TOKENS,), LOWEST, tl.float32)
    for first in range(0, splits, SHARES):
        share = first + tl.arange(0, SHARES)
        offsets = share.to(tl.int64)[:, None] * N
        top = tl.maximum(top, tl.max(tl.load(maxima[None, :] + offsets, (share < splits)[:, None], LOWEST), 0))
    return top


@triton.jit
def _share(maxima, field, known, top, scale):
    """(the shares' maxima below the top, what that multiplies their sums by, s), each (SHARES, TOKENS) float64."""
    moved = tl.where(known, _load64(maxima, known) - top.to(tl.float64)[None, :], 0.0)
    return moved, tl.exp2(moved * scale), _load64(maxima + field, known)


@triton.jit
def _store_results(
    target_logits, top, total, weighted, scale, logprob, entropy, lse, top_logprob, maximum, logsum, inside
):  # fmt: skip
    """Store the results of one branch, and return log2 s."""
    below = tl.load(target_logits).to(tl.float64) - top.to(tl.float64)
    bits = tl.log2(total)
    tl.store(logprob, ((below * scale - bits) * LN2).to(tl.float32), inside)
    tl.store(entropy, ((bits - weighted / total * scale) * LN2).to(tl.float32), inside)
    tl.store(lse, ((top.to(tl.float64) * scale + bits) * LN2).to(tl.float32), inside)
    tl.store(top_logprob, (-bits * LN2).to(tl.float32), inside)  # exactly the target's where its logit is the largest
    tl.store(maximum, top, inside)
    tl.store(logsum, bits.to(tl.float32), inside)
    return bits


@triton.jit
def _store_divergence(out, bits, inside):
    """Below zero is rounding."""
    tl.store(out, tl.where(bits < 0, 0.0, bits * LN2).to(tl.float32), inside)
