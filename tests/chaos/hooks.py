"""What is done to a rank from within: it is killed at a line of a save, or its memory is limited."""

import os
import resource
import signal
import sys
from pathlib import Path

import vogue
from vogue.trainer import Trainer

ROOM = 4 << 20  # bytes
OURS = str(Path(vogue.__file__).parent)


def install(kill_at=0, count_to=None, memory_at=None):
    """Set up what is to happen.

    kill_at    the number of vogue's line, counted over all saves, before which the rank is killed; 0: never
    count_to   a file for the number of those lines that the saves so far had
    memory_at  the step before which the rank's address space is limited to ROOM more than it has
    """
    if kill_at or count_to:
        _trace_saves(kill_at, count_to)
    if memory_at is not None:
        _limit_memory(memory_at)


def _trace_saves(kill_at, count_to):
    save, lines = Trainer.save, 0

    def on_line(frame, event, _):
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def on_call(frame, event, argument):
        return on_line if frame.f_code.co_filename.startswith(OURS) else None

    def traced(self):
        sys.settrace(on_call)
        try:
            return save(self)
        finally:
            sys.settrace(None)
            if count_to:
                Path(count_to).write_text(str(lines))

    Trainer.save = traced


def _limit_memory(step):
    run_step = Trainer.run_step

    def limited(self):
        if self.step == step:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            # With nothing left at all, Python waits for ever for a thread that dies before it has begun.
            resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        return run_step(self)

    Trainer.run_step = limited
