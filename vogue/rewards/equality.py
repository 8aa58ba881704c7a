r"""Equality of mathematical expressions, in processes that may die of it.

A model can write 9^{9^{9^9}}. SymPy can't be stopped from Python while C code multiplies huge integers. Here worker
processes arm a timer whose default action is to end what computes, inside C code too. The timer counts CPU time, so
that a busy machine changes no score.
"""

import atexit
import logging
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from vogue.rewards.worker import Worker

logger = logging.getLogger(__name__)

CPU_SECONDS = 1.0  # of a question
SECONDS = 4.0  # of a worker, for the questions of one call
FREE_SECONDS = 0.01  # of a question that don't count as such: honest ones take 2 to 5 milliseconds
A_WORKER = 8  # questions that another worker is started for
TOO_LONG = -signal.SIGPROF  # a child's exit code
Pair = tuple[str, str]


class Verifier:
    """A client that asks worker processes whether expressions are equal, and starts them when first asked.

    cpu_seconds  that a question may take
    seconds      that a worker may take for the slow questions of one call
    failures     number of questions without an answer in time or memory since `take_failures`, all judged unequal

    Safe to use from several threads, which then wait for each other.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS, seconds: float = SECONDS):
        self.cpu_seconds = cpu_seconds
        self.seconds = seconds
        self.failures = 0
        self._workers: list[Worker] = []
        self._lock = threading.Lock()
        atexit.register(self.close)

    def equal(self, given: str, answer: str) -> bool:
        """Whether two expressions in LaTeX are equal; False where it takes too long."""
        return self.equal_all([(given, answer)])[given, answer]

    def equal_all(self, pairs: Iterable[Pair]) -> dict[Pair, bool]:
        """Whether the expressions of each pair are equal; False where that takes too long.

        What may be a huge number is asked last, so that it takes no time from the others.

        Raises RuntimeError where a worker cannot start, for want of math-verify say.
        """
        questions = sorted(set(pairs), key=lambda pair: sum(map("".join(pair).count, "^!")))
        if not questions:
            return {}
        with self._lock:
            return self._asked(self._start(min(_cores(), -(-len(questions) // A_WORKER))), questions)

    def take_failures(self) -> int:
        """`failures`, which begin at 0 again."""
        with self._lock:
            failures, self.failures = self.failures, 0
            return failures

    def close(self) -> None:
        """End the workers; the next question starts others."""
        with self._lock:
            self._stop()

    def _asked(self, places: range, questions: Sequence[Pair]) -> dict[Pair, bool]:
        """The answers that the workers at `places` give within `seconds` of processor time each."""
        found: dict[Pair, bool] = {}
        waiting, taking = iter(questions), threading.Lock()

        def serve(place: int) -> None:
            spent = 0.0
            while spent < self.seconds:
                with taking:
                    pair = next(waiting, None)
                if pair is None:
                    return
                reply = self._reply(place, pair)
                spent += max(0.0, reply.get("seconds", self.cpu_seconds) - FREE_SECONDS)
                if "equal" in reply:
                    found[pair] = reply["equal"]

        with ThreadPoolExecutor(len(places)) as pool:
            list(pool.map(serve, places))
        if unanswered := len(questions) - len(found):
            self.failures += unanswered
            logger.warning("%d of %d comparisons took too long: scored 0", unanswered, len(questions))
        return {pair: found.get(pair, False) for pair in questions}

    def _reply(self, place: int, pair: Pair) -> dict:
        """A worker's reply; what ended it, or its child, from outside is no fault of the question, asked once more."""
        reply: dict | None = None
        for _ in range(2):
            reply = self._workers[place].ask(pair)
            if reply and reply.get("failed", TOO_LONG) == TOO_LONG:
                break
            if reply is None:
                self._workers[place].stop()
                self._workers[place] = self._checked(self._new())
        if reply and "failed" in reply:
            logger.warning("comparing %.80r with %.80r took more than %g s of CPU", *pair, self.cpu_seconds)
        return reply or {}

    def _start(self, count: int) -> range:
        """Have `count` workers that answer; new ones start at the same time. Returns their places."""
        fresh = [self._new() for _ in range(count - len(self._workers))]
        self._workers += map(self._checked, fresh)
        return range(count)

    def _new(self) -> Worker:
        return Worker("equality_worker.py", str(self.cpu_seconds))

    def _checked(self, worker: Worker) -> Worker:
        if worker.ask(["1", "1"]) is None:
            code = worker.stop()
            raise RuntimeError(f"the math-verify worker does not start (exit code {code}); its error is on stderr.")
        return worker

    def _stop(self) -> None:
        while self._workers:
            self._workers.pop().stop()


def _cores() -> int:
    """The cores of this process, shared with the other ranks of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
