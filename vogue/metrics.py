"""What a step measures: seconds of its phases, and means over tokens, completions and ranks."""

import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vogue import distributed
from vogue.config import COMPONENTS


class Clock:
    """Seconds of each phase of a step, added up where it comes more than once; one may lie within another."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Sums:
    """Sums and counts of a step's metrics on this rank; `means` divides them over all ranks.

    Those of rewards, answers and lengths are of all that was generated. Those of tokens (entropy, u_per, clipping,
    mismatch, ratio_error) are of the tokens that send a gradient, A != 0, and so of every step alike, u_per of those
    among them that it is paid to; `measured/...`, on the steps that `trainer.measure_every` names, of all tokens that
    the step keeps. `trained_share`: share of those tokens that went through a forward.
    """

    NAMES = (
        *("reward", "accuracy", "format", "finished", "tokens", "noisy_share", "paid_share"),
        *("solved_share", "mixed_share"),
        *("distinct_answers", "pass_at_n", "entropy", "clip_fraction", "out_capped", "mismatch/logprob"),
        *("mismatch/kl", "u_per", "per_capped", "ratio_error", "loss", "grad_norm", "skipped_updates"),
        *(f"reward/{name}" for name in (*COMPONENTS, "overlong")),
        *("verifier_failures", "rounds", "filled_share", "trained_share", "measured/entropy", "measured/u_per"),
    )

    def __init__(self):
        self.sums: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def add(self, name: str, value: float) -> None:
        self.add_sum(name, value, 1)

    def add_sum(self, name: str, value: float, count: float) -> None:
        self.sums[name] += value
        self.counts[name] += count

    def add_tokens(self, real: Tensor, values: dict[str, Tensor]) -> None:
        """Add per-token values (N,) where `real`."""
        count = int(real.sum())
        for name, value in values.items():
            self.add_sum(name, float(value[real].sum(dtype=torch.float64)), count)

    def means(self, device: torch.device) -> dict[str, float]:
        """Means over all ranks, without those nothing was added to."""
        values = {f"sum {name}": float(self.sums[name]) for name in self.NAMES}
        values |= {f"count {name}": float(self.counts[name]) for name in self.NAMES}
        summed = distributed.total(values, device)
        return {name: summed[f"sum {name}"] / summed[f"count {name}"] for name in self.NAMES if summed[f"count {name}"]}


def peak_memory() -> float:
    """GB, at the highest so far: of GPU memory allocated where there is a GPU, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
