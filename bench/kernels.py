"""The head's statistics beside their peers: time, memory, error, and what the machine could do at best.

    python bench/kernels.py [--json FILE]                                   # on the GPU if there is one
    python bench/kernels.py --quick                                         # two minutes on two cores: `make bench`
    python bench/kernels.py --dtype float32 --shape 2048 151936 --tokens 1024 --contenders vogue eager floor
    python bench/kernels.py --work trainer kl loss                          # what else there is to be done
    python bench/kernels.py --work backward --keep 20MB 0.5x all            # memory for time, against torch.compile
    python bench/kernels.py --errors                                        # relative errors against float64 too

Contenders run in turns, each time in another order, so that a change of clocks or of other load meets them all, and the
median of a contender's turns counts: compare ratios, not seconds of a shared machine. Time on a GPU is that between
CUDA events, on a CPU the wall clock's of the second of two runs in a row. Memory is what a turn needs beyond inputs and
results at its highest: in torch's allocator and, on a GPU, for NVML on the device as a whole, on which nothing else
should run.

The bound is by operations and bytes, at the rates of a matrix product and of a copy measured before. Its operations,
which TFLOP/s counts for all contenders alike, are those of bounded memory, where a backward pass computes the logits
again: who stores them needs a product less and may be ahead of it.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, logs every start

import torch
import triton
from kernel_contenders import CONTENDERS, WORK
from machines import machine_of
from measuring import errors, run_section
from roofline import HEADS

QUICK = {"shape": [[2048, 37984]], "tokens": [64], "turns": 5, "seconds": 45}  # a quarter of a vocabulary
QUICK_LEFT_OUT = ("reference", "compile", "liger-ce")  # slow to run, slow to compile, and of GPUs alone


# ---------------------------------------------------------------------------------------------------- output

LINE = "{:12} {:>9} {:>19} {:>6} {:>8} {:>8} {:>8} {:>8} {:>9} {:>8}  {}"
TITLES = (
    "median ms",
    "fastest to slowest",
    "turns",
    "× vogue",
    "× floor",
    "TFLOP/s",
    "of bound",
    "torch MB",
    "NVML MB",
)


def print_section(section: dict) -> None:
    title = "{title}; D = {D}, V = {V}, {dtype}, {tokens} tokens a branch; bound {bound_ms:.3g} ms"
    print("\n" + title.format(**section) + "\n")
    print(LINE.format("contender", *TITLES, "computes"))
    times = {row["contender"]: row["ms"] for row in section["rows"] if "ms" in row}
    for row in section["rows"]:
        if "ms" not in row:
            print(f"{row['contender']:12} {row['note']}")
            continue
        found = f"{row['ms']:.2f}", f"{row['fastest_ms']:.2f} to {row['slowest_ms']:.2f}", row["turns"]
        ratios = [f"{row['ms'] / times[name]:.2f}" if name in times else "-" for name in ("vogue", "floor")]
        rates = f"{row['tflops']:.3g}", f"{row['of_bound']:.0%}"
        memory = ("-" if row[key] is None else f"{row[key] / 1e6:.0f}" for key in ("torch_bytes", "nvml_bytes"))
        print(LINE.format(row["contender"], *found, *ratios, *rates, *memory, row["computes"]), flush=True)


def kept(text: str) -> str:
    if not re.fullmatch(r"all|\d+(\.\d+)?(MB|x)", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of all, a number of MB as 28MB, a share as 0.5x")
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=found, help=f"here {found}")
    parser.add_argument("--quick", action="store_true", help="one shape, few tokens, few contenders: two minutes")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--errors", action="store_true", help="of the symmetric KL against float64")
    parser.add_argument("--work", nargs="+", choices=WORK, default=["forward", "backward"])
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("D", "V"), help="may be repeated")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192], help="of each branch")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument(
        "--keep", type=kept, nargs="+", default=["all"], metavar="HOW_MUCH",
        help="logits that vogue-kept keeps for the backward pass, a contender each: all, 28MB, or 0.5x, with which all "
        "of its memory is half of torch.compile's",
    )  # fmt: skip
    parser.add_argument("--turns", type=int, default=15, help="of each contender")
    parser.add_argument("--seconds", type=float, default=300, help="in all; fewer turns are taken for it")
    parser.add_argument("--json", type=Path, help="write everything there too, after each section")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none; nothing was measured", file=sys.stderr)
        sys.exit(2)
    if options.quick:
        vars(options).update(QUICK, contenders=[name for name in CONTENDERS if name not in QUICK_LEFT_OUT])
        if options.device == "cpu":
            options.dtype = "float32"  # PyTorch's products of bfloat16 take minutes where the processor has none
    return options


def main():
    options, start = arguments(), time.monotonic()
    dtype = getattr(torch, options.dtype)
    machine = machine_of(options.device, dtype)
    description = machine.description | {"torch": torch.__version__, "triton": triton.__version__}
    print(", ".join(f"{key} {value}" for key, value in description.items()))
    print("bound by {:.3g} GFLOP/s and {:.3g} GB/s".format(*(rate / 1e9 for rate in machine.rates)))
    results = {"machine": description, "rates": machine.rates._asdict(), "sections": [], "errors": []}

    def write():
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))

    shapes = options.shape or list(HEADS.values())
    todo = [(work, n, shape) for shape in shapes for n in options.tokens for work in options.work]
    end = start + options.seconds
    for index, (work, n, shape) in enumerate(todo):
        until = start + options.seconds * (index + 1) / len(todo)
        given = machine, options.device, dtype, options.contenders, options.turns, until, end, options.keep
        results["sections"].append(run_section(work, n, shape, *given))
        write()
        print_section(results["sections"][-1])
    for width, vocab in shapes if options.errors else ():
        found = errors(width, vocab, options.device, dtype)
        results["errors"].append({"D": width, "V": vocab, "dtype": options.dtype, **found})
        listed = ", ".join(f"{name} {error:.1e}" for name, error in found.items())
        print(f"\nrelative error of the symmetric KL, D = {width}, V = {vocab}, {options.dtype}: {listed}")
    write()


if __name__ == "__main__":
    main()
