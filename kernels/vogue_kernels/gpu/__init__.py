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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..branches import Head, HeadGradients, Scaling, log2_scale, numbers, of_branch
from ..kept_logits import NARROWEST, KeptLogits, kept_logits, own_bits
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

kept_bits = own_bits  # as branches.py says


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


def forward(hiddens, heads, targets, scaling, buffers):
    """As branches.py says."""
    hiddens, heads, targets = [h.contiguous() for h in hiddens], _contiguous(heads), targets.contiguous()
    results = tuple(targets.new_empty(len(targets), dtype=torch.float32) for _ in range(6 if len(hiddens) == 1 else 15))
    kept = _kept(buffers, targets, heads)
    for rows in _batches(targets):
        kept_rows = [logits.select(rows) for logits in kept]
        sums = _running_sums([h[rows] for h in hiddens], heads, targets[rows], scaling, kept_rows)
        _merge(*sums, [result[rows] for result in results], scaling)
    return results


def _running_sums(hiddens, heads, targets, scaling, kept) -> tuple[Tensor, Tensor]:
    """The running sums of shares of the vocabulary and the targets' logits, as the forward kernel says.

    kept: of each branch, to be filled.
    """
    n, (weight, bias), both = len(targets), heads[0], len(hiddens) == 2
    tile = _tile("forward both" if both else "forward" if bias is None else "forward with bias", hiddens, heads)
    blocks, tiles = -(-n // tile.tokens), -(-len(weight) // tile.vocab)
    share = share_size(blocks, tiles, _processors(weight))
    splits = -(-tiles // share)
    partial = targets.new_empty((len(hiddens), 4 if both else 3, splits, n), dtype=torch.float32)
    target_logits = targets.new_empty((len(hiddens), n), dtype=torch.float32)
    with torch.cuda.device_of(weight):
        forward_kernel[(blocks * splits,)](
            *_matrices(tile, hiddens, heads), *_biases(heads), targets, partial, target_logits,
            *(logits.logits if logits.columns else weight for logits in (kept[0], kept[-1])),
            *(logits.reference if logits.columns else partial for logits in (kept[0], kept[-1])),
            n, *_sizes(heads), *_scales(scaling), splits, share,
            kept[0].columns, kept[-1].columns, max(logits.reference.stride(0) for logits in kept),
            BOTH=both, BIAS=bias is not None, KEEP_P=kept[0].columns > 0, KEEP_Q=both and kept[1].columns > 0,
            KEPT=NARROWEST, **launch_options(tile, *(head.weight.shape[1] for head in heads)),
        )  # fmt: skip
    return partial, target_logits


def _merge(partial: Tensor, target_logits: Tensor, results: list[Tensor], scaling: Scaling) -> None:
    """Fill the results of `forward` for a batch of tokens."""
    n, splits, both = partial.shape[3], partial.shape[2], len(results) == 15
    if not both:
        logprob, entropy, lse, top_logprob, maximum, logsum = results
        values = [logprob, logprob, entropy, entropy, *[logprob] * 3, lse, lse, top_logprob, top_logprob]
        results = [*values, maximum, logsum, maximum, logsum]
    with torch.cuda.device_of(partial):
        merge_kernel[(-(-n // MERGE_OPTIONS["TOKENS"]),)](
            partial, target_logits, *results, n, splits, log2_scale(scaling),
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
    head: int
    numbers: Tensor  # the kernel's
    kept: KeptLogits
    written: bool  # its logits have a gradient
    grad_hidden: Tensor | None  # float32, to be added to


def backward(branches, heads, targets, scaling, needs, buffers):
    """As branches.py says."""
    heads, written = _contiguous(heads), needs.of_logits(branches)
    reached = {of_branch(range(len(heads)), i) for i, on in enumerate(written) if on}
    grads_hidden = [
        branch.hidden.new_zeros(branch.hidden.shape, dtype=torch.float32) if need else None
        for branch, need in zip(branches, needs.hidden, strict=True)
    ]
    grads = [_new_gradients(head, needs.weight[i], needs.bias[i], i in reached) for i, head in enumerate(heads)]
    used = [branch for branch, on in zip(branches, written, strict=True) if on]
    terms = {
        "LOGPROB": any(branch.g_logprob is not None for branch in used),
        "ENTROPY": any(branch.g_entropy is not None for branch in used),
        "CROSS": any(branch.crosses for branch in used),
    }
    kept = _kept(buffers, targets, heads)
    batches = []
    for rows in _batches(targets):
        sides = [
            _Side(
                branch.hidden[rows].contiguous(),
                of_branch(range(len(heads)), i),
                numbers(branch.select(rows)),
                kept[i].select(rows),
                written[i],
                None if grads_hidden[i] is None else grads_hidden[i][rows],
            )
            for i, branch in enumerate(branches)
            if written[i] or terms["CROSS"]
        ]
        batches.append((targets[rows].contiguous(), sides))
    _add_gradients(batches, heads, scaling, terms, grads)
    grads_hidden = [None if grad is None else grad.to(heads[0].weight.dtype) for grad in grads_hidden]
    grads_bias = [
        None if grad.bias is None else grad.bias.to(head.bias.dtype)  # pyright: ignore[reportOptionalMemberAccess]
        for grad, head in zip(grads, heads, strict=True)
    ]
    return grads_hidden, [grad.weight for grad in grads], grads_bias


def _new_gradients(head: Head, needs_weight: bool, needs_bias: bool, written: bool) -> HeadGradients:
    """Of the weight empty where all of it will be written, else zeros; of the bias a sum to add to."""
    new = torch.empty_like if written else torch.zeros_like
    bias = torch.zeros_like(head.bias, dtype=torch.float32) if needs_bias and head.bias is not None else None
    return HeadGradients(new(head.weight) if needs_weight else None, bias)


def _add_gradients(batches, heads, scaling, terms, grads):
    """Add to all gradients, in a loop over chunks of the vocabulary and, within it, over batches of tokens.

    In this order a chunk of a weight's gradient is written once.
    """
    stacks, vocab = [_stacks(sides, len(heads)) for _, sides in batches], len(heads[0].weight)
    columns = chunk_size(vocab, max(len(targets) for targets, _ in batches))
    buffer = heads[0].weight.new_empty(max(stack[-1].rows.stop for stack in stacks), columns)
    for first in range(0, vocab, columns):
        chunk = slice(first, min(first + columns, vocab))
        sums: list[Any] = [None] * len(heads)
        for (targets, sides), stack in zip(batches, stacks, strict=True):
            grad_logits = buffer[: stack[-1].rows.stop, : chunk.stop - first]
            parts = iter(grad_logits.split(len(targets)))
            outputs = [next(parts) if side.written else None for side in sides]
            _write_logit_gradients(outputs, sides, heads, targets, scaling, first, terms)
            for side, output in zip(sides, outputs, strict=True):
                if output is not None and side.grad_hidden is not None:
                    _add_product(side.grad_hidden, output, heads[side.head].weight[chunk])
            for head, rows, hiddens in stack:
                grad, grad_weight = grad_logits[rows], grads[head].weight
                if grad_weight is not None and len(batches) == 1:  # nothing to add to: rounded once, where it belongs
                    torch.mm(grad.t(), hiddens, out=grad_weight[chunk])
                elif grad_weight is not None:
                    sums[head] = _add_product(sums[head], grad.t(), hiddens)
                if grads[head].bias is not None:
                    grads[head].bias[chunk] += grad.sum(0, dtype=torch.float32)
        for grad, total in zip(grads, sums, strict=True):
            if total is not None:
                grad.weight[chunk] = total


class _Stack(NamedTuple):
    """What of a batch's gradient of the logits belongs to one head."""

    head: int
    rows: slice  # of the gradient
    hiddens: Tensor  # the hidden states of these rows


def _stacks(sides: list[_Side], heads: int) -> list[_Stack]:
    """Of the heads that have a written side; in the order of the sides, so that their rows are those of the buffer."""
    stacks, end = [], 0
    for head in range(heads):
        hiddens = [side.hidden for side in sides if side.written and side.head == head]
        if hiddens:
            start, end = end, end + sum(len(hidden) for hidden in hiddens)
            stacks.append(_Stack(head, slice(start, end), hiddens[0] if len(hiddens) == 1 else torch.cat(hiddens)))
    return stacks


def chunk_size(vocab: int, tokens: int) -> int:
    """How many columns a chunk has. All but the last have the same number, a multiple of 256, and the last few less."""
    most = min(max(CHUNK_ELEMENTS // tokens // 256, 1) * 256, MOST_COLUMNS)
    chunks = -(-vocab // most)
    return -(-vocab // chunks // 256) * 256


def _write_logit_gradients(outputs, sides, heads, targets, scaling, first, terms):
    """Fill each output that isn't None, (n, columns), with the gradient of a side's logits from column `first` on."""
    width = next(output for output in outputs if output is not None).shape[1]
    heads = _heads_of(sides, heads)
    plain = not terms["ENTROPY"] and all(head.bias is None for head in heads)
    kernel = "gradient both" if len(sides) == 2 else "gradient of logprob" if plain else "gradient"
    tile = _tile(kernel, [side.hidden for side in sides], heads)
    # Words whose logits all sides have kept; without a divergence, for whose gradient none are, all sides are written.
    known = min(max(min(side.kept.columns for side in sides) - first, 0), width)
    if known < width:  # logits that are computed again are so in tiles as in the forward pass, to round alike
        known -= known % tile.vocab
    if known:
        for output, side in zip(outputs, sides, strict=True):
            _write_gradients_of_kept(output[:, :known], side, targets, scaling, first, terms)
    if known < width:
        rest = [output if output is None else output[:, known:] for output in outputs]
        _write_gradients_of_new(rest, sides, heads, targets, scaling, first + known, terms, tile)


def _heads_of(sides: list[_Side], heads: list[Head]) -> list[Head]:
    """The heads that these sides have, in their order: one or two."""
    return [heads[i] for i in dict.fromkeys(side.head for side in sides)]


def _write_gradients_of_kept(output, side: _Side, targets, scaling, first, terms):
    n, columns = output.shape
    grid = (-(-n // KEPT_OPTIONS["TOKENS"]), -(-columns // NARROWEST))
    with torch.cuda.device_of(output):
        kept_gradient_kernel[grid](
            side.kept.logits, side.kept.reference, targets, side.numbers, output,
            n, log2_scale(scaling), first, columns, output.stride(0), side.kept.columns,
            side.kept.reference.stride(0),
            LOGPROB=terms["LOGPROB"], ENTROPY=terms["ENTROPY"], CAPPED=scaling.softcap is not None,  # pyright: ignore[reportArgumentType]
            **KEPT_OPTIONS,
        )  # fmt: skip


def _write_gradients_of_new(outputs, sides, heads, targets, scaling, first, terms, tile):
    n, both = len(targets), len(sides) == 2
    some = next(output for output in outputs if output is not None)
    grid = (-(-n // tile.tokens) * -(-some.shape[1] // tile.vocab),)
    with torch.cuda.device_of(some):
        logit_gradient_kernel[grid](
            *_matrices(tile, [side.hidden for side in sides], heads), *_biases(heads), targets,
            sides[0].numbers, sides[-1].numbers,
            some if outputs[0] is None else outputs[0], some if outputs[-1] is None else outputs[-1],
            n, *_sizes(heads), *_scales(scaling), first, some.shape[1], some.stride(0),
            BOTH=both, WRITE_A=outputs[0] is not None, WRITE_B=both and outputs[1] is not None,
            BIAS=heads[0].bias is not None, **terms,
            **launch_options(tile, *(head.weight.shape[1] for head in heads)),
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


def _contiguous(heads: list[Head]) -> list[Head]:
    return [Head(weight.contiguous(), None if bias is None else bias.contiguous()) for weight, bias in heads]


def _kept(buffers: list[Tensor], targets: Tensor, heads: list[Head]) -> list[KeptLogits]:
    return [kept_logits(buffer, len(targets), heads[0].weight, NARROWEST) for buffer in buffers]


def _tile(kernel: str, hiddens: list[Tensor], heads: list[Head]) -> Tile:
    weights = [head.weight for head in heads]
    if weights[0].is_cuda:
        tile = pick_tile(kernel, weights[0].dtype, _architecture(weights[0]), len(hiddens[0]))
    else:
        tile = INTERPRETER_TILE
    aligned = all(x.data_ptr() % 16 == 0 for x in (*hiddens, *weights)) and all(w[0].nbytes % 16 == 0 for w in weights)
    return DEFAULT_TILE if tile.tma and not aligned else tile


def _architecture(weight: Tensor) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(weight.device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(weight.device))


def _matrices(tile: Tile, hiddens: list[Tensor], heads: list[Head]) -> tuple:
    """What the kernels take for both hidden states and both weights: the tensors, or descriptors for TMA."""
    matrices = [(hidden, tile.tokens) for hidden in (hiddens[0], hiddens[-1])]
    matrices += [(head.weight, tile.vocab) for head in heads]
    given = [_described(matrix, rows, tile.depth) if tile.tma else matrix for matrix, rows in matrices]
    return *given, *[None] * (4 - len(given))


def _biases(heads: list[Head]) -> tuple:
    """Of both heads; in the place of a first one that there isn't stands a tensor, which isn't read."""
    return heads[0].weight if heads[0].bias is None else heads[0].bias, heads[1].bias if len(heads) == 2 else None


def _sizes(heads: list[Head]) -> tuple:
    """V, D and, of a second head, D_q."""
    return *heads[0].weight.shape, heads[1].weight.shape[1] if len(heads) == 2 else None


def _scales(scaling: Scaling) -> tuple:
    return log2_scale(scaling), None if scaling.softcap is None else 1 / scaling.softcap


def _described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    # A matrix of one row may be contiguous with any strides; the kernels know those of its width.
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], [rows, columns])


def launch_options(tile: Tile, *widths: int) -> dict:
    """The kernels' constants and the compiler's options that a tile fixes, for the widths of the heads."""
    return {
        "TOKENS": tile.tokens,
        "VOCAB": tile.vocab,
        "DEPTH": tile.depth,
        "GROUP": GROUP,
        "WHOLE_DEPTH": all(width % tile.depth == 0 for width in widths),
        "TMA": tile.tma,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def _processors(weight: Tensor) -> int:
    return torch.cuda.get_device_properties(weight.device).multi_processor_count if weight.is_cuda else 8
