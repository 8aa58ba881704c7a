"""The process of `vogue.rewards.equality`: answers [right answer, parsed answer] with whether they are equal.

A script that imports nothing of vogue, so that it starts soon.
"""

import json
import logging
import resource
import signal
import sys

MEMORY_BYTES = 4 << 30  # of address space: 10^(10^10) alone would take 4 GB


def work(cpu_seconds: float) -> None:
    """Answer questions from stdin until it closes; a question that takes too long ends the process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, for the trainer, which ends this process itself
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is not a reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        answer, parsed = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF, unhandled, ends the process
        expected = parse(f"${answer}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        given = parse(f"${parsed}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        equal = verify(expected, given, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(equal), file=replies, flush=True)


if __name__ == "__main__":
    work(float(sys.argv[1]))
