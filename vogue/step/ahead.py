"""The rollout of the step to come, generated while this one trains: `rollout.ahead=1`.

    step s    trains on completions that were sampled with the weights after s - 1 updates,
              while those of step s + 1 are sampled with the weights after s updates
    sync      waits for the rollout, then gives the servers the weights after s + 1 updates

so that a step takes as long as the longer of the two. Completions are one update older than the policy that trains on
them (step 0's are not), and their loss is weighed by the trainer's probability over the engine's, which
`loss.importance_cap` bounds.

Which weights a rollout has been sampled with is no function of the seed and the step alone. A checkpoint therefore has
the completions of the step to come, and a resumed run trains on those.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vogue import distributed
from vogue.config import Config
from vogue.evaluate import FAILURES
from vogue.metrics import Clock, Means
from vogue.rollout.engine import Completion, Engine, Generates, Request
from vogue.rollout.sampling import Sampling
from vogue.step.groups import Group, generate
from vogue.step.loader import Item, Loader
from vogue.step.run_state import RunState, Values

AHEAD = "ahead"  # the run's state under this name, in checkpoints alone: each rank's `Rollout`


@dataclass(frozen=True)
class Rollout:
    """A step's groups, unscored, and what they come from."""

    step: int
    version: int  # the optimizer update whose weights sampled them
    seconds: float  # that it took, with loading the step's items
    items: list[Item]
    groups: list[Group]
    answers: list[list[list[Completion]]]  # of each call of the engine, a list of completions a request


class Ahead:
    """A step's rollout, and the next one's in a thread.

    saved  what a checkpoint has of the rollouts that come next, as `saved_in` writes it; empty: nothing
    """

    def __init__(self, config: Config, loader: Loader, engine: Engine, saved: list[Values]):
        self._config, self._loader, self._engine = config, loader, engine
        self._thread = ThreadPoolExecutor(1, initializer=distributed.one_openmp_thread)
        self._held: Rollout | None = None
        self._coming: Future[Rollout] | None = None
        self._saved = saved

    def groups(self, step: int, judge: Callable[[list[Group]], list[Group]], means: Means, clock: Clock) -> list[Group]:
        """This rank's judged groups of a step, generated during the step before; the next step's are begun.

        Raises, on all ranks, what of `FAILURES` one of them meets.
        """
        with distributed.together(*FAILURES, meeting=clock.waiting), clock("rollout"):
            rollout = self.rollout(step)
        if step + 1 < self._config.trainer.steps:
            self.begin(step + 1)
        with distributed.together(*FAILURES, meeting=clock.waiting), clock("reward"):
            groups = judge(rollout.groups)
        clock.seconds[AHEAD] = rollout.seconds
        means.add("staleness", step - rollout.version)
        means.add("broken_share", sum(item.skipped for item in rollout.items), len(rollout.items))
        return groups

    def rollout(self, step: int) -> Rollout:
        """The rollout of a step, the same one until the next step's is asked for.

        It is generated here where it hasn't been begun: of a run's first step. Raises what loading or generating does.
        """
        if self._held is None or self._held.step != step:
            coming, self._coming = self._coming, None
            held = coming.result() if coming else self._restored()
            self._held = held if held and held.step == step else self._generated(step, self._engine.version)
        return self._held

    def begin(self, step: int) -> None:
        """Generate a step's rollout from now on, with the weights that the engine has now."""
        self.wait()  # of a step that has failed since
        self._coming = self._thread.submit(self._generated, step, self._engine.version)

    def wait(self) -> None:
        """Wait until nothing is generated; `rollout` raises what has failed."""
        if self._coming:
            wait([self._coming])

    def meet(self) -> None:
        """Wait until nothing is generated on any rank, as its weights are the same servers'; all ranks call."""
        self.wait()
        distributed.gather(None)

    def _generated(self, step: int, version: int) -> Rollout:
        start = time.perf_counter()
        items, recorder = self._loader.items(step), _Recorder(self._engine)
        groups = generate(recorder, self._config, items, step)
        return Rollout(step, version, time.perf_counter() - start, items, groups, recorder.answers)

    # ------------------------------------------------------------------------------------------------ checkpoints

    @contextmanager
    def saved_in(self, state: RunState, step: int) -> Iterator[None]:
        """In the block the run's state has all ranks' rollouts that come next, if there are any; collective."""
        self.wait()
        coming = self._coming.result() if self._coming and not self._coming.exception() else None
        found = next((rollout for rollout in (self._held, coming) if rollout and rollout.step == step), None)
        mine: Values = {}
        if found:
            answers = [[list(map(_plain, group)) for group in answer] for answer in found.answers]
            mine = {"step": step, "version": found.version, "seconds": found.seconds, "answers": answers}
            mine["prompts"] = [item.number for item in found.items]
        state.current[AHEAD] = distributed.gather(mine)
        try:
            yield
        finally:
            state.current.pop(AHEAD, None)

    def _restored(self) -> Rollout | None:
        """The rollout that a checkpoint had; its items are loaded anew."""
        of_ranks, self._saved = self._saved, []
        if not any(of_ranks):
            return None
        saved = of_ranks[self._loader.rank] if len(of_ranks) == self._loader.ranks else {}
        items = self._loader.items(saved["step"]) if saved else []
        if not saved or [item.number for item in items] != saved["prompts"]:
            if self._loader.rank == 0:
                warnings.warn(
                    "the completions of the next step that the checkpoint has are of other prompts than a rank's, as "
                    "on another number of ranks: they are generated anew, by the newer weights",
                    stacklevel=2,
                )
            return None
        answers = [[list(map(_completion, group)) for group in answer] for answer in saved["answers"]]
        groups = generate(_Player(answers), self._config, items, saved["step"])
        return Rollout(saved["step"], saved["version"], saved["seconds"], items, groups, answers)


class _Recorder:
    """An engine that keeps what it has answered."""

    def __init__(self, engine: Generates):
        self._engine = engine
        self.answers: list[list[list[Completion]]] = []

    def generate(self, requests: list[Request], n: int, sampling: Sampling) -> list[list[Completion]]:
        self.answers.append(self._engine.generate(requests, n, sampling))
        return self.answers[-1]


class _Player:
    """An engine that answers what it answered before."""

    def __init__(self, answers: Iterable[list[list[Completion]]]):
        self._answers = iter(answers)

    def generate(self, requests: list[Request], n: int, sampling: Sampling) -> list[list[Completion]]:
        return next(self._answers)


def _plain(completion: Completion) -> tuple[Tensor, Tensor, str, bool]:
    """A completion as a checkpoint holds it; log-probabilities as exact as they came."""
    ids, logprobs = torch.tensor(completion.token_ids), torch.tensor(completion.logprobs, dtype=torch.float64)
    return ids, logprobs, completion.text, completion.finished


def _completion(values: tuple[Any, ...]) -> Completion:
    ids, logprobs, text, finished = values
    return Completion(tuple(ids.tolist()), tuple(logprobs.tolist()), text, finished)
