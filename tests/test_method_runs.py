"""Whole runs of the methods that are another loss or another advantage: they go on, and two ranks train as one does."""

import json
from pathlib import Path

import pytest
from ranks import launch
from safetensors.torch import load_file

from vogue.cli import main

pytestmark = pytest.mark.long

REWARD = Path(__file__).parent.parent / "bench" / "reward.py"  # completions of a group are seldom paid alike
CURVES = ("reward", "loss", "entropy", "clip_fraction", "grad_norm", "tokens")
OF_THE_MACHINE = ("time", "throughput", "memory")


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if not name.startswith(OF_THE_MACHINE)} for row in rows]


@pytest.mark.parametrize("method", ["cispo", "dr_grpo", "gspo", "rloo", "sapo"])
def test_a_run_of_a_method_goes_on_as_if_it_had_not_stopped_and_two_ranks_train_as_one(
    method, settings, mixed_data, tmp_path
):
    # Only in a step's second update have ratios left 1, where all surrogates have the same gradient.
    given = [*settings, "branch.rollout=raw", f"data.train={mixed_data}", "rollout.n=4", "trainer.updates=2"]
    given.append(f"reward.function={REWARD}:varied")

    def train(name, steps, *more, ranks=1, method=method):
        folder = tmp_path / name
        arguments = [*given, f"method={method}", f"trainer.output_dir={folder}", f"trainer.steps={steps}", *more]
        if ranks == 1:
            assert main(["train", *arguments]) == 0
        else:
            launch(ranks, "--module", "vogue.train", *arguments)
        return folder

    straight = train("straight", 2)
    first = metrics(train("grpo", 1, method="grpo"))[0]
    assert metrics(straight)[0]["reward"] == first["reward"]
    for name in ("loss", "grad_norm"):
        assert metrics(straight)[0][name] != pytest.approx(first[name], rel=1e-2)
    train("resumed", 1)
    resumed = train("resumed", 2, "--resume")
    assert metrics(resumed) == metrics(straight)
    ends = [load_file(run / "checkpoints/step_000002/hf/model.safetensors") for run in (straight, resumed)]
    assert ends[0].keys() == ends[1].keys()
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])
    two = train("two", 2, ranks=2)
    for one, other in zip(metrics(straight), metrics(two), strict=True):
        assert {name: other[name] for name in CURVES} == pytest.approx({name: one[name] for name in CURVES}, rel=2e-3)
