"""Where runs are disturbed: how they are started, waited for, gone on with, and held to the undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ranks import environment, free_port
from safetensors.torch import load_file

STEPS = 6
LIMIT = 300.0  # seconds in which a run must end, whatever is done to it
ATTEMPTS = 4  # times that a run is gone on with
SETTINGS = (
    *("model.dtype=float32", "data.system_prompt=Think.", "data.max_prompt_tokens=128", "rollout.engine=hf"),
    *("rollout.prompts=4", "rollout.n=2", "rollout.max_tokens=12", "optimizer.lr=1e-3", f"trainer.steps={STEPS}"),
    *("trainer.save_every=2", "trainer.measure_every=0", "branch.probability=0.5", "trainer.timeout=30"),
    *("data.test_limit=2", "trainer.eval_every=3", "trainer.eval_samples=2"),
)
# Metrics that no two runs share; the last ones are of the engine's log-probabilities, which servers round by what they
# compute together, and so by which of them are there.
CHANGING = ("time/", "throughput/", "memory_gb", "mismatch/", "log_perplexity/")
THREADS = {"OMP_NUM_THREADS": "1"}  # of a rank, however it is started: more would round otherwise


@dataclass
class Outcome:
    """What became of a disturbed run."""

    disturbed: bool = False  # it has ended other than by itself
    seconds: float = 0.0  # until its end
    output: str = ""
    resumed: int = 0  # times
    survived: bool = False  # it was done in the end
    equal: bool = False


@dataclass
class Rank:
    output: Path
    pid: int = 0

    @property
    def code(self):
        path = Path(f"{self.output}.code")
        return int(path.read_text()) if path.exists() else None


@dataclass
class Arena:
    """`settings` of every run but its folder; what the table is made of."""

    folder: Path
    settings: list
    outcomes: dict = field(default_factory=lambda: defaultdict(list))
    servers: Any = None  # of `servers.py`, once there are some
    _count: Counter = field(default_factory=Counter)
    _straight: dict = field(default_factory=dict)
    _nursery: subprocess.Popen | None = None

    def new_folder(self):
        self._count["runs"] += 1
        path = self.folder / f"run{self._count['runs']}"
        path.mkdir()
        return path

    def start(self, folder, *more, ranks=1, hooks=None, machines=()):
        """Begin a run on so many ranks in `folder`/run.

        hooks     of the last rank (`hooks.py`)
        machines  where each rank is (`network.py`); none: here
        """
        if self._nursery is None:
            command = [sys.executable, Path(__file__).with_name("nursery.py")]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._nursery = subprocess.Popen(command, env=environment() | THREADS, **pipes)
            assert self._nursery.stdout.readline() == "ready\n"
        arguments = ["train", *self.settings, f"trainer.output_dir={folder}/run", *more]
        shared = {
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": machines[0].address if machines else "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        started = []
        for rank in range(ranks):
            self._count["ranks"] += 1
            one = Rank(folder / f"output{self._count['ranks']}")
            own = {"RANK": rank, "LOCAL_RANK": rank, **shared} if ranks > 1 else {}
            order = {"arguments": arguments, "output": str(one.output), "hooks": {}}
            own |= {"GLOO_SOCKET_IFNAME": "cable"} if machines else {}
            order["variables"] = {name: str(value) for name, value in own.items()}
            order["hooks"] = (hooks or {}) if rank == ranks - 1 else {}
            order["imports"] = ["vogue.rollout.server_engine"] if "rollout.engine=server" in more else []
            order["network"] = machines[rank].process.pid if machines else 0
            self._nursery.stdin.write(json.dumps(order) + "\n")
            self._nursery.stdin.flush()
            started.append(one)
        for one in started:
            wait_for(lambda path=Path(f"{one.output}.pid"): path.exists(), LIMIT)
            one.pid = int(Path(f"{one.output}.pid").read_text())
        return started

    def straight(self, ranks, *more):
        """The metrics and weights of the undisturbed run, with so many ranks and `more` settings."""
        if (ranks, more) not in self._straight:
            folder = self.new_folder()
            started = self.start(folder, *more, ranks=ranks)
            assert codes(started, LIMIT) == [0] * ranks, printed(started)
            self._straight[ranks, more] = result(folder / "run")
        return self._straight[ranks, more]

    def end(self):
        if self._nursery:
            self._nursery.kill()
            self._nursery.wait()
        if self.servers:
            self.servers.end()

    def go_on(self, folder, outcome, ranks=1, more=()):
        """Go on with a run until it is done, and compare it with the undisturbed one of these settings."""
        for outcome.resumed in range(1, ATTEMPTS + 1):
            started = self.start(folder, "--resume", *more, ranks=ranks)
            outcome.survived = codes(started, LIMIT) == [0] * ranks
            if outcome.survived:
                break
            outcome.output += printed(started)
        outcome.equal = same(result(folder / "run"), self.straight(ranks, *more))
        if outcome.equal:
            shutil.rmtree(folder)
        return outcome


def wait_for(condition, seconds, pause=0.02):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(pause)


def send(pid, number):
    """Signal a process, unless it has ended by itself meanwhile."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def codes(started, seconds):
    """The exit codes of ranks; what hasn't ended in this time is killed, and counts as no code at all."""
    end = time.monotonic() + seconds
    while any(one.code is None for one in started) and time.monotonic() < end:
        time.sleep(0.05)
    hanging = [one for one in started if one.code is None]
    for one in hanging:
        send(one.pid, signal.SIGKILL)
    return [None if one in hanging else one.code for one in started]


def printed(started):
    return "".join(one.output.read_text() for one in started if one.output.exists())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def result(run):
    """A run's metrics but the times, its evaluations, and its last weights."""
    metrics = [{k: v for k, v in row.items() if not k.startswith(CHANGING)} for row in lines(run / "metrics.jsonl")]
    files = sorted((run / f"checkpoints/step_{STEPS:06d}/hf").glob("*.safetensors"))
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return metrics, lines(run / "evaluations.jsonl"), weights


def same(one, two):
    return (
        one[:2] == two[:2]
        and one[2].keys() == two[2].keys()
        and all(torch.equal(tensor, two[2][name]) for name, tensor in one[2].items())
    )


def ended(started, outcome, traceback=False):
    """Wait for the ranks' end, and hold it to what every end must be; `traceback`: nobody could foresee it."""
    began = time.monotonic()
    found = codes(started, LIMIT)
    outcome.seconds, outcome.output = time.monotonic() - began, printed(started)
    outcome.disturbed = any(found)
    assert None not in found, f"a rank hung: {outcome.output}"
    assert traceback or "Traceback" not in outcome.output, outcome.output
    if any(code and code > 0 for code in found):
        assert "vogue" in outcome.output and ("vogue train: " in outcome.output or traceback), outcome.output
    return found


def whole(folder):
    return {path.name for path in (folder / "run/checkpoints").glob("step_*")}


def kept(folder, before):
    """The newest of the checkpoints of before is there, or a newer one."""
    assert not before or max(whole(folder), default="") >= max(before), (before, whole(folder))
