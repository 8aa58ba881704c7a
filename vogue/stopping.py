"""Stopping a run between two steps, where a checkpoint can be written.

SIGINT (Ctrl-C) and SIGTERM (of a scheduler, a launcher, `vogue sweep`) are wishes that wait for the end of the step or
the evaluation. All ranks stop at the same one, whichever of them was told. A second SIGINT ends a rank where it is. Who
sends SIGTERM may have less patience: DeepSpeed's launcher, which sends it after Ctrl-C too, kills a rank 30 s later.
"""

import os
import signal

STOPPED = 128 + signal.SIGINT  # exit code
TOLD = b"\nvogue: stopping after this step or evaluation; Ctrl-C again stops at once\n"


class Stop:
    """Takes note of SIGINT and SIGTERM while its block runs, in the main thread; what is ignored stays so."""

    def __init__(self):
        self.asked = self._interrupted = False

    def __enter__(self) -> "Stop":
        heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in heeded}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if not self.asked and os.environ.get("RANK", "0") == "0":
            os.write(2, TOLD)  # a stream may be in the middle of a write of its own
        self.asked = True
