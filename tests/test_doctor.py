import io
import re
import sys

import pytest
import torch
from rich.console import Console

from vogue import doctor
from vogue.doctor import Finding

WELL = {
    "torch": Finding({"build": "the CPU", "gpus": []}),
    "kernels": Finding({"backends": {"triton": "no GPU", "cpu": None, "torch": None}, "cpu": "avx2"}),
    "deepspeed": Finding("ZeRO-3 on cpu, gloo"),
    "vllm": Finding("generates on cpu"),
    "hf": Finding("generates wherever torch runs"),
}


def report(monkeypatch, **changed):
    findings = {doctor.PROBES[name]: finding for name, finding in (WELL | changed).items()}
    monkeypatch.setattr(doctor, "probe", findings.__getitem__)
    console = Console(width=200, record=True, file=io.StringIO())
    return doctor.run(console), console.export_text()


def test_a_whole_environment_can_train(monkeypatch):
    code, text = report(monkeypatch)
    assert code == 0
    assert "A training can run here." in text
    assert "no GPU" in text  # why the triton backend can't
    assert re.search(r"kernels: cpu +│? *yes +│? *avx2", text)


def test_without_deepspeed_it_fails_and_names_the_extra(monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: Finding([], "no driver"))
    missing = Finding(reason="ModuleNotFoundError: No module named 'deepspeed'")
    code, text = report(monkeypatch, deepspeed=missing)
    assert code == 1
    assert "deepspeed: ModuleNotFoundError" in text
    assert "'.[cpu]'" in text


def test_where_there_is_a_gpu_the_gpu_extra_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: Finding(["NVIDIA H100, 80 GiB"]))
    missing = Finding(reason="ModuleNotFoundError: No module named 'deepspeed'")
    code, text = report(monkeypatch, deepspeed=missing)
    assert code == 1
    assert "'.[gpu]'" in text
    assert "torch doesn't see them: it is a build for the CPU" in text


def test_without_vllm_it_names_the_other_engine(monkeypatch):
    code, text = report(monkeypatch, vllm=Finding(reason="OSError: Could not load libtorchcodec_image.so"))
    assert code == 0
    assert "rollout.engine=hf" in text
    assert "tools/match_torch.py" in text


def test_without_any_rollout_engine_it_fails(monkeypatch):
    code, text = report(monkeypatch, vllm=Finding(reason="no vllm"), hf=Finding(reason="no transformers"))
    assert code == 1
    assert "no vllm" in text


def test_without_torch_it_fails_without_a_traceback(monkeypatch):
    broken = Finding(reason="ModuleNotFoundError: No module named 'torch'")
    code, text = report(monkeypatch, **dict.fromkeys(WELL, broken))
    assert code == 1
    assert "torch: ModuleNotFoundError" in text


def test_a_probe_returns_what_was_printed_last():
    assert doctor.probe("print('noise'); print('[1, 2]')") == Finding([1, 2])


def test_a_failing_probe_returns_the_last_line_of_the_traceback():
    assert doctor.probe("raise OSError('no libcudart')") == Finding(reason="OSError: no libcudart")


def test_a_probe_that_dies_silently_or_hangs_gives_a_reason():
    assert "exit code" in doctor.probe("import os; os.abort()").reason
    assert "within 1 s" in doctor.probe("import time; time.sleep(60)", time_limit=1).reason


@pytest.mark.parametrize(
    "cpuinfo, expected",
    [
        ("processor : 0\nflags\t\t: fpu fma avx2\n", ["avx2", "fma"]),
        (
            "flags\t\t: avx2 fma avx512f amx_tile amx_bf16 avx512_bf16\n",
            ["avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"],
        ),
        ("Features\t: fp asimd bf16 sve\n", ["asimd", "bf16", "sve"]),
        ("model name : avx2\n", []),
    ],
)
def test_instruction_sets_are_read_from_the_flags_alone(cpuinfo, expected):
    assert doctor.instruction_sets(cpuinfo) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_there_is_no_gpu_the_first_minute_on_it_ends_with_that_reason(capfd):
    assert doctor.try_gpu(Console()) == 2
    assert "no GPU: torch" in capfd.readouterr().err


def test_without_a_checkout_the_first_minute_on_a_gpu_says_what_it_needs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "vogue" / "doctor.py"))
    assert doctor.try_gpu(Console(width=200)) == 1
    assert "bench/gpu.py of a checkout" in capsys.readouterr().out


@pytest.mark.long  # `make setup` ends with it
def test_this_very_environment_can_train():
    assert doctor.run(Console(width=200, file=sys.stdout)) == 0
