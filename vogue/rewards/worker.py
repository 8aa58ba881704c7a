"""A process of its own for work that may have to be ended in the middle of C code."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping
from pathlib import Path

# Names of environment variables that hold what lets somebody in, by their last word; and those of a cloud's, or of an
# agent that has the user's keys, whatever they end with.
SECRET = re.compile(
    r"(.*_)?(API_?KEY|KEY|KEYS|TOKEN|TOKENS|SECRET|SECRETS|PASSWORD|PASSWD|PASS|PAT|CREDENTIALS?)|AWS_.*|SSH_AUTH_SOCK",
    re.IGNORECASE,
)


def without_secrets(environment: Mapping[str, str], passed: Collection[str] = ()) -> dict[str, str]:
    """The environment variables but those whose name says that they are secrets; `passed` ones stay."""
    return {name: value for name, value in environment.items() if name in passed or not SECRET.fullmatch(name)}


class Worker:
    """A process of a script of this folder, which answers each line of JSON on its input with a line on its output.

    Not multiprocessing: spawning imports the trainer's main module again, forking copies its threads and GPU. The
    process leads a session: Ctrl-C is for the trainer to handle, and what the process starts can be ended with it. On
    Linux it dies with the trainer, whatever it is doing.

    environment  of the process; unset: the trainer's, without its secrets
    """

    def __init__(self, script: str, *arguments: str, environment: Mapping[str, str] | None = None):
        here = Path(__file__).parent
        command = [str(here / script), *arguments]
        # It would die with the thread that starts it: another one than the main thread may end before the trainer.
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            command = [str(here / "worker_start.py"), str(os.getpid()), *command]
        self._process = subprocess.Popen(
            [sys.executable, "-u", *command],  # -u: what it prints is seen at once
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=without_secrets(os.environ) if environment is None else environment,
        )
        assert self._process.stdin and self._process.stdout  # both are pipes
        self._questions, self._answers = self._process.stdin, self._process.stdout

    def ask(self, question):
        """Ask a question; returns the answer, None if the process ended instead."""
        try:
            self._questions.write(json.dumps(question) + "\n")
            self._questions.flush()
        except BrokenPipeError:
            return None
        return self.read()

    def read(self):
        """Read the next line that the process prints, None if it ended instead."""
        line = self._answers.readline()
        return json.loads(line) if line.endswith("\n") else None

    def kill(self) -> None:
        """End the process and all that it started, from any thread."""
        with contextlib.suppress(ProcessLookupError):  # they have ended
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self, patience: float = 0.0) -> int:
        """End the process and clean up; returns its exit code, its own one where it ends within `patience` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self.kill()
        code = self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # of a question it died on
            self._questions.close()
        self._answers.close()
        return code
