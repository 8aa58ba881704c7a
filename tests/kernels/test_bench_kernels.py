"""bench/kernels.py and bench/gpu.sh: without a GPU they say so, and a tiny run on the CPU works."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [[sys.executable, BENCH / "kernels.py", "--device", "cuda"], ["bash", BENCH / "gpu.sh"]],
    ids=["py", "sh"],
)
def test_without_a_gpu_the_benchmark_ends_with_a_reason(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("no GPU: torch")


@pytest.mark.slow
def test_a_tiny_run_on_the_cpu_measures_every_contender_in_turns(tmp_path):
    contenders = [
        "vogue",
        "reference",
        "eager",
        "liger",
        "liger-ce",
        "floor",
    ]  # all but the one that takes long to compile
    command = [
        sys.executable,
        BENCH / "kernels.py",
        "--device",
        "cpu",
        "--shape",
        32,
        300,
        "--tokens",
        3,
        4,
        "--turns",
        2,
    ]
    command += ["--errors", "--json", tmp_path / "results.json", "--contenders", *contenders]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    error, sections = results["errors"][0], results["sections"]
    assert error["vogue"] < 1e-5 < error["eager"]  # bfloat16: only eager rounds its logits to it
    forward, both = "forward, both branches", "forward and backward of one branch's logprob"
    assert [(section["tokens"], section["work"]) for section in sections] == [
        (tokens, work) for tokens in (3, 4) for work in (forward, both)
    ]
    for section in sections:
        rows = {row.pop("contender"): row for row in section["rows"]}
        assert list(rows) == [name for name in contenders if name != "liger-ce" or section["work"] == both]
        assert rows.pop("liger-ce", {"note": "needs a GPU"})["note"] == "needs a GPU"
        for name, row in rows.items():
            assert row["torch_bytes"] > 0 or name == "floor"
            assert row["turns"] == 2 and 0 < row["fastest_ms"] <= row["ms"] <= row["slowest_ms"]
            assert f"{name:9} {row['ms']:9.2f}" in done.stdout


def test_the_errors_beside_others_are_of_every_result_and_say_who_rounds(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    kernel_errors = importlib.import_module("kernel_errors")
    # trl takes seconds to import; liger, where it isn't installed, is told as what it is
    monkeypatch.delitem(kernel_errors.HEADS, "trl")
    found = kernel_errors.errors(6, 64, 500, "cpu", torch.bfloat16)
    results = ["log p", "entropy", "∂hidden", "∂weight"]
    assert list(found["vogue"]) == list(found["eager"]) == [*results, "symmetric KL"]
    assert max(found["vogue"][name] for name in ("log p", "entropy", "symmetric KL")) < 1e-5
    assert found["eager"]["log p"] > 1e-4 and found["eager"]["symmetric KL"] > 1e-4  # its logits are bfloat16
    assert found["liger"] == "liger_kernel isn't installed" or list(found["liger"]) == results


def test_a_head_that_is_not_installed_is_told_by_its_name(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    kernel_errors = importlib.import_module("kernel_errors")
    missing = kernel_errors.Head(lambda *_: importlib.import_module("no_such_peer.kernels"), None)
    monkeypatch.setattr(kernel_errors, "HEADS", {"eager": kernel_errors.HEADS["eager"], "peer": missing})
    assert kernel_errors.errors(2, 8, 20, "cpu", torch.float32)["peer"] == "no_such_peer isn't installed"
