"""Sections of bench/gpu.py: the kernels' tiles, the head beside its peers, and a step's time by kernel."""

import importlib
import statistics
import time
from collections.abc import Callable

import torch
from gpu import Report, Settings
from kernel_contenders import CONTENDERS, Inputs, inputs
from machines import machine_of
from measuring import run_section
from roofline import HEADS
from triton.runtime.errors import OutOfResources

from vogue_kernels import linear_branch_stats, linear_logprob

QWEN_3B, QWEN_7B = HEADS.values()
TINY = (64, 300)  # D, V with --quick

# ------------------------------------------------------------------------------------------------------- kernels

EVERYONE = tuple(name for name in CONTENDERS if name != "reference")
WITHOUT_COMPILING = tuple(name for name in EVERYONE if name != "compile")  # 15 s each time
FEW = ("vogue", "vogue-kept", "liger-scaled", "cce", "floor")

# What tells most stands first, since time may run out: work, D and V, tokens, contenders.
CASES = [
    ("forward", QWEN_7B, 8192, EVERYONE),
    ("backward", QWEN_7B, 8192, EVERYONE),
    ("trainer", QWEN_7B, 8192, WITHOUT_COMPILING),
    ("loss", QWEN_7B, 8192, WITHOUT_COMPILING),
    ("kl", QWEN_7B, 8192, WITHOUT_COMPILING),
    *(("forward", QWEN_7B, n, FEW) for n in (64, 256, 1024, 16384)),
    *(("backward", QWEN_7B, n, FEW) for n in (64, 256, 1024, 16384)),
    *((work, QWEN_3B, n, FEW) for work in ("forward", "backward", "trainer") for n in (1024, 8192)),
    ("forward", QWEN_7B, 1024, EVERYONE),
    ("backward", QWEN_7B, 1024, EVERYONE),
]


def kernels(report: Report, settings: Settings) -> None:
    """A row for each contender of each case, with TFLOP/s and the share of the bound at this machine's ceilings."""
    machine = machine_of(settings.device, torch.bfloat16, settings.quick)
    works = dict.fromkeys(work for work, *_ in CASES)
    cases = [(work, TINY, 3, WITHOUT_COMPILING) for work in works] if settings.quick else CASES
    for work, shape, n, names in cases:
        left = settings.ends - time.monotonic()
        if left < 5:
            report.add(what=f"{work}, D {shape[0]}, {n} tokens", skipped="no time was left")
            continue
        with report.trying(f"{work}, D {shape[0]}, {n} tokens"):
            end = time.monotonic() + min(left, 12)
            given = machine, settings.device, torch.bfloat16, names, 2 if settings.quick else 15, end, end
            section = run_section(work, n, shape, *given)
            for row in section.pop("rows"):
                failure = {"skipped": row["note"]} if _expected(row["note"]) else {"error": row["note"]}
                report.add(
                    **section, **{key: x for key, x in row.items() if key != "note"}, **(failure if row["note"] else {})
                )


def _expected(note: str | None) -> bool:
    """A peer that can't run is no error of ours, nor is the memory that plain PyTorch wants."""
    return note is not None and any(told in note for told in ("isn't installed", "out of memory", "needs a GPU"))


# --------------------------------------------------------------------------------------------------------- tiles


def tiles(report: Report, settings: Settings) -> None:
    """Milliseconds of each kernel's step with one tile after the other; each must give what the chosen one gives."""
    gpu = importlib.import_module("vogue_kernels.gpu")
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability()) if settings.device == "cuda" else "sm_90"
    if architecture not in gpu.TILES:
        report.add(what="tiles", skipped=f"{architecture} has no row of gpu.TILES")
        return
    machine = machine_of(settings.device, torch.bfloat16, quick=True)
    chosen, own_group = gpu.TILES[architecture], gpu.GROUP
    n, shapes = (3, [TINY]) if settings.quick else (4096, [QWEN_7B, QWEN_3B])
    given = {shape: inputs(n, *shape, settings.device, torch.bfloat16) for shape in shapes}
    for kernel in KERNELS:
        before = chosen[kernel]
        steps = {shape: KERNELS[kernel](given[shape]) for shape in shapes}
        truth = [x.float().clone() for x in steps[shapes[0]]()]
        for tile, group in _candidates(before, own_group)[: 2 if settings.quick else None]:
            if settings.ends - time.monotonic() < 4:
                report.add(what=kernel, skipped="no time was left", tile=_shown(tile), group=group)
                continue
            chosen[kernel], gpu.GROUP = tile, group
            row = {"what": kernel, "tile": _shown(tile), "group": group, "chosen": (tile, group) == (before, own_group)}
            with report.trying(" ".join(map(str, row.values()))):
                try:
                    found = {f"ms_d{shape[0]}": _median(steps[shape], machine) for shape in shapes}
                    results = steps[shapes[0]]()
                except OutOfResources as error:
                    report.add(**row, skipped=str(error).splitlines()[0])
                    continue
                error = max(float((a - b).norm() / b.norm()) for a, b in zip(results, truth, strict=True))
                report.add(**row, difference=error, **found)
        chosen[kernel], gpu.GROUP = before, own_group


def _shown(tile) -> str:
    return f"{tile.tokens}×{tile.vocab}×{tile.depth}, {tile.warps} warps, {tile.stages} stages"


def _candidates(chosen, own_group: int) -> list[tuple]:
    """(tile, GROUP) to try, the chosen one first. Few, because each is compiled for some seconds."""
    wide = chosen._replace(vocab=256 if chosen.vocab < 256 else 128)
    half = chosen._replace(tokens=64, vocab=256) if chosen.vocab == 256 else chosen._replace(tokens=64, warps=4)
    tried = [(tile, own_group) for tile in (wide, chosen._replace(stages=3), half)]
    return [(chosen, own_group), (chosen, 2 * own_group), *tried]


def _gradient(both: bool, entropy: bool, bias: bool) -> Callable[[Inputs], Callable[[], tuple]]:
    """A backward pass alone: its forward is run once."""

    def make(given: Inputs):
        p, q, weight = (x.detach().requires_grad_() for x in given[:3])
        b = weight.new_zeros(len(weight)).detach() if bias else None
        if both:
            stats = linear_branch_stats(p, q, weight, given.targets, b)
            result, wanted = (stats.symmetric_kl + stats.entropy_p + stats.logprob_p).sum(), (p, q, weight)
        else:
            one = linear_logprob(p, weight, given.targets, b)
            result, wanted = (one.logprob + one.entropy if entropy else one.logprob).sum(), (p, weight)
        return lambda: torch.autograd.grad(result, wanted, retain_graph=True)

    return make


def _forward(both: bool, bias: bool) -> Callable[[Inputs], Callable[[], tuple]]:
    def make(given: Inputs):
        p, q, weight = (x.detach() for x in given[:3])
        b = weight.new_zeros(len(weight)) if bias else None
        if both:
            return lambda: tuple(linear_branch_stats(p, q, weight, given.targets, b))
        return lambda: tuple(linear_logprob(p, weight, given.targets, b))

    return make


# Key of gpu.TILES: a step that takes that tile. The trainer's own stand first.
KERNELS = {
    "forward both": _forward(both=True, bias=True),
    "gradient": _gradient(both=False, entropy=False, bias=True),
    "gradient both": _gradient(both=True, entropy=True, bias=False),
    "forward": _forward(both=False, bias=False),
    "forward with bias": _forward(both=False, bias=True),
    "gradient of logprob": _gradient(both=False, entropy=False, bias=False),
}


def _median(step: Callable[[], object], machine, turns: int = 7) -> float:
    step()  # compiles
    return statistics.median(machine.milliseconds(step) for _ in range(turns))


# --------------------------------------------------------------------------------------------------------- split


def split(report: Report, settings: Settings) -> None:
    """Milliseconds and launches of each kernel of a step, by one pass of torch's profiler."""
    n, shape = (3, TINY) if settings.quick else (8192, QWEN_7B)
    given = inputs(n, *shape, settings.device, torch.bfloat16)
    steps = {
        "forward, both branches": _forward(both=True, bias=False)(given),
        "backward of one branch's logprob": _gradient(both=False, entropy=False, bias=True)(given),
        "backward of both branches": _gradient(both=True, entropy=True, bias=False)(given),
    }
    activity = torch.profiler.ProfilerActivity
    on_gpu = settings.device == "cuda"
    for name, step in steps.items():
        with report.trying(name):
            step()
            with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
                step()
                if on_gpu:
                    torch.cuda.synchronize()
            times = [
                (event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3, event.count)
                for event in profile.key_averages()
            ]
            whole = sum(ms for _, ms, _ in times)
            for kernel, ms, launches in sorted(times, key=lambda x: -x[1])[:8]:
                size = {"D": shape[0], "V": shape[1], "tokens": n}
                report.add(what=name, kernel=kernel[:90], ms=ms, launches=launches, share=ms / whole, **size)
