"""Stopping a run between two steps, where a checkpoint can be written.

SIGINT (Ctrl-C) and SIGTERM (of a scheduler, a launcher, `vogue sweep`) are wishes that wait for the end of the step or
the evaluation. All ranks stop at the same one, whichever of them was told. A second SIGINT ends a rank where it is. Who
sends SIGTERM may have less patience: DeepSpeed's launcher, which sends it after Ctrl-C too, kills a rank 30 s later.

DeepSpeed's command passes no signal on, and neither it nor the launcher that it starts, nor torchrun, can when it is
killed. Ranks that have lost one of them stop as if they had been told.
"""

import os
import signal
from itertools import takewhile
from pathlib import PurePath

import psutil

from vogue.run import launch

STOPPED = 128 + signal.SIGINT  # exit code
LOST = 3  # exit code where the launcher, or another rank, no longer answers
TOLD = b"\nvogue: stopping after this step or evaluation; Ctrl-C again stops at once\n"
ORPHANED = b"\nvogue: the launcher has ended: stopping after this step or evaluation\n"
LAUNCHERS = (  # in their command lines
    *("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("torchrun", "torch.distributed.run"),
)


class Stop:
    """Takes note of SIGINT and SIGTERM while its block runs, in the main thread; what is ignored stays so."""

    def __init__(self):
        self._asked = self._interrupted = False
        self._launched_by = _launchers()

    @property
    def asked(self) -> bool:
        """Whether the run is to stop: by a signal, by the end of its launcher, or since it was set."""
        if not self._asked and self.is_orphaned:
            self._ask_once(ORPHANED)
        return self._asked

    @property
    def is_orphaned(self) -> bool:
        """Whether the launcher has ended, or the command that started it."""
        return _launchers() != self._launched_by

    @asked.setter
    def asked(self, value: bool) -> None:
        self._asked = value

    def __enter__(self) -> "Stop":
        heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._heed) for number in heeded}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heed(self, number: int, _) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self._ask_once(TOLD)

    def _ask_once(self, message: bytes) -> None:
        if not self._asked and launch.rank() == 0:
            _tell(message)
        self._asked = True


def _tell(message: bytes) -> None:
    try:
        os.write(2, message)  # a stream may be in the middle of a write of its own
    except OSError:  # who read it has ended
        return


def _launchers() -> list[psutil.Process]:
    """The launcher of this process, and DeepSpeed's command that started that, as far as they are alive.

    A process whose parent has ended has another one, also where nobody has waited for the parent.
    """
    try:
        return list(takewhile(_is_launcher, psutil.Process().parents()))
    except psutil.NoSuchProcess:  # it ends right now
        return []


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return any(PurePath(part).name in LAUNCHERS for part in process.cmdline())
    except psutil.Error:
        return False
