import json

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vogue import logs
from vogue.config import load_config
from vogue.settings import ConfigError

EVALUATION = {"pass@1": [0.5, 0.4, 0.6], "pass@2": [0.75, 0.7, 0.8], "pass@4": [1.0, 1.0, 1.0]}
EVALUATION |= {"n": 4, "right": [3, 1], "distinct": [2, 4]}


def log_steps(config, start, end):
    """What a run from `start` to `end` leaves in its logs."""
    logs.prepare(config, start)
    with logs.RunLog(config, start, Console(quiet=True)) as log:
        for step in range(start, end):
            log.step(step, {"reward": float(100 * start + step)}, [{"step": step, "completion": f"{start}: {step}"}])
            log.evaluation(step + 1, EVALUATION)


def lines(config, name):
    return [json.loads(line) for line in (config.trainer.output_dir / name).read_text().splitlines()]


def test_a_run_writes_its_metrics_completions_evaluations_and_configuration(config):
    log_steps(config(), 0, 2)
    assert lines(config(), "metrics.jsonl") == [{"step": 0, "reward": 0.0}, {"step": 1, "reward": 1.0}]
    assert lines(config(), "completions.jsonl")[1] == {"step": 1, "completion": "0: 1"}
    assert lines(config(), "evaluations.jsonl")[1] == {"step": 2} | EVALUATION
    assert load_config(config().trainer.output_dir / "config.yaml", []) == config()
    events = EventAccumulator(str(config().trainer.output_dir / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(0, 0.0), (1, 1.0)]
    assert [(event.step, event.value) for event in events.Scalars("eval/pass@1")] == [(1, 0.5), (2, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("eval/pass@2")] == [(1, 0.75), (2, 0.75)]


def test_an_evaluation_is_told_by_pass_at_1_and_by_the_largest_k(config, capsys):
    logs.prepare(config(), 0)
    with logs.RunLog(config(), 0, Console(width=200)) as log:
        log.evaluation(7, EVALUATION)
    told = "after 7 steps: held-out pass@1 50.0% [40.0, 60.0], pass@4 100.0% [100.0, 100.0]"
    assert told in capsys.readouterr().out


def test_going_on_from_a_checkpoint_drops_what_was_logged_after_it(config):
    log_steps(config(), 0, 5)
    log_steps(config(), 3, 4)
    # Steps 0 to 2 come before the checkpoint after 3 steps, and so does its evaluation.
    assert [(row["step"], row["reward"]) for row in lines(config(), "metrics.jsonl")] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 303.0),
    ]
    assert [row["step"] for row in lines(config(), "completions.jsonl")] == [0, 1, 2, 3]
    assert [row["step"] for row in lines(config(), "evaluations.jsonl")] == [1, 2, 3, 4]
    events = EventAccumulator(str(config().trainer.output_dir / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("reward")] == [0.0, 1.0, 2.0, 303.0]


def test_images_of_completions_that_are_dropped_go_with_them(config):
    log_steps(config(), 0, 3)
    folder = config().trainer.output_dir / "completions"
    folder.mkdir()
    for step in (0, 2, 3, 11):
        (folder / f"step_{step:06d}_prompt_1_raw_0.webp").touch()
    logs.prepare(config(), 3)
    assert sorted(path.name[:11] for path in folder.iterdir()) == ["step_000000", "step_000002"]


def test_a_run_that_stopped_before_its_first_step_starts_over(config):
    logs.prepare(config(), 0)
    for _ in range(2):  # the evaluation before training is run again, and must not stand there twice
        logs.prepare(config(), 0)
        with logs.RunLog(config(), 0, Console(quiet=True)) as log:
            log.evaluation(0, EVALUATION)
    assert [row["step"] for row in lines(config(), "evaluations.jsonl")] == [0]


def test_a_new_run_refuses_a_folder_that_holds_one(config):
    logs.check_folder(config(), resume=False)
    log_steps(config(), 0, 1)
    with pytest.raises(ConfigError, match=r"run holds a run already: pass --resume, or another trainer\.output_dir"):
        logs.check_folder(config(), resume=False)


def test_a_resumed_run_must_be_the_one_that_stopped(config):
    log_steps(config(), 0, 1)
    logs.check_folder(config("trainer.steps=9"), resume=True)
    with pytest.raises(ConfigError) as error:
        logs.check_folder(config("rollout.n=3", "seed=5"), resume=True)
    assert "seed was 0 and is 5" in str(error.value)
    assert "rollout.n was 2 and is 3" in str(error.value)
