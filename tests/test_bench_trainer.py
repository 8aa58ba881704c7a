"""bench/trainer.py and bench/real_size.py run: trainers take turns on the same completions, or are alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import environment

pytestmark = pytest.mark.slow


BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.delitem(sys.modules, "trainer", raising=False)
    for name in os.environ.keys() - environment().keys():  # contestants are runs of their own
        monkeypatch.delenv(name)
    import trainer

    return trainer


@pytest.mark.long
def test_the_quick_training_row_times_both_trainers_and_writes_what_it_found(bench, tmp_path, capsys):
    results = bench.main(["--quick", "--only", "train-digits", "--out", str(tmp_path)])
    row = results["train-digits"]
    assert row["seconds"].keys() == {"TRL", "GRPO", "VOGUE, z = 1 in all groups"}
    assert all(seconds > 0 for seconds in row["seconds"].values())
    assert row["TRL / GRPO"] == row["seconds"]["TRL"] / row["seconds"]["GRPO"]
    assert "--quick --only train-digits" in capsys.readouterr().out
    assert (tmp_path / "train-digits.json").exists()


def test_a_micro_batch_of_trl_keeps_to_the_budget_and_divides_the_batch(bench):
    assert bench.DIGITS.micro_batch == 128  # of 256 completions: 128 x 60 tokens are less than 8,192, 256 x 60 aren't
    assert bench.PROMPT_HEAVY.micro_batch == 16


@pytest.mark.long
def test_the_step_of_real_size_runs_with_both_engines_and_with_trl(tmp_path):
    command = [sys.executable, str(BENCH / "real_size.py"), "--quick", "--out", str(tmp_path / "found.json")]
    subprocess.run(command, env=environment(), check=True, timeout=600)
    vllm, hf, trl = json.loads((tmp_path / "found.json").read_text())["rows"]
    for row in (vllm, hf):
        assert row["largest_difference"] < 0.05  # bfloat16's rounding: tokens of a wrong image differ by nats
        assert 0 < row["products_share"] < 1
        assert row["peak_gb"] >= row["start_gb"] >= row["libraries_gb"] > 0 < row["planned_gb"]
    assert vllm["training_tflop"] == pytest.approx(hf["training_tflop"], rel=0.01)  # the same shapes
    assert trl["step_s"] > 0 and "error" not in trl
