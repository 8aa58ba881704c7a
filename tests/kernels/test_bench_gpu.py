"""bench/gpu.py: its sections run on a CPU, and nothing that fails, hangs or dies in one stops the others."""

import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))  # last: its kernels.py must not stand for a package of that name

import gpu  # noqa: E402
from gpu import SECTIONS, Report, Section, Settings  # noqa: E402


@pytest.mark.slow
def test_all_sections_run_on_tiny_shapes_without_a_gpu(tmp_path, monkeypatch):
    """In this process, which has imported most of what they need; other tests may have made it the rank of a run."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in SECTIONS:
        gpu.run_section(name, tmp_path, Settings("cpu", quick=True, ends=time.monotonic() + 200))
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in SECTIONS}
    errors = [row for section in found.values() for row in section["rows"] if "error" in row]
    assert not errors, errors
    assert all(section["finished"] and section["rows"] for section in found.values())
    rows = {name: section["rows"] for name, section in found.items()}
    assert {row["work"] for row in rows["kernels"]} == {"forward", "backward", "trainer", "kl", "loss"}
    assert {row.get("attention") for row in rows["attention"]} == {"shared_prefix", "shared_prefix_varlen", "sdpa"}
    steps = {(row["what"], row["method"]) for row in rows["training"]}
    assert steps == {
        (way, method) for way in ("plain loop, tiny", "vogue.trainer, tiny") for method in ("grpo", "vogue")
    }
    told = tables_of(tmp_path)
    table = told.stdout
    assert told.returncode == 0, told.stderr
    assert "| vogue |" in table and "GB/s" in table and "not finished" not in table


def test_the_command_runs_a_section_as_a_process_and_ends_without_an_error(tmp_path):
    command = ["bash", BENCH / "gpu.sh", tmp_path, "--device", "cpu", "--quick", "--only", "machine"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "errors: none" in done.stdout, done.stdout + done.stderr
    section = json.loads((tmp_path / "machine.json").read_text())
    assert section["finished"] and [row["what"] for row in section["rows"]] == [
        *("versions", "backends", "ceilings", "ceilings", "addmm with out_dtype"),
    ]


def test_a_row_is_on_the_disk_when_it_is_added_and_an_error_is_one(tmp_path):
    report = Report(tmp_path / "kernels.json")
    report.add(what="first", ms=1.5)
    with report.trying("second"):
        raise ValueError("D is 3\nand so on")
    with report.trying("third"):
        report.add(what="third", ms=2.5)
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert written["rows"] == [
        {"what": "first", "ms": 1.5},
        {"what": "second", "error": "ValueError: D is 3"},
        {"what": "third", "ms": 2.5},
    ]
    assert not written["finished"]


SCRIPT = """
import os, time
def hangs(report, settings):
    report.add(what="before", ms=1)
    time.sleep(600)
def dies(report, settings):
    report.add(what="before", ms=1)
    print("no more memory", flush=True)
    os._exit(9)
def raises(report, settings):
    raise KeyError("nothing of this name")
"""


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("hangs", r"stopped after \d+ s"),
        ("dies", "its process ended with exit code 9; its last line: no more memory"),
        ("raises", "KeyError"),
    ],
)
def test_a_section_that_hangs_dies_or_raises_keeps_its_rows_and_has_an_error(tmp_path, monkeypatch, name, error):
    """In a copy of gpu.py whose sections are these."""
    section = Section("sections_of_the_test", 8, "")
    text = (BENCH / "gpu.py").read_text()
    text = text.replace("class Settings(", f"SECTIONS = {{{name!r}: {section}}}\n\n\nclass Settings(")
    (tmp_path / "gpu.py").write_text(text)
    (tmp_path / "sections_of_the_test.py").write_text(SCRIPT)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "gpu.py"))
    monkeypatch.setitem(SECTIONS, name, section)
    out = tmp_path / "out"
    out.mkdir()
    rows = gpu.start_section(name, out, Namespace(device="cpu", quick=True), limit=8)
    assert rows == json.loads((out / f"{name}.json").read_text())["rows"]
    assert "error" in rows[-1]
    assert re.search(error, rows[-1]["error"])
    assert name == "raises" or rows[0] == {"what": "before", "ms": 1}


def tables_of(path):
    command = [sys.executable, str(BENCH.parent / "tools" / "bench_tables.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True)


def test_tables_tell_what_failed_and_give_ratios_to_vogue(tmp_path):
    case = {"work": "forward", "title": "forward", "D": 2048, "V": 151936, "tokens": 64, "dtype": "bfloat16"}
    case |= {"bound_ms": 1.5, "operations": 10**12}
    measured = {"computes": "all", "tflops": 500.0, "torch_bytes": 3_000_000, "nvml_bytes": None}
    rows = [
        case | measured | {"contender": "vogue", "ms": 2.0, "of_bound": 0.75},
        case | measured | {"contender": "eager", "ms": 5.0, "of_bound": 0.3},
        case | {"contender": "cce", "computes": "part", "error": "ValueError: no"},
    ]
    section = {"section": "kernels", "finished": False, "seconds": 3, "rows": rows}
    (tmp_path / "kernels.json").write_text(json.dumps(section))
    told = tables_of(tmp_path).stdout
    assert "- kernels: not finished" in told and "- training: not run" in told
    assert "- kernels: forward, D = 2048, N = 64, cce: ValueError: no" in told
    assert "| eager | 5 | 2.5 | 500 | 30% | 3 | – | all |" in told
    assert tables_of(tmp_path / "missing").returncode == 2


def test_a_section_without_time_left_says_so(tmp_path):
    rows = gpu.start_section("tiles", tmp_path, Namespace(device="cpu", quick=True), limit=4)
    assert "no time was left" in rows[0]["error"]


def test_the_sections_share_the_time_that_is_left():
    todo, seconds = ["split", "attention", "training"], {name: section.seconds for name, section in SECTIONS.items()}
    assert gpu.limit_of("split", todo, 1000) == seconds["split"]
    whole = sum(seconds[name] for name in todo)
    assert gpu.limit_of("attention", todo, whole / 3) == pytest.approx(seconds["attention"] / 3)
