"""The C++ backend: one compiled library, `_C.so` (kernels/csrc), for float32, bfloat16 and float16 on CPUs.

It chooses its instructions when it runs: AVX-512, AVX2 or none in particular (torch's own choice, which
ATEN_CPU_CAPABILITY overrides), and for bfloat16 the products of AMX, where torch has them, or of AVX-512 BF16, where
the processor has them; else bfloat16 is raised to float32, exactly. VOGUE_CPU_PRODUCTS=amx, bf16 or f32 overrides that,
for tests and comparisons.
"""

from functools import cache
from pathlib import Path

import torch

from ..branches import log2_scale, merge, numbers
from ..kept import kept_logits

LIBRARY = Path(__file__).with_name("_C.so")


@cache
def why_not() -> str | None:
    """Load the library; returns why it can't be used, None if it can."""
    if not LIBRARY.exists():
        return "its library wasn't compiled: it needs a C++ compiler, and torch at hand (pip's --no-build-isolation)"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"its library was compiled for another torch or system: {str(error).splitlines()[0]}"
    return None


def description() -> str:
    """The instruction set in use."""
    return torch.ops.vogue_cpu.description()


def forward(hiddens, weight, targets, bias, temperature, buffers):
    """As branches.py says."""
    scale = log2_scale(temperature)
    kept = _kept(buffers, targets, weight)
    partial, target_logits = torch.ops.vogue_cpu.forward(
        hiddens,
        weight,
        targets.contiguous(),
        _float(bias),
        scale,
        [branch.logits for branch in kept],
        [branch.reference for branch in kept],
    )
    return merge(partial, target_logits.double(), scale)


def backward(branches, weight, targets, bias, temperature, needs_hidden, needs_weight, needs_bias, buffers):
    """As branches.py says."""
    needs = zip(needs_hidden, branches, strict=True)
    written = [branch.used and (need or needs_weight or needs_bias) for need, branch in needs]
    crosses = any(branch.crosses for branch, on in zip(branches, written, strict=True) if on)
    sides = [i for i, on in enumerate(written) if on or crosses]
    kept = _kept(buffers, targets, weight)
    gradients = torch.ops.vogue_cpu.backward(
        [branches[i].hidden for i in sides],
        [numbers(branches[i]) for i in sides],
        weight,
        targets.contiguous(),
        _float(bias),
        log2_scale(temperature),
        [kept[i].logits for i in sides],
        [kept[i].reference for i in sides],
        [written[i] for i in sides],
        [written[i] and needs_hidden[i] for i in sides],
        needs_weight,
        needs_bias,
    )
    given = iter(gradients)
    grad_hidden = [
        None if not need else next(given) if on else torch.zeros_like(branch.hidden)
        for need, on, branch in zip(needs_hidden, written, branches, strict=True)
    ]
    return grad_hidden, next(given) if needs_weight else None, next(given).to(bias.dtype) if needs_bias else None


def _kept(buffers, targets, weight):
    width = torch.ops.vogue_cpu.tile_columns(weight)
    return [kept_logits(buffer, len(targets), weight, width) for buffer in buffers]


def _float(bias):
    return None if bias is None else bias.float().contiguous()
