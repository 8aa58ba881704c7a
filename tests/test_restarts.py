"""`vogue train --restarts`, and torchrun's own: what is gone on with, and what is not."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from ranks import environment, free_port
from safetensors.torch import load_file
from test_several_ranks import metrics

from vogue.cli import main
from vogue.run import restarts

# A launcher that takes a step of the run in its folder, then does what the next line of `plan` says.
LAUNCHER = """
import os, pathlib, subprocess, sys, time
from vogue.run.restarts import note_end
here = pathlib.Path(sys.argv[0]).parent
with open(here / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
what, step, *more = (here / "plan").read_text().splitlines()[len((here / "calls").read_text().splitlines()) - 1].split()
(here / "run").mkdir(exist_ok=True)
(here / "run/metrics.jsonl").write_text('{"step": %s}\\n' % step if step != "-" else "")
if what == "crash":
    sys.exit(int(more[0]))
if what == "killed":
    os.kill(os.getpid(), 9)
if what == "end":
    note_end(int(more[0]))
    sys.exit(1)
if what == "orphan":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (here / "orphan").write_text(str(child.pid))
    os.kill(os.getpid(), 9)
if what == "wait":
    time.sleep(600)
"""


@pytest.fixture
def supervised(tmp_path, monkeypatch, capsys):
    """A function: a run whose launcher does these things; returns exit code, lines said, and how it was called."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.02)

    def run(*plan, times=5, resume=None, patience=5.0):
        (tmp_path / "plan").write_text("\n".join(plan))
        command = [sys.executable, str(tmp_path / "launcher.py")]
        code = restarts.supervise(tmp_path / "run", patience, command, resume, times)
        calls = tmp_path / "calls"
        return code, capsys.readouterr().err.splitlines(), calls.read_text().splitlines()

    return run


def test_a_run_that_crashes_goes_on_from_its_newest_whole_checkpoint(supervised, tmp_path):
    code, said, calls = supervised("crash - 1", "killed 4", "orphan 7", "end 9 0", patience=0.5)
    assert code == 0
    assert calls == ["", "--resume=whole", "--resume=whole", "--resume=whole"]
    assert said == [
        "vogue train: the run crashed after 0 steps (exit code 1); restart 1 of 5 in 0.02 s, from its newest whole "
        "checkpoint",
        "vogue train: the run crashed after 5 steps (SIGKILL); restart 2 of 5 in 0.04 s, from its newest whole "
        "checkpoint",
        "vogue train: the run crashed after 8 steps (SIGKILL); restart 3 of 5 in 0.08 s, from its newest whole "
        "checkpoint",
    ]
    orphan = int((tmp_path / "orphan").read_text())
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE


def test_a_second_crash_at_the_same_step_ends_the_run(supervised):
    code, said, calls = supervised("crash 3 1", "crash 6 1", "crash 6 7", "end 9 0")
    assert (code, len(calls)) == (7, 3)
    told = "vogue train: the run crashed after 7 steps as it did before (exit code 7): another restart won't help"
    assert said[-1] == told


def test_as_many_restarts_as_are_asked_for(supervised):
    code, said, calls = supervised("crash 1 1", "crash 2 1", "killed 3", times=2)
    assert (code, len(calls)) == (137, 3)
    assert said[-1] == "vogue train: the run crashed after 4 steps (SIGKILL), and no restart is left of 2"


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_run_that_ends_for_a_reason_of_its_own_is_over_whatever_its_launcher_makes_of_it(supervised, code):
    assert supervised(f"end 1 {code}") == (code, [], [""])


def test_the_first_start_is_as_it_was_asked_for(supervised):
    assert supervised("end 1 0", resume="step_000002")[2] == ["--resume=step_000002"]


def test_a_new_run_where_there_is_one_is_refused_at_once(settings, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    assert main(["train", *settings, "--restarts", "2"]) == 2
    assert f"{tmp_path}/run holds a run already: pass --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--restarts", "2", "--launcher", "/nowhere/torchrun x"], "--launcher /nowhere/torchrun: No such file"),
        (["--launcher", "torchrun"], "--launcher goes with --restarts"),
        (["--restarts", "2", "--check"], "--check starts nothing"),
    ],
)
def test_what_cannot_be_restarted_is_told(settings, capsys, arguments, told):
    assert main(["train", *settings, *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_rank_of_another_launcher_starts_no_ranks(settings, capsys, monkeypatch):
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["train", *settings, "--restarts", "2"]) == 2
    assert "rank 1: --restarts starts the ranks itself" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_wish_to_stop_passes_to_the_launcher_and_nothing_is_restarted(tmp_path, number):
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "plan").write_text("wait 1\nend 2 0")
    script = "import pathlib, sys; from vogue.run.restarts import supervise; here = pathlib.Path(sys.argv[1]); "
    script += "sys.exit(supervise(here / 'run', 9.0, [sys.executable, str(here / 'launcher.py')], None, 3))"
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == 130
    assert (process.stderr.read(), (tmp_path / "calls").read_text()) == ("", "\n")


# Kills what is above it at the steps that a file names, once each: its rank, or the launcher of that.
REWARD = """
import os, pathlib, psutil
here = pathlib.Path(__file__).parent

def own(completions, samples):
    rows = here / "run" / "metrics.jsonl"
    step = len(rows.read_text().splitlines()) if rows.exists() else 0
    for generation, when in enumerate((2, 3), 1):
        done = here / f"killed{generation}"
        if step == when and not done.exists():
            done.touch()
            [*psutil.Process().parents()][generation - 1].kill()
    return [float(i % 2) for i in range(len(completions))]
"""


@pytest.mark.slow
def test_torchrun_and_vogue_go_on_with_a_run_whose_rank_and_whose_launcher_are_killed(settings, tmp_path):
    chosen = [*settings, "trainer.save_every=1", "trainer.steps=5", f"reward.function={tmp_path}/rewards.py:own"]
    (tmp_path / "rewards.py").write_text(REWARD)
    torchrun = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node=1", f"--master-port={free_port()}"]
    launcher = shlex.join([*map(str, torchrun), "--max-restarts=1", "--module", "vogue.train"])
    command = [sys.executable, "-m", "vogue", "train", *chosen, "--restarts=1", "--launcher", launcher]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("vogue")]
    assert said == [
        "vogue: the launcher has ended: stopping after this step or evaluation",
        "vogue train: the run crashed after 4 steps (SIGKILL); restart 1 of 1 in 2 s, from its newest whole checkpoint",
    ]
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]
    assert main(["train", *chosen, f"trainer.output_dir={tmp_path}/straight"]) == 0
    weights = [load_file(path) for path in tmp_path.glob("*/checkpoints/step_000005/hf/model.safetensors")]
    assert len(weights) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.long
def test_torchrun_does_not_go_on_with_a_run_that_it_did_not_begin(settings, tmp_path):
    assert main(["train", *settings, "trainer.steps=1"]) == 0
    before = sorted((tmp_path / "run").rglob("*"))
    torchrun = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node=1", f"--master-port={free_port()}"]
    command = [*torchrun, "--max-restarts=1", "--module", "vogue.train", *settings, "trainer.steps=1"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.count(f"vogue train: {tmp_path}/run holds a run already") == 2
    assert sorted((tmp_path / "run").rglob("*")) == before
