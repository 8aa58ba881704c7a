"""A reward of the user's own, `reward.function: path/to/file.py:name`, in a process of its own.

    def name(completions: list[str], samples: list[dict[str, str]]) -> list[float]

completions  texts as generated, without the end token: a step's of this rank, or some of an evaluation's
samples      the sample of each: {"problem", "answer", "source", "category", "state"}; images stay behind
returns      a finite number for each, on any scale: advantages are relative to their group

The file is imported once, with its own folder first on the path; what it prints goes to standard error. Another
process can be ended in the middle of C code, and can't disturb the trainer's threads, signals and GPU. Nothing that
goes wrong becomes a score: an exception, a time-out, a wrong length or a number that isn't finite ends the run.

Run as a script, this file is the worker: it answers one line of JSON with another.
"""

import atexit
import contextlib
import functools
import importlib.util
import json
import math
import numbers
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

COLUMNS = ("problem", "answer", "source", "category", "state")
LAST_SECONDS = 5.0  # that a worker whose replies have ended has for its exit code
SHOWN = 2000  # characters of a completion in a message


class RewardError(RuntimeError):
    """A user's reward function that failed; the message names file and function and shows the completion."""


class RewardFunction:
    """Calls the function `path/to/file.py:name` in a worker process, each time for at most `seconds`.

    Raises RewardError where there is no such file or function, or the file cannot be imported.
    """

    def __init__(self, spec: str, seconds: float):
        self.spec = spec
        self.seconds = seconds
        self._worker = None
        self._start()
        atexit.register(self.close)

    def __call__(self, completions: Sequence[str], samples: Sequence) -> list[float]:
        """The rewards of completions, each for the Sample at its position.

        Raises RewardError where the function raises, takes too long, ends its process, or returns anything else than a
        finite number for each completion. It is then called on one after the other, to show where it fails.
        """
        if not completions:
            return []
        rows = [{name: getattr(sample, name) for name in COLUMNS} for sample in samples]
        reply = self._call(completions, rows)
        if "failed" in reply:
            raise RewardError(f"reward.function={self.spec} {self._located(reply, completions, rows)}")
        return reply["rewards"]

    def close(self) -> None:
        """End the worker; the next call starts another."""
        if self._worker is not None:
            self._stop()

    def _located(self, reply: dict, completions: Sequence[str], rows: list[dict]) -> str:
        """What went wrong on which completion."""
        tried, began = 0, time.monotonic()
        while "at" not in reply and tried < len(completions) and time.monotonic() - began < self.seconds:
            alone = self._call(completions[tried : tried + 1], rows[tried : tried + 1])
            if "failed" in alone:
                reply = alone | {"at": tried}
            tried += 1
        where = f"{reply['failed']} on completion {{}} of {len(completions)}, answer {{!r}}:\n{{}}"
        if "at" in reply:
            at = reply["at"]
            return where.format(at + 1, rows[at]["answer"], _cut(completions[at]))
        return (
            f"{reply['failed']} on {len(completions)} completions at once, but on none of the first {tried} alone; "
            f"the first:\n{_cut(completions[0])}"
        )

    def _start(self) -> None:
        file, name = self.spec.rsplit(":", 1)
        path = Path(file).absolute()
        if not path.is_file():
            raise RewardError(f"reward.function={self.spec}: there is no file {path}")
        self._worker = subprocess.Popen(
            [sys.executable, __file__, str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the trainer to handle; _kill ends what the function started, too
        )
        reply = self._reply()
        if reply is None or "failed" in reply:
            code = self._stop(LAST_SECONDS)
            told = f"exit code {code}" if reply is None else reply["failed"]
            raise RewardError(f"reward.function={self.spec} cannot be imported: {told}")

    def _call(self, completions: Sequence[str], rows: list[dict]) -> dict:
        """{"rewards": [...]}, or what went wrong: {"failed": "raised …"}, with the position "at" where it is known."""
        if self._worker is None:
            self._start()
        expired = threading.Event()
        timer = threading.Timer(self.seconds, lambda: (expired.set(), self._kill()))
        timer.start()
        reply = None
        with contextlib.suppress(BrokenPipeError):
            self._worker.stdin.write(json.dumps([list(completions), rows]) + "\n")
            self._worker.stdin.flush()
            reply = self._reply()
        timer.cancel()
        timer.join()
        if reply is not None and not expired.is_set():
            return reply
        if expired.is_set():
            self._stop()
            return {"failed": f"took longer than reward.timeout={self.seconds:g} s"}
        return {"failed": f"ended its process (exit code {self._stop(LAST_SECONDS)})"}

    def _reply(self) -> dict | None:
        """The worker's next line, None if it ended instead."""
        line = self._worker.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it and all that it started have ended
            os.killpg(self._worker.pid, signal.SIGKILL)

    def _stop(self, patience: float = 0.0) -> int:
        """End the worker and what it started; its exit code, its own one where it ends within `patience` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._worker.wait(patience)
        self._kill()
        code = self._worker.wait()
        with contextlib.suppress(BrokenPipeError):  # of a question it died on
            self._worker.stdin.close()
        self._worker.stdout.close()
        self._worker = None
        return code


@functools.cache
def reward_function(spec: str, seconds: float) -> RewardFunction:
    """The one `RewardFunction` of this process for these settings; raises as that does."""
    return RewardFunction(spec, seconds)


def work(path: str, name: str) -> None:
    """Import the function, say whether that worked, and answer questions from stdin until it closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed is not a reply
    sys.path[0] = str(Path(path).parent)
    try:
        spec = importlib.util.spec_from_file_location("reward_function", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:  # of the user's code, any
        print(json.dumps({"failed": _told(error, path)}), file=replies, flush=True)
        return
    print(json.dumps({}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(function, path, *json.loads(line))), file=replies, flush=True)


def _answer(function: Callable, path: str, completions: list[str], samples: list[dict]) -> dict:
    try:
        rewards = list(function(completions, samples))
    except Exception as error:  # of the user's code, any
        return {"failed": f"raised {_told(error, path)}"}
    if len(rewards) != len(completions):
        return {"failed": f"returned {len(rewards)} rewards for {len(completions)} completions"}
    for at, reward in enumerate(rewards):
        if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
            return {"failed": f"returned {reward!r}, not a finite number,", "at": at}
    return {"rewards": [float(reward) for reward in rewards]}


def _told(error: Exception, path: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"


if __name__ == "__main__":
    work(*sys.argv[1:])
