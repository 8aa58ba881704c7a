"""What fails between two checkpoints costs nothing: a reward or an image, on all ranks or on one. And a hung rank."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from ranks import environment, free_port, launcher, started_together
from safetensors.torch import load_file

from vogue.cli import main
from vogue.run.logs import RunLog

# Fails when the step and rank are those that a file names; which step it is, the file of the metrics says.
REWARD = """
import os, pathlib, time
here = pathlib.Path(__file__).parent

def own(completions, samples):
    rows = here / "run" / "metrics.jsonl"
    step = len(rows.read_text().splitlines()) if rows.exists() else 0
    if (here / "when").exists() and [str(step), os.environ["RANK"]] in json_when():
        if (here / "hang").exists():
            time.sleep(600)
        raise ValueError("not this time")
    return [float(i % 2) for i in range(len(completions))]

def json_when():
    return [line.split() for line in (here / "when").read_text().splitlines()]
"""
SAVED_AT_THE_END = ("trainer.steps=4", "trainer.save_every=0", "branch.probability=0.5")


@pytest.fixture
def failing(settings, tmp_path):
    """A function: the settings of a run whose reward fails at these (step, rank); none for one that is well again."""
    (tmp_path / "rewards.py").write_text(REWARD)

    def build(*when):
        (tmp_path / "when").write_text("".join(f"{step} {rank}\n" for step, rank in when))
        return [*settings, *SAVED_AT_THE_END, f"reward.function={tmp_path}/rewards.py:own"]

    return build


def on_two_ranks(*settings):
    """The exit code and the lines on standard error that are vogue's."""
    command = [*launcher(2), "--module", "vogue.train", *settings]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("vogue train: ")], done.stderr


def saved(folder):
    return [path.name for path in sorted((folder / "checkpoints").iterdir())]


def final(folder):
    return load_file(folder / "checkpoints/step_000004/hf/model.safetensors")


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_a_reward_that_fails_leaves_a_checkpoint_and_the_run_ends_as_if_it_had_not(failing, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", *failing((3, 0))]) == 2
    err = capsys.readouterr().err
    assert "raised ValueError: not this time" in err
    assert "stopped after 3 of 4 steps; --resume goes on from there" in err
    assert saved(folder) == ["step_000003"]
    assert main(["train", *failing(), "--resume"]) == 0
    folder.rename(tmp_path / "failed")
    assert main(["train", *failing()]) == 0
    assert same(final(tmp_path / "failed"), final(folder))


def test_an_evaluation_that_fails_is_made_up_for(failing, tmp_path, capsys):
    evaluating = ["trainer.eval_every=2", "data.test_limit=2"]
    body = (tmp_path / "rewards.py").read_text()
    (tmp_path / "rewards.py").write_text(body.replace("step = len", "samples[0]['problem'] and 0\n    step = len"))
    assert main(["train", *failing((2, 0)), *evaluating]) == 2
    assert saved(tmp_path / "run") == ["step_000002"]
    assert main(["train", *failing(), *evaluating, "--resume"]) == 0
    rows = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 2, 4]


def test_a_failure_before_the_first_step_leaves_nothing_and_resume_begins_anew(failing, tmp_path, capsys):
    assert main(["train", *failing((0, 0))]) == 2
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert main(["train", *failing(), "--resume"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [
        pytest.param([(2, 0)], id="first", marks=pytest.mark.long),
        pytest.param([(2, 1)], id="second"),
        pytest.param([(2, 0), (2, 1)], id="both", marks=pytest.mark.long),
    ],
)
def test_a_reward_that_fails_on_some_rank_ends_all_with_one_checkpoint_and_one_message(failing, tmp_path, where):
    code, told, _ = on_two_ranks(*failing(*where))
    assert code == 2
    assert len(told) == 1
    assert "raised ValueError: not this time" in told[0]
    assert saved(tmp_path / "run") == ["step_000002"]


@pytest.mark.long
def test_two_ranks_of_which_one_failed_end_as_if_it_had_not(failing, tmp_path):
    folder = tmp_path / "run"
    assert on_two_ranks(*failing((2, 1)))[0] == 2
    assert on_two_ranks(*failing(), "--resume")[0] == 0
    shutil.move(folder, tmp_path / "failed")
    assert on_two_ranks(*failing())[0] == 0
    assert same(final(tmp_path / "failed"), final(folder))


SHARED = ("rollout.engine=vllm", "rollout.tensor_parallel=2", "rollout.kv_cache_gb=0.1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [pytest.param((), id="own"), pytest.param(SHARED, id="shared", marks=pytest.mark.long)]
)
def test_an_image_that_is_lost_during_a_run_on_two_ranks(engine, settings, tmp_path, samples, wide_model_folder):
    (tmp_path / "images").mkdir()
    rows = []
    for number, sample in enumerate(samples):
        sample.load_images()[0].save(tmp_path / "images" / f"{number}.png")
        rows.append({"problem": sample.problem, "answer": sample.answer, "images": [f"images/{number}.png"]})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "rewards.py").write_text(
        "import pathlib, shutil\nhere = pathlib.Path(__file__).parent\n"
        "def own(completions, samples):\n"
        "    if (here / 'run' / 'metrics.jsonl').exists():\n"
        "        shutil.rmtree(here / 'images', ignore_errors=True)\n"
        "    return [float(i % 2) for i in range(len(completions))]\n"
    )
    chosen = [f"data.train={tmp_path}/data.json", f"reward.function={tmp_path}/rewards.py:own", "trainer.steps=9"]
    chosen += [f"model.path={wide_model_folder}", *engine] if engine else []
    code, told, err = on_two_ranks(*settings, *chosen, "trainer.save_every=0")
    assert code == 2
    assert len(told) == 1
    assert "cannot be read" in told[0]
    (left,) = saved(tmp_path / "run")
    assert f"stopped after {int(left[5:])} of 9 steps" in err


@pytest.mark.long
def test_a_rank_that_hangs_ends_the_run_with_every_ranks_stack(failing, tmp_path):
    (tmp_path / "hang").touch()
    code, told, _ = on_two_ranks(*failing((1, 1)), "trainer.timeout=12", "reward.timeout=500")
    assert code != 0
    assert told[0].startswith("vogue train: rank 0: another rank has hung for trainer.timeout: see stacks_rank*.txt")
    stacks = [(tmp_path / "run" / f"stacks_rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "in gather" in stacks[0]
    assert "function.py" in stacks[1]
    assert "in own" not in stacks[0]


GROUPS = """
import sys, time, torch, torch.distributed as dist
from vogue import distributed
from vogue.run.stacks import LostRank
rank, *_ = distributed.start(4.0)
group = dist.new_group()
if rank == 1:
    time.sleep(60)
began = time.monotonic()
try:
    with distributed.heeding_losses():
        dist.all_reduce(torch.ones(1), group=group)
except LostRank as error:
    print("took", time.monotonic() - began, error, flush=True)
distributed.leave(3)
"""


@pytest.mark.long
def test_groups_that_others_make_wait_as_long_as_is_set(tmp_path):
    (tmp_path / "groups.py").write_text(GROUPS)
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    own = [{"RANK": rank, "LOCAL_RANK": rank, **shared} for rank in (0, 1)]
    (code, printed), _ = started_together([[sys.executable, tmp_path / "groups.py"]] * 2, own)
    took = re.search(r"took ([\d.]+) another rank has hung for trainer.timeout", printed)
    assert code == 3
    assert 3 < float(took[1]) < 10


@pytest.mark.long
def test_a_rank_that_is_stopped_ends_the_run_within_the_time_that_is_set(settings, tmp_path):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "vogue", "train", *settings, "trainer.timeout=8", "trainer.steps=100000"]
    command += ["trainer.save_every=0", "branch.probability=0.5"]
    started = [
        subprocess.Popen(
            command,
            env=environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True},
        )
        for rank in (0, 1)
    ]
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert all(process.poll() is None for process in started)
            time.sleep(0.1)
        started[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        _, err = started[0].communicate(timeout=60)
        assert time.monotonic() - began < 8 + 10
    finally:
        for process in started:
            process.kill()
    assert started[0].returncode == 3
    told = (
        "vogue train: rank 0: another rank has hung for trainer.timeout: see stacks_rank*.txt of trainer.output_dir ("
    )
    assert [line.startswith(told) for line in err.splitlines() if line.startswith("vogue")] == [True]
    assert "most recent call first" in (tmp_path / "run" / "stacks_rank0.txt").read_text()


def test_stacks_leave_no_file_behind_a_run_that_ends_well(settings, tmp_path):
    assert main(["train", *settings, "trainer.steps=1"]) == 0
    assert not list((tmp_path / "run").glob("stacks*"))


@pytest.mark.slow
def test_another_rank_that_was_killed_is_told_in_one_sentence(failing, tmp_path):
    body = (tmp_path / "rewards.py").read_text()
    (tmp_path / "rewards.py").write_text(body.replace('raise ValueError("not this time")', "os.kill(os.getppid(), 9)"))
    code, told, _ = on_two_ranks(*failing((1, 1)))
    assert code != 0
    assert len(told) == 1
    assert told[0].startswith("vogue train: rank 0: another rank has ended (")


def test_logs_that_cannot_be_written_stop_the_run_with_a_checkpoint(settings, tmp_path, capsys, monkeypatch):
    def full(self, name, records, own=RunLog._append):
        if name == "metrics.jsonl" and records[0]["step"] == 1:
            with open("/dev/full", "w") as file:
                file.write("x")
        own(self, name, records)

    monkeypatch.setattr("vogue.run.logs.RunLog._append", full)
    assert main(["train", *settings, "trainer.save_every=0"]) == 2
    err = capsys.readouterr().err
    assert f"vogue train: the disk is full: the logs can't be written to {tmp_path}/run" in err
    assert saved(tmp_path / "run") == ["step_000002"]
