"""The Triton kernels. In the two large ones a program takes one block of tokens, and reads a tile of the weight
once for both branches.

With l = h Wᵀ + bias, or tanh((h Wᵀ + bias) / softcap), and a = l − m of branch p and b of branch q, the logits below
their maximum, the forward kernel keeps, per token and branch, over its share of the vocabulary

    m = max l      s = Σ 2^(c a)      t = Σ 2^(c a) a      x = Σ 2^(c a) (a − b)        c = log2(e) softcap / τ

and leaves the rest to the merge kernel (merge.py), which adds the shares up in float64. A share is short (MOST_TILES in
__init__.py), because in float32 a sum over a thousand tiles would be the largest error of all. Everything is relative
to the maximum, as in reference.py. Differences are taken before anything is multiplied by c: a difference of two
products is compiled to a fused multiply-add, which gives a product's rounding error where equal branches must give 0.

The backward kernel computes one tile of logits again and writes the gradient of the loss with respect to it,

    ∂l_v = p_v (c₀ + c₁ log2 p_v + c₂ (log2 p_v − log2 q_v)) − c₃ q_v + c₄ 1[v=y]

with the per-token numbers c of __init__.py; times the slope 1 − l_v² where the logits are capped. The matrix products
with it are left to cuBLAS. A kernel without a product writes it of logits that the forward one kept (kept_logits.py).

A branch may have a head of its own, of another width: then a program multiplies one after the other. What there isn't,
a softcap or such a head, is None and compiled out.

Where the tile says TMA, hidden states and weight come as tensor descriptors, whose loads give 0 outside the matrix.
Otherwise rows past the last token and columns past the vocabulary read the last one again, so that no load of whole
tiles needs a mask, and the tail of D is masked with 0. Such a column then counts as a logit of LOWEST, and such a row
isn't written.
"""

import triton
import triton.language as tl

# Stands for −∞: differences and multiples of it stay finite, and 0 · finite is 0 where 0 · ∞ is NaN.
LOWEST = tl.constexpr(-1e30)
NO = tl.constexpr(False)
YES = tl.constexpr(True)


@triton.jit(do_not_specialize=["N", "splits", "tiles", "reference_stride"])
def forward_kernel(
    hidden_p,  # (N, D); with TMA descriptors of blocks (TOKENS, DEPTH)
    hidden_q,  # (N, D); unused unless BOTH
    weight,  # (V, D); with TMA a descriptor of blocks (VOCAB, DEPTH)
    weight_q,  # (V, D_q), of branch q, as hidden_q then is (N, D_q); None: it has `weight`
    bias,  # (V,); unused unless BIAS
    bias_q,  # (V,), of a weight_q; or None
    targets,  # (N,) int64
    partial,  # (branches, fields, splits, N) float32, the fields m, s, t and, if BOTH, x
    target_logits,  # (branches, N) float32: l of the target
    kept_p,  # (N, columns_p): l less the running maximum, of the first words; unused unless KEEP_P
    kept_q,  # (N, columns_q); unused unless KEEP_Q
    reference_p,  # (columns_p / KEPT, reference_stride) float32: that maximum
    reference_q,
    N,
    V,
    D,
    D_q,  # None without a weight_q
    log2_scale,  # log2(e) / τ, times a softcap
    inverse_softcap,  # None without one
    splits,  # shares of the vocabulary
    tiles,  # of the vocabulary in a share
    columns_p,
    columns_q,
    reference_stride,
    BOTH: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP_P: tl.constexpr,
    KEEP_Q: tl.constexpr,
    KEPT: tl.constexpr,  # words that have a reference in common; divides VOCAB
    TOKENS: tl.constexpr,
    VOCAB: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_DEPTH: tl.constexpr,  # D is a multiple of DEPTH
    TMA: tl.constexpr,
):
    block, split = _program(tl.cdiv(N, TOKENS), splits, GROUP)
    rows = block * TOKENS + tl.arange(0, TOKENS)
    inside = rows < N

    zero = tl.zeros((TOKENS,), tl.float32)
    max_a, sum_a, weighted_a, cross_a = zero + LOWEST, zero, zero, zero
    max_b, sum_b, weighted_b, cross_b = zero + LOWEST, zero, zero, zero
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(V, VOCAB))):
        columns = tile * VOCAB + tl.arange(0, VOCAB)
        a, b = _products(
            hidden_p, hidden_q, weight, weight_q, block * TOKENS, tile * VOCAB, N, V, D, D_q,
            BOTH, TOKENS, VOCAB, DEPTH, WHOLE_DEPTH, TMA,
        )  # fmt: skip
        target = tl.load(targets + rows, inside, -1).to(tl.int32)
        here = (target >= tile * VOCAB) & (target < (tile + 1) * VOCAB)
        a, _ = _finish(a, bias, columns, V, inverse_softcap, BIAS)
        if BOTH:
            b, _ = _finish_q(b, bias, weight_q, bias_q, columns, V, inverse_softcap, BIAS)
        if tl.max(here.to(tl.int32), 0) != 0:
            _store_target(target_logits + rows, a, target, columns, here)
            if BOTH:
                _store_target(target_logits + N + rows, b, target, columns, here)
        a, max_a, moved_a, scale_a = _below_maximum(a, max_a, columns, V, log2_scale)
        if KEEP_P:
            _keep(kept_p, reference_p, a, max_a, rows, inside, tile, columns_p, reference_stride, VOCAB, KEPT)
        if BOTH:
            b, max_b, moved_b, scale_b = _below_maximum(b, max_b, columns, V, log2_scale)
            if KEEP_Q:
                _keep(kept_q, reference_q, b, max_b, rows, inside, tile, columns_q, reference_stride, VOCAB, KEPT)
            moved = moved_a - moved_b
            cross_a = scale_a * (cross_a + sum_a * moved)
            cross_b = scale_b * (cross_b + sum_b * moved)
            exp_b = tl.exp2(b * log2_scale)
            weighted_b = scale_b * (weighted_b + sum_b * moved_b) + tl.sum(exp_b * b, 1)
            sum_b = scale_b * sum_b + tl.sum(exp_b, 1)
            b = a - b
            cross_b += tl.sum(exp_b * b, 1)
        exp_a = tl.exp2(a * log2_scale)
        weighted_a = scale_a * (weighted_a + sum_a * moved_a) + tl.sum(exp_a * a, 1)
        sum_a = scale_a * sum_a + tl.sum(exp_a, 1)
        if BOTH:
            cross_a += tl.sum(exp_a * b, 1)

    field = splits.to(tl.int64) * N
    out = partial + split.to(tl.int64) * N + rows
    tl.store(out, max_a, inside)
    tl.store(out + field, sum_a, inside)
    tl.store(out + 2 * field, weighted_a, inside)
    if BOTH:
        tl.store(out + 3 * field, cross_a, inside)
        tl.store(out + 4 * field, max_b, inside)
        tl.store(out + 5 * field, sum_b, inside)
        tl.store(out + 6 * field, weighted_b, inside)
        tl.store(out + 7 * field, cross_b, inside)


# `width` is specialized: only where it is known to be a multiple of 16 are 16 bytes stored at a time.
@triton.jit(do_not_specialize=["N", "first"])
def logit_gradient_kernel(
    hidden_a,  # (N, D); it, hidden_b and weight with TMA as above
    hidden_b,  # (N, D); unused unless BOTH
    weight,  # (V, D)
    weight_q,  # of branch b, and None unless BOTH; as above
    bias,  # (V,); unused unless BIAS
    bias_q,
    targets,  # (N,) int64
    numbers_a,  # (7, N) float32: m, log2 s, c₀, c₁, c₂, c₃, c₄ of branch a
    numbers_b,  # the same of branch b; unused unless BOTH
    gradient_a,  # (N, stride): columns first ... first + width of the gradient; unused unless WRITE_A
    gradient_b,  # unused unless WRITE_B
    N,
    V,
    D,
    D_q,
    log2_scale,
    inverse_softcap,
    first,
    width,
    stride,
    BOTH: tl.constexpr,  # compute the logits of both branches
    WRITE_A: tl.constexpr,
    WRITE_B: tl.constexpr,
    LOGPROB: tl.constexpr,  # whether c₄, c₁, and c₂ and c₃, aren't all 0
    ENTROPY: tl.constexpr,
    CROSS: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    VOCAB: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    block, tile = _program(tl.cdiv(N, TOKENS), tl.cdiv(width, VOCAB), GROUP)
    rows = block * TOKENS + tl.arange(0, TOKENS)
    safe = tl.minimum(rows, N - 1)
    local = tile * VOCAB + tl.arange(0, VOCAB)
    columns = first + local
    a, b = _products(
        hidden_a, hidden_b, weight, weight_q, block * TOKENS, first + tile * VOCAB, N, V, D, D_q,
        BOTH, TOKENS, VOCAB, DEPTH, WHOLE_DEPTH, TMA,
    )  # fmt: skip
    a, slope_a = _finish(a, bias, columns, V, inverse_softcap, BIAS)
    a = _log2_softmax(a, log2_scale, numbers_a + safe, N)
    if BOTH:
        b, slope_b = _finish_q(b, bias, weight_q, bias_q, columns, V, inverse_softcap, BIAS)
        b = _log2_softmax(b, log2_scale, numbers_b + safe, N)

    hit = tl.load(targets + safe).to(tl.int32)[:, None] == columns[None, :]
    inside = (rows < N)[:, None] & (local < width)[None, :]
    out = rows.to(tl.int64)[:, None] * stride + local[None, :]
    if WRITE_A:
        gradient = _logit_gradient(a, b, hit, numbers_a + safe, N, LOGPROB, ENTROPY, CROSS)
        if inverse_softcap is not None:
            gradient *= slope_a
        tl.store(gradient_a + out, gradient.to(gradient_a.dtype.element_ty), inside)
    if WRITE_B:
        gradient = _logit_gradient(b, a, hit, numbers_b + safe, N, LOGPROB, ENTROPY, CROSS)
        if inverse_softcap is not None:
            gradient *= slope_b
        tl.store(gradient_b + out, gradient.to(gradient_b.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["N", "first", "reference_stride"])
def kept_gradient_kernel(
    kept,  # (N, columns), as the next of the forward kernel
    reference,
    targets,  # (N,) int64
    numbers,  # (7, N) float32
    gradient,  # (N, stride): columns first ... first + width of the gradient
    N,
    log2_scale,
    first,
    width,
    stride,
    columns,
    reference_stride,
    LOGPROB: tl.constexpr,
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    TOKENS: tl.constexpr,
    KEPT: tl.constexpr,
):
    block, tile = tl.program_id(0), tl.program_id(1)
    rows = block * TOKENS + tl.arange(0, TOKENS)
    safe = tl.minimum(rows, N - 1)
    local = tile * KEPT + tl.arange(0, KEPT)
    inside = (rows < N)[:, None] & (local < width)[None, :]
    logits = tl.load(kept + rows.to(tl.int64)[:, None] * columns + (first + local)[None, :], inside, 0.0).to(tl.float32)
    logits += tl.load(reference + (first // KEPT + tile).to(tl.int64) * reference_stride + safe)[:, None]
    logp = _log2_softmax(logits, log2_scale, numbers + safe, N)
    hit = tl.load(targets + safe).to(tl.int32)[:, None] == (first + local)[None, :]
    found = _logit_gradient(logp, logp, hit, numbers + safe, N, LOGPROB, ENTROPY, NO)
    if CAPPED:
        found *= (1.0 - logits) * (1.0 + logits)
    out = gradient + rows.to(tl.int64)[:, None] * stride + local[None, :]
    tl.store(out, found.to(gradient.dtype.element_ty), inside)


@triton.jit
def _program(blocks, columns, GROUP: tl.constexpr):
    """(block of tokens, column) of this program. GROUP blocks go down one column of the grid before the next, so that
    programs that run together read the same weights, and the hidden states of a group stay in L2."""
    program = tl.program_id(0)
    group = program // (GROUP * columns)
    within = program - group * GROUP * columns
    size = tl.minimum(blocks - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def _products(
    hidden_a, hidden_b, weight, weight_q, row, column, N, V, D, D_q, BOTH: tl.constexpr,
    TOKENS: tl.constexpr, VOCAB: tl.constexpr, DEPTH: tl.constexpr, WHOLE_DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """h Wᵀ of both branches, (TOKENS, VOCAB) float32; twice the first without BOTH."""
    a = tl.zeros((TOKENS, VOCAB), tl.float32)
    b = tl.zeros((TOKENS, VOCAB), tl.float32)
    for start in range(0, D, DEPTH):
        w = _load_tile(weight, column, start, V, D, VOCAB, DEPTH, WHOLE_DEPTH, TMA)
        h_a = _load_tile(hidden_a, row, start, N, D, TOKENS, DEPTH, WHOLE_DEPTH, TMA)
        a = _add_product(a, h_a, w)
        if BOTH and weight_q is None:
            h_b = _load_tile(hidden_b, row, start, N, D, TOKENS, DEPTH, WHOLE_DEPTH, TMA)
            b = _add_product(b, h_b, w)
    if weight_q is not None:
        for start in range(0, D_q, DEPTH):
            w = _load_tile(weight_q, column, start, V, D_q, VOCAB, DEPTH, WHOLE_DEPTH, TMA)
            h_b = _load_tile(hidden_b, row, start, N, D_q, TOKENS, DEPTH, WHOLE_DEPTH, TMA)
            b = _add_product(b, h_b, w)
    return a, b if BOTH else a


@triton.jit
def _add_product(total, h, w):
    """total + h wᵀ. Without tensor cores the D terms of a float32 sum would be added one by one, which loses digits, so
    DEPTH of them are a sum of their own. The last argument, made for float8, keeps the compiler from joining them.
    """
    if h.dtype == tl.float32:
        return total + tl.dot(h, tl.trans(w), input_precision="ieee", max_num_imprecise_acc=1)
    else:
        return tl.dot(h, tl.trans(w), total, input_precision="ieee")


@triton.jit
def _load_tile(
    matrix, row, start, height, width,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, WHOLE_DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(ROWS, DEPTH) from (row, start) on, of a matrix (height, width)."""
    if TMA:
        tile = matrix.load([row, start])
    else:
        depth = tl.arange(0, DEPTH)
        offsets = tl.minimum(tl.arange(0, ROWS), height - 1 - row)[:, None] * width + depth[None, :]
        pointers = matrix + (tl.cast(row, tl.int64) * width + start) + offsets
        tile = tl.load(pointers) if WHOLE_DEPTH else tl.load(pointers, (depth < width - start)[None, :], 0.0)
    return tile


@triton.jit
def _finish(products, bias, columns, V, inverse_softcap, BIAS: tl.constexpr):
    """(l, its slope), from h Wᵀ. Without a softcap the slope is no number of anything."""
    if BIAS:
        products += tl.load(bias + tl.minimum(columns, V - 1)).to(tl.float32)[None, :]
    slope = products
    if inverse_softcap is not None:
        products, slope = _capped(products * inverse_softcap)
    return products, slope


@triton.jit
def _finish_q(products, bias, weight_q, bias_q, columns, V, inverse_softcap, BIAS: tl.constexpr):
    """The same of branch q, whose bias is that of its head."""
    if weight_q is None:
        products, slope = _finish(products, bias, columns, V, inverse_softcap, BIAS)
    elif bias_q is None:
        products, slope = _finish(products, bias, columns, V, inverse_softcap, NO)
    else:
        products, slope = _finish(products, bias_q, columns, V, inverse_softcap, YES)
    return products, slope


@triton.jit
def _capped(x):
    """(tanh x, its slope 1 − tanh² x), both to some ulp of their own size: the first near 0 too, where what is capped
    is as exact as what isn't, the second near ±1, where 1 − l² would have lost its digits. libdevice's tanh isn't in
    the interpreter.
    """
    size, square = tl.abs(x), x * x
    e = tl.exp2(-2.88539008 * size)  # e^(−2|x|)
    rest = 2.0 * e / (1.0 + e)  # 1 − |tanh x|
    # (tanh x / x − 1) / x² up to 0.625, minimax; relative error of tanh 4.4e-9.
    p = -0.00570498677 * square + 0.020639087
    p = p * square - 0.053739715
    p = p * square + 0.133314422
    p = p * square - 0.333332819
    far = tl.where(x < 0, rest - 1.0, 1.0 - rest)
    return tl.where(size < 0.625, x + x * square * p, far), rest * (2.0 - rest)


@triton.jit
def _store_target(out, logits, target, columns, here):
    hit = target[:, None] == columns[None, :]
    tl.store(out, tl.sum(tl.where(hit, logits, 0.0), 1), here)


@triton.jit
def _below_maximum(logits, maximum, columns, V, log2_scale):
    """(l − the new maximum, the new maximum, how far it moved (≤ 0), what that multiplies the sums by)."""
    logits = tl.where((columns < V)[None, :], logits, LOWEST)
    new = tl.maximum(maximum, tl.max(logits, 1))
    moved = maximum - new
    return logits - new[:, None], new, moved, tl.exp2(moved * log2_scale)


@triton.jit
def _keep(
    kept, reference, below, maximum, rows, inside, tile, columns, reference_stride,
    VOCAB: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Keep what of a tile lies before `columns`."""
    if tile * VOCAB < columns:
        if kept.dtype.element_ty == tl.float16:  # its −∞ would make 0 · ∞ of p log p
            below = tl.maximum(below, -65504.0)
        column = tile * VOCAB + tl.arange(0, VOCAB)
        out = kept + rows.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out, below.to(kept.dtype.element_ty), inside[:, None] & (column < columns)[None, :])
        for i in range(VOCAB // KEPT):
            part = tile * (VOCAB // KEPT) + i
            if part * KEPT < columns:
                tl.store(reference + tl.cast(part, tl.int64) * reference_stride + rows, maximum, inside)


@triton.jit
def _log2_softmax(logits, log2_scale, numbers, N):
    return (logits - tl.load(numbers)[:, None]) * log2_scale - tl.load(numbers + N)[:, None]


@triton.jit
def _logit_gradient(
    logp, logq, hit, numbers, N, LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, CROSS: tl.constexpr
):  # fmt: skip
    inner = tl.load(numbers + 2 * N)[:, None]
    if ENTROPY:
        inner += tl.load(numbers + 3 * N)[:, None] * logp
    if CROSS:
        inner += tl.load(numbers + 4 * N)[:, None] * (logp - logq)
    gradient = tl.exp2(logp) * inner
    if CROSS:
        gradient -= tl.load(numbers + 5 * N)[:, None] * tl.exp2(logq)
    if LOGPROB:
        gradient += tl.where(hit, tl.load(numbers + 6 * N)[:, None], 0.0)
    return gradient
