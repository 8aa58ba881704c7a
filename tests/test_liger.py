"""Liger's kernels in the text body, in Triton's interpreter, against the model's own forward; and where they can't be.

The interpreter needs two repairs: it leaves a kernel's float arguments as Python's, and has none of libdevice.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import environment, launcher
from test_families import random_model

from vogue.model.liger import check_liger
from vogue.settings import ConfigError

REPAIRS = """
import copy, sys

import numpy, torch
import triton.language as tl
from triton.runtime import interpreter

import liger_kernel.ops.rms_norm

convert = interpreter._implicit_cvt

def with_floats(argument):
    if not isinstance(argument, float):
        return convert(argument)
    return tl.tensor(interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32), tl.float32)

interpreter._implicit_cvt = with_floats
liger_kernel.ops.rms_norm.rsqrt = lambda x: 1 / tl.sqrt(x)
"""
SAME = """
from test_families import random_model, row_of
from vogue.config import LoraConfig
from vogue.model.liger import ROTATION, apply_liger
from vogue.model.lora import add_adapters
from vogue.model.packing import collate
from vogue.model.policy import Policy

def results(model, kind):
    rows = [row_of(model, kind, 1, [10, 11, 12], [20, 21]), row_of(model, kind, 2, [13, 14], [30])]
    logprob = Policy(model, 1.0)(collate(rows, 0, token_mean=True)).logprob
    (logprob * torch.linspace(-1, 2, len(logprob))).sum().backward()
    return logprob, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

for kind, adapted in (("qwen2_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", False)):
    plain = random_model(kind, torch.float32)
    if adapted:
        add_adapters(plain, LoraConfig(rank=2), seed=0)
    fused = copy.deepcopy(plain)
    (expected, gradients), family = results(plain, kind), sys.modules[type(plain).__module__]
    rotation = getattr(family, ROTATION)
    apply_liger(fused)
    liger = getattr(family, ROTATION)
    turned = []
    setattr(family, ROTATION, lambda *given: turned.append(1) or liger(*given))
    found, ours = results(fused, kind)
    setattr(family, ROTATION, rotation)
    assert len(turned) == 3, turned  # of three layers
    kinds = {type(module).__name__ for module in fused.model.language_model.modules()}
    assert {"FusedRMSNorm", "FusedMLP"} <= kinds and not any(k.endswith(("VLRMSNorm", "TextMLP")) for k in kinds)
    assert (found - expected).abs().max() < 1e-5, kind
    assert ours.keys() == gradients.keys()
    least = 1e-2 * max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), least), name
    assert fused.state_dict().keys() == plain.state_dict().keys()
    print("same", kind, adapted)
"""


@pytest.mark.slow
def test_ligers_kernels_change_no_logprob_and_no_gradient_of_a_family_they_are_for():
    given = environment() | {"TRITON_INTERPRET": "1"}
    given["PYTHONPATH"] = f"{Path(__file__).parent}:{given.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", REPAIRS + SAME], env=given, capture_output=True, text=True, timeout=500
    )
    assert done.stdout.count("same") == 3, done.stdout + done.stderr


TRAIN = """
from vogue.cli import main
from vogue.distributed import leave

leave(main(["train", *[text for text in sys.argv[1:] if not text.startswith("--local_rank")]]))
"""


@pytest.mark.long
def test_two_ranks_train_a_partitioned_model_by_ligers_kernels_as_by_its_own(settings, mixed_data, tmp_path):
    script, rows = tmp_path / "train.py", []
    script.write_text(REPAIRS + TRAIN)
    for liger in ("true", "false"):
        folder = tmp_path / liger
        given = [*settings, f"model.liger={liger}", f"data.train={mixed_data}", "trainer.steps=2"]
        given += ["trainer.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"]
        command = [*launcher(2), script, *given, "rollout.n=4", f"trainer.output_dir={folder}"]
        told = {"env": environment() | {"TRITON_INTERPRET": "1"}, "capture_output": True, "text": True}
        done = subprocess.run([*map(str, command)], **told, timeout=590)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        rows.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    for ours, theirs in zip(*rows, strict=True):
        for name in ("reward", "loss", "entropy", "grad_norm", "tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert any(row["grad_norm"] > 0 for row in rows[0])


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("llava_onevision", "it is for qwen2_vl, qwen2_5_vl, qwen3_vl, not for llava_onevision"),
        ("qwen3_5", "it is for qwen2_vl, qwen2_5_vl, qwen3_vl, not for qwen3_5"),
        ("qwen2_5_vl", "Triton's kernels need a GPU"),
    ],
)
def test_where_liger_cannot_be_had_is_one_sentence(kind, told, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError) as refused:
        check_liger(random_model(kind))
    assert str(refused.value) == f"model.liger=true: {told}"


def test_another_activation_than_silu_is_refused():
    model = random_model("qwen2_5_vl")
    model.config.text_config.hidden_act = "gelu"
    with pytest.raises(ConfigError, match=r"model\.liger=true: the MLPs' activation is gelu, not silu"):
        check_liger(model)
