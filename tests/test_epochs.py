"""The length of a run as passes over its data."""

import json

import pytest
import yaml

from vogue.cli import main
from vogue.config import load_config, with_steps
from vogue.run import logs
from vogue.settings import ConfigError

EPOCH = ("trainer.steps=null", "trainer.epochs=0.5", "data.limit=12", "rollout.prompts=4", "branch.probability=0.5")


@pytest.mark.parametrize(
    ("given", "samples", "steps"),
    [
        (["trainer.epochs=1", "rollout.prompts=4"], 24, 6),
        (["trainer.epochs=2", "rollout.prompts=4"], 25, 13),  # 50 places by fours
        (["trainer.epochs=0.1", "rollout.prompts=3"], 30, 1),
        (["trainer.epochs=1.1", "rollout.prompts=1"], 10, 11),  # though 1.1 x 10 is more than 11 in floating point
        (["trainer.epochs=3", "rollout.prompts=4", "rollout.rounds=2"], 24, 9),  # a step has the places of all rounds
        (["trainer.epochs=0.001", "rollout.prompts=4"], 24, 1),
        (["trainer.epochs=1", "rollout.prompts=4", "method=mmr1"], 24, 12),  # half the prompts are drawn by scores,
        (["trainer.epochs=1", "rollout.prompts=4", "method=avatar"], 24, 12),  # half from the replay buffer
        (["trainer.steps=7"], 24, 7),
        ([], 24, 200),
    ],
)
def test_epochs_are_steps_by_the_number_of_samples(given, samples, steps):
    assert with_steps(load_config(None, ["model.path=m", *given]), samples).trainer.steps == steps


def test_two_lengths_that_differ_are_refused_with_both(settings, capsys):
    given = ["trainer.epochs=2", "data.limit=12", "trainer.steps=5"]
    assert main(["train", "--check", *settings, *given]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "vogue train: trainer.steps=5 and trainer.epochs=2 say how long the run is: set one of them, the other to "
        "null. 2 epochs of 12 samples, 4 a step, are 6 steps"
    ]


def test_a_run_of_epochs_says_its_steps_and_ends_after_them(settings, tmp_path, capsys):
    given = [*settings, *EPOCH]
    assert main(["train", *given]) == 0
    assert "trainer.epochs=0.5 of 12 samples are 2 steps" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["trainer"]
    assert (written["steps"], written["epochs"]) == (2, 0.5)
    assert main(["train", str(tmp_path / "run/config.yaml"), "--check", "--resume"]) == 0
    assert "0.5 of 12 samples are 2 steps" in capsys.readouterr().out
    # A longer one is the same run, since no schedule ends with its length.
    assert main(["train", *given, "trainer.epochs=1", "--resume"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_a_resumed_run_has_its_epochs_where_a_schedule_ends_with_them(config):
    scheduled = ("trainer.steps=null", "trainer.epochs=2")
    logs.prepare(with_steps(config(*scheduled), 24), 0)
    logs.check_folder(config(*scheduled), resume=True)
    logs.check_folder(config("trainer.steps=12"), resume=True)
    for other in (("trainer.steps=null", "trainer.epochs=3"), ("trainer.steps=13",)):
        with pytest.raises(ConfigError, match=r"was .* \(the end of branch\.probability's schedule\)"):
            logs.check_folder(config(*other), resume=True)
    assert logs.steps_of(config().trainer.output_dir) == 12
