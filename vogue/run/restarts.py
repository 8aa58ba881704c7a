"""`vogue train --restarts N`: a run that goes on by itself after a crash, from its newest whole checkpoint.

The ranks are processes below this one, started by the launcher that is asked for. A run that ends for a reason of its
own (it is done, a setting or a sample is wrong, somebody stopped it) leaves its exit code in the file that `ENDED`
names, whatever a launcher makes of that code. Where there is none the run has crashed: a rank, its engine or the
launcher was killed, or failed in a way that nobody foresaw.

A crash at the step of the crash before it is no accident: then, too, the run ends.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from vogue.run import launch
from vogue.run.folder import NEWEST_WHOLE, check_new, read_rows
from vogue.run.stopping import STOPPED
from vogue.settings import ConfigError

ENDED = "VOGUE_ENDED"  # the environment variable with that file's name
OWN_PYTHON = (sys.executable, "-m", "vogue.train")
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 300.0  # seconds; each is twice the one before
POLL = 0.3  # seconds
KILLED = 30.0  # seconds that a killed process may take to be gone, with its memory
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass(frozen=True)
class Ending:
    """How the launcher and its ranks ended."""

    code: int  # the run's own, or the launcher's after a crash, -9 for SIGKILL
    crashed: bool


def note_end(code: int) -> None:
    """Leave word, where somebody would restart this run, that it has ended for a reason of its own."""
    path = Path(os.environ.get(ENDED, ""))
    if path.name and path.parent.is_dir():  # not so on another node
        path.write_text(str(code))


def supervise(folder: Path, patience: float, command: list[str], resume: str | None, times: int) -> int:
    """Run a launcher's command of `vogue train`, and again after a crash, at most `times` times; returns the exit code.

    `folder` is the run's; ranks that have lost their launcher may end their step within `patience` seconds. Raises
    `ConfigError` for a new run in a folder that holds one, which a restart would go on with, and in another launcher's
    rank.
    """
    if launch.ranks() > 1:
        raise ConfigError(
            "--restarts starts the ranks itself, but this process is one of theirs: vogue train … --restarts N "
            "--launcher 'torchrun --nproc-per-node 8 --module vogue.train'"
        )
    if resume is None:
        check_new(folder)
    crashed_at, pause = None, FIRST_PAUSE
    with Wishes() as wishes:
        for restart in range(times + 1):
            ending = _attempt([*command, *([] if resume is None else [f"--resume={resume}"])], wishes, patience)
            if not ending.crashed or wishes.made.is_set():
                return STOPPED if ending.crashed else ending.code
            reached, how = _steps_done(folder), _how(ending.code)
            if reached == crashed_at:
                _tell(f"the run crashed after {reached} steps as it did before ({how}): another restart won't help")
                break
            if restart == times:
                _tell(f"the run crashed after {reached} steps ({how}), and no restart is left of {times}")
                break
            left = f"restart {restart + 1} of {times} in {pause:g} s"
            _tell(f"the run crashed after {reached} steps ({how}); {left}, from its newest whole checkpoint")
            if wishes.made.wait(pause):
                return STOPPED
            crashed_at, resume, pause = reached, NEWEST_WHOLE, min(2 * pause, LONGEST_PAUSE)
    return ending.code if ending.code > 0 else 128 - ending.code  # as a shell has it


class Wishes:
    """Takes note of SIGINT and SIGTERM, which pass to the launcher as SIGTERM; a second one is a KeyboardInterrupt."""

    def __init__(self):
        self.made = threading.Event()
        self.launcher: subprocess.Popen | None = None

    def __enter__(self) -> "Wishes":
        self._before = {number: signal.signal(number, self._heed) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heed(self, *_) -> None:
        if self.made.is_set():
            raise KeyboardInterrupt
        self.made.set()
        if self.launcher:
            self.launcher.terminate()  # the ranks of one that passes nothing on notice that it has ended


def _attempt(command: list[str], wishes: Wishes, patience: float) -> Ending:
    """Run the command until all of its processes on this machine have ended."""
    with TemporaryDirectory(prefix="vogue-") as folder:
        note = Path(folder) / "ended"
        try:
            # A session of its own: Ctrl-C is a wish, which all ranks are to hear of once.
            wishes.launcher = subprocess.Popen(
                command, env=os.environ | {ENDED: str(note)}, start_new_session=True, preexec_fn=_end_with_parent
            )
            code = wishes.launcher.wait()
            end = time.monotonic() + patience
            time.sleep(POLL)  # a process that has only just begun shows no variables yet
            while _left(note) and time.monotonic() < end:
                time.sleep(POLL)
        except OSError as error:
            raise ConfigError(f"--launcher {command[0]}: {error.strerror}") from None
        finally:
            left = _left(note)
            for process in left:  # its lock, or a checkpoint that it is writing, would be in the next one's way
                process.kill()
            psutil.wait_procs(left, timeout=KILLED)
        noted = note.read_text() if note.exists() else ""
    return Ending(int(noted or code), crashed=not noted and code != 0)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _left(note: Path) -> list[psutil.Process]:
    """The launcher's processes, however deep and in whatever session, that are alive."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(ENDED) == str(note) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # somebody else's, or gone
            continue
    return found


def _steps_done(folder: Path) -> int:
    rows = read_rows(folder / "metrics.jsonl")
    return rows[-1]["step"] + 1 if rows else 0


def _how(code: int) -> str:
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


def _tell(text: str) -> None:
    print(f"vogue train: {text}", file=sys.stderr, flush=True)
