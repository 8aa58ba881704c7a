import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vogue.config import load_config
from vogue.run import logs
from vogue.run.folder import parts, read_rows, rotate
from vogue.settings import ConfigError

FIXED = "branch.probability=0.5"
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
    logs.check_folder(config("trainer.keep=9"), resume=True)
    with pytest.raises(ConfigError) as error:
        logs.check_folder(config("rollout.n=3", "seed=5"), resume=True)
    assert "seed was 0 and is 5" in str(error.value)
    assert "rollout.n was 2 and is 3" in str(error.value)


def test_a_run_goes_on_with_other_servers(config):
    before = config("rollout.engine=server", "rollout.servers=[http://a:1,http://b:1]", "rollout.weight_folder=one")
    log_steps(before, 0, 1)
    now = config("rollout.engine=server", "rollout.server_count=2", "rollout.server_timeout=9")
    logs.check_folder(now, resume=True)
    with pytest.raises(ConfigError, match=r"rollout\.engine was server and is hf"):
        logs.check_folder(config(), resume=True)


@pytest.mark.parametrize("schedule", [(), ("perturb.anneal_at=0.5", FIXED), ("guidance.sign_transition=[0,1]", FIXED)])
def test_other_steps_are_another_run_where_a_schedule_ends_with_them(config, schedule):
    log_steps(config(*schedule), 0, 1)
    with pytest.raises(ConfigError, match=r"trainer.steps was 4 and is 9 \(the end of .*model.path=the hf folder"):
        logs.check_folder(config("trainer.steps=9", *schedule), resume=True)


def test_other_steps_are_the_same_run_where_no_schedule_ends_with_them(config):
    log_steps(config(FIXED), 0, 1)
    logs.check_folder(config("trainer.steps=9", FIXED), resume=True)


def test_a_folder_that_was_moved_is_the_same_run(config, tmp_path):
    log_steps(config(), 0, 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    logs.check_folder(config(f"trainer.output_dir={tmp_path}/moved"), resume=True)


@pytest.mark.parametrize("torn", [b'{"step": 2, "rew', b"\0\0\0\0", b"\xff\xfe", b"["])
@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl", "evaluations.jsonl"])
def test_a_torn_last_line_is_dropped_and_the_next_one_is_whole(config, name, torn):
    log_steps(config(), 0, 2)
    with open(config().trainer.output_dir / name, "ab") as file:
        file.write(torn)
    logs.check_folder(config(), resume=True)
    log_steps(config(), 2, 3)
    assert len(lines(config(), name)) == 3


def test_a_last_line_that_only_lacks_its_end_is_kept(config):
    log_steps(config(), 0, 2)
    path = config().trainer.output_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    log_steps(config(), 2, 3)
    assert [row["step"] for row in lines(config(), "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("broken", [b'{"step": 0', b"\0\0\0", b"\xff", b"[1]", b"{}", b""])
@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl", "evaluations.jsonl"])
def test_any_other_broken_line_is_told_with_file_and_line(config, name, broken):
    log_steps(config(), 0, 3)
    path = config().trainer.output_dir / name
    rows = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([rows[0], broken, *rows[2:]]))
    with pytest.raises(ConfigError, match=rf"{name}, line 2: "):
        logs.check_folder(config(), resume=True)


@pytest.mark.parametrize(
    "text", ["", "\0" * 300, "model:\n  path: [a", "model: 3", "- a", "seed: x", "word", "model:\n"]
)
def test_settings_that_are_damaged_are_told_with_the_way_on(config, text):
    log_steps(config(), 0, 1)
    path = config().trainer.output_dir / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"{path} can't be read, .* delete that file"):
        logs.check_folder(config(), resume=True)
    path.unlink()
    logs.check_folder(config(), resume=True)


def test_nothing_is_written_again_that_has_not_changed(config):
    log_steps(config(), 0, 3)
    folder = config().trainer.output_dir
    paths = [folder / name for name in ("config.yaml", "metrics.jsonl", "completions.jsonl", "evaluations.jsonl")]
    with ExitStack() as held:  # else a new file may get an old one's number
        before = [os.fstat(held.enter_context(open(path)).fileno()).st_ino for path in paths]
        logs.prepare(config(), 3)
        assert [path.stat().st_ino for path in paths] == before
        logs.prepare(config("trainer.keep=7"), 2)  # written beside and renamed: another file each
        assert not {path.stat().st_ino for path in paths} & set(before)
    assert not list(folder.glob(".*"))


def test_a_run_that_is_killed_while_it_rewrites_a_log_loses_nothing(config):
    log_steps(config(), 0, 3)
    folder = config().trainer.output_dir
    before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    script = """
import os, sys
from pathlib import Path
from vogue.run import logs
from vogue.config import load_config
Path.rename = lambda *_: os.kill(os.getpid(), 9)  # the moment before the new file takes the old one's place
logs.prepare(load_config(sys.argv[1], []), 1)
"""
    done = subprocess.run([sys.executable, "-c", script, folder / "config.yaml"], check=False)
    assert done.returncode == -9
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == before
    log_steps(config(), 1, 2)
    assert [row["step"] for row in lines(config(), "metrics.jsonl")] == [0, 1]


def rotated(config, start, end, size=100):
    """`log_steps` with logs of at most `size` bytes; a row of metrics here has 30 or so, of an evaluation 150."""
    chosen = config(f"trainer.log_rotation_mb={size / 1e6}")
    log_steps(chosen, start, end)
    return chosen.trainer.output_dir


def test_logs_are_put_aside_where_they_grow_too_large_and_read_as_one(config):
    folder = rotated(config, 0, 9)
    files = parts(folder / "metrics.jsonl")
    assert [file.name for file in files] == ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]
    assert all(file.stat().st_size <= 100 for file in files)
    for name, first in {"metrics": 0, "completions": 0, "evaluations": 1}.items():  # a row larger than that: one a file
        assert [row["step"] for row in read_rows(folder / f"{name}.jsonl")] == list(range(first, first + 9))
    assert len(parts(folder / "evaluations.jsonl")) == 9


def test_a_resumed_run_drops_rows_from_the_logs_that_were_put_aside_and_goes_on_in_a_new_file(config):
    folder = rotated(config, 0, 9)
    logs.check_folder(config(), resume=True)
    before = (folder / "metrics.1.jsonl").stat().st_ino
    rotated(config, 4, 6)
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["reward"] for row in rows] == [0, 1, 2, 3, 404, 405]
    assert (folder / "metrics.1.jsonl").stat().st_ino == before  # of steps before the checkpoint alone
    assert [row["step"] for row in read_rows(folder / "evaluations.jsonl")] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match="holds a run already"):
        (folder / "metrics.jsonl").unlink()
        logs.check_folder(config(), resume=False)


def test_a_torn_line_is_dropped_from_the_newest_file_alone(config):
    folder = rotated(config, 0, 9)
    with open(folder / "metrics.1.jsonl", "a") as file:
        file.write('{"step"')
    with pytest.raises(ConfigError, match=r"metrics\.1\.jsonl, line 4: "):
        logs.check_folder(config(), resume=True)


def test_a_run_that_begins_anew_leaves_nothing_of_logs_that_were_put_aside(config):
    folder = rotated(config, 0, 9)
    logs.prepare(config(), 0)
    assert read_rows(folder / "metrics.jsonl") == []
    assert [file.name for file in parts(folder / "metrics.jsonl")] == ["metrics.jsonl"]


def test_logs_are_numbered_beyond_nine_in_their_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(12):
        path.write_text(json.dumps({"step": step}) + "\n")
        rotate(path)
    (tmp_path / "metrics.old.jsonl").write_text("not a part of it\n")
    assert [row["step"] for row in read_rows(path)] == list(range(12))
