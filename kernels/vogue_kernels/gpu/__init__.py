"""The Triton backend: NVIDIA and AMD GPUs, and Triton's interpreter. Drop-in for reference.py, but not for float64.

Forward: one kernel, the vocabulary split over programs; torch merges the shares in float64. Backward: for a chunk of
the vocabulary at a time, one kernel writes the gradient of the logits, in the inputs' dtype, torch.mm does the rest:

    ∂H += ∂L W[chunk]   (float32)      ∂W[chunk] = ∂Lᵀ H

The two branches' rows stand one above the other in ∂L and H, so that each is a single product. Besides inputs, results
and copies of hidden states and targets, memory is that of CHUNK_ELEMENTS and a float32 copy of the hidden states'
gradient, whatever V.
"""

# A launch of a Triton kernel looks like a call with all its arguments missing; a gradient is None where none is needed.
# pyright: reportCallIssue=false, reportOptionalSubscript=false

import os
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..branches import log2_scale, merge, numbers
from .kernels import forward_kernel, logit_gradient_kernel

if os.environ.get("TRITON_INTERPRET") == "1":
    from . import interpreter  # noqa: F401

CHUNK_ELEMENTS = 1 << 26  # of the gradient of the logits at a time: 128 MB of bfloat16
MOST_COLUMNS = 1 << 15  # of a chunk: more makes its two products no faster
MOST_TOKENS = 1 << 13  # of a batch: bounds the shares' sums, and leaves chunks wide
MOST_TILES = 32  # of a share of the vocabulary: longer float32 sums would cost digits
GROUP = 8  # blocks of tokens that share a tile of the weight through L2


class Tile(NamedTuple):
    tokens: int
    vocab: int
    depth: int
    warps: int
    stages: int
    tma: bool = False  # hidden states and weight are loaded through tensor descriptors


# By architecture and kernel: wide tiles that keep everything in registers (bench/gpu_static.py) where V and D are
# multiples of 16. A bias, a second branch and the entropy's gradient need registers of their own.
TILES = {
    "sm_80": {
        "forward": Tile(128, 128, 32, 8, 4),
        "forward with bias": Tile(128, 128, 32, 8, 4),
        "forward both": Tile(128, 64, 32, 8, 4),
        "gradient of logprob": Tile(128, 128, 32, 8, 4),
        "gradient": Tile(128, 128, 32, 8, 4),
        "gradient both": Tile(64, 128, 64, 8, 3),
    },
    "sm_90": {
        "forward": Tile(128, 256, 64, 8, 4, tma=True),
        "forward with bias": Tile(128, 256, 64, 8, 4, tma=True),
        "forward both": Tile(128, 128, 64, 8, 4, tma=True),
        "gradient of logprob": Tile(128, 256, 64, 8, 4, tma=True),
        "gradient": Tile(128, 128, 64, 8, 4, tma=True),
        "gradient both": Tile(128, 64, 64, 8, 4, tma=True),
    },
    "sm_100": {
        "forward": Tile(128, 256, 64, 8, 4, tma=True),
        "forward with bias": Tile(128, 128, 64, 8, 4, tma=True),
        "forward both": Tile(128, 64, 64, 8, 4, tma=True),
        "gradient of logprob": Tile(128, 256, 64, 8, 4, tma=True),
        "gradient": Tile(128, 256, 64, 8, 4, tma=True),
        "gradient both": Tile(128, 64, 64, 8, 4, tma=True),
    },
}
TILES["gfx942"] = dict.fromkeys(TILES["sm_90"], Tile(128, 128, 32, 8, 2))
DEFAULT_TILE = Tile(64, 64, 32, 4, 2)  # other GPUs, which may have 64 KB of shared memory only
FLOAT32_TILE = Tile(32, 64, 32, 4, 2)  # without tensor cores: TF32 isn't exact enough
INTERPRETER_TILE = Tile(64, 512, 32, 1, 1)  # wide, because the interpreter pays by the operation


def pick_tile(kernel: str, dtype: torch.dtype, architecture: str) -> Tile:
    """The tile of a kernel, which is a key of a row of TILES, on an architecture such as "sm_90" or "gfx942"."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    return TILES[architecture][kernel] if architecture in TILES else DEFAULT_TILE


# ---------------------------------------------------------------------------------------------------- forward


def forward(hiddens, weight, targets, bias, temperature, buffers):
    """As branches.py says."""
    hiddens, weight, targets = [h.contiguous() for h in hiddens], weight.contiguous(), targets.contiguous()
    batches = [_forward_batch([h[rows] for h in hiddens], weight, targets[rows], bias, temperature)
               for rows in _batches(targets)]  # fmt: skip
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def _forward_batch(hiddens, weight, targets, bias, temperature):
    n, (vocab, width), both = len(targets), weight.shape, len(hiddens) == 2
    tile = _tile("forward both" if both else "forward" if bias is None else "forward with bias", hiddens, weight)
    blocks, tiles = -(-n // tile.tokens), -(-vocab // tile.vocab)
    share = share_size(blocks, tiles, _processors(weight))
    splits = -(-tiles // share)
    scale = log2_scale(temperature)
    partial = targets.new_empty((len(hiddens), 4 if both else 3, splits, n), dtype=torch.float32)
    target_logits = targets.new_empty((len(hiddens), n), dtype=torch.float32)
    with torch.cuda.device_of(weight):
        forward_kernel[(blocks * splits,)](
            *_matrices(tile, hiddens[0], hiddens[-1], weight),
            weight if bias is None else bias, targets, partial, target_logits,
            n, vocab, width, scale, splits, share,
            BOTH=both, BIAS=bias is not None, **launch_options(tile, width),
        )  # fmt: skip
    return merge(partial.double(), target_logits.double(), scale)


def share_size(blocks: int, tiles: int, processors: int) -> int:
    """How many tiles a share of the vocabulary has, so that all programs end soonest, one at a time on a processor.

    A program's start is reckoned at a quarter of a tile.
    """
    sizes = range(min(tiles, MOST_TILES), 0, -1)
    return min(sizes, key=lambda size: -(-blocks * -(-tiles // size) // processors) * (size + 0.25))


# ---------------------------------------------------------------------------------------------------- backward


class _Side(NamedTuple):
    """A branch whose logits are needed, for a batch of tokens."""

    hidden: Tensor
    numbers: Tensor  # the kernel's
    written: bool  # its logits have a gradient
    grad_hidden: Tensor | None  # float32, to be added to


def backward(branches, weight, targets, bias, temperature, needs_hidden, needs_weight, needs_bias, buffers):
    """As branches.py says."""
    weight = weight.contiguous()
    grad_hidden = [
        torch.zeros_like(branch.hidden, dtype=torch.float32) if need else None
        for branch, need in zip(branches, needs_hidden, strict=True)
    ]
    grad_weight = torch.zeros_like(weight) if needs_weight else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
    written = [
        branch.used and (need or needs_weight or needs_bias)
        for branch, need in zip(branches, needs_hidden, strict=True)
    ]
    used = [branch for branch, on in zip(branches, written, strict=True) if on]
    terms = {
        "LOGPROB": any(branch.g_logprob is not None for branch in used),
        "ENTROPY": any(branch.g_entropy is not None for branch in used),
        "CROSS": any(branch.crosses for branch in used),
    }
    batches = []
    for rows in _batches(targets):
        sides = [
            _Side(
                branch.hidden[rows].contiguous(),
                numbers(branch.select(rows)),
                on,
                None if grad is None else grad[rows],
            )
            for on, branch, grad in zip(written, branches, grad_hidden, strict=True)
            if on or terms["CROSS"]
        ]
        batches.append((targets[rows].contiguous(), sides))
    _add_gradients(batches, weight, bias, temperature, terms, grad_weight, grad_bias)
    grad_hidden = [None if grad is None else grad.to(weight.dtype) for grad in grad_hidden]
    return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype)


def _add_gradients(batches, weight, bias, temperature, terms, grad_weight, grad_bias):
    """Add to all gradients, in a loop over chunks of the vocabulary and, within it, over batches of tokens.

    In this order a chunk of the weight's gradient is written once.
    """
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
    kernel = "gradient both" if both else "gradient of logprob" if plain else "gradient"
    tile = _tile(kernel, [side.hidden for side in sides], weight)
    grid = (-(-n // tile.tokens) * -(-some.shape[1] // tile.vocab),)
    with torch.cuda.device_of(weight):
        logit_gradient_kernel[grid](
            *_matrices(tile, sides[0].hidden, sides[-1].hidden, weight),
            weight if bias is None else bias, targets,
            sides[0].numbers, sides[-1].numbers,
            some if outputs[0] is None else outputs[0], some if outputs[-1] is None else outputs[-1],
            n, vocab, width, log2_scale(temperature), first, some.shape[1], some.stride(0),
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
    return [slice(start, start + MOST_TOKENS) for start in range(0, len(targets), MOST_TOKENS)]


def _tile(kernel: str, hiddens: list[Tensor], weight: Tensor) -> Tile:
    tile = pick_tile(kernel, weight.dtype, _architecture(weight)) if weight.is_cuda else INTERPRETER_TILE
    aligned = all(x.data_ptr() % 16 == 0 for x in (*hiddens, weight)) and weight[0].nbytes % 16 == 0
    return DEFAULT_TILE if tile.tma and not aligned else tile


def _architecture(weight: Tensor) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(weight.device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(weight.device))


def _matrices(tile: Tile, hidden_a: Tensor, hidden_b: Tensor, weight: Tensor) -> tuple:
    """What the kernels take for these matrices: the tensors, or descriptors for TMA."""
    if not tile.tma:
        return hidden_a, hidden_b, weight
    a, b = (TensorDescriptor.from_tensor(hidden, [tile.tokens, tile.depth]) for hidden in (hidden_a, hidden_b))
    return a, b, TensorDescriptor.from_tensor(weight, [tile.vocab, tile.depth])


def launch_options(tile: Tile, width: int) -> dict:
    """The kernels' constants and the compiler's options that a tile fixes."""
    return {
        "TOKENS": tile.tokens,
        "VOCAB": tile.vocab,
        "DEPTH": tile.depth,
        "GROUP": GROUP,
        "WHOLE_DEPTH": width % tile.depth == 0,
        "TMA": tile.tma,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def _processors(weight: Tensor) -> int:
    return torch.cuda.get_device_properties(weight.device).multi_processor_count if weight.is_cuda else 8
