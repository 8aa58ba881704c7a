"""One seed for each thing that is random: a function of the run's seed, what it is for, and where it stands.

Nothing in a run draws from a generator that lives on, so a resumed run, and one on another number of ranks, sees the
same data, perturbations, branches and sampling noise.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    DATA = 0
    PERTURB = 1
    BRANCH = 2
    ROLLOUT = 3
    EVALUATION = 4
    WARMSTART = 5
    BLIND = 6
    REFRESH = 7  # completions by which prompts are scored
    SCORED = 8  # which prompts are drawn by their scores
    SHUFFLE = 9
    REPLAY = 10  # which stored completions join a group, and which prompts are drawn for that
    DEGRADE = 11
    CRITIC = 12
    DEALT = 13  # which value head learns of which token
    PROBE = 14  # a completion that a server's weights are tried by
    LATENT = 15  # noise that is read in place of states


def seed_for(seed: int, purpose: Purpose, *where: int) -> int:
    """A 31-bit seed (vLLM and torch take it) for `purpose` at `where`, such as (step, prompt)."""
    return int(np.random.SeedSequence([seed, purpose, *where]).generate_state(1)[0]) >> 1


def rng_for(seed: int, purpose: Purpose, *where: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, *where])
