"""Contestants that are processes of their own and take turns, one repetition each; what a repetition cost."""

import ctypes
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Memory:
    """Peak resident memory since it was made, in MB, over what was resident then."""

    def __init__(self):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.baseline = self._status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew

    def found(self) -> dict[str, float]:
        peak = self._status("VmHWM")
        return {"peak_mb": peak, "over_baseline_mb": peak - self.baseline}

    @staticmethod
    def _status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(name + ":"))


def requests(connection) -> Iterator[dict]:
    """Say that this contestant is ready, then give what is asked of it until nothing is."""
    connection.send("ready")
    while (request := connection.recv()) is not None:
        yield request


@contextmanager
def measured(connection) -> Iterator[dict]:
    """Send the seconds and the memory of the block, with whatever is put into the yielded dict."""
    found: dict = {}
    memory = Memory()
    start, used = time.perf_counter(), time.process_time()
    yield found
    found |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
    connection.send(found | memory.found())


def quiet() -> None:
    """Leave out what libraries say of themselves, and keep DeepSpeed to the CPU."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore")


def _quiet_worker(run: Callable, connection, *arguments) -> None:
    quiet()
    run(connection, *arguments)


@contextmanager
def contestants(**workers: tuple) -> Iterator[dict[str, Callable[..., dict]]]:
    """Start each worker (function, arguments) in a process; yields a function a name, which runs one repetition."""
    context = multiprocessing.get_context("spawn")
    running = {}
    for name, (run, *arguments) in workers.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_quiet_worker, args=(run, theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        running[name] = (process, ours)
    for _, ours in running.values():
        assert ours.recv() == "ready"

    def asking(connection):
        def repeat(**request) -> dict:
            connection.send(request)
            return connection.recv()

        return repeat

    yield {name: asking(connection) for name, (_, connection) in running.items()}
    for process, connection in running.values():
        connection.send(None)
        process.join(timeout=30)
        process.kill()


def alternate(repeats: int, workers: dict[str, Callable], warmup: int = 1, **request) -> dict[str, list[dict]]:
    """`repeats` of each in turn, after `warmup` that don't count."""
    for _ in range(warmup):
        for repeat in workers.values():
            repeat(**request)
    found: dict[str, list[dict]] = {name: [] for name in workers}
    for _ in range(repeats):
        for name, repeat in workers.items():
            found[name].append(repeat(**request))
    return found


def median(rows: list[dict], key: str = "seconds") -> float:
    return statistics.median(row[key] for row in rows)
