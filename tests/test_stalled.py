"""A run whose groups teach nothing is told once, with the reasons that its own data shows."""

import pytest

from vogue.cli import main
from vogue.run.stalled import STEPS, Stalled

NORMAL = {"differing_share": 0.0, "alike_share": 0.0, "finished": 1.0, "accuracy": 0.5, "answered": 1.0}
NORMAL |= {"format": 1.0, "reward": 0.5}


def told(config, **found):
    """What is said in the step with which nothing was learned for long enough."""
    stalled = Stalled(config)
    assert not any(stalled.reasons(NORMAL | found) for _ in range(STEPS - 1))
    return stalled.reasons(NORMAL | found)


def test_it_is_said_once_after_ten_steps_in_a_row(config):
    stalled = Stalled(config())
    said = [stalled.reasons(NORMAL | {"differing_share": share}) for share in [0.0] * 9 + [0.1] + [0.0] * 20]
    assert [number for number, text in enumerate(said) if text] == [19]
    assert said[19].startswith("nothing was learned in 10 steps: no group has completions with different rewards. ")


@pytest.mark.parametrize(
    ("found", "reasons"),
    [
        ({"accuracy": 1.0}, ["every answer is right: the samples are too easy for this model"]),
        ({"accuracy": 0.0}, ["no answer is right: the samples may be too hard, or their answers of another form"]),
        (
            {"accuracy": 0.0, "answered": 0.25, "format": 0.125},
            [
                "no answer is right: the samples may be too hard, or their answers of another form",
                "in 75% of the completions no answer was found where reward.design=verifiable asks for it",
                "88% of the completions don't have the form that is asked for",
            ],
        ),
        ({"finished": 0.25}, ["75% of the completions were cut off at rollout.max_tokens=12"]),
        (
            {"alike_share": 1.0},
            [
                "in 100% of the groups all completions are the same: rollout.temperature=1 may be too low, or the "
                "model too sure"
            ],
        ),
        ({}, ["each group's rewards are equal, whatever they are"]),
    ],
)
def test_the_reasons_are_those_that_the_data_shows(config, found, reasons):
    assert told(config(), **found).partition("different rewards. ")[2] == "; ".join(reasons)


def test_a_reward_function_that_gives_all_the_same_is_told_by_a_run(settings, tmp_path, capsys):
    (tmp_path / "rewards.py").write_text("def own(completions, samples):\n    return [3.0] * len(completions)\n")
    chosen = [f"reward.function={tmp_path}/rewards.py:own", "trainer.steps=12"]
    assert main(["train", *settings, *chosen]) == 0
    out = capsys.readouterr().out
    assert out.count("nothing was learned in 10 steps") == 1
    assert "reward.function gave 3 on average" in out


def test_completions_that_are_cut_off_and_alike_are_told_by_a_run(settings, capsys):
    chosen = ["rollout.max_tokens=1", "rollout.temperature=0.01", "trainer.steps=10"]
    assert main(["train", *settings, *chosen]) == 0
    out = capsys.readouterr().out
    assert "100% of the completions were cut off at rollout.max_tokens=1;" in out
    assert "of the groups all completions are the same: rollout.temperature=0.01 may be too low" in out
    assert "in 100% of the completions no answer was found" in out


def test_a_run_that_learns_is_told_nothing(settings, capsys):
    assert main(["train", *settings, "trainer.steps=11", "rollout.n=4"]) == 0
    assert "nothing was learned" not in capsys.readouterr().out
