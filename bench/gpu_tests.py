"""Sections of bench/gpu.py: the tests of the kernels, and one case under compute-sanitizer."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path

from gpu import Report, Settings

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 8  # processes of pytest: each compiles its kernels on cores of its own

# Odd sizes: the edges of tiles are where a kernel may leave its tensors.
CASE = """
import sys, torch
from vogue_kernels import linear_branch_stats
torch.manual_seed(0)
torch.set_default_device(sys.argv[1])
for width, vocab in ((128, 3000), (100, 3003)):  # rows that tensor descriptors can load, and rows that they can't
    p, q, weight = (torch.randn(n, width).bfloat16().requires_grad_() for n in (130, 130, vocab))
    stats = linear_branch_stats(p, q, weight, torch.randint(vocab, (130,)))
    sum(x.sum() for x in stats).backward()
    assert all(x.grad.isfinite().all() for x in (p, q, weight))
print("ran")
"""


def tests(report: Report, settings: Settings) -> None:
    """tests/kernels of the Triton backend: a row of counts, and one for each test that failed."""
    if settings.quick:
        _pytest(report, settings, ["tests/kernels/test_loss.py", "-k", "token_weights"])
        return
    has_xdist = importlib.util.find_spec("xdist") is not None
    parallel = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if has_xdist else []
    # The backend's name is in the tests' ids.
    _pytest(report, settings, ["tests/kernels", "-k", "triton and not real_widths", *parallel])


def widths(report: Report, settings: Settings) -> None:
    """The tests at real widths, one after the other: one may take 45 GB of the GPU's memory."""
    if settings.device == "cpu":
        report.add(what="tests/kernels/test_real_widths.py", skipped="needs a GPU")
        return
    _pytest(report, settings, ["tests/kernels/test_real_widths.py"])


def _pytest(report: Report, settings: Settings, chosen: list[str]) -> None:
    name, file = " ".join(chosen), report.path.with_suffix(".xml")
    file.unlink(missing_ok=True)
    # Without conftest.py of tests/, which wants all of vogue; a module that can't be imported stops no other.
    options = ["-q", "-p", "no:cacheprovider", "--confcutdir", "tests/kernels", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *chosen, *options, f"--junit-xml={file}"]
    limit = settings.ends - time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=max(limit, 1))
    except subprocess.TimeoutExpired:
        report.add(what=name, error=f"not done within {limit:.0f} s; the log has what there was")
        return
    if not file.exists():
        report.add(what=name, error=f"pytest ended with exit code {done.returncode} and wrote nothing")
        return
    suite = xml.parse(file).getroot()[0]
    counts = {"ran": "tests", "failed": "failures", "broken": "errors", "left_out": "skipped", "seconds": "time"}
    report.add(what=name, **{told: suite.get(key) for told, key in counts.items()})
    for case in suite.iter("testcase"):
        for told in (*case.findall("failure"), *case.findall("error")):
            lines = (told.get("message") or "").strip().splitlines() or [""]
            report.add(what=f"{case.get('classname')}::{case.get('name')}", error=lines[0][:300])


def sanitizer(report: Report, settings: Settings) -> None:
    tool = shutil.which("compute-sanitizer") if settings.device == "cuda" else None
    if tool is None and settings.device == "cuda":
        report.add(what="compute-sanitizer", skipped="isn't on the PATH")
        return
    command = [sys.executable, "-c", CASE, settings.device]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else it can't see past a tensor's end
    limit = settings.ends - time.monotonic()
    prefix = [tool, "--error-exitcode", "9"] if tool else []
    try:
        done = subprocess.run([*prefix, *command], capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        report.add(what="compute-sanitizer", skipped=f"not done within {limit:.0f} s")  # it is that slow
        return
    told = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")][:20]
    if done.returncode:
        print(done.stdout, done.stderr)
        raise RuntimeError(f"exit code {done.returncode}: {(told or done.stderr.splitlines() or [''])[-1]}")
    report.add(what="compute-sanitizer" if tool else "the case without compute-sanitizer", told=told[-1:])
