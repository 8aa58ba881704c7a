"""A reward of the user's own, `path/to/file.py:name` or `package.module:name`, in a process of its own.

    def name(completions: list[str], samples: list[dict]) -> list[float | dict]
    def name(completion: str, sample: dict) -> float | dict                          either one may be async

completions  the model's turns, without the end token: a step's of this rank, or some of an evaluation's
samples      the sample of each: {"problem", "answer", "source", "category", "state"} and its row's further columns;
             images stay behind
returns      a finite number for each, on any scale: advantages are relative to their group; or a dict with such a
             "reward", and, if wanted, "accuracy" from 0 to 1, "parsed", the answer as text, and components to log

The file is imported once, with its own folder first on the path; what it prints goes to standard error. Another
process can be ended in the middle of C code, and can't disturb the trainer's threads, signals and GPU. Its environment
has none of the trainer's secrets (HF_TOKEN, WANDB_API_KEY, AWS_… and the like) but those of `reward.pass_env`; vogue's
own functions have all. Nothing that goes wrong becomes a score: an exception, a time-out, a wrong length or a number
that isn't finite ends the run.
"""

import atexit
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vogue.config.sections import RewardConfig
from vogue.rewards.worker import Worker, without_secrets

OURS = "vogue."  # what modules of vogue's own begin with
COLUMNS = ("problem", "answer", "source", "category", "state")
LAST_SECONDS = 5.0  # that a worker whose replies have ended has for its exit code
SHOWN = 2000  # characters of a completion in a message


class RewardError(RuntimeError):
    """A user's reward function that failed; the message names file and function and shows the completion."""


@dataclass(frozen=True)
class Earned:
    """What a function of the user's own says of a completion.

    judged      "accuracy" and "parsed", if it gives them, in place of the checker's
    components  whatever else it gives
    """

    reward: float
    judged: dict[str, Any]
    components: dict[str, float]


class RewardFunction:
    """The user's function of setting `key`, called in a worker process for at most `seconds` each time.

    spec     path/to/file.py:name or package.module:name
    options  further arguments
    passed   secrets of the environment that it gets, by their names

    Raises RewardError where there is no such file, function or secret, or the file cannot be imported in that time.
    """

    def __init__(
        self,
        spec: str,
        seconds: float,
        options: dict[str, Any] | None = None,
        key: str = "reward.function",
        passed: Sequence[str] = (),
    ):
        self.spec = spec
        self.seconds = seconds
        self.options = options or {}
        self.passed = passed
        self.name = f"{key}={spec}"
        self._worker: Worker | None = None
        self._start()
        atexit.register(self.close)

    def __call__(self, completions: Sequence[str], samples: Sequence) -> list[Earned]:
        """What completions earn, each for the Sample at its position.

        Raises RewardError where the function raises, takes too long, ends its process, or returns anything else than a
        finite number, or a dict with one, for each completion. It is then called on one after the other, to show where
        it fails.
        """
        if not completions:
            return []
        rows = [{**sample.columns} | {name: getattr(sample, name) for name in COLUMNS} for sample in samples]
        reply = self._call(completions, rows)
        if "failed" in reply:
            withheld = self._withheld(reply["failed"])
            raise RewardError(f"{self.name} {self._located(reply, completions, rows)}{withheld}")
        return [_earned(values) for values in reply["earned"]]

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
        if "at" in reply:
            at = int(reply["at"])
            where = f"on completion {at + 1} of {len(completions)}, answer {rows[at]['answer']!r}"
            return f"{reply['failed']} {where}:\n{_cut(completions[at])}"
        return (
            f"{reply['failed']} on {len(completions)} completions at once, but on none of the first {tried} alone; "
            f"the first:\n{_cut(completions[0])}"
        )

    def _start(self) -> Worker:
        target, name = self.spec.rsplit(":", 1)
        if target.endswith(".py"):
            target = str(Path(target).absolute())
            if not Path(target).is_file():
                raise RewardError(f"{self.name}: there is no file {target}")
        if missing := [name for name in self.passed if name not in os.environ]:
            raise RewardError(f"reward.pass_env: there is no environment variable {', '.join(missing)}")
        search = [place or str(Path.cwd()) for place in sys.path]
        given = (json.dumps(self.options), json.dumps(search))
        worker = self._worker = Worker("function_worker.py", target, name, *given, environment=self._environment())
        reply, expired = self._in_time(worker, worker.read)
        if expired or reply is None or "failed" in reply:
            code = self._stop(0.0 if expired else LAST_SECONDS)
            told = f"exit code {code}" if reply is None else reply["failed"]
            told = f"it took longer than reward.timeout={self.seconds:g} s" if expired else told
            raise RewardError(f"{self.name} cannot be imported: {told}{self._withheld(told)}")
        return worker

    def _environment(self) -> dict[str, str]:
        return dict(os.environ) if self.spec.startswith(OURS) else without_secrets(os.environ, self.passed)

    def _withheld(self, told: str) -> str:
        """What to say of secrets that a message names, and that the function wasn't given."""
        names = [name for name in sorted(os.environ.keys() - self._environment().keys()) if name in told]
        return f"; {', '.join(names)} is withheld from it: reward.pass_env={json.dumps(names)}" if names else ""

    def _call(self, completions: Sequence[str], rows: list[dict]) -> dict:
        """Call the function; returns {"earned": [...]}, or {"failed": "raised …"} and maybe its position "at"."""
        worker = self._worker or self._start()
        reply, expired = self._in_time(worker, lambda: worker.ask([list(completions), rows]))
        if reply is not None and not expired:
            return reply
        if expired:
            self._stop()
            return {"failed": f"took longer than reward.timeout={self.seconds:g} s"}
        return {"failed": f"ended its process (exit code {self._stop(LAST_SECONDS)})"}

    def _in_time(self, worker: Worker, reply: Callable[[], Any]) -> tuple[Any, bool]:
        """The worker's reply, and whether it was killed because `seconds` were over."""
        expired = threading.Event()
        timer = threading.Timer(self.seconds, lambda: (expired.set(), worker.kill()))
        timer.start()
        try:
            replied = reply()
        finally:  # after Ctrl-C, too: the process would wait for the timer
            timer.cancel()
            timer.join()
        return replied, expired.is_set()

    def _stop(self, patience: float = 0.0) -> int:
        worker, self._worker = self._worker, None
        return worker.stop(patience) if worker else 0


def own_rewards(settings: RewardConfig) -> dict[str, RewardFunction]:
    """The functions of `settings` by name; that of `reward.function` has the name "".

    Each is started once in this process. Raises RewardError where one can't be.
    """
    passed = tuple(settings.pass_env)
    if settings.function:
        return {"": _started(settings.function, settings.timeout, "{}", "reward.function", passed)}
    return {
        name: _started(own.function, settings.timeout, json.dumps(own.options), f"reward.functions.{name}", passed)
        for name, own in settings.functions.items()
    }


def description_scorer(settings: RewardConfig) -> RewardFunction:
    """The function of `reward.scorer`, started once in this process. Raises RewardError where it can't be."""
    if settings.scorer is None:
        raise RewardError("reward.scorer is not set")
    scorer, passed = settings.scorer, tuple(settings.pass_env)
    return _started(scorer.function, settings.timeout, json.dumps(scorer.options), "reward.scorer", passed)


@functools.cache
def _started(spec: str, seconds: float, options: str, key: str, passed: tuple[str, ...]) -> RewardFunction:
    return RewardFunction(spec, seconds, json.loads(options), key, passed)


def _earned(values: dict[str, Any]) -> Earned:
    judged = {name: values[name] for name in ("accuracy", "parsed") if name in values}
    components = {name: value for name, value in values.items() if name not in ("reward", *judged)}
    return Earned(values["reward"], judged, components)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"
