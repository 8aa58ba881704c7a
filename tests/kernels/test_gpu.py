"""The Triton backend where there may be no GPU: the other tests of this folder in Triton's interpreter, and the choice
of the backend."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vogue_kernels import linear_logprob, operator

FOLDER = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="this is the child")
def test_every_kernel_test_of_a_small_vocabulary_passes_in_the_interpreter():
    """In a process of its own: triton must be told before its first import, and other tests compile with it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir", FOLDER, FOLDER]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*map(str, command), "-k", "triton and not (V32003 or V15)"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_auto_leaves_the_interpreter_to_those_who_ask_for_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert operator.available_backends()["triton"] is None
    assert operator._implementation("auto", torch.zeros(1, 1)).__name__ != "vogue_kernels.gpu"


def test_tensors_on_the_cpu_are_refused_though_there_is_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="backend 'triton' can't run: the tensors are on cpu"):
        linear_logprob(torch.zeros(1, 8), torch.zeros(50, 8), torch.tensor([0]), backend="triton")
    linear_logprob(torch.zeros(1, 8), torch.zeros(50, 8), torch.tensor([0]))


def test_float64_is_refused_where_it_would_be_computed_in_float32(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden, weight = torch.zeros(1, 8, dtype=torch.float64), torch.zeros(50, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="it computes in float32; use torch"):
        linear_logprob(hidden, weight, torch.tensor([0]), backend="triton")


@pytest.mark.parametrize(
    "blocks, tiles, processors, expected",
    [
        (1, 1187, 132, 9),  # one token block: 132 shares, one for each processor, rather than 2 × 5 tiles
        (1, 3, 132, 1),  # fewer tiles than processors
        (132, 10, 132, 10),  # a whole wave already
    ],
)
def test_shares_of_the_vocabulary_fill_the_processors(blocks, tiles, processors, expected):
    assert importlib.import_module("vogue_kernels.gpu").share_size(blocks, tiles, processors) == expected
