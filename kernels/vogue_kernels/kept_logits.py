"""Logits that the forward pass keeps for the backward pass, which is then spared a product: memory for time.

Each branch has a buffer of bytes. How much of the vocabulary fits depends on the width of the backend's tiles and on
how many tokens are skipped, and is reckoned alike in both passes. This is how the torch and triton backends use it; the
C++ backend has its own way (csrc/operands.h), in fewer bits for bfloat16 (csrc/rows.h).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .branches import Branch, Scaling, compute_dtype

LOWEST_SOFTCAP = 16  # over τ: below it capped logits aren't kept
NARROWEST = 64  # words of a tile for whose references a buffer has room; with narrower ones it keeps a little less
ALIGNMENT = 16  # bytes


class KeptLogits(NamedTuple):
    """A branch's logits of the first K words of the vocabulary.

    Rounded to bfloat16 as they are, the logit of a token with p near 1 would be off by some hundredths, and 1 − p with
    it. So what is kept is their distance from the largest logit met so far: the rounding error of p is then at most
    max x e^(−x) = 0.37 units in the last place of the row's largest p, however large the logits are.

    That doesn't hold for log q where p is large and q isn't, which the gradient of a divergence multiplies by p: there
    they don't serve (`serve`).
    """

    logits: Tensor  # (N, K) in the dtype of the inputs: l − reference, l being what the backend's maximum is of
    reference: Tensor  # (tiles, N): of each tile of the vocabulary
    width: int  # of a tile

    @property
    def columns(self) -> int:
        return self.logits.shape[1]

    def select(self, rows: slice) -> "KeptLogits":
        return self._replace(logits=self.logits[rows], reference=self.reference[:, rows])

    def holds(self, tile: slice) -> bool:
        return tile.stop <= self.columns

    def put(self, distance: Tensor, reference: Tensor, tile: slice) -> None:
        """Keep a tile's distances (n, v) from a reference (n,)."""
        lowest = torch.finfo(self.logits.dtype).min  # float16's −∞ would make 0 · ∞ of p log p
        self.logits[:, tile] = distance.clamp(min=lowest)
        self.reference[tile.start // self.width] = reference

    def get(self, tile: slice) -> Tensor:
        """A tile's logits (n, v), in the dtype of the reference."""
        return self.logits[:, tile] + self.reference[tile.start // self.width].unsqueeze(1)


def own_bits(dtype: torch.dtype, _: Scaling) -> int:
    """Of a logit of KeptLogits, which has the dtype of the inputs."""
    return 8 * dtype.itemsize


def kept_bytes(length, weight: Tensor, bits: int, at_most: int) -> Any:
    """The size of a buffer that holds all logits of N tokens, or of `at_most` bytes. N may be a symbol of a trace."""
    vocab = weight.shape[0]
    room = length * (-(-vocab * bits // 8) - (-vocab // NARROWEST) * compute_dtype(weight).itemsize)
    return torch.sym_min(room + ALIGNMENT, at_most)


def kept_logits(buffer: Tensor, length: int, weight: Tensor, width: int) -> KeptLogits:
    """What a buffer of bytes has room for: tiles of `width` words, from the first on."""
    itemsize, reference = weight.itemsize, compute_dtype(weight)
    vocab, tiles = len(weight), -(-len(weight) // width)
    available = max(len(buffer) - ALIGNMENT, 0)
    if length * (vocab * itemsize + tiles * reference.itemsize) > available:
        tiles = min(available // (length * (width * itemsize + reference.itemsize)), vocab // width)
    columns = min(tiles * width, vocab)
    end = length * columns * itemsize
    start = -(-end // ALIGNMENT) * ALIGNMENT
    references = buffer[start : start + tiles * length * reference.itemsize]
    logits = buffer[:end].view(weight.dtype).view(length, columns)
    return KeptLogits(logits, references.view(reference).view(tiles, length), width)


def worth_keeping(scaling: Scaling) -> bool:
    """Whether what would be kept is exact enough for gradients of log-probabilities and entropies.

    A capped logit's gradient has the factor 1 − (l / c)². At a distance x below the largest one its error is up to
    2 x τ / c units in the last place, and p's factor is e^(−x): with c ≥ 16 τ that is less than a gradient's own
    rounding, with a small cap, at which the largest logits have a factor near 0 and the others not, it is more.
    """
    return scaling.softcap is None or scaling.softcap >= LOWEST_SOFTCAP * scaling.temperature


def serve(branches: list[Branch]) -> bool:
    """Whether kept logits are exact enough for these gradients."""
    return not any(branch.crosses for branch in branches)
