"""Contenders in turns on one shape, whatever becomes of any of them: rows for bench/kernels.py and bench/gpu.py."""

import os
import random
import re
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from statistics import median

import torch
from kernel_contenders import ENOUGH, WORK, Contender, eager_forward, inputs
from machines import Cpu, Gpu
from roofline import of_work

from vogue_kernels import linear_branch_stats


def why_not(error: Exception) -> str:
    """A contender's error as a note of its row."""
    if isinstance(error, ImportError):
        return f"{error.name or error} isn't installed" if "No module" in str(error) else str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, NotImplementedError) and str(error).startswith("needs a GPU"):
        return str(error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def reason_not_to_run(name: str, machine: Gpu | Cpu) -> str | None:
    if name == "compile" and os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "torch.compile is disabled"
    return "needs a GPU" if name == "liger-ce" and isinstance(machine, Cpu) else None


def room_for_logits(keep: str, contenders: dict[str, Contender], machine: Gpu | Cpu) -> Callable[[], int]:
    """Bytes of logits to keep, by what `--keep` says: "all", "28MB", or "0.5x".

    With the last, vogue's whole memory is that share of torch.compile's. Both are measured for it, once.
    """
    number, unit = re.fullmatch(r"([\d.]*)(all|MB|x)", keep).groups()
    if unit != "x":
        return lambda: ENOUGH if unit == "all" else int(float(number) * 1e6)

    @cache
    def room() -> int:
        if reason := reason_not_to_run("compile", machine):
            raise RuntimeError(reason)
        peaks = []
        for name in ("vogue", "compile"):
            contenders[name].run()  # compiles
            peaks.append(machine.peak_bytes(contenders[name].run)["torch_bytes"])
        return max(0, int(float(number) * peaks[1]) - peaks[0])

    return room


def measure(contenders: dict[str, Contender], machine: Gpu | Cpu, turns: int, until: float, end: float) -> list[dict]:
    """A row for each contender: the median of so many turns, or fewer: 7 if that takes until then, 1 at the end.

    A contender that raises, whatever it is, has the reason in its row, and the others go on.
    """
    rows, running = [], []
    for name, (computes, run) in contenders.items():
        row = {"contender": name, "computes": computes, "note": reason_not_to_run(name, machine)}
        rows.append(row)
        if row["note"] is None:
            try:
                run()  # compiles
                row |= machine.peak_bytes(run)
                running.append((row, run, []))
            except Exception as error:
                row["note"] = why_not(error)
                if not isinstance(error, ImportError | NotImplementedError):
                    traceback.print_exc(limit=-3)  # the last frames tell it
            machine.free()
    for turn in range(turns):
        if (turn >= 7 and time.monotonic() > until) or (turn >= 1 and time.monotonic() > end):
            break
        for _, run, times in random.Random(turn).sample(running, len(running)):  # none always follows the same one
            times.append(machine.milliseconds(run))
    for row, _, times in running:
        row |= {"ms": median(times), "fastest_ms": min(times), "slowest_ms": max(times), "turns": len(times)}
    return rows


def run_section(
    key: str,
    n: int,
    shape: tuple[int, int],
    machine: Gpu | Cpu,
    device: str,
    dtype: torch.dtype,
    names: tuple[str, ...],
    turns: int,
    until: float,
    end: float,
    keeps: Sequence[str] = ("all",),
) -> dict:
    """Measure contenders of one kind of work on one shape; `until` and `end` as in `measure`.

    keeps: as in `room_for_logits`; "vogue-kept" is a contender for each of them.
    """
    work, (width, vocab) = WORK[key], shape
    contenders: dict[str, Contender] = {}
    labels = {"vogue-kept" if keep == "all" else f"vogue-{keep}": keep for keep in keeps}
    kept = {label: room_for_logits(keep, contenders, machine) for label, keep in labels.items()}
    contenders |= work.make(inputs(n, width, vocab, device, dtype), kept)
    names = [name for given in names for name in (labels if given == "vogue-kept" else (given,))]
    competing = {name: contenders[name] for name in names if name in contenders}
    bound_ms, operations = of_work(work.steps, width, vocab, n, dtype.itemsize, machine.rates)
    section = {"work": key, "title": work.title, "D": width, "V": vocab, "tokens": n}
    section |= {"dtype": str(dtype).removeprefix("torch."), "bound_ms": bound_ms, "operations": operations}
    section["rows"] = measure(competing, machine, turns, until, end)
    for row in section["rows"]:
        if "ms" in row:
            row |= {"tflops": operations / row["ms"] / 1e9, "of_bound": bound_ms / row["ms"]}
    contenders.clear(), competing.clear()
    machine.free()
    torch.compiler.reset()
    return section


def errors(width: int, vocab: int, device: str, dtype: torch.dtype, n: int = 16) -> dict[str, float]:
    """The largest relative error of the symmetric KL, against float64."""
    p, q, weight, targets = inputs(n, width, vocab, device, dtype)
    exact = [x.double() for x in (p, q, weight)]
    truth = linear_branch_stats(*exact, targets, backend="torch").symmetric_kl
    *_, pq, qp = eager_forward(p, q, weight, targets)
    found = {"vogue": linear_branch_stats(p, q, weight, targets).symmetric_kl, "eager": (pq + qp) / 2}
    return {name: float(((kl - truth) / truth).abs().max()) for name, kl in found.items()}
