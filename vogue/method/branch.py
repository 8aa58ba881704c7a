r"""Schedules over a run's steps: how likely the noisy branch is drawn, the draws, and the sign of u_per's bonus.

p_noi(s) = max(0, 1 − s / s_total),   z ~ Bernoulli(p_noi(s))          arXiv 2510.01444
"""

import numpy as np
import torch
from torch import Tensor


def noisy_probability(step: int, total: int, fixed: float | None = None) -> float:
    """p_noi after `step` of `total` steps: from 1 down to 0, or `fixed` throughout."""
    return max(0.0, 1 - step / total) if fixed is None else fixed


def draw(granularity: str, prompts: int, responses: int, probability: float, seed: int, step: int) -> Tensor:
    """z (P, G) bool, True for the noisy branch: one draw a "prompt", a "response" or a "step".

    (seed, step) alone decide it, so that every rank and a resumed run draw the same. Each rank
    draws for the prompts of all ranks and takes its own rows.
    """
    shapes = {"prompt": (prompts, 1), "response": (prompts, responses), "step": (1, 1)}
    state = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    uniform = torch.rand(shapes[granularity], generator=torch.Generator().manual_seed(state))
    return (uniform < probability).expand(prompts, responses)


def bonus_sign(step: int, total: int, transition: tuple[float, float] | None) -> float:
    """The sign of g_per: 1 up to the first share of the run, -1 from the second one on, linear in between.

    1 rewards tokens that the perturbation changes (exploration), -1 those that it leaves alone (consistency). The
    authors' code has such a transition, switched off in its scripts. None: 1 throughout.
    """
    if transition is None:
        return 1.0
    start, end = (share * total for share in transition)
    if step <= start:
        return 1.0
    return max(-1.0, 1 - 2 * (step - start) / (end - start)) if end > start else -1.0
