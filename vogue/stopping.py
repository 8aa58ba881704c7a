"""Stopping a run between two steps, where a checkpoint can be written.

SIGINT (Ctrl-C) and SIGTERM (of a scheduler, a launcher, `vogue sweep`) are wishes that wait for the end of the step.
All ranks stop at the same one, whichever of them was told. A second SIGINT ends a rank where it is.
"""

import os
import signal

STOPPED = 128 + signal.SIGINT  # exit code
TOLD = b"\nvogue: stopping after this step; Ctrl-C again stops at once\n"


class Stop:
    """Takes note of SIGINT and SIGTERM while its block runs; of the main thread alone."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked and os.environ.get("RANK", "0") == "0":
            os.write(2, TOLD)  # a stream may be in the middle of a write of its own
        self.asked = True
