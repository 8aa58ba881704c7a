"""The C++ backend: one compiled library, `_C.so` (kernels/csrc), for float32, bfloat16 and float16 on CPUs.

It chooses its instructions when it runs: AVX-512, AVX2 or none in particular (torch's own choice, which
ATEN_CPU_CAPABILITY overrides), and for bfloat16 the products of AMX, where torch has them, or of AVX-512 BF16, where
the processor has them; else bfloat16 is raised to float32, exactly. VOGUE_CPU_PRODUCTS=amx, bf16 or f32 overrides that,
for tests and comparisons.
"""

from functools import cache
from pathlib import Path

import torch

from ..branches import log2_scale, merge, numbers, of_branch

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


def kept_bits(dtype, scaling):
    """As branches.py says."""
    coded = {torch.bfloat16: 8, torch.float32: 20} if scaling.softcap is None else {}
    return coded.get(dtype, 8 * dtype.itemsize)


def forward(hiddens, heads, targets, scaling, buffers):
    """As branches.py says."""
    scale = log2_scale(scaling)
    partial, target_logits = torch.ops.vogue_cpu.forward(
        hiddens,
        [head.weight for head in heads],
        targets.contiguous(),
        [_float(head.bias) for head in heads],
        scale,
        _inverse_softcap(scaling),
        buffers,
    )
    return merge(partial, target_logits.double(), scale)


def backward(branches, heads, targets, scaling, needs, buffers):
    """As branches.py says."""
    written = needs.of_logits(branches)
    crosses = any(branch.crosses for branch, on in zip(branches, written, strict=True) if on)
    sides = [i for i, on in enumerate(written) if on or crosses]
    gradients = torch.ops.vogue_cpu.backward(
        [branches[i].hidden for i in sides],
        [numbers(branches[i]) for i in sides],
        [of_branch(range(len(heads)), i) for i in sides],
        [head.weight for head in heads],
        targets.contiguous(),
        [_float(head.bias) for head in heads],
        log2_scale(scaling),
        _inverse_softcap(scaling),
        [buffers[i] for i in sides],
        [written[i] for i in sides],
        [written[i] and needs.hidden[i] for i in sides],
        needs.weight,
        needs.bias,
    )
    given = iter(gradients)
    grads_hidden = [
        None if not need else next(given) if on else torch.zeros_like(branch.hidden)
        for need, on, branch in zip(needs.hidden, written, branches, strict=True)
    ]
    grads_weight, grads_bias = [], []
    for head, needs_weight, needs_bias in zip(heads, needs.weight, needs.bias, strict=True):
        grads_weight.append(next(given) if needs_weight else None)
        grads_bias.append(next(given).to(head.bias.dtype) if needs_bias else None)
    return grads_hidden, grads_weight, grads_bias


def _inverse_softcap(scaling):
    return 0.0 if scaling.softcap is None else 1 / scaling.softcap


def _float(bias):
    return None if bias is None else bias.float().contiguous()
