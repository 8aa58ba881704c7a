"""What a step measures: seconds of its phases, and means over tokens, completions and ranks.

Means of rewards, answers and lengths are over all that was generated. Those of tokens (entropy, u_per, clipping,
mismatch, ratio_error) are over the tokens that send a gradient, A != 0, and so of every step alike, u_per over those
among them that it is paid to; `measured/...`, on the steps that `trainer.measure_every` names, over all tokens that the
step keeps. `trained_share` is the share of those tokens that went through a forward. With an entropy bonus,
`entropy_paid` is over the tokens that it is paid to, and `entropy_coef` over micro-batches; `mismatch/outside`, of the
tokens that send a gradient, the share whose ratio to the engine is out of bounds.
"""

import os
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vogue import distributed

WAIT = "wait"
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes, or "max"


class Mean(NamedTuple):
    """A part of a mean: a sum of values, and their count or the sum of their weights."""

    total: float
    count: float


def mean_over(tokens: Tensor, values: Tensor) -> Mean:
    """The part of the values (N,) where `tokens` (N,) bool."""
    return Mean(float(values[tokens].sum(dtype=torch.float64)), int(tokens.sum()))


class Clock:
    """Seconds of each phase of a step, added up where it comes more than once; one may lie within another.

    What a phase waits for other ranks is in "wait" and not in the phase.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {WAIT: 0.0}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, waited = time.perf_counter(), self.seconds[WAIT]
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        waited = self.seconds[WAIT] - waited
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start - waited

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around that in which ranks meet; one doesn't lie within another."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # this rank's own work isn't waiting
        start = time.perf_counter()
        yield
        self.seconds[WAIT] += time.perf_counter() - start

    def over_ranks(self) -> dict[str, float]:
        """`time/PHASE`, the mean over the ranks, and `time/PHASE_slowest`, that of the rank that took longest.

        On one rank, which waits for nobody, there is the first alone, and no "wait".
        """
        parts = distributed.gather(self.seconds)
        if len(parts) == 1:
            return {f"time/{phase}": seconds for phase, seconds in self.seconds.items() if phase != WAIT}
        found = {}
        for phase in self.seconds:
            values = [part[phase] for part in parts]
            found[f"time/{phase}"] = sum(values) / len(values)
            if phase != WAIT:
                found[f"time/{phase}_slowest"] = max(values)
        return found


class Means:
    """This rank's parts of a step's means by name; `over_ranks` divides their sums."""

    def __init__(self):
        self.parts: dict[str, Mean] = {}

    def add(self, name: str, total: float, count: float = 1) -> None:
        before = self.parts.get(name, Mean(0.0, 0.0))
        self.parts[name] = Mean(before.total + total, before.count + count)

    def add_all(self, metrics: Mapping[str, Mean]) -> None:
        for name, part in metrics.items():
            self.add(name, *part)

    def __getitem__(self, name: str) -> Mean:
        return self.parts.get(name, Mean(0.0, 0.0))

    def over_ranks(self) -> dict[str, float]:
        """The means over all ranks, whichever of them added to one; without those that nothing was added to."""
        summed = Means()
        for parts in distributed.gather(self.parts, Mean):
            summed.add_all(parts)
        return {name: part.total / part.count for name, part in summed.parts.items() if part.count}


def peak_memory() -> float:
    """GB, at the highest so far: of GPU memory allocated where there is a GPU, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def memory_limit() -> float:
    """GB that `peak_memory` can reach: the GPU's, or this rank's share of what the machine or its container has."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # without cgroups, or without a limit
        limit = min(limit, int(CGROUP_LIMIT.read_text()))
    return limit / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / 1e9
