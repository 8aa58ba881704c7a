"""Spans in which completions read their own states in place of tokens (`vogue.method.latent`).

    sampled      ... <|lvr_start|>               <|lvr_end|> 3 ...
    read                          h_1 h_2 .. h_K

A span begins behind every start token that is sampled, and is `rollout.latent_steps` states long. Then a token is
sampled again: which one is up to the model, and another start token begins another span. A state takes a step of
`max_tokens`, as a token does; where those end within a span, the states that no token comes behind are left out.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vogue.config import Config
from vogue.method.latent import END, START, read_state
from vogue.seeds import Purpose, rng_for
from vogue.settings import ConfigError


class Read(NamedTuple):
    """What some of S completions read in place of a token."""

    rows: Tensor  # (R,) int64, which ones
    states: Tensor  # (R, D)


def check_latent(tokenizer: Any, config: Config) -> None:
    """Raise `ConfigError` where states are to be read, and the tokenizer doesn't have what begins and ends that."""
    known, steps = tokenizer.get_vocab(), config.rollout.latent_steps
    if steps and (missing := [token for token in (START, END) if token not in known]):
        raise ConfigError(
            f"rollout.latent_steps={steps}: the tokenizer of model.path={config.model.path} has no "
            f"{' and no '.join(missing)}, which `vogue warmstart --latent-steps` gives a model"
        )


class Spans:
    """Which of S completions are within a span, and the states that each has read.

    seeds   of the requests, of `n` completions each
    hidden  their states (S, D) before the first step
    """

    def __init__(self, config: Config, tokenizer: Any, seeds: Sequence[int], n: int, hidden: Tensor):
        self._steps, self._kind = config.rollout.latent_steps, config.rollout.latent
        self._start = tokenizer.convert_tokens_to_ids(START) if self._steps else 0
        self._left = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)  # states to come
        self._none = hidden[:0].cpu().clone()  # of a part of a tensor all of it would be sent to other ranks
        self._places = [(seed, i) for seed in seeds for i in range(n)]
        self._read: list[dict[int, Tensor]] = [{} for _ in self._places]  # of each completion (D,), by their step

    def silenced(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (S, 1), one that says and ends nothing where a state is read instead; and where that is (S,) bool."""
        inside = self._left > 0
        return drawn.masked_fill(inside[:, None], self._start), inside

    def read(self, drawn: Tensor, inside: Tensor, hidden: Tensor, at: int) -> Read | None:
        """What is read in step `at` in place of the tokens (S, 1), from the states (S, D) before it; None for none."""
        if not self._steps:
            return None
        begins = ~inside & (drawn[:, 0] == self._start)
        self._left = torch.where(begins, self._steps, self._left - inside.long())
        rows = inside.nonzero()[:, 0]
        if not len(rows):
            return None
        before = hidden[rows]
        found = Read(rows, read_state(before, self._kind, self._noise(rows.tolist(), at, before)))
        for row, state in zip(rows.tolist(), found.states.cpu(), strict=True):
            self._read[row][at] = state
        return found

    def _noise(self, rows: Sequence[int], at: int, like: Tensor) -> Tensor:
        """Normal numbers (R, D), a function of a completion's seed and the step, whatever is beside it."""
        if self._kind != "noise":
            return torch.empty_like(like)
        rngs = (rng_for(seed, Purpose.LATENT, i, at) for seed, i in (self._places[row] for row in rows))
        return torch.from_numpy(np.stack([rng.standard_normal(like.shape[1]) for rng in rngs])).to(like.device)

    def told_apart(self, row: int, length: int) -> tuple[list[int], Tensor | None, tuple[int, ...]]:
        """Of a completion of so many steps those in which a token was sampled, and `Completion`'s fields of states."""
        if not self._steps:
            return list(range(length)), None, ()
        sampled = [at for at in range(length) if at not in self._read[row]]
        read = [at for at in self._read[row] if at < sampled[-1]]
        states = [self._read[row][at] for at in read]
        return sampled, torch.stack(states) if states else self._none, tuple(at - i for i, at in enumerate(read))
