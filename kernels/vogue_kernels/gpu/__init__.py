"""The Triton backend: NVIDIA and AMD GPUs, and Triton's interpreter. Drop-in for reference.py, but not for float64.

Forward: one kernel, the vocabulary split over programs, and a small one that merges the shares in float64. Backward:
for a chunk of the vocabulary at a time, one kernel writes the gradient of the logits, in the inputs' dtype, and
torch.mm does the rest:

    ∂H += ∂L W[chunk]   (float32)      ∂W[chunk] = ∂Lᵀ H

The two branches' rows stand one above the other in ∂L and H, so that each is a single product. Besides inputs, results
and a copy of two branches' hidden states, memory is that of CHUNK_ELEMENTS a branch and a float32 copy of the hidden
states' gradient, whatever V.
"""

# A launch of a Triton kernel looks like a call with all its arguments missing; a gradient is None where none is needed.
# pyright: reportCallIssue=false, reportOptionalSubscript=false

import os
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..branches import log2_scale, numbers
from ..kept import NARROWEST, KeptLogits, kept_logits
from .kernels import forward_kernel, kept_gradient_kernel, logit_gradient_kernel
from .merge import merge_kernel

if os.environ.get("TRITON_INTERPRET") == "1":
    from . import interpreter  # noqa: F401

CHUNK_ELEMENTS = 1 << 26  # of the gradient of a branch's logits at a time: 128 MB of bfloat16
MOST_COLUMNS = 1 << 15  # of a chunk: more makes its two products no faster
MOST_TOKENS = 1 << 13  # of a batch: bounds the shares' sums, and leaves chunks wide
MOST_TILES = 32  # of a share of the vocabulary: longer float32 sums would cost digits
GROUP = 8  # blocks of tokens that share a tile of the weight through L2
# Nothing is fused in the merge: of equal branches, every difference must be exactly 0.
MERGE_OPTIONS = {"TOKENS": 16, "SHARES": 32, "num_warps": 4, "enable_fp_fusion": False}
# Of kept logits; the words of a block have one reference, whatever the tile that they were computed in.
KEPT_OPTIONS = {"TOKENS": 64, "KEPT": NARROWEST, "num_warps": 4, "enable_fp_fusion": True}


class Tile(NamedTuple):
    tokens: int
    vocab: int
    depth: int
    warps: int
    stages: int
    tma: bool = False  # hidden states and weight are loaded through tensor descriptors


# By architecture and kernel: tiles as wide as registers allow where V and D are multiples of 16. A bias, a second
# branch and the entropy's gradient need registers of their own. What doesn't fit may be spilled after the products,
# once a tile, but never among them (bench/gpu_static.py).
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
        "gradient": Tile(128, 256, 64, 8, 4, tma=True),
        "gradient both": Tile(128, 128, 64, 8, 4, tma=True),
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
# The row that suits an architecture without one: its instructions, and 99 KB of shared memory (228 KB for sm_103).
NEAREST = {**dict.fromkeys(("sm_86", "sm_87", "sm_89", "sm_120", "sm_121"), "sm_80"), "sm_103": "sm_100"}
TILES["gfx942"] = dict.fromkeys(TILES["sm_90"], Tile(128, 128, 32, 8, 2))
DEFAULT_TILE = Tile(64, 64, 32, 4, 2)  # other GPUs, which may have 64 KB of shared memory only
FLOAT32_TILE = Tile(32, 64, 32, 8, 2)  # without tensor cores: TF32 isn't exact enough
INTERPRETER_TILE = Tile(64, 512, 32, 1, 1)  # wide, because the interpreter pays by the operation


def pick_tile(kernel: str, dtype: torch.dtype, architecture: str, tokens: int) -> Tile:
    """The tile of a kernel, a key of a row of TILES, for a batch of tokens on an architecture: "sm_90", "gfx942"."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    row = TILES.get(NEAREST.get(architecture, architecture))
    tile = DEFAULT_TILE if row is None else row[kernel]
    return tile._replace(tokens=64) if tokens <= 64 else tile  # half of a larger one would be empty


# ---------------------------------------------------------------------------------------------------- forward


def forward(hiddens, weight, targets, bias, temperature, buffers):
    """As branches.py says."""
    hiddens, weight, targets = [h.contiguous() for h in hiddens], weight.contiguous(), targets.contiguous()
    results = tuple(targets.new_empty(len(targets), dtype=torch.float32) for _ in range(6 if len(hiddens) == 1 else 15))
    kept = _kept(buffers, targets, weight)
    for rows in _batches(targets):
        sums = _running_sums(
            [h[rows] for h in hiddens],
            weight,
            targets[rows],
            bias,
            temperature,
            [logits.select(rows) for logits in kept],
        )
        _merge(*sums, [result[rows] for result in results], temperature)
    return results


def _running_sums(hiddens, weight, targets, bias, temperature, kept) -> tuple[Tensor, Tensor]:
    """The running sums of shares of the vocabulary and the targets' logits, as the forward kernel says.

    kept: of each branch, to be filled.
    """
    n, (vocab, width), both = len(targets), weight.shape, len(hiddens) == 2
    tile = _tile("forward both" if both else "forward" if bias is None else "forward with bias", hiddens, weight)
    blocks, tiles = -(-n // tile.tokens), -(-vocab // tile.vocab)
    share = share_size(blocks, tiles, _processors(weight))
    splits = -(-tiles // share)
    partial = targets.new_empty((len(hiddens), 4 if both else 3, splits, n), dtype=torch.float32)
    target_logits = targets.new_empty((len(hiddens), n), dtype=torch.float32)
    with torch.cuda.device_of(weight):
        forward_kernel[(blocks * splits,)](
            *_matrices(tile, hiddens[0], hiddens[-1], weight),
            weight if bias is None else bias, targets, partial, target_logits,
            *(logits.logits if logits.columns else weight for logits in (kept[0], kept[-1])),
            *(logits.reference if logits.columns else partial for logits in (kept[0], kept[-1])),
            n, vocab, width, log2_scale(temperature), splits, share,
            kept[0].columns, kept[-1].columns, max(logits.reference.stride(0) for logits in kept),
            BOTH=both, BIAS=bias is not None, KEEP_P=kept[0].columns > 0, KEEP_Q=both and kept[1].columns > 0,
            KEPT=NARROWEST, **launch_options(tile, width),
        )  # fmt: skip
    return partial, target_logits


def _merge(partial: Tensor, target_logits: Tensor, results: list[Tensor], temperature: float) -> None:
    """Fill the results of `forward` for a batch of tokens."""
    n, splits, both = partial.shape[3], partial.shape[2], len(results) == 15
    if not both:
        logprob, entropy, lse, top_logprob, maximum, logsum = results
        values = [logprob, logprob, entropy, entropy, *[logprob] * 3, lse, lse, top_logprob, top_logprob]
        results = [*values, maximum, logsum, maximum, logsum]
    with torch.cuda.device_of(partial):
        merge_kernel[(-(-n // MERGE_OPTIONS["TOKENS"]),)](
            partial, target_logits, *results, n, splits, log2_scale(temperature),
            BOTH=both, **MERGE_OPTIONS,
        )  # fmt: skip


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
    kept: KeptLogits
    written: bool  # its logits have a gradient
    grad_hidden: Tensor | None  # float32, to be added to


def backward(branches, weight, targets, bias, temperature, needs_hidden, needs_weight, needs_bias, buffers):
    """As branches.py says."""
    weight = weight.contiguous()
    grad_hidden = [
        branch.hidden.new_zeros(branch.hidden.shape, dtype=torch.float32) if need else None
        for branch, need in zip(branches, needs_hidden, strict=True)
    ]
    grad_weight = torch.empty_like(weight) if needs_weight else None
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
    kept = _kept(buffers, targets, weight)
    batches = []
    for rows in _batches(targets):
        sides = [
            _Side(
                branch.hidden[rows].contiguous(),
                numbers(branch.select(rows)),
                logits.select(rows),
                on,
                None if grad is None else grad[rows],
            )
            for on, branch, logits, grad in zip(written, branches, kept, grad_hidden, strict=True)
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
    stacked = [_stack([side.hidden for side in sides if side.written]) for _, sides in batches]
    columns = chunk_size(len(weight), max(len(targets) for targets, _ in batches))
    buffer = weight.new_empty(max(len(hiddens) for hiddens in stacked), columns)
    for first in range(0, len(weight), columns):
        chunk = slice(first, first + columns)
        w, chunk_weight = weight[chunk], None
        for (targets, sides), hiddens in zip(batches, stacked, strict=True):
            grad_logits = buffer[: len(hiddens), : len(w)]
            parts = iter(grad_logits.split(len(targets)))
            outputs = [next(parts) if side.written else None for side in sides]
            _write_logit_gradients(outputs, sides, weight, bias, targets, temperature, first, terms)
            for side, output in zip(sides, outputs, strict=True):
                if output is not None and side.grad_hidden is not None:
                    _add_product(side.grad_hidden, output, w)
            if grad_weight is not None and len(batches) == 1:  # nothing to add to: it is rounded once, where it belongs
                torch.mm(grad_logits.t(), hiddens, out=grad_weight[chunk])
            elif grad_weight is not None:
                chunk_weight = _add_product(chunk_weight, grad_logits.t(), hiddens)
            if grad_bias is not None:
                grad_bias[chunk] += grad_logits.sum(0, dtype=torch.float32)
        if chunk_weight is not None:
            grad_weight[chunk] = chunk_weight


def chunk_size(vocab: int, tokens: int) -> int:
    """How many columns a chunk has. All but the last have the same number, a multiple of 256, and the last few less."""
    most = min(max(CHUNK_ELEMENTS // tokens // 256, 1) * 256, MOST_COLUMNS)
    chunks = -(-vocab // most)
    return -(-vocab // chunks // 256) * 256


def _stack(hiddens: list[Tensor]) -> Tensor:
    return hiddens[0] if len(hiddens) == 1 else torch.cat(hiddens)


def _write_logit_gradients(outputs, sides, weight, bias, targets, temperature, first, terms):
    """Fill each output that isn't None, (n, columns), with the gradient of a side's logits from column `first` on."""
    width = next(output for output in outputs if output is not None).shape[1]
    plain = bias is None and not terms["ENTROPY"]
    kernel = "gradient both" if len(sides) == 2 else "gradient of logprob" if plain else "gradient"
    tile = _tile(kernel, [side.hidden for side in sides], weight)
    # Words whose logits all sides have kept; without a divergence, for whose gradient none are, all sides are written.
    known = min(max(min(side.kept.columns for side in sides) - first, 0), width)
    if known < width:  # logits that are computed again are so in tiles as in the forward pass, to round alike
        known -= known % tile.vocab
    if known:
        for output, side in zip(outputs, sides, strict=True):
            _write_gradients_of_kept(output[:, :known], side, targets, temperature, first, terms)
    if known < width:
        rest = [output if output is None else output[:, known:] for output in outputs]
        _write_gradients_of_new(rest, sides, weight, bias, targets, temperature, first + known, terms, tile)


def _write_gradients_of_kept(output, side: _Side, targets, temperature, first, terms):
    n, columns = output.shape
    grid = (-(-n // KEPT_OPTIONS["TOKENS"]), -(-columns // NARROWEST))
    with torch.cuda.device_of(output):
        kept_gradient_kernel[grid](
            side.kept.logits, side.kept.reference, targets, side.numbers, output,
            n, log2_scale(temperature), first, columns, output.stride(0), side.kept.columns,
            side.kept.reference.stride(0),
            LOGPROB=terms["LOGPROB"], ENTROPY=terms["ENTROPY"], **KEPT_OPTIONS,
        )  # fmt: skip


def _write_gradients_of_new(outputs, sides, weight, bias, targets, temperature, first, terms, tile):
    n, (vocab, width), both = len(targets), weight.shape, len(sides) == 2
    some = next(output for output in outputs if output is not None)
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


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total += a b, in float32 whatever the dtype of a and b. Returns total, which is new where it was None."""
    if a.dtype == torch.float32 or not a.is_cuda or torch.version.hip is not None:
        return a.float() @ b.float() if total is None else total.addmm_(a.float(), b.float())
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    if torch.__version__ < "2.10":  # there addmm refuses a total of another dtype than a's
        return total.add_(torch.mm(a, b, out_dtype=torch.float32))
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


# ---------------------------------------------------------------------------------------------------- both


def _batches(targets: Tensor) -> list[slice]:
    return [slice(start, start + MOST_TOKENS) for start in range(0, len(targets), MOST_TOKENS)]


def _kept(buffers: list[Tensor], targets: Tensor, weight: Tensor) -> list[KeptLogits]:
    return [kept_logits(buffer, len(targets), weight, NARROWEST) for buffer in buffers]


def _tile(kernel: str, hiddens: list[Tensor], weight: Tensor) -> Tile:
    if weight.is_cuda:
        tile = pick_tile(kernel, weight.dtype, _architecture(weight), len(hiddens[0]))
    else:
        tile = INTERPRETER_TILE
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
    a, b = (_described(hidden, tile.tokens, tile.depth) for hidden in (hidden_a, hidden_b))
    return a, b, _described(weight, tile.vocab, tile.depth)


def _described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    # A matrix of one row may be contiguous with any strides; the kernels know those of its width.
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], [rows, columns])


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
