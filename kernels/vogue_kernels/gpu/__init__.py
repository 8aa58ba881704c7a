"""The Triton backend: NVIDIA and AMD GPUs, and Triton's interpreter. Drop-in for reference.py, but not for float64.

Forward: one kernel, the vocabulary split over programs; torch merges the shares in float64. Backward: for a chunk of
the vocabulary at a time, one kernel writes the gradient of the logits, in the inputs' dtype, torch.mm does the rest:

    ∂H += ∂L W[chunk]   (float32)      ∂W[chunk] = ∂Lᵀ H

The two branches' rows stand one above the other in ∂L and H, so that each is a single product. Besides inputs, results
and copies of hidden states and targets, memory is that of CHUNK_ELEMENTS and a float32 copy of the hidden states'
gradient, whatever V.
"""

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import _Branch, _kept, _over, _restore, _select
from .kernels import forward_kernel, logit_gradient_kernel

if os.environ.get("TRITON_INTERPRET") == "1":
    from . import interpreter  # noqa: F401

CHUNK_ELEMENTS = 1 << 26  # of the gradient of the logits at a time: 128 MB of bfloat16
MOST_COLUMNS = 1 << 15  # of a chunk: more makes its two products no faster
MOST_TOKENS = 1 << 13  # of a batch: bounds the shares' sums, and leaves chunks wide
MOST_TILES = 32  # of a share of the vocabulary: longer float32 sums would cost digits
GROUP = 8  # blocks of tokens that share a tile of the weight through L2
LN2 = math.log(2)


class Tile(NamedTuple):
    tokens: int
    vocab: int
    depth: int
    warps: int
    stages: int


# By compute capability and kernel: wide tiles that keep everything in registers (bench/gpu_static.py) where V and D are
# multiples of 16. A bias, a second branch and the entropy's gradient need registers of their own.
TILES = {
    80: {
        "forward": Tile(128, 128, 32, 8, 4),
        "forward with bias": Tile(128, 128, 32, 8, 4),
        "forward both": Tile(128, 64, 32, 8, 4),
        "gradient of logprob": Tile(128, 128, 32, 8, 4),
        "gradient": Tile(128, 128, 32, 8, 4),
        "gradient both": Tile(64, 128, 64, 8, 3),
    },
    90: {
        "forward": Tile(128, 256, 64, 8, 4),
        "forward with bias": Tile(128, 128, 64, 8, 4),
        "forward both": Tile(128, 128, 64, 8, 4),
        "gradient of logprob": Tile(128, 256, 64, 8, 4),
        "gradient": Tile(128, 128, 64, 8, 4),
        "gradient both": Tile(128, 64, 64, 8, 4),
    },
    100: {
        "forward": Tile(128, 256, 64, 8, 4),
        "forward with bias": Tile(128, 128, 64, 8, 4),
        "forward both": Tile(128, 64, 64, 8, 4),
        "gradient of logprob": Tile(128, 256, 64, 8, 4),
        "gradient": Tile(128, 128, 64, 8, 4),
        "gradient both": Tile(128, 64, 64, 8, 4),
    },
}
DEFAULT_TILE = Tile(64, 64, 32, 4, 2)  # other GPUs, which may have 64 KB of shared memory only
FLOAT32_TILE = Tile(32, 64, 32, 4, 2)  # without tensor cores: TF32 isn't exact enough
INTERPRETER_TILE = Tile(64, 512, 32, 1, 1)  # wide, because the interpreter pays by the operation


def pick_tile(kernel: str, dtype: torch.dtype, capability: int) -> Tile:
    """kernel: a key of TILES[80]; capability: 90 for sm_90."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    return TILES[capability][kernel] if capability in TILES else DEFAULT_TILE


def logprob_forward(hidden, weight, targets, bias, temperature):
    """As in reference.py; the maximum is that of h Wᵀ + bias, the logsum in bits."""
    return _forward([hidden], weight, targets, bias, temperature)


def branch_forward(hidden_raw, hidden_noisy, weight, targets, bias, temperature):
    """As in reference.py; the maxima are those of h Wᵀ + bias, the logsums in bits."""
    return _forward([hidden_raw, hidden_noisy], weight, targets, bias, temperature)


def logprob_backward(grads, hidden, weight, targets, bias, temperature, saved, needs):
    """As in reference.py."""
    entropy, maximum, logsum = saved
    g_logprob, g_entropy = _over(grads, temperature)
    branch = _Branch(hidden, maximum, logsum, entropy, None, g_logprob, g_entropy, None, None)
    (grad_hidden,), *rest = _backward([branch], weight, targets, bias, temperature, needs[:1], *needs[1:])
    return grad_hidden, *rest


def branch_backward(grads, hidden_raw, hidden_noisy, weight, targets, bias, temperature, saved, needs):
    """As in reference.py."""
    g_logp_raw, g_logp_noisy, g_ent_raw, g_ent_noisy, g_forward, g_reverse, g_symmetric = _over(grads, temperature)
    ent_raw, ent_noisy, kl_forward, kl_reverse, max_raw, logsum_raw, max_noisy, logsum_noisy = saved
    if g_symmetric is not None:
        half = g_symmetric / 2
        g_forward = half if g_forward is None else g_forward + half
        g_reverse = half if g_reverse is None else g_reverse + half
    raw = _Branch(hidden_raw, max_raw, logsum_raw, ent_raw, kl_forward, g_logp_raw, g_ent_raw, g_forward, g_reverse)
    noisy = _Branch(
        hidden_noisy, max_noisy, logsum_noisy, ent_noisy, kl_reverse, g_logp_noisy, g_ent_noisy, g_reverse, g_forward
    )
    (grad_raw, grad_noisy), *rest = _backward([raw, noisy], weight, targets, bias, temperature, needs[:2], *needs[2:])
    return grad_raw, grad_noisy, *rest


# ---------------------------------------------------------------------------------------------------- forward


def _forward(hiddens, weight, targets, bias, temperature):
    kept, length = _kept(targets), len(targets)
    *hiddens, targets = (x.contiguous() for x in _select(kept, *hiddens, targets))
    weight = weight.contiguous()
    batches = [_forward_batch([h[rows] for h in hiddens], weight, targets[rows], bias, temperature)
               for rows in _batches(targets)]  # fmt: skip
    return tuple(_restore(kept, torch.cat(parts).float(), length) for parts in zip(*batches, strict=True))


def _forward_batch(hiddens, weight, targets, bias, temperature):
    n, (vocab, width), both = len(targets), weight.shape, len(hiddens) == 2
    if n == 0:
        return [weight.new_zeros(0)] * (11 if both else 4)
    tile = _tile("forward both" if both else "forward" if bias is None else "forward with bias", weight)
    blocks, tiles = -(-n // tile.tokens), -(-vocab // tile.vocab)
    share = share_size(blocks, tiles, _processors(weight))
    splits = -(-tiles // share)
    log2_scale = _log2_scale(temperature)
    partial = targets.new_empty((len(hiddens), 4 if both else 3, splits, n), dtype=torch.float32)
    target_logits = targets.new_empty((len(hiddens), n), dtype=torch.float32)
    with torch.cuda.device_of(weight):
        forward_kernel[(blocks * splits,)](
            hiddens[0], hiddens[-1], weight, weight if bias is None else bias, targets, partial, target_logits,
            n, vocab, width, log2_scale, splits, share,
            BOTH=both, BIAS=bias is not None, **launch_options(tile, width),
        )  # fmt: skip
    return _merge(partial.double(), target_logits.double(), log2_scale)


def share_size(blocks: int, tiles: int, processors: int) -> int:
    """Tiles in a share of the vocabulary so that all programs end soonest, one at a time on each processor.

    A program's start is reckoned at a quarter of a tile.
    """
    sizes = range(min(tiles, MOST_TILES), 0, -1)
    return min(sizes, key=lambda size: -(-blocks * -(-tiles // size) // processors) * (size + 0.25))


def _merge(partial, target_logits, log2_scale):
    """The results from the shares' sums, all float64, for one or two branches."""
    maximum, total, weighted = partial[:, 0], partial[:, 1], partial[:, 2]
    top = maximum.amax(1)
    shift = (maximum - top.unsqueeze(1)) * log2_scale
    scale = shift.exp2()
    weighted = (scale * (weighted + total * shift)).sum(1)
    if len(partial) == 2:
        cross = (scale * (partial[:, 3] + total * (shift[0] - shift[1]))).sum(1)
    total = (scale * total).sum(1)
    logsum = total.log2()
    logprob = ((target_logits - top) * log2_scale - logsum) * LN2
    entropy = (logsum - weighted / total) * LN2
    if len(partial) == 1:
        return logprob[0], entropy[0], top[0], logsum[0]
    expected = cross / total
    difference = logsum[0] - logsum[1]
    divergences = (expected[0] - difference, difference - expected[1], (expected[0] - expected[1]) / 2)
    # A divergence below zero is rounding.
    return *logprob, *entropy, *((x * LN2).clamp(min=0) for x in divergences), top[0], logsum[0], top[1], logsum[1]


# ---------------------------------------------------------------------------------------------------- backward


class _Side(NamedTuple):
    """A branch whose logits are needed, for a batch of tokens."""

    hidden: Tensor
    numbers: Tensor  # the kernel's
    written: bool  # its logits have a gradient
    grad_hidden: Tensor | None  # float32, to be added to


def _backward(branches, weight, targets, bias, temperature, needs_hidden, needs_weight, needs_bias):
    """(gradients of the branches' hidden states, of weight, of bias), None where they aren't needed."""
    kept, length = _kept(targets), len(targets)
    weight = weight.contiguous()
    grad_hidden = [None if not need else weight.new_zeros((length if kept is None else len(kept), weight.shape[1]),
                   dtype=torch.float32) for need in needs_hidden]  # fmt: skip
    grad_weight = torch.zeros_like(weight) if needs_weight else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None

    if kept is not None:
        branches, targets = [branch.select(kept) for branch in branches], targets[kept]
    written = [
        branch.used() and (need or needs_weight or needs_bias)
        for branch, need in zip(branches, needs_hidden, strict=True)
    ]
    if any(written) and len(targets) > 0:
        used = [branch for branch, on in zip(branches, written, strict=True) if on]
        terms = {
            "LOGPROB": any(branch.g_logprob is not None for branch in used),
            "ENTROPY": any(branch.g_entropy is not None for branch in used),
            "CROSS": any(branch.crosses() for branch in used),
        }
        batches = []
        for rows in _batches(targets):
            sides = [
                _Side(
                    branch.hidden[rows].contiguous(),
                    _numbers(branch.select(rows)),
                    on,
                    grad if grad is None else grad[rows],
                )
                for on, branch, grad in zip(written, branches, grad_hidden, strict=True)
                if on or terms["CROSS"]
            ]
            batches.append((targets[rows].contiguous(), sides))
        _add_gradients(batches, weight, bias, temperature, terms, grad_weight, grad_bias)

    grad_hidden = [None if grad is None else _restore(kept, grad.to(weight.dtype), length) for grad in grad_hidden]
    return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype)


def _numbers(branch: _Branch) -> Tensor:
    """(7, N) float32: m, log2 s, c₀ ... c₄ of kernels.py."""
    zero = torch.zeros_like(branch.maximum)
    g_logprob, g_entropy, g_kl, g_kl_other = (
        zero if g is None else g for g in (branch.g_logprob, branch.g_entropy, branch.g_kl, branch.g_kl_other)
    )
    constant = g_kl_other - g_logprob - g_entropy * branch.entropy - g_kl * (zero if branch.kl is None else branch.kl)
    return torch.stack(
        [branch.maximum, branch.logsum, constant, -LN2 * g_entropy, LN2 * g_kl, g_kl_other, g_logprob]
    ).float()


def _add_gradients(batches, weight, bias, temperature, terms, grad_weight, grad_bias):
    """Chunks of the vocabulary outside, batches of tokens inside: a chunk of the weight's gradient is written once."""
    stacked = [torch.cat([side.hidden for side in sides if side.written]) for _, sides in batches]
    rows = max(len(hiddens) for hiddens in stacked)
    columns = min(max(CHUNK_ELEMENTS // rows // 256, 1) * 256, MOST_COLUMNS)
    buffer = weight.new_empty(rows, columns)
    for first in range(0, len(weight), columns):
        chunk = slice(first, first + columns)
        w = weight[chunk]
        chunk_weight = (
            torch.zeros_like(w, dtype=torch.float32) if grad_weight is not None and len(batches) > 1 else None
        )
        for (targets, sides), hiddens in zip(batches, stacked, strict=True):
            grad_logits = buffer[: len(hiddens), : len(w)]
            parts = iter(grad_logits.split(len(targets)))
            outputs = [next(parts) if side.written else None for side in sides]
            _write_logit_gradients(outputs, sides, weight, bias, targets, temperature, first, terms)
            for side, output in zip(sides, outputs, strict=True):
                if output is not None and side.grad_hidden is not None:
                    _add_product(side.grad_hidden, output, w)
            if chunk_weight is not None:
                _add_product(chunk_weight, grad_logits.t(), hiddens)
            elif grad_weight is not None:
                torch.mm(grad_logits.t(), hiddens, out=grad_weight[chunk])
            if grad_bias is not None:
                grad_bias[chunk] += grad_logits.sum(0, dtype=torch.float32)
        if chunk_weight is not None:
            grad_weight[chunk] = chunk_weight


def _write_logit_gradients(outputs, sides, weight, bias, targets, temperature, first, terms):
    """Fill each output that isn't None, (n, columns), with the gradient of a side's logits from column `first` on."""
    n, (vocab, width), both = len(targets), weight.shape, len(sides) == 2
    some = next(output for output in outputs if output is not None)
    plain = bias is None and not terms["ENTROPY"]
    tile = _tile("gradient both" if both else "gradient of logprob" if plain else "gradient", weight)
    grid = (-(-n // tile.tokens) * -(-some.shape[1] // tile.vocab),)
    with torch.cuda.device_of(weight):
        logit_gradient_kernel[grid](
            sides[0].hidden, sides[-1].hidden, weight, weight if bias is None else bias, targets,
            sides[0].numbers, sides[-1].numbers,
            some if outputs[0] is None else outputs[0], some if outputs[-1] is None else outputs[-1],
            n, vocab, width, _log2_scale(temperature), first, some.shape[1], some.stride(0),
            BOTH=both, WRITE_A=outputs[0] is not None, WRITE_B=both and outputs[1] is not None,
            BIAS=bias is not None, **terms, **launch_options(tile, width),
        )  # fmt: skip


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, all of it in float32 whatever the dtype of a and b."""
    if a.dtype != torch.float32 and total.is_cuda and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


# ---------------------------------------------------------------------------------------------------- both


def _batches(targets: Tensor) -> list[slice]:
    """At least one, if empty, so that no tokens give empty results rather than none."""
    return [slice(start, start + MOST_TOKENS) for start in range(0, max(1, len(targets)), MOST_TOKENS)]


def _log2_scale(temperature: float) -> float:
    """What the kernels multiply differences of h Wᵀ + bias by: rounded to float32, as they do, for the merge's sake."""
    return torch.tensor(1 / (temperature * LN2), dtype=torch.float32).item()


def _tile(kernel: str, weight: Tensor) -> Tile:
    if not weight.is_cuda:
        return INTERPRETER_TILE
    if torch.version.hip is not None:
        return DEFAULT_TILE
    major, minor = torch.cuda.get_device_capability(weight.device)
    return pick_tile(kernel, weight.dtype, 10 * major + minor)


def launch_options(tile: Tile, width: int) -> dict:
    """What a tile fixes of the kernels' constants and of the compiler's options."""
    return {
        "TOKENS": tile.tokens,
        "VOCAB": tile.vocab,
        "DEPTH": tile.depth,
        "GROUP": GROUP,
        "WHOLE_DEPTH": width % tile.depth == 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def _processors(weight: Tensor) -> int:
    return torch.cuda.get_device_properties(weight.device).multi_processor_count if weight.is_cuda else 8
