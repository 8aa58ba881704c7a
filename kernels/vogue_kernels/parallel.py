"""The operators where the head's weight is spread over ranks by words: Megatron's vocabulary-parallel head.

Each rank has rows of the weight, a shard s of the vocabulary, and computes exact statistics of the softmax over them.
With their lse_s, entropies H_s and divergences KL_s, the whole vocabulary's are, by the chain rule of entropy,

    lse = log Σ_s e^lse_s        w_s = e^(lse_s − lse)        log p_y = log p_y|s + log w_s, s being the shard of y
    H = Σ_s w_s (H_s − log w_s)
    KL(p‖q) = Σ_s w_s (KL_s + log w_s − log v_s), v being q's w

in which nothing large cancels. So a few numbers a token are gathered once, and every rank computes the same results
of them, in float64. What a result's gradient is with respect to a shard's own statistics, the shard knows: in the
backward pass nothing travels but the gradient of the hidden states, (N, D), summed over the ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .operator import IGNORE, BranchStats, LogprobStats, linear_branch_stats, linear_logprob


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    *,
    group: "dist.ProcessGroup | None",
    ignore_index: int = IGNORE,
    shift: bool = False,
    **options: Any,
) -> LogprobStats:
    """`linear_logprob` where each rank of a group has a shard of the vocabulary.

    All ranks of `group` call it together, with the same hidden (..., D) and the same targets (...), words of the whole
    vocabulary. weight: (V_s, D), this rank's rows. bias: (V_s,), its part of it. Shards stand in the order of the ranks
    and may differ in length. Rows that stand for no word, where a vocabulary is padded to a multiple of the ranks,
    would take part in the softmax: leave them out, as weight[:words]. group: None is torch.distributed's default group.
    All else, `options` too, is as in `linear_logprob`.

    Results are those of the whole vocabulary, and equal to the bit on all ranks. Every rank has to compute the same
    loss of them. Then the gradients of weight and bias are the shard's whole ones, and so is that of hidden on every
    rank: it is summed over the ranks here, in float32, and nobody else may sum it. (With Megatron's sequence
    parallelism, gather the hidden states with `tensor_parallel_output_grad=False`.)

    Raises RuntimeError where torch.distributed hasn't been started. Raises ValueError, on all ranks alike, where their
    numbers of tokens, widths or targets differ, for an empty shard, and for a target outside of all shards. Raises what
    `linear_logprob` raises. It waits for the GPU and for the other ranks, so that no CUDA graph can hold it and
    torch.compile breaks its graph there.
    """
    shard = _find_shard(weight, targets, ignore_index, shift, group)
    hidden = _SummedGradient.apply(hidden, group)
    local = linear_logprob(hidden, weight, shard.targets, bias, temperature, backend, shift=shift, **options)
    merged = _merge_branch(shard, local[0].dtype, *_gather(local, group))
    return LogprobStats(*shard.restore(local, *merged[:4]))


def vocab_parallel_branch_stats(
    hidden_p: Tensor,
    hidden_q: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    *,
    group: "dist.ProcessGroup | None",
    ignore_index: int = IGNORE,
    shift: bool = False,
    **options: Any,
) -> BranchStats:
    """`linear_branch_stats` where each rank of a group has a shard of the vocabulary.

    As `vocab_parallel_logprob`, for two branches. The KLs are never negative, and 0 where the branches are identical.
    """
    shard = _find_shard(weight, targets, ignore_index, shift, group)
    hidden_p, hidden_q = _SummedGradient.apply(hidden_p, group), _SummedGradient.apply(hidden_q, group)
    given = weight, shard.targets, bias, temperature, backend
    local = linear_branch_stats(hidden_p, hidden_q, *given, shift=shift, **options)
    every = BranchStats(*_gather(local, group))
    dtype = local[0].dtype
    p = _merge_branch(shard, dtype, every.logprob_p, every.entropy_p, every.lse_p, every.top_logprob_p)
    q = _merge_branch(shard, dtype, every.logprob_q, every.entropy_q, every.lse_q, every.top_logprob_q)
    kls = _merge_kl(every.kl_pq, p, q), _merge_kl(every.kl_qp, q, p), _merge_symmetric_kl(every, p, q)
    others = p.lse, q.lse, p.top_logprob, q.top_logprob
    return BranchStats(*shard.restore(local, p.logprob, q.logprob, p.entropy, q.entropy, *kls, *others))


# ---------------------------------------------------------------------------------------------- who has which words


class _Shard(NamedTuple):
    targets: Tensor  # as given, counted from the shard's first word; some word of it where another shard has the target
    owner: Tensor  # of each position that is scored: the rank of the group whose shard has the target
    scored: Tensor  # bool, of each of them: not skipped

    def restore(self, local: Sequence[Tensor], *results: Tensor):
        """Results in the dtype of the rank's own, 0 where they are skipped."""
        return (torch.where(self.scored, result, 0.0).to(local[0].dtype) for result in results)


def _find_shard(weight: Tensor, targets: Tensor, ignore_index: int, shift: bool, group) -> _Shard:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("a vocabulary spread over ranks needs torch.distributed; call init_process_group first")
    if (rank := dist.get_rank(group)) < 0:
        raise ValueError(f"this process, rank {dist.get_rank()}, isn't in the group that has the vocabulary")
    if hasattr(weight, "to_local"):
        raise ValueError("weight is a DTensor; pass weight.to_local(), this rank's rows of it, and the bias alike")
    if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    scored = (targets != IGNORE) & (targets != ignore_index)
    words = torch.where(scored, targets, 0).long()
    positions = (..., slice(1, None)) if shift and targets.dim() else ...  # shift scores each token but the first
    lengths = _lengths(weight, words[positions], group)
    ends = torch.tensor(lengths, device=words.device).cumsum(0)
    owner = torch.searchsorted(ends, words, right=True)
    local = torch.where(owner == rank, words - ends[rank] + lengths[rank], 0)
    return _Shard(local.masked_fill(~scored, IGNORE), owner[positions], scored[positions])


def _lengths(weight: Tensor, words: Tensor, group) -> list[int]:
    """The lengths of all shards. Raises on all ranks alike, before any of them waits for one that doesn't come.

    Ranks with other tokens, as where the group is one of data parallelism, would merge what doesn't belong together.
    """
    words = words.flatten()
    lowest, highest = torch.aminmax(words) if len(words) else (words.sum(), words.sum())
    checksum = (words * torch.arange(1, len(words) + 1, device=words.device)).sum()
    own = [words.new_tensor(size) for size in (weight.shape[0], weight.shape[-1], len(words))]
    own = torch.stack([*own, checksum, lowest, highest])
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    lengths, widths, counts, checksums, (low, *_), (high, *_) = torch.stack(every).T.tolist()
    for name, found in (("widths D", widths), ("numbers of tokens", counts), ("targets' checksums", checksums)):
        if len(set(found)) > 1:
            raise ValueError(f"the ranks of the group must have the same tokens, got {name} of {found}")
    if 0 in lengths:
        raise ValueError(f"every rank of the group needs a shard of the weight, got shards of {lengths} rows")
    vocab = sum(lengths)
    if low < 0 or high >= vocab:
        position = int(((words < 0) | (words >= vocab)).nonzero()[0])
        raise ValueError(
            f"targets[{position}] = {int(words[position])} is outside [0, {vocab}), the words of all shards; "
            f"only {IGNORE} marks a position to skip"
        )
    return lengths


# ------------------------------------------------------------------------------------------------------- the merge


class _Branch(NamedTuple):
    """A branch's results over the whole vocabulary, (...) float64, and its shards' shares of it, (ranks, ...)."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    top_logprob: Tensor
    log_share: Tensor  # log w_s


def _merge_branch(shard: _Shard, dtype: torch.dtype, logprob, entropy, lse, top_logprob) -> _Branch:
    """Takes every rank's results, (ranks, ...) float64, and the dtype that theirs will have."""
    log_share = lse.log_softmax(0)
    owned = (logprob + log_share).gather(0, shard.owner.unsqueeze(0)).squeeze(0)
    spread = (log_share.exp() * (entropy - log_share)).sum(0)
    top = (top_logprob + log_share.detach()).amax(0)
    # Rounded, two words' log-probabilities may be one; the likeliest token's is the target's only where that is it.
    rounded = owned.detach().to(dtype)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    top = torch.where(owned.detach() == top, top, top.maximum(above.double()))
    return _Branch(owned, spread, lse.logsumexp(0), top, log_share)


def _merge_kl(kl: Tensor, of: _Branch, other: _Branch) -> Tensor:
    """KL(of‖other) (...), from every rank's, (ranks, ...): inside of the shards, and between them."""
    share = of.log_share.exp()
    between = (share * (of.log_share - other.log_share)).sum(0)
    return (share * kl).sum(0) + between.clamp(min=0)  # one below zero is rounding


def _merge_symmetric_kl(every: BranchStats, p: _Branch, q: _Branch) -> Tensor:
    """The symmetric KL, by the shards' own, in which errors cancel that either KL of near branches has.

    ½ (w KL(p‖q) + v KL(q‖p)) = ½ (w + v) symmetric KL + ¼ (w − v) (KL(p‖q) − KL(q‖p)), where w − v is small if p − q is
    """
    share_p, share_q = p.log_share.exp(), q.log_share.exp()
    difference = share_p - share_q
    inside = (share_p + share_q) * every.symmetric_kl + difference * (every.kl_pq - every.kl_qp) / 2
    between = difference * (p.log_share - q.log_share)
    return ((inside + between).sum(0) / 2).clamp(min=0)


def _gather(results: Sequence[Tensor], group) -> list[Tensor]:
    """Each result of every rank, (ranks, ...) float64; the others' are constants, this rank's own has a gradient.

    That is all of the gradient, since every rank has the same loss: what the others' results add to it is theirs.
    """
    own = torch.stack(list(results))
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own.detach(), group=group)
    every[dist.get_rank(group)] = own
    return list(torch.stack(every, dim=1).double())


class _SummedGradient(torch.autograd.Function):
    """The hidden states as they are; in the backward pass, the sum of their gradients over the shards."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None
