"""Whole runs of every family of models: they train, go on where they stopped, and two ranks train as one does."""

import copy
import json
from pathlib import Path

import pytest
from kinds import model_of, processor_of, save_as_published
from ranks import launch
from safetensors.torch import load_file

from vogue.cli import main
from vogue.families import FAMILIES

pytestmark = pytest.mark.long

REWARD = Path(__file__).parent.parent / "bench" / "reward.py"  # random weights earn nothing otherwise
CURVES = ("reward", "loss", "entropy", "grad_norm", "tokens")
KINDS = sorted({*FAMILIES} - {"qwen2_5_vl"})  # which all other tests train


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curves(folder):
    return [{name: row[name] for name in CURVES} for row in metrics(folder)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_a_family_goes_on_as_if_it_had_not_stopped_and_two_ranks_train_as_one(
    kind, processor, settings, mixed_data, tmp_path
):
    own = processor_of(kind, copy.deepcopy(processor.tokenizer), processor.chat_template)
    own.save_pretrained(tmp_path / "model")
    save_as_published(kind, model_of(kind, own), tmp_path / "model")

    def train(name, steps, *more, ranks=1):
        given = [*settings, f"model.path={tmp_path}/model", f"data.train={mixed_data}", "data.max_prompt_tokens=512"]
        given += [f"reward.function={REWARD}:varied", "rollout.prompts=2", "perturb.sigma=0.8", "optimizer.lr=1e-4"]
        given += [f"trainer.output_dir={tmp_path / name}", f"trainer.steps={steps}", "branch.probability=0.5", *more]
        if ranks == 1:
            assert main(["train", *given]) == 0
        else:
            launch(ranks, "--module", "vogue.train", *given)
        return tmp_path / name

    straight = train("straight", 2)
    assert all(row["grad_norm"] > 0 for row in metrics(straight))
    train("resumed", 1)
    resumed = train("resumed", 2, "--resume")
    assert curves(resumed) == curves(straight)
    ends = [load_file(run / "checkpoints/step_000002/hf/model.safetensors") for run in (straight, resumed)]
    assert ends[0].keys() == ends[1].keys()
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])
    two = train("two", 2, ranks=2)
    for one, other in zip(curves(straight), curves(two), strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=1e-4)
