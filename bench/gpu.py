"""Everything that only a GPU can tell of vogue: `bash bench/gpu.sh [OUT]` has what this needs, and runs it.

    python bench/gpu.py [OUT] [--only machine correct ...]       # sections, in their order, each with its time limit
    python bench/gpu.py [OUT] --device cpu --quick               # does everything run? On tiny shapes, without a GPU

Each section is a process of its own. It writes OUT/SECTION.json after every row; what it raises, or a time limit that
ends it, is a row too, with an "error". What can't run here has a row that says so under "skipped". Nothing stops the
sections after it. Exit code 0: all ran, without an error; 1: some row has one; 2: there is no GPU.

`python tools/bench_tables.py OUT` makes tables of the files.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
SECONDS = 525  # of all sections together


class Section(NamedTuple):
    module: str  # of this folder; it has a function of the section's name, which takes a Report and Settings
    seconds: int  # its limit, or its share of the time that is left where that is less
    tells: str


# What is wrong with the machine or the kernels first: it explains what fails later.
SECTIONS = {
    "machine": Section("gpu_machine", 45, "versions, ceilings, and what the kernels take for granted"),
    "correct": Section("gpu_machine", 40, "small cases on every backend against float64"),
    "tests": Section("gpu_tests", 110, "the Triton tests, in parallel"),
    "widths": Section("gpu_tests", 60, "the tests at real widths, which need a GPU"),
    "sanitizer": Section("gpu_tests", 45, "one case under compute-sanitizer"),
    "tiles": Section("gpu_kernels", 60, "the kernels' tiles, one after the other"),
    "kernels": Section("gpu_kernels", 115, "the head beside its peers"),
    "split": Section("gpu_kernels", 25, "a step's time by kernel"),
    "attention": Section("gpu_attention", 60, "attention of shared prompts: right, and how fast"),
    "training": Section("gpu_training", 90, "whole trainings"),
}


class Settings(NamedTuple):
    device: str  # "cuda" or "cpu"
    quick: bool  # tiny shapes
    ends: float  # time.monotonic() by which the section should be done; it is stopped soon after


@dataclass
class Report:
    """A section's rows, in a file after each of them."""

    path: Path
    rows: list[dict] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    finished: bool = False

    def add(self, **row) -> None:
        self.rows.append(row)
        self.write()
        print(self.path.stem, " ".join(f"{name}={value}" for name, value in row.items())[:400], flush=True)

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Whatever the block raises is a row, with what was tried, and the next block runs."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            self.add(what=what, error=f"{type(error).__name__}: {lines[0][:300]}")

    def write(self) -> None:
        seconds = round(time.monotonic() - self.start, 1)
        told = {"section": self.path.stem, "finished": self.finished, "seconds": seconds, "rows": self.rows}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(told, indent=1, default=str))
        partial.replace(self.path)  # a process that is stopped here leaves the file before


def run_section(name: str, out: Path, settings: Settings) -> None:
    """In a process of its own."""
    report = Report(out / f"{name}.json")
    report.write()
    with report.trying(name):
        getattr(importlib.import_module(SECTIONS[name].module), name)(report, settings)
    report.finished = True
    report.write()


def limit_of(name: str, todo: list[str], left: float) -> float:
    """Seconds for a section, so that each of those still to do has its share of the seconds that are left."""
    return SECTIONS[name].seconds * min(1.0, left / sum(SECTIONS[other].seconds for other in todo))


def start_section(name: str, out: Path, options: argparse.Namespace, limit: float) -> list[dict]:
    """Run a section as a process within so many seconds; returns its rows, one more if the process was ended."""
    file, log = out / f"{name}.json", out / f"{name}.log"
    file.unlink(missing_ok=True)
    if limit < 5:
        report = Report(file)
        report.add(what=name, error=f"no time was left of {SECONDS} s")
        return report.rows
    command = [sys.executable, __file__, str(out), "--section", name, "--seconds", str(limit - 3)]
    command += ["--device", options.device, *(["--quick"] if options.quick else [])]
    print(f"\n{name}: {SECTIONS[name].tells} ({limit:.0f} s at most)", flush=True)
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            ended = None if code == 0 else f"its process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        except KeyboardInterrupt:
            _kill(process)
            raise
        _kill(process)  # and what it started
    report = Report(file, **({"rows": json.loads(file.read_text())["rows"]} if file.exists() else {}))
    if ended:
        tail = log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
        report.add(what=name, error=f"{ended}; its last line: {tail[0][:200]}")
    return report.rows


def _named(row: dict) -> str:
    if "contender" in row:
        return f"{row['work']}, D {row['D']}, {row['tokens']} tokens, {row['contender']}"
    return ", ".join(str(row[key]) for key in ("what", "tile", "attention") if key in row)


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)  # its own session's processes alone
    process.wait()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # this process is that section's
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all sections together")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none; nothing was tested or measured", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + options.seconds
    if options.section:
        run_section(options.section, options.out, Settings(options.device, options.quick, ends))
        return 0
    failed = {}
    todo = [name for name in SECTIONS if name in options.only]  # in their order, however they were asked for
    for index, name in enumerate(todo):
        limit = limit_of(name, todo[index:], ends - time.monotonic())
        rows = start_section(name, options.out, options, limit)
        for row in rows:
            if "error" in row or "skipped" in row:
                told = "error" if "error" in row else "skipped"
                print(f"  {_named(row)}: {told}: {row[told]}", flush=True)
        failed[name] = sum("error" in row for row in rows)
        print(f"  {len(rows)} rows, {failed[name]} of them errors: {options.out / name}.json", flush=True)
    print(f"\nerrors: {', '.join(f'{name} {count}' for name, count in failed.items() if count) or 'none'}")
    return 1 if any(failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
