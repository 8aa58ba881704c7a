"""Forwards without gradient that come before an update: what has to be known of its batches first.

Each is a collective where the model is partitioned: all ranks call it with as many batches, in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from vogue import distributed
from vogue.config import Config
from vogue.method.kl import Reference, divergence
from vogue.method.uncertainty import Signals, TokenStats
from vogue.metrics import Means, mean_over
from vogue.model.packing import Batch, Place
from vogue.step.groups import Trace, reads_other, traced
from vogue.step.objective import credited, dependence, with_chosen

Forward = Callable[..., TokenStats]  # of a batch that is on the policy's device
ReadSignals = Callable[[Batch, TokenStats], Signals]


def needs_look(config: Config, updates: int) -> bool:
    """Whether an update's batches are looked at before it, where a step has so many updates.

    The later ones start from another policy than the one that generated: its signals are computed first, in the same
    packing, so that the first ratio is 1 to rounding. And only once all of an update's tokens are known is it known
    which have the highest entropies, and which depend most on the image; and their values are those before it.
    """
    return updates > 1 or config.credit.on or config.loss.top_entropy_quantile < 1 or config.advantage.valued


@torch.no_grad()
def looked_at(
    forward: Forward,
    read_signals: ReadSignals,
    batches: Sequence[Batch],
    config: Config,
    device: torch.device,
    *,
    several: bool,
    measuring: bool,
    valued: Callable[[Batch, Tensor], Batch] | None = None,
) -> list[Batch]:
    """An update's batches with what is known of them before it.

    That is the old signals, with `several` updates a step; a token's own advantage, which `valued` makes of its hidden
    state; with which part of the advantage it trains, by `credit`; and which tokens do at all, by
    `loss.top_entropy_quantile`.
    """
    found, dependences = [], []
    share = config.loss.top_entropy_quantile
    for batch in batches:
        there = replace(batch, degraded=()).to(device)
        stats = forward(there)
        found.append(replace(batch, old=read_signals(there, stats)) if several or share < 1 else batch)
        if valued and stats.hidden is not None:
            found[-1] = valued(found[-1], stats.hidden)
        dependences.append(dependence(there, stats, config.credit.estimator).cpu())
    if config.credit.on:
        found = credited(found, dependences, config.credit, distributed.gather)
        again = reads_other(config) and config.branch.probability != 0
        if not (again or config.perception.on or measuring):
            found = [replace(batch, others=()) for batch in found]  # nothing reads them from here on
    return with_chosen(found, share, distributed.gather) if share < 1 else found


@torch.no_grad()
def referred(
    forward: Forward, batches: Sequence[Batch], config: Config, device: torch.device, means: Means
) -> dict[Place, Trace]:
    """The traces of the batches' completions, with the KL to the reference as `kl.estimator` has it."""
    traces: dict[Place, Trace] = {}
    for batch in batches:
        batch = replace(batch, degraded=()).to(device)
        stats = forward(batch, refers=True)
        reference, logprob = cast(Reference, stats.reference), stats.logprob
        means.add_all({"kl": mean_over(batch.weights > 0, reference.kl)})
        found = divergence(logprob, logprob, reference, config.kl.estimator)
        traces |= traced(batch, stats._replace(reference=reference._replace(kl=found)))
    return traces
