r"""Equality of mathematical expressions by math-verify, in a process that may die of it.

A model can write 9^{9^{9^9}}. math-verify stops itself with a Python signal handler, which works
in the main thread alone and never runs while C code multiplies huge integers. Here a worker
process arms a timer whose default action is to end the process, inside C code too, and the next
question starts another worker. The timer counts CPU time, so that a busy machine changes no score.

Run as a script, this file is the worker: it answers one line of JSON with another.
"""

import atexit
import contextlib
import json
import logging
import subprocess
import sys
import threading

logger = logging.getLogger(__name__)

CPU_SECONDS = 3.0
MEMORY_BYTES = 4 << 30  # address space of the worker: 10^(10^10) alone would take 4 GB


class Verifier:
    """Asks a worker process whether expressions are equal; starts it when first asked.

    failures   number of comparisons that ended the worker (out of time or memory), all judged unequal

    Safe to use from several threads, which then wait for each other.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS):
        self.cpu_seconds = cpu_seconds
        self.failures = 0
        self._worker = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def equal(self, answer: str, parsed: str) -> bool:
        """Whether `parsed` is mathematically equal to the right answer; False where it takes too long.

        Raises RuntimeError where the worker cannot start, for want of math-verify say.
        """
        with self._lock:
            if self._worker is None:
                self._start()
            reply = self._ask([answer, parsed])
            if reply is not None:
                return reply
            self.failures += 1
            code = self._stop()
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

    def _start(self) -> None:
        # Not multiprocessing: spawning imports the trainer's main module again, forking copies its threads and GPU.
        self._worker = subprocess.Popen(
            [sys.executable, __file__, str(self.cpu_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the trainer to handle
        )
        if self._ask(["1", "1"]) is None:
            code = self._stop()
            raise RuntimeError(f"the math-verify worker does not start (exit code {code}); its error is on stderr.")

    def _ask(self, question: list[str]) -> bool | None:
        """The worker's answer, None if it ended instead."""
        try:
            self._worker.stdin.write(json.dumps(question) + "\n")
            self._worker.stdin.flush()
        except BrokenPipeError:
            return None
        reply = self._worker.stdout.readline()
        return json.loads(reply) if reply else None

    def _stop(self) -> int:
        self._worker.kill()
        code = self._worker.wait()
        with contextlib.suppress(BrokenPipeError):  # of a question it died on
            self._worker.stdin.close()
        self._worker.stdout.close()
        self._worker = None
        return code


def work(cpu_seconds: float) -> None:
    """Answer questions from stdin until it closes; a question that takes too long ends the process."""
    import resource
    import signal

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is not a reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        answer, parsed = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF, unhandled, ends the process
        expected = parse(f"${answer}$", parsing_timeout=None)
        equal = verify(expected, parse(f"${parsed}$", parsing_timeout=None), timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(equal), file=replies, flush=True)


if __name__ == "__main__":
    work(float(sys.argv[1]))
