"""What the Triton kernels compile to, and the roofline bound of two models' heads. Needs triton 3.4 or later, no GPU.

    python bench/gpu_static.py [--arch sm_80 sm_90 sm_100 gfx942] [--dtype bf16 f32] [--tokens many few] [--json FILE]

Every tile of vogue_kernels/gpu is compiled ahead of time for bfloat16, with many tokens and with few, and for float32:
registers and local memory of a thread, shared memory of a program, programs that fit on a multiprocessor, tensor
instructions. Registers that are spilled to local memory after the products cost some hundred cycles of a tile. Among
the products they would cost as much at every step; such instructions are counted by themselves. D and V are arguments
of the compiled kernels: D = 2048 and 3584 and V = 151,936 and 152,064 give the same code, as does every D that is a
multiple of a tile's depth with every V that is one of 16. For other V a few registers may spill.

The bound says how fast an H100 could be at most (roofline.py). No kernel was timed for it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel can't be compiled
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

import torch
import triton
from roofline import HEADS, bound, steps
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vogue_kernels import BranchStats, gpu

TARGETS = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 86, 89, 90, 100, 103, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
COMPILED = ("sm_80", "sm_90", "sm_100", "gfx942")  # unless told otherwise; the others take a row of one of these
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
# Of the tensor cores of sm_80, sm_90, sm_100 and of gfx942; and loads by TMA.
INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma_f32", "cp.async.bulk.tensor")
# The same in machine code, where a spilled register is an STL and an LDL.
PRODUCTS, SPILLS = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma_f32)"), re.compile(r"\b(STL|LDL|scratch_(load|store))")
LABEL, BRANCH = re.compile(r"^\s*(\.L\w+):", re.M), re.compile(r"\b(?:BRA|s_c?branch\w*)\b[^\n]*?(\.L\w+)")
# Of a multiprocessor; on NVIDIA 1 KB of it goes to each program.
SHARED_BYTES = {
    "sm_80": 164 << 10,
    **dict.fromkeys(("sm_86", "sm_89", "sm_120"), 100 << 10),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103"), 228 << 10),
    "gfx942": 64 << 10,
}
TOKENS = {"many": 1024, "few": 64}  # of a batch, for which a tile is picked

# Name: kernel, constants, key of the tile. Terms of a gradient that isn't asked for are compiled out: these are those
# that a training launches (PolicyHead always has a bias), and those with everything.
NOTHING_KEPT = {"KEEP_P": False, "KEEP_Q": False, "KEPT": gpu.NARROWEST}
ONE_HEAD, UNCAPPED = {"weight_q": None, "bias_q": None, "D_q": None}, {"inverse_softcap": None}
PLAIN = ONE_HEAD | UNCAPPED
FORWARD, GRADIENT, MERGE = gpu.forward_kernel, gpu.logit_gradient_kernel, gpu.merge_kernel
LOGPROB = {"LOGPROB": True, "ENTROPY": False, "CROSS": False, "WRITE_A": True, "WRITE_B": False}
ENTROPY = {**LOGPROB, "ENTROPY": True}
EVERYTHING = {"LOGPROB": True, "ENTROPY": True, "CROSS": True, "WRITE_A": True, "WRITE_B": True}
VARIANTS = {
    "forward": (FORWARD, {"BOTH": False, "BIAS": False, **PLAIN, **NOTHING_KEPT}, "forward"),
    "forward, bias": (FORWARD, {"BOTH": False, "BIAS": True, **PLAIN, **NOTHING_KEPT}, "forward with bias"),
    "forward, bias, kept": (
        FORWARD,
        {"BOTH": False, "BIAS": True, **PLAIN, **NOTHING_KEPT, "KEEP_P": True},
        "forward with bias",
    ),
    "forward both": (FORWARD, {"BOTH": True, "BIAS": False, **PLAIN, **NOTHING_KEPT}, "forward both"),
    "forward both, bias": (FORWARD, {"BOTH": True, "BIAS": True, **PLAIN, **NOTHING_KEPT}, "forward both"),
    "gradient of logprob": (GRADIENT, {"BOTH": False, "BIAS": False, **PLAIN, **LOGPROB}, "gradient of logprob"),
    "gradient of logprob, bias": (GRADIENT, {"BOTH": False, "BIAS": True, **PLAIN, **LOGPROB}, "gradient"),
    "gradient, entropy": (GRADIENT, {"BOTH": False, "BIAS": False, **PLAIN, **ENTROPY}, "gradient"),
    "gradient, entropy, bias": (GRADIENT, {"BOTH": False, "BIAS": True, **PLAIN, **ENTROPY}, "gradient"),
    "gradient both": (GRADIENT, {"BOTH": True, "BIAS": False, **PLAIN, **EVERYTHING}, "gradient both"),
    "gradient both, bias": (GRADIENT, {"BOTH": True, "BIAS": True, **PLAIN, **EVERYTHING}, "gradient both"),
}
# What is compiled for many tokens in bfloat16: with a softcap, and with a head of its own for the second branch.
FURTHER = {
    "forward, bias, softcap": (FORWARD, {"BOTH": False, "BIAS": True, **NOTHING_KEPT, **ONE_HEAD}, "forward with bias"),
    "forward both, softcap": (FORWARD, {"BOTH": True, "BIAS": False, **NOTHING_KEPT, **ONE_HEAD}, "forward both"),
    "forward both, own head": (
        FORWARD,
        {"BOTH": True, "BIAS": False, "bias_q": None, **NOTHING_KEPT, **UNCAPPED},
        "forward both",
    ),
    "gradient of logprob, softcap": (
        GRADIENT,
        {"BOTH": False, "BIAS": False, **LOGPROB, **ONE_HEAD},
        "gradient of logprob",
    ),
    "gradient both, softcap": (GRADIENT, {"BOTH": True, "BIAS": False, **EVERYTHING, **ONE_HEAD}, "gradient both"),
    "gradient both, own head": (
        GRADIENT,
        {"BOTH": True, "BIAS": False, "bias_q": None, **EVERYTHING, **UNCAPPED},
        "gradient both",
    ),
}
# Kernels without a product, whose tile is always the same.
SMALL = {
    "merge": (MERGE, {"BOTH": False, **gpu.MERGE_OPTIONS}, None),
    "merge both": (MERGE, {"BOTH": True, **gpu.MERGE_OPTIONS}, None),
    "gradient of kept": (
        gpu.kept_gradient_kernel,
        {"LOGPROB": True, "ENTROPY": True, "CAPPED": False, **gpu.KEPT_OPTIONS},
        None,
    ),
}
RESULTS = (*BranchStats._fields, "max_p", "logsum_p", "max_q", "logsum_q")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

MATRICES = {
    **dict.fromkeys(("hidden_p", "hidden_q", "hidden_a", "hidden_b"), "tokens"),
    **dict.fromkeys(("weight", "weight_q"), "vocab"),
}
IN_DTYPE = (*MATRICES, "bias", "bias_q", "gradient_a", "gradient_b", "gradient", "kept_p", "kept_q", "kept")
FLOATS = (
    *("partial", "target_logits", "numbers_a", "numbers_b", "numbers", "reference_p", "reference_q", "reference"),
    *RESULTS,
)
POINTERS = {"targets": "*i64", **dict.fromkeys(FLOATS, "*fp32")}
MULTIPLES_OF_16 = ("V", "D", "D_q", "stride", "width", "columns", "columns_p", "columns_q")


def compile_variant(name: str, dtype: str, architecture: str, tokens: str = "many") -> dict:
    """Compile as a launch with aligned tensors would, and return what the compiled kernel uses."""
    kernel, _, key = (VARIANTS | FURTHER | SMALL)[name]
    tile = gpu.pick_tile(key, DTYPES[dtype], architecture, TOKENS[tokens]) if key else None
    signature, constants, aligned = specialize(name, dtype, tile)
    options = {option: constants.pop(option) for option in OPTIONS if option in constants}
    names, target = kernel.arg_names, TARGETS[architecture]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=target, options=options)
    used = amd_code(compiled) if target.backend == "hip" else nvidia_code(compiled)
    shared = compiled.metadata.shared
    return {
        "architecture": architecture,
        "kernel": name,
        "dtype": dtype,
        "tokens": tokens,
        "tile": tile and tile._asdict(),
        "warps": options["num_warps"],
        "registers": used.registers,
        "local_bytes": used.local_bytes,
        "spills_among_products": spills_among_products(used.machine_code),
        "shared_bytes": shared,
        "programs_per_sm": programs(architecture, used.registers, shared, options["num_warps"]),
        "instructions": {found: count for found in INSTRUCTIONS if (count := used.assembly.count(found))},
        "wide_stores": used.assembly.count("st.global.v4"),
        "narrow_stores": len(re.findall(r"st\.global\.b16\b", used.assembly)),
        "negations": used.assembly.count("neg.f32"),
    }


def specialize(name: str, dtype: str, tile: gpu.Tile | None) -> tuple[dict, dict, list]:
    """(types of the kernel's arguments, constants and options, arguments known to be multiples of 16)."""
    kernel, constants, _ = (VARIANTS | FURTHER | SMALL)[name]
    constants = {**(gpu.launch_options(tile, tile.depth) if tile else {}), **constants}
    element = {"bf16": "bf16", "f32": "fp32"}[dtype]
    types = {**POINTERS, **dict.fromkeys(IN_DTYPE, f"*{element}"), "log2_scale": "fp32", "inverse_softcap": "fp32"}
    if tile and tile.tma:
        blocks = {"tokens": tile.tokens, "vocab": tile.vocab}
        types |= {name: f"tensordesc<{element}[{blocks[side]}, {tile.depth}]>" for name, side in MATRICES.items()}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [
        name
        for name, kind in signature.items()
        if kind.startswith("*") or (name in MULTIPLES_OF_16 and kind != "constexpr")
    ]
    return signature, constants, aligned


class Code(NamedTuple):
    """What was compiled; registers and bytes of local memory of a thread."""

    registers: int
    local_bytes: int  # all of it is spilled registers
    assembly: str  # what Triton hands to the assembler: PTX or AMD's
    machine_code: str


def nvidia_code(compiled) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, machine_code = (
            subprocess.run([tool, *flags, file.name], check=True, capture_output=True, text=True).stdout
            for tool, flags in (
                (triton.knobs.nvidia.cuobjdump.path, ["--dump-resource-usage"]),
                (triton.knobs.nvidia.nvdisasm.path, ["-c"]),
            )
        )
    registers, stack, local = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK", "LOCAL"))
    return Code(registers, stack + local, compiled.asm["ptx"], machine_code)


def amd_code(compiled) -> Code:
    """The same; vector registers, with those for accumulators."""
    assembly = compiled.asm["amdgcn"]
    fields = ("vgpr_count", "private_segment_fixed_size")
    registers, local = (int(re.search(rf"\.{field}: +(\d+)", assembly)[1]) for field in fields)
    return Code(registers, local, assembly, assembly)


def spills_among_products(machine_code: str) -> int:
    """Instructions that spill or reload in a loop over D, an innermost one around products; two heads have one each.

    What a program stores once, before its loops or between them, isn't among them. Where a product is in no loop, all
    before the last product counts.
    """
    products = [match.start() for match in PRODUCTS.finditer(machine_code)]
    if not products:
        return 0
    labels = {match[1]: match.start() for match in LABEL.finditer(machine_code)}
    branches = [(labels.get(match[1]), match.start()) for match in BRANCH.finditer(machine_code)]
    loops = [(start, end) for start, end in branches if start is not None and start < end]
    around = set()
    for product in products:
        spans = [(start, end) for start, end in loops if start <= product < end]
        # The shortest: a block at the end of the code that waits, and returns into the loop, looks like a longer one.
        around.add(min(spans, key=lambda span: span[1] - span[0], default=(0, products[-1])))
    return sum(len(SPILLS.findall(machine_code[start:end])) for start, end in around)


def programs(architecture: str, registers: int, shared: int, warps: int) -> int:
    """That fit on a multiprocessor: 64 K registers, 64 warps; of gfx942: four SIMDs, each with 512 × 64 and 8 warps."""
    registers = -(-registers // 8) * 8
    if architecture == "gfx942":
        return min(4 * min(512 // registers, 8) // warps, SHARED_BYTES[architecture] // max(shared, 1))
    return min((1 << 16) // (registers * 32 * warps), SHARED_BYTES[architecture] // (shared + 1024), 64 // warps)


# ---------------------------------------------------------------------------------------------------- output


def bounds() -> list[dict]:
    rows = []
    for model, (width, vocab) in HEADS.items():
        for n in (1024, 8192):
            for step, (operations, moved) in steps(width, vocab, n).items():
                ms, limit = bound(operations, moved)
                size = {"model": model, "D": width, "V": vocab, "tokens_per_branch": n, "step": step}
                rows.append({**size, "operations": operations, "bytes": moved, "bound_ms": ms, "bound_by": limit})
    return rows


def cases(architectures, dtypes, tokens):
    """(architecture, dtype, tokens, variant) of all that is compiled. float32 has one tile, whatever the tokens."""
    for architecture in architectures:
        for dtype in dtypes:
            for batch in tokens if dtype == "bf16" else ("many",):
                yield from ((architecture, dtype, batch, name) for name in VARIANTS)
        if "bf16" in dtypes and "many" in tokens:
            yield from ((architecture, "bf16", "many", name) for name in FURTHER)
        yield from ((architecture, "f32", "many", name) for name in SMALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=COMPILED)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--json", type=Path, help="write everything there too")
    arguments = parser.parse_args()

    print(f"triton {triton.__version__}, torch {torch.__version__}; compiled ahead of time, nothing was run\n")
    line = "{:7} {:25} {:5} {:5} {:>12} {:>5} {:>6} {:>9} {:>11} {:>14} {:>11} {:>11}  {}"
    titles = "tokens×V×D", "warps", "stages", "registers", "local bytes", "among products", "shared", "programs/SM"
    print(line.format("arch", "kernel", "dtype", "N", *titles, "instructions"))
    compiled = []
    for architecture, dtype, tokens, name in cases(arguments.arch, arguments.dtype, arguments.tokens):
        row = compile_variant(name, dtype, architecture, tokens)
        compiled.append(row)
        tile = row["tile"] or dict.fromkeys(gpu.Tile._fields, "-")
        shape = f"{tile['tokens']}×{tile['vocab']}×{tile['depth']}"
        found = ", ".join(f"{count} {key}" for key, count in row["instructions"].items()) or "none"
        fields = "registers", "local_bytes", "spills_among_products", "shared_bytes", "programs_per_sm"
        shown = architecture, name, dtype, tokens, shape, row["warps"], tile["stages"], *(row[key] for key in fields)
        print(line.format(*shown, found), flush=True)

    print("\nBound of an H100 in bfloat16 (798 TFLOP/s, 3.0 TB/s); a bound, not a measurement\n")
    line = "{:14} {:>6} {:34} {:>8} {:>7} {:>9}  {}"
    print(line.format("model", "tokens", "step", "TFLOP", "GB", "bound ms", "by"))
    for row in bounds():
        figures = f"{row['operations'] / 1e12:.2f}", f"{row['bytes'] / 1e9:.2f}", f"{row['bound_ms']:.2f}"
        print(line.format(row["model"], row["tokens_per_branch"], row["step"], *figures, row["bound_by"]))

    if arguments.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        arguments.json.write_text(
            json.dumps({"versions": versions, "compiled": compiled, "bounds": bounds()}, indent=1)
        )


if __name__ == "__main__":
    main()
