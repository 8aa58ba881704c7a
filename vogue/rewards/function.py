"""A reward of the user's own, `reward.function: path/to/file.py:name`, in a process of its own.

    def name(completions: list[str], samples: list[dict]) -> list[float]

completions  texts as generated, without the end token: a step's of this rank, or some of an evaluation's
samples      the sample of each: {"problem", "answer", "source", "category", "state"} and its row's further columns;
             images stay behind
returns      a finite number for each, on any scale: advantages are relative to their group

The file is imported once, with its own folder first on the path; what it prints goes to standard error. Another
process can be ended in the middle of C code, and can't disturb the trainer's threads, signals and GPU. Nothing that
goes wrong becomes a score: an exception, a time-out, a wrong length or a number that isn't finite ends the run.
"""

import atexit
import functools
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vogue.rewards.worker import Worker

COLUMNS = ("problem", "answer", "source", "category", "state")
LAST_SECONDS = 5.0  # that a worker whose replies have ended has for its exit code
SHOWN = 2000  # characters of a completion in a message


class RewardError(RuntimeError):
    """A user's reward function that failed; the message names file and function and shows the completion."""


class RewardFunction:
    """The user's function `path/to/file.py:name`, called in a worker process for at most `seconds` each time.

    Raises RewardError where there is no such file or function, or the file cannot be imported.
    """

    def __init__(self, spec: str, seconds: float):
        self.spec = spec
        self.seconds = seconds
        self._worker: Worker | None = None
        self._start()
        atexit.register(self.close)

    def __call__(self, completions: Sequence[str], samples: Sequence) -> list[float]:
        """The rewards of completions, each for the Sample at its position.

        Raises RewardError where the function raises, takes too long, ends its process, or returns anything else than a
        finite number for each completion. It is then called on one after the other, to show where it fails.
        """
        if not completions:
            return []
        rows = [{**sample.columns} | {name: getattr(sample, name) for name in COLUMNS} for sample in samples]
        reply = self._call(completions, rows)
        if "failed" in reply:
            raise RewardError(f"reward.function={self.spec} {self._located(reply, completions, rows)}")
        return reply["rewards"]

    def close(self) -> None:
        """End the worker; the next call starts another."""
        if self._worker is not None:
            self._stop()

    def _located(self, reply: dict[str, Any], completions: Sequence[str], rows: list[dict]) -> str:
        """Find the completion on which the function fails, and say what went wrong."""
        tried, began = 0, time.monotonic()
        while "at" not in reply and tried < len(completions) and time.monotonic() - began < self.seconds:
            alone = self._call(completions[tried : tried + 1], rows[tried : tried + 1])
            if "failed" in alone:
                reply = alone | {"at": tried}
            tried += 1
        where = f"{reply['failed']} on completion {{}} of {len(completions)}, answer {{!r}}:\n{{}}"
        if "at" in reply:
            at = int(reply["at"])
            return where.format(at + 1, rows[at]["answer"], _cut(completions[at]))
        return (
            f"{reply['failed']} on {len(completions)} completions at once, but on none of the first {tried} alone; "
            f"the first:\n{_cut(completions[0])}"
        )

    def _start(self) -> Worker:
        file, name = self.spec.rsplit(":", 1)
        path = Path(file).absolute()
        if not path.is_file():
            raise RewardError(f"reward.function={self.spec}: there is no file {path}")
        worker = self._worker = Worker("function_worker.py", str(path), name)
        reply = worker.read()
        if reply is None or "failed" in reply:
            code = self._stop(LAST_SECONDS)
            told = f"exit code {code}" if reply is None else reply["failed"]
            raise RewardError(f"reward.function={self.spec} cannot be imported: {told}")
        return worker

    def _call(self, completions: Sequence[str], rows: list[dict]) -> dict:
        """Call the function; returns {"rewards": [...]}, or {"failed": "raised …"} and maybe its position "at"."""
        worker = self._worker or self._start()
        expired = threading.Event()
        timer = threading.Timer(self.seconds, lambda: (expired.set(), worker.kill()))
        timer.start()
        try:
            reply = worker.ask([list(completions), rows])
        finally:  # after Ctrl-C, too: the process would wait for the timer
            timer.cancel()
            timer.join()
        if reply is not None and not expired.is_set():
            return reply
        if expired.is_set():
            self._stop()
            return {"failed": f"took longer than reward.timeout={self.seconds:g} s"}
        return {"failed": f"ended its process (exit code {self._stop(LAST_SECONDS)})"}

    def _stop(self, patience: float = 0.0) -> int:
        worker, self._worker = self._worker, None
        return worker.stop(patience) if worker else 0


@functools.cache
def reward_function(spec: str, seconds: float) -> RewardFunction:
    """The one `RewardFunction` of this process for these settings; raises what its constructor raises."""
    return RewardFunction(spec, seconds)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"
