"""The mathematics of the operators in plain PyTorch: the truth for tests, the fallback everywhere.

With logits a = l_p / τ and b = l_q / τ, where l is W h + bias, or c tanh((W h + bias) / c) with a softcap c, and
p = softmax(a), q = softmax(b), keep per token and branch, over tiles of the vocabulary, the running maximum m and

    s = Σ e^(a−m)      t = Σ e^(a−m) (a−m)      x = Σ e^(a−m) ((a−m_a) − (b−m_b))

Then, for the target y,

    log p_y = (a_y − m) − log s          H(p) = log s − t / s
    KL(p‖q) = x_a / s_a − log s_a + log s_b          symmetric KL = ½ (x_a / s_a − x_b / s_b)
    log Σ e^a = m + log s                            log p of the likeliest token = −log s

Everything is kept relative to the maximum, so that logits of 1e4 cost no digits; and the normalisers cancel in the
symmetric KL. Only tiles of the logits exist, never a (tokens × vocabulary) tensor.

The backward pass computes each tile of logits again that wasn't kept. With g_r the gradient that arrives at result r,

    ∂a_v = g_logp (1[v=y] − p_v) − g_H p_v (log p_v + H) + g_KL(p‖q) p_v (log p_v − log q_v − KL(p‖q))
           + g_KL(q‖p) (p_v − q_v) + g_lse p_v

and the same with p and q exchanged for b; a capped logit's is multiplied by its slope, 1 − (l / c)². Inputs of float64
are computed in float64, all others in float32.
"""

# A gradient is None where none is needed, which `needs_...` and the branches' own fields say.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .branches import Branch, Head, HeadGradients, Needs, Scaling, compute_dtype, of_branch
from .kept_logits import KeptLogits, kept_logits, own_bits

TILE_ELEMENTS = 1 << 20  # of a tile of logits: 4 MB of float32; larger leaves the cache, smaller pays in launches
VOCAB_TILE = 1024
SLICE_ELEMENTS = 1 << 22  # of a slice of the hidden states or of the weight: 16 MB of float32

kept_bits = own_bits  # as branches.py says

# ---------------------------------------------------------------------------------------------------- forward


def forward(hiddens, heads, targets, scaling, buffers):
    """As branches.py says; the maximum is that of l / τ, the logsum in nats."""
    block = _one_branch if len(hiddens) == 1 else _two_branches
    weight, kept = heads[0].weight, _kept(buffers, targets, heads)
    blocks = [
        block(
            [_upcast(hidden[rows]) for hidden in hiddens],
            heads,
            scaling,
            [_RunningSoftmax(weight, targets[rows], logits.select(rows)) for logits in kept],
        )
        for rows in _blocks(targets, heads)
    ]
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


class _RunningSoftmax:
    """Running sums m, s and t of one branch over vocabulary tiles, for a block of tokens, and the target's logit.

    The sums over a tile are those of its dtype; the (n,) sums over tiles are float64, because adding up a hundred tiles
    in float32 would be the largest error of all, and the KL's terms cancel.
    """

    def __init__(self, weight: Tensor, targets: Tensor, kept: KeptLogits):
        self.targets, self.kept, dtype = targets, kept, compute_dtype(weight)
        # Half of the lowest number rather than −inf: m − m_new stays finite, and 0 · finite is 0 where 0 · inf is NaN.
        self.maximum = weight.new_full((len(targets),), torch.finfo(dtype).min / 2, dtype=dtype)
        self.sum = torch.zeros_like(self.maximum, dtype=torch.float64)
        self.weighted = torch.zeros_like(self.sum)
        self.target_logit = torch.zeros_like(self.maximum)

    def shift(self, logits: Tensor, tile: slice) -> Tensor:
        """Move the maximum to cover this tile, subtract it from `logits` in place, return m − m_new (n,).

        What is then in `logits` is kept, if there is room for it.
        """
        index, inside = _locate(self.targets, tile)
        picked = logits.gather(1, index).squeeze(1)
        self.target_logit = torch.where(inside, picked, self.target_logit)
        old = self.maximum
        self.maximum = torch.maximum(old, logits.amax(1))
        logits.sub_(self.maximum.unsqueeze(1))
        if self.kept.holds(tile):
            self.kept.put(logits, self.maximum, tile)
        return old.double() - self.maximum

    def accumulate(self, shift: Tensor, exps: Tensor, weighted: Tensor) -> None:
        """Rescale s and t from the old maximum to the new one and add this tile's sums."""
        scale = shift.exp()
        self.weighted = scale * (self.weighted + self.sum * shift) + weighted
        self.sum = scale * self.sum + exps.sum(1)

    def add(self, logits: Tensor, tile: slice) -> None:
        """Take in one tile of logits (n, v), which are overwritten."""
        shift = self.shift(logits, tile)
        exps = logits.exp()
        self.accumulate(shift, exps, logits.mul_(exps).sum(1))

    def logprob(self) -> Tensor:
        return self.target_logit.double() - self.maximum - self.sum.log()

    def entropy(self) -> Tensor:
        return self.sum.log() - self.weighted / self.sum

    def lse(self) -> Tensor:
        return self.maximum + self.sum.log()


def _one_branch(hiddens, heads, scaling, softmaxes):
    (softmax,) = softmaxes
    for tile in _tiles(heads):
        softmax.add(_logits(hiddens[0], heads[0], scaling, tile), tile)
    logsum = softmax.sum.log()
    return softmax.logprob(), softmax.entropy(), softmax.lse(), -logsum, softmax.maximum, logsum


def _two_branches(hiddens, heads, scaling, softmaxes):
    hidden_p, hidden_q = hiddens
    p, q = softmaxes
    cross_p, cross_q = torch.zeros_like(p.sum), torch.zeros_like(p.sum)  # Σ e^(·−m) (a − b), shifted
    for tile in _tiles(heads):
        a = _logits(hidden_p, of_branch(heads, 0), scaling, tile)
        b = _logits(hidden_q, of_branch(heads, 1), scaling, tile)
        shift_a, shift_b = p.shift(a, tile), q.shift(b, tile)
        exp_a, exp_b, difference, moved = a.exp(), b.exp(), a - b, shift_a - shift_b
        weighted_a, weighted_b = a.mul_(exp_a).sum(1), b.mul_(exp_b).sum(1)
        tile_p = torch.mul(difference, exp_a, out=a).sum(1)
        tile_q = torch.mul(difference, exp_b, out=b).sum(1)
        cross_p = shift_a.exp() * (cross_p + p.sum * moved) + tile_p
        cross_q = shift_b.exp() * (cross_q + q.sum * moved) + tile_q
        p.accumulate(shift_a, exp_a, weighted_a)
        q.accumulate(shift_b, exp_b, weighted_b)
    expected_p, expected_q = cross_p / p.sum, cross_q / q.sum
    logsum_p, logsum_q = p.sum.log(), q.sum.log()
    # A divergence below zero is rounding. Only the value is clamped: the gradient's formula holds there all the same.
    return (
        p.logprob(),
        q.logprob(),
        p.entropy(),
        q.entropy(),
        (expected_p - logsum_p + logsum_q).clamp_(min=0),
        (logsum_p - logsum_q - expected_q).clamp_(min=0),
        (expected_p - expected_q).div_(2).clamp_(min=0),
        p.lse(),
        q.lse(),
        -logsum_p,
        -logsum_q,
        p.maximum,
        logsum_p,
        q.maximum,
        logsum_q,
    )


# ---------------------------------------------------------------------------------------------------- backward


def backward(branches, heads, targets, scaling, needs: Needs, buffers):
    """As branches.py says; vocabulary tiles are the outer loop, so that a tile of a weight's gradient is whole when
    it is written.
    """
    active, dtype = needs.of_logits(branches), compute_dtype(heads[0].weight)
    grad_hidden = [
        torch.zeros_like(branch.hidden, dtype=dtype) if need else None
        for branch, need in zip(branches, needs.hidden, strict=True)
    ]
    grads = [
        HeadGradients(
            torch.empty_like(head.weight) if needs_weight else None, torch.empty_like(head.bias) if needs_bias else None
        )
        for head, needs_weight, needs_bias in zip(heads, needs.weight, needs.bias, strict=True)
    ]
    kept = _kept(buffers, targets, heads)
    for tile in _tiles(heads):
        weights = [_upcast(head.weight[tile]) for head in heads]
        sums = [_zero_sums(grad, w) for grad, w in zip(grads, weights, strict=True)]
        for rows in _blocks(targets, heads):
            block = [branch.select(rows) for branch in branches]
            block = [branch._replace(hidden=_upcast(branch.hidden)) for branch in block]
            logits = [
                partial(_kept_or_new, kept[i].select(rows), branch.hidden, of_branch(heads, i), scaling, tile)
                for i, branch in enumerate(block)
            ]
            for i, grad_logits in _logit_gradients(block, active, logits, targets[rows], scaling, tile):
                tile_weight, tile_bias = of_branch(sums, i)
                if needs.hidden[i]:
                    grad_hidden[i][rows].addmm_(grad_logits, of_branch(weights, i))
                if tile_weight is not None:
                    tile_weight.addmm_(grad_logits.t(), block[i].hidden)
                if tile_bias is not None:
                    tile_bias += grad_logits.sum(0)
        for grad, total in zip(grads, sums, strict=True):
            for whole, part in zip(grad, total, strict=True):
                if whole is not None:
                    whole[tile] = part
    grad_hidden = [None if grad is None else grad.to(heads[0].weight.dtype) for grad in grad_hidden]
    return grad_hidden, [grad.weight for grad in grads], [grad.bias for grad in grads]


def _zero_sums(grad: HeadGradients, w: Tensor) -> HeadGradients:
    """Of a tile (v, D) of a head, where its gradients are needed, in the computing dtype."""
    return HeadGradients(
        None if grad.weight is None else torch.zeros_like(w), None if grad.bias is None else w.new_zeros(len(w))
    )


def _logit_gradients(block, active, logits, targets, scaling, tile):
    """Yield (index of the branch, gradient of its W h + bias (n, v)) for the active branches of one block and tile.

    logits: a function for each branch that gives this tile of l / τ.
    """
    crossing = any(on and branch.crosses for on, branch in zip(active, block, strict=True))
    logps: list[Any] = [None] * len(block)
    slopes: list[Any] = [None] * len(block)
    for i, branch in enumerate(block):
        if active[i] or crossing:
            logps[i] = logits[i]()
            slopes[i] = _slope(logps[i], scaling) if active[i] else None
            logps[i].sub_(branch.maximum.unsqueeze(1)).sub_(branch.logsum.unsqueeze(1))
    for i, branch in enumerate(block):
        if active[i]:
            gradient = _logit_gradient(branch, logps[i], logps[1 - i] if crossing else None, targets, tile)
            yield i, gradient if slopes[i] is None else gradient.mul_(slopes[i])


def _slope(logits: Tensor, scaling: Scaling) -> Tensor | None:
    """1 − (l / c)² of l / τ; None without a softcap, where it is 1."""
    if scaling.softcap is None:
        return None
    part = logits / (scaling.softcap / scaling.temperature)
    return (1 - part) * (1 + part)  # near ±1 it has digits that 1 − part² loses


def _kept_or_new(kept: KeptLogits, hidden, head, scaling, tile) -> Tensor:
    return kept.get(tile) if kept.holds(tile) else _logits(hidden, head, scaling, tile)


def _logit_gradient(branch: Branch, logp: Tensor, logq: Tensor | None, targets: Tensor, tile: slice) -> Tensor:
    """The gradient of one branch's logits (n, v): p · (what every result adds) − g_KL(q‖p) q + g_logp 1[v=y]."""
    constant = torch.zeros_like(branch.maximum)
    if branch.g_logprob is not None:
        constant -= branch.g_logprob
    if branch.g_kl_other is not None:
        constant += branch.g_kl_other
    if branch.g_lse is not None:
        constant += branch.g_lse
    inner = constant.unsqueeze(1)
    if branch.g_entropy is not None:
        inner = torch.addcmul(inner, logp + branch.entropy.unsqueeze(1), branch.g_entropy.unsqueeze(1), value=-1)
    if branch.g_kl is not None:
        inner = torch.addcmul(inner, logp - logq - branch.kl.unsqueeze(1), branch.g_kl.unsqueeze(1))
    gradient = logp.exp().mul_(inner)
    if branch.g_kl_other is not None:
        gradient.addcmul_(logq.exp(), branch.g_kl_other.unsqueeze(1), value=-1)
    if branch.g_logprob is not None:
        index, inside = _locate(targets, tile)
        gradient.scatter_add_(1, index, torch.where(inside, branch.g_logprob, 0).unsqueeze(1))
    return gradient


# ---------------------------------------------------------------------------------------------------- both


def _logits(hidden: Tensor, head: Head, scaling: Scaling, tile: slice) -> Tensor:
    """The logits l / τ of one tile; h and W are raised to the computing type first, so that nothing is rounded to
    bfloat16.
    """
    logits = hidden @ _upcast(head.weight[tile]).t()
    if head.bias is not None:
        logits += head.bias[tile]
    if scaling.softcap is not None:
        logits.div_(scaling.softcap).tanh_().mul_(scaling.softcap)
    return logits if scaling.temperature == 1 else logits.div_(scaling.temperature)


def _kept(buffers: list[Tensor], targets: Tensor, heads: list[Head]) -> list[KeptLogits]:
    columns = _tile_shape(heads)[1]
    return [kept_logits(buffer, len(targets), heads[0].weight, columns) for buffer in buffers]


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor))


def _locate(targets: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Each target's column within the tile (n, 1), clamped to it, and whether it truly lies inside (n,)."""
    local = targets - tile.start
    return local.clamp(0, tile.stop - tile.start - 1).unsqueeze(1), (targets >= tile.start) & (targets < tile.stop)


def _tile_shape(heads: list[Head]) -> tuple[int, int]:
    """The size of a tile of logits: (tokens, vocabulary entries). It suits the wider of two heads."""
    width, vocab = max(head.weight.shape[1] for head in heads), len(heads[0].weight)
    columns = max(1, min(vocab, VOCAB_TILE, SLICE_ELEMENTS // width))
    return max(1, min(TILE_ELEMENTS // columns, SLICE_ELEMENTS // width)), columns


def _blocks(targets: Tensor, heads: list[Head]) -> list[slice]:
    """Cut the tokens into slices."""
    size = _tile_shape(heads)[0]
    return [slice(start, min(start + size, len(targets))) for start in range(0, len(targets), size)]


def _tiles(heads: list[Head]) -> list[slice]:
    vocab, size = len(heads[0].weight), _tile_shape(heads)[1]
    return [slice(start, min(start + size, vocab)) for start in range(0, vocab, size)]
