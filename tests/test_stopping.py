"""A run that is asked to stop."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch
from ranks import environment, launcher
from safetensors.torch import load_file
from test_several_ranks import metrics

from vogue.cli import main
from vogue.run.stopping import Stop

# The schedule depends on the number of steps, which differs here.
CHOSEN = ("trainer.save_every=0", "branch.probability=0.5")


@pytest.fixture
def heeded():
    """Signals that have an effect, also where the suite runs in the background of a shell, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_the_first_signal_is_a_wish_and_a_second_interrupt_is_not(heeded, first):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.asked
        os.kill(os.getpid(), first)
        assert stop.asked
        other = signal.SIGINT if first == signal.SIGTERM else signal.SIGTERM  # a launcher's, on top of a terminal's
        os.kill(os.getpid(), other)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_that_is_ignored_stays_ignored(heeded):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert not stop.asked


def test_a_stop_before_the_first_step_leaves_nothing_in_the_way(settings, monkeypatch, capsys):
    class Asked(Stop):
        def __enter__(self):
            self.asked = True
            return self

        def __exit__(self, *_):
            pass

    chosen = [*settings, "trainer.steps=1", "trainer.eval_every=1", "data.test_limit=2"]
    with monkeypatch.context() as patch:
        patch.setattr("vogue.run.training.Stop", Asked)
        assert main(["train", *chosen]) == 130
    assert "stopped before the first step; the same command starts anew" in capsys.readouterr().out
    assert main(["train", *chosen]) == 0


def told_in_the_middle(command, folder, tell):
    """Start a long run, `tell` it to stop after a few steps, wait for its end; returns (process, stdout, stderr)."""
    process = subprocess.Popen(
        [*command, *CHOSEN, "trainer.steps=100000"],
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True},
    )
    try:
        while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        tell(process)
        return process, *process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.long
def test_all_ranks_stop_at_the_same_step_where_one_of_them_alone_is_told(settings, tmp_path):
    def tell(launcher_process):
        processes = psutil.Process(launcher_process.pid).children(recursive=True)
        (second,) = [p for p in processes if "vogue.train" in p.cmdline() and p.environ().get("LOCAL_RANK") == "1"]
        second.send_signal(signal.SIGTERM)

    folder = tmp_path / "run"
    _, out, _ = told_in_the_middle([*launcher(2), "--module", "vogue.train", *settings], folder, tell)
    done = len(metrics(folder))
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == [f"step_{done:06d}"]
    assert f"stopped after {done} of 100000 steps; --resume goes on from there" in out


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_from_there(settings, tmp_path, ranks):
    folder = tmp_path / "run"
    alone = [sys.executable, "-m", "vogue", "train"]
    command = alone if ranks == 1 else [*launcher(ranks), "--module", "vogue.train"]
    # As a terminal does at Ctrl-C: to launcher, ranks and workers.
    process, out, err = told_in_the_middle(
        [*command, *settings], folder, lambda process: os.killpg(process.pid, signal.SIGINT)
    )
    done = len(metrics(folder))
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == [f"step_{done:06d}"]
    assert f"stopped after {done} of 100000 steps; --resume goes on from there" in out
    assert "vogue: stopping after this step" in err
    if ranks == 1:  # the launcher has ways of its own
        assert "Traceback" not in err
        assert process.returncode == 130
        steps = f"trainer.steps={done + 1}"
        assert main(["train", *settings, *CHOSEN, steps, "--resume"]) == 0
        assert [row["step"] for row in metrics(folder)] == list(range(done + 1))
        assert main(["train", *settings, *CHOSEN, steps, f"trainer.output_dir={tmp_path}/straight"]) == 0
        paths = tmp_path.glob(f"*/checkpoints/step_{done + 1:06d}/hf/*.safetensors")
        weights = [load_file(path) for path in paths]
        assert len(weights) == 2
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "number"),
    [
        ("the command", signal.SIGTERM),
        pytest.param("the command", signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("its launcher", signal.SIGKILL, marks=pytest.mark.long),
    ],
)
def test_ranks_whose_launcher_is_gone_stop_with_a_checkpoint(settings, tmp_path, number, who):
    ranks = []

    def tell(process):
        below = psutil.Process(process.pid).children(recursive=True)
        ranks.extend(
            p for p in below if "vogue.train" in p.cmdline() and "deepspeed.launcher.launch" not in p.cmdline()
        )
        (launched,) = [p for p in below if "deepspeed.launcher.launch" in p.cmdline()]
        (process if who == "the command" else launched).send_signal(number)

    folder = tmp_path / "run"
    _, _, err = told_in_the_middle([*launcher(2), "--module", "vogue.train", *settings], folder, tell)
    assert len(ranks) == 2
    assert not psutil.wait_procs(ranks, timeout=60)[1]
    assert "vogue: the launcher has ended: stopping after this step" in err
    done = len(metrics(folder))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{done:06d}"]
