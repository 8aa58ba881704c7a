r"""Equality of mathematical expressions by math-verify, in a process that may die of it.

A model can write 9^{9^{9^9}}. math-verify stops itself with a Python signal handler, which works
in the main thread alone and never runs while C code multiplies huge integers. Here a worker
process arms a timer whose default action is to end the process, inside C code too, and the next
question starts another worker. The timer counts CPU time, so that a busy machine changes no score.
"""

import atexit
import logging
import signal
import threading

from vogue.rewards.worker import Worker

logger = logging.getLogger(__name__)

CPU_SECONDS = 3.0
OWN_LIMITS = (-signal.SIGPROF, 1)  # exit codes of CPU time and memory; any other end may not be the answer's fault


class Verifier:
    """A client that asks a worker process whether expressions are equal, and starts the process when first asked.

    failures   number of comparisons that ended the worker (out of time or memory), all judged unequal

    A question whose worker was killed from outside is asked once more.

    Safe to use from several threads, which then wait for each other.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS):
        self.cpu_seconds = cpu_seconds
        self.failures = 0
        self._worker: Worker | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def equal(self, answer: str, parsed: str) -> bool:
        """Whether `parsed` is mathematically equal to the right answer; False where it takes too long.

        Raises RuntimeError where the worker cannot start, for want of math-verify say.
        """
        with self._lock:
            for _ in range(2):
                worker = self._worker or self._start()
                reply = worker.ask([answer, parsed])
                if reply is not None:
                    return reply
                code = self._stop()
                if code in OWN_LIMITS:
                    break
            self.failures += 1
            logger.warning(
                "comparing %.80r with %.80r ended the worker (exit code %d, limit %g s of CPU): scored 0",
                parsed, answer, code, self.cpu_seconds,
            )  # fmt: skip
            return False

    def close(self) -> None:
        """End the worker; the next question starts another."""
        with self._lock:
            if self._worker is not None:
                self._stop()

    def _start(self) -> Worker:
        worker = self._worker = Worker("equality_worker.py", str(self.cpu_seconds))
        if worker.ask(["1", "1"]) is None:
            code = self._stop()
            raise RuntimeError(f"the math-verify worker does not start (exit code {code}); its error is on stderr.")
        return worker

    def _stop(self) -> int:
        worker, self._worker = self._worker, None
        return worker.stop() if worker else 0
