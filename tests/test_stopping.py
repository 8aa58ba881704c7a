"""A run that is asked to stop."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from test_engines import free_port, metrics

from vogue.cli import main
from vogue.stopping import Stop


def test_the_first_signal_is_a_wish_and_a_second_interrupt_is_not():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for first in (signal.SIGINT, signal.SIGTERM):
        with Stop() as stop:
            assert not stop.asked
            os.kill(os.getpid(), first)
            assert stop.asked
            os.kill(os.getpid(), signal.SIGTERM)  # a launcher's, after a Ctrl-C that reached its ranks too
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_from_there(settings, tmp_path, ranks):
    folder = tmp_path / "run"
    launcher = [os.path.join(os.path.dirname(sys.executable), "deepspeed"), "--num_gpus=2"]
    command = [*launcher, f"--master_port={free_port()}", "--module", "vogue.train"]
    command = command if ranks == 2 else [sys.executable, "-m", "vogue", "train"]
    ours = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    process = subprocess.Popen(
        [*command, *settings, "trainer.steps=100000", "trainer.save_every=0"],
        env={name: value for name, value in os.environ.items() if name not in ours},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True},
    )
    try:
        while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does at Ctrl-C: to launcher, ranks and workers
        out, err = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    done = len(metrics(folder))
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == [f"step_{done:06d}"]
    assert f"stopped after {done} of 100000 steps; --resume goes on from there" in out
    assert "vogue: stopping after this step" in err
    if ranks == 1:  # the launcher has ways of its own
        assert "Traceback" not in err
        assert process.returncode == 130
        assert main(["train", *settings, f"trainer.steps={done + 1}", "trainer.save_every=0", "--resume"]) == 0
        assert [row["step"] for row in metrics(folder)] == list(range(done + 1))
