"""The head's statistics beside their peers: time, memory, error, and what the machine could do at best.

    python bench/kernels.py [--json FILE]                                   # on the GPU if there is one
    python bench/kernels.py --dtype float32 --shape 2048 151936 --tokens 1024 --contenders vogue eager floor
    python bench/kernels.py --errors                                        # relative errors against float64 too

Contenders run in turns, so that a change of clocks or of other load meets them all, and the median of a contender's
turns counts: compare ratios, not seconds of a shared machine. Time on a GPU is that between CUDA events, on a CPU the
wall clock's. Memory is what a turn needs beyond inputs and results at its highest: in torch's allocator and, on a GPU,
for NVML on the device as a whole, on which nothing else should run. The bound is by operations and bytes: on
a GPU an H100's (roofline.py), on a CPU at the rates of a matrix product and of a copy measured before.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

import torch
import triton
from roofline import H100, HEADS, Rates, bound, steps
from torch.utils._pytree import tree_leaves

from vogue_kernels import available_backends, cpu, linear_branch_stats, linear_logprob

# ---------------------------------------------------------------------------------------------------- contenders


def eager_forward(raw, noisy, weight, targets):
    p, q = (torch.log_softmax((hidden @ weight.T).float(), dim=-1) for hidden in (raw, noisy))
    logprobs = [logits.gather(1, targets[:, None])[:, 0] for logits in (p, q)]
    entropies = [-(logits.exp() * logits).sum(dim=-1) for logits in (p, q)]
    return *logprobs, *entropies, (p.exp() * (p - q)).sum(dim=-1), (q.exp() * (q - p)).sum(dim=-1)


def eager_logprob(hidden, weight, targets):
    return torch.log_softmax((hidden @ weight.T).float(), dim=-1).gather(1, targets[:, None])[:, 0]


def liger_logprob(hidden, weight, targets):
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, targets[None])


def liger_cross_entropy(hidden, weight, targets):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)


def backward_of(logprob):
    """A function: the gradients of hidden states and weight from the sum of the log-probabilities."""

    def run(hidden, weight, targets):
        return torch.autograd.grad(logprob(hidden, weight, targets).sum(), (hidden, weight))

    return run


def forward_contenders(raw, noisy, weight, targets) -> dict[str, tuple[str, Callable]]:
    """Name: what it computes, and a function that does."""
    compiled = torch.compile(eager_forward, dynamic=False)
    everything = "log-probabilities, entropies, both KLs"
    logits = weight.new_empty(len(raw), len(weight))

    def floor():
        for hidden in (raw, noisy):
            torch.mm(hidden, weight.T, out=logits)

    return {
        "vogue": (everything, lambda: linear_branch_stats(raw, noisy, weight, targets)),
        "reference": (everything, lambda: linear_branch_stats(raw, noisy, weight, targets, backend="torch")),
        "eager": (everything, lambda: eager_forward(raw, noisy, weight, targets)),
        "compile": (everything, lambda: compiled(raw, noisy, weight, targets)),
        "liger": ("both log-probabilities only", lambda: [liger_logprob(x, weight, targets) for x in (raw, noisy)]),
        "floor": ("two matrix products", floor),
    }


def backward_contenders(raw, noisy, weight, targets) -> dict[str, tuple[str, Callable]]:
    hidden, weight = raw.requires_grad_(), weight.requires_grad_()
    logits = weight.new_empty(len(raw), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    compiled = torch.compile(eager_logprob, dynamic=False)

    def vogue_logprob(hidden, weight, targets, backend="auto"):
        return linear_logprob(hidden, weight, targets, backend=backend).logprob

    @torch.no_grad()
    def floor():
        for _ in range(2):  # a backward without stored logits computes them again
            torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)  # of the logits' gradient, were it one
        torch.mm(logits.T, hidden, out=grad_weight)

    per_token = "log-probability per token, its gradients"
    contenders = {
        "vogue": (f"{per_token}; entropy too", vogue_logprob),
        "reference": (f"{per_token}; entropy too", partial(vogue_logprob, backend="torch")),
        "eager": (per_token, eager_logprob),
        "compile": (per_token, compiled),
        "liger": (f"{per_token} (of its GRPO loss)", liger_logprob),
        "liger-ce": ("sum of the log-probabilities, its gradients", liger_cross_entropy),
    }
    runs = {
        name: (what, lambda logprob=logprob: backward_of(logprob)(hidden, weight, targets))
        for name, (what, logprob) in contenders.items()
    }
    return runs | {"floor": ("three matrix products and the logits' again", floor)}


# Name: contenders, steps of roofline.py.
WORK = {
    "forward, both branches": (forward_contenders, ["forward, both branches"]),
    "forward and backward of one branch's logprob": (
        backward_contenders,
        ["forward of one branch", "backward of one branch's logprob"],
    ),
}
CONTENDERS = ("vogue", "reference", "eager", "compile", "liger", "liger-ce", "floor")


# ---------------------------------------------------------------------------------------------------- measurement


class Gpu:
    def __init__(self):
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(0).uuid)
        self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        self.used = lambda: pynvml.nvmlDeviceGetMemoryInfo(self.handle).used
        self.description = {
            "device": torch.cuda.get_device_name(0),
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "cuda": torch.version.cuda,
        }
        self.rates = H100

    def milliseconds(self, run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self, run) -> dict:
        self.free()
        used, allocated = self.used(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        torch.cuda.synchronize()
        # the allocator keeps what it took from the device, so that this is still NVML's peak
        peaks = {"torch_bytes": torch.cuda.max_memory_allocated() - allocated, "nvml_bytes": self.used() - used}
        return {name: peak - size(results) for name, peak in peaks.items()}

    def free(self):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Cpu:
    def __init__(self, dtype: torch.dtype):
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        kernels = available_backends()["cpu"] or cpu.description()
        self.description = {
            "device": name[1] if name else platform.machine(),
            "threads": torch.get_num_threads(),
            "kernels": kernels,
        }
        # In float32 too: where there is no arithmetic of bfloat16, it is the faster one for that.
        product = max(self.product_rate(dtype), self.product_rate(torch.float32))
        self.rates = Rates(product, self.copy_rate())

    def product_rate(self, dtype: torch.dtype) -> float:
        size = 1536 if dtype == torch.float32 else 384
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        return 2 * size**3 / min(1e-3 * self.milliseconds(lambda: a @ b) for _ in range(5))

    def copy_rate(self) -> float:
        source = torch.zeros(1 << 26)
        target = torch.empty_like(source)
        return 2 * source.nbytes / min(1e-3 * self.milliseconds(lambda: target.copy_(source)) for _ in range(5))

    def milliseconds(self, run) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def peak_bytes(self, run) -> dict:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            results = run()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        peak = max(accumulate((event.nbytes() for event in events), initial=0))
        return {"torch_bytes": peak - size(results), "nvml_bytes": None}

    def free(self):
        pass


def size(results) -> int:
    return sum(x.nbytes for x in tree_leaves(results) if isinstance(x, torch.Tensor))


def reason_not_to_run(name: str, machine) -> str | None:
    if name == "compile" and os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "torch.compile is disabled"
    return "needs a GPU" if name == "liger-ce" and isinstance(machine, Cpu) else None


def measure(contenders: dict, machine, turns: int, until: float, end: float) -> list[dict]:
    """A row for each contender: the median of so many turns, or fewer: 7 if that takes until then, 1 at the end."""
    rows, running = [], []
    for name, (computes, run) in contenders.items():
        row = {"contender": name, "computes": computes, "note": reason_not_to_run(name, machine)}
        rows.append(row)
        if row["note"] is None:
            try:
                run()  # compiles
                row |= machine.peak_bytes(run)
                running.append((row, run, []))
            except torch.cuda.OutOfMemoryError:
                row["note"] = "out of memory"
            machine.free()
    for turn in range(turns):
        if (turn >= 7 and time.monotonic() > until) or (turn >= 1 and time.monotonic() > end):
            break
        for _, run, times in running:
            times.append(machine.milliseconds(run))
    for row, _, times in running:
        row |= {"ms": statistics.median(times), "fastest_ms": min(times), "slowest_ms": max(times), "turns": len(times)}
    return rows


def inputs(n: int, width: int, vocab: int, device: str, dtype: torch.dtype):
    """(raw, noisy, weight, targets), of a model's scale."""
    torch.manual_seed(0)
    raw = torch.randn(n, width, device=device)
    noisy = raw + 0.3 * torch.randn(n, width, device=device)
    weight = torch.randn(vocab, width, device=device) / width**0.5
    targets = torch.randint(vocab, (n,), device=device)
    return *(x.to(dtype) for x in (raw, noisy, weight)), targets


def errors(width: int, vocab: int, device: str, dtype: torch.dtype, n: int = 16) -> dict[str, float]:
    """The largest relative error of the symmetric KL, against float64."""
    raw, noisy, weight, targets = inputs(n, width, vocab, device, dtype)
    exact = [x.double() for x in (raw, noisy, weight)]
    truth = linear_branch_stats(*exact, targets, backend="torch").symmetric_kl
    *_, forward, reverse = eager_forward(raw, noisy, weight, targets)
    found = {
        "vogue": linear_branch_stats(raw, noisy, weight, targets).symmetric_kl,
        "eager": (forward + reverse) / 2,
    }
    return {name: float(((kl - truth) / truth).abs().max()) for name, kl in found.items()}


# ---------------------------------------------------------------------------------------------------- output


def print_section(section: dict):
    title = "{work}; D = {D}, V = {V}, {dtype}, {tokens} tokens a branch; bound {bound_ms:.3g} ms"
    print("\n" + title.format(**section) + "\n")
    line = "{:9} {:>9} {:>19} {:>6} {:>8} {:>10} {:>9}  {}"
    print(
        line.format(
            "contender", "median ms", "fastest to slowest", "turns", "× floor", "torch MB", "NVML MB", "computes"
        )
    )
    floor = next((row.get("ms") for row in section["rows"] if row["contender"] == "floor"), None)
    for row in section["rows"]:
        if row["note"]:
            print(f"{row['contender']:9} {row['note']}")
            continue
        times = f"{row['ms']:.2f}", f"{row['fastest_ms']:.2f} to {row['slowest_ms']:.2f}", row["turns"]
        ratio = f"{row['ms'] / floor:.2f}" if floor else "-"
        memory = ("-" if row[key] is None else f"{row[key] / 1e6:.0f}" for key in ("torch_bytes", "nvml_bytes"))
        print(line.format(row["contender"], *times, ratio, *memory, row["computes"]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=found, help=f"here {found}")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--errors", action="store_true", help="of the symmetric KL against float64")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("D", "V"), help="may be repeated")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192], help="of each branch")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--turns", type=int, default=15, help="of each contender")
    parser.add_argument("--seconds", type=float, default=300, help="in all; fewer turns are taken for it")
    parser.add_argument("--json", type=Path, help="write everything there too")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none; nothing was measured", file=sys.stderr)
        sys.exit(2)

    dtype = getattr(torch, options.dtype)
    machine = Gpu() if options.device == "cuda" else Cpu(dtype)
    description = machine.description | {"torch": torch.__version__, "triton": triton.__version__}
    print(", ".join(f"{key} {value}" for key, value in description.items()))
    print("bound by {:.3g} GFLOP/s and {:.3g} GB/s".format(*(rate / 1e9 for rate in machine.rates)))
    start = time.monotonic()
    shapes = options.shape or list(HEADS.values())
    todo = [(n, shape, work) for shape in shapes for n in options.tokens for work in WORK]
    sections = []
    for index, (n, (width, vocab), work) in enumerate(todo):
        make, roofline = WORK[work]
        contenders = make(*inputs(n, width, vocab, options.device, dtype))
        contenders = {name: contenders[name] for name in options.contenders if name in contenders}
        until = start + options.seconds * (index + 1) / len(todo)
        bounds = [bound(*steps(width, vocab, n, dtype.itemsize)[step], machine.rates)[0] for step in roofline]
        section = {"work": work, "D": width, "V": vocab, "dtype": options.dtype, "tokens": n, "bound_ms": sum(bounds)}
        section["rows"] = measure(contenders, machine, options.turns, until, start + options.seconds)
        sections.append(section)
        print_section(section)
        del contenders
        machine.free()
        torch.compiler.reset()
    results = {"machine": description, "rates": machine.rates._asdict(), "sections": sections, "errors": []}
    for width, vocab in shapes if options.errors else ():
        found = errors(width, vocab, options.device, dtype)
        results["errors"].append({"D": width, "V": vocab, "dtype": options.dtype, **found})
        listed = ", ".join(f"{name} {error:.1e}" for name, error in found.items())
        print(f"\nrelative error of the symmetric KL, D = {width}, V = {vocab}, {options.dtype}: {listed}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
