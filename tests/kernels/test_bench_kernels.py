"""bench/kernels.py and bench/gpu.sh: without a GPU they say so, and a tiny run on the CPU works."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))  # last: its kernels.py must not stand for a package of that name

from kernel_contenders import CONTENDERS, ENOUGH, WORK, Contender, inputs  # noqa: E402
from machines import machine_of  # noqa: E402
from measuring import measure, room_for_logits  # noqa: E402


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


def run(*arguments):
    command = [sys.executable, BENCH / "kernels.py", "--device", "cpu", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_tiny_run_on_the_cpu_measures_every_contender_in_turns(tmp_path):
    contenders = [name for name in CONTENDERS if name != "compile"]  # which takes long to compile
    tiny = ["--shape", 32, 300, "--tokens", 3, 4, "--turns", 2, "--work", *WORK, "--contenders", *contenders]
    done = run(*tiny, "--keep", "1.5MB", "all", "--errors", "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    error, sections = results["errors"][0], results["sections"]
    assert error["vogue"] < 1e-5 < error["eager"]  # bfloat16: only eager rounds its logits to it
    assert [(section["tokens"], section["work"]) for section in sections] == [(n, key) for n in (3, 4) for key in WORK]
    for section in sections:
        rows = {row.pop("contender"): row for row in section["rows"]}
        assert {"vogue", "eager"} < set(rows)
        assert section["work"] == "forward" or {"vogue-1.5MB", "vogue-kept"} < set(rows)
        needs = {name for name, row in rows.items() if "ms" not in row}
        assert needs == {"liger-ce", "cce"} & set(rows) and all("GPU" in rows[name]["note"] for name in needs)
        for name in set(rows) - needs:
            row = rows[name]
            assert row["torch_bytes"] > 0 or name == "floor"
            assert row["turns"] == 2 and 0 < row["fastest_ms"] <= row["ms"] <= row["slowest_ms"]
            assert row["of_bound"] == section["bound_ms"] / row["ms"]
            assert f"{name:12} {row['ms']:9.2f}" in done.stdout


def test_a_contender_that_fails_has_the_reason_in_its_row_and_the_others_go_on():
    def missing():
        import a_peer_that_nobody_has  # noqa: F401

    def broken():
        raise RuntimeError("no such layout\nand more")

    functions = {"a": missing, "b": broken, "c": lambda: torch.ones(3)}
    contenders = {name: Contender("", function) for name, function in functions.items()}
    machine = machine_of("cpu", torch.float32, quick=True)
    a, b, c = measure(contenders, machine, turns=2, until=0, end=float("inf"))
    assert (a["note"], b["note"]) == ("a_peer_that_nobody_has isn't installed", "RuntimeError: no such layout")
    assert c["turns"] == 2


class Weighed:
    """A machine on which a run needs as many MB as it returns."""

    def peak_bytes(self, run):
        return {"torch_bytes": run() * 10**6}


def test_logits_are_kept_by_megabytes_or_up_to_a_share_of_what_torch_compile_needs(monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    contenders = {"vogue": Contender("", lambda: 10), "compile": Contender("", lambda: 78)}
    kept = {keep: room_for_logits(keep, contenders, Weighed()) for keep in ("all", "28MB", "0.5x", "0.1x")}
    assert {keep: room() for keep, room in kept.items()} == {"all": ENOUGH, "28MB": 28e6, "0.5x": 29e6, "0.1x": 0}
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(RuntimeError, match=r"torch\.compile is disabled"):
        room_for_logits("0.5x", contenders, Weighed())()


def test_an_amount_to_keep_that_cannot_be_read_is_told():
    done = run("--keep", "half")
    assert done.returncode == 2 and "'half' is none of all, a number of MB as 28MB, a share as 0.5x" in done.stderr


def test_all_contenders_of_the_loss_that_know_it_compute_the_same_gradients():
    given = inputs(6, 16, 50, "cpu", torch.float32)
    work = WORK["loss"].make(given)
    vogue, kept, eager = (work[name].run() for name in ("vogue", "vogue-kept", "eager"))
    for ours in (vogue, kept):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)


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
