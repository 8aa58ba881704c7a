"""What variance-aware sampling knows of every prompt (`vogue.method.variance`): measured anew, or from the groups.

It is a tensor (S, 2) float32 of the S samples' OVS and TDS in the run's state, the same on every rank, which the loader
draws from. What it costs to measure all of them anew is counted, since it is more than a step's own rollout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vogue import distributed
from vogue.data import DataError
from vogue.evaluate import CHUNK
from vogue.method.variance import distinct, outcome_variance, unseen
from vogue.metrics import Means
from vogue.rewards import RewardError
from vogue.rewards.scoring import score_groups
from vogue.rollout.engine import Completion, Engine, Request
from vogue.rollout.sampling import of_rollouts
from vogue.seeds import Purpose, seed_for
from vogue.step.groups import Group
from vogue.step.loader import Loader

TOKENS = "refresh_tokens"  # the metric: tokens that were generated for scores and aren't trained on


class Seen(NamedTuple):
    """Completions of one sample."""

    index: int  # of the sample in the data
    right: int
    count: int
    diversity: float


def refreshed(engine: Engine, loader: Loader, step: int, means: Means) -> Tensor:
    """OVS and TDS (S, 2) of all samples, from `sampling.n` fresh completions of each raw image; ranks share the work.

    A sample that can't be read ends the run, or with `data.broken=skip` has 0 for both. Collective: raises, on all
    ranks, the `DataError` or `RewardError` of one.
    """
    size, ranks = len(loader.samples), loader.ranks
    mine, seen = range(loader.rank, size, ranks), []
    for start in range(0, -(-size // ranks), CHUNK):  # as many on every rank: some share an engine
        with distributed.together(DataError):
            requests = _requests(loader, mine[start : start + CHUNK], step)
        with distributed.together(DataError, RewardError):
            completions, right = _answered(engine, loader, requests, step)
        for index, group, count in zip(requests, completions, right, strict=True):
            seen.append(Seen(index, count, len(group), distinct([completion.token_ids for completion in group])))
            means.add(TOKENS, sum(len(completion.token_ids) for completion in group), 0)
    found = torch.zeros(size, 2)
    _enter(found, seen)
    outcome, diversity = found.mean(dim=0).tolist()
    means.add("refresh/outcome", outcome)
    means.add("refresh/diversity", diversity)
    return found


def remembered(before: Tensor | None, size: int, groups: Sequence[Group]) -> Tensor:
    """OVS and TDS (`size`, 2) as they were `before`, with those of the samples of all ranks' groups of a step.

    A sample's groups count together, whatever views they were generated from. Collective.
    """
    found = unseen(size) if before is None else before.clone()
    _enter(found, [_seen(group) for group in groups if group.item.index is not None])
    return found


def _seen(group: Group) -> Seen:
    right = sum(score.accuracy == 1 for score in group.scores)
    texts = [completion.token_ids for completion in group.completions]
    return Seen(group.item.origin.index, right, len(texts), distinct(texts))


def _enter(found: Tensor, own: Sequence[Seen]) -> None:
    """Put what all ranks have seen into `found`; of a sample that was seen several times, all of it together."""
    by_index: dict[int, list[Seen]] = {}
    everyone = (seen for part in distributed.gather(list(own), Seen) for seen in part)
    for seen in sorted(everyone):  # the same sums on any ranks
        by_index.setdefault(seen.index, []).append(seen)
    for index, parts in by_index.items():
        outcome = outcome_variance(sum(seen.right for seen in parts), sum(seen.count for seen in parts))
        found[index] = torch.tensor([outcome, sum(seen.diversity for seen in parts) / len(parts)])


def _requests(loader: Loader, numbers: Sequence[int], step: int) -> dict[int, Request]:
    """What is asked of each sample's raw image, by the sample's number; without those that are broken and skipped."""
    config, preprocessor, found = loader.config, loader.preprocessor, {}
    for number in numbers:
        try:
            sample = loader.samples[number]
            view = preprocessor.raw_view(sample)
            seed = seed_for(config.seed, Purpose.REFRESH, step, number)
            found[number] = Request(preprocessor.prompt(sample, view), view, seed)
        except DataError:
            if config.data.broken == "refuse":
                raise
    return found


def _answered(
    engine: Engine, loader: Loader, requests: dict[int, Request], step: int
) -> tuple[list[list[Completion]], list[int]]:
    """The completions of each request and how many of them are right."""
    config = loader.config.model_copy(update={"reward": loader.config.reward.unweighed()})
    sampling = of_rollouts(config)
    completions = engine.generate(list(requests.values()), config.sampling.n, sampling)
    asked, places = [loader.samples[number] for number in requests], [(step, number) for number in requests]
    found = score_groups(engine, loader.preprocessor, config, asked, completions, places, sampling)
    return completions, [sum(score.accuracy == 1 for score in group) for group in found]
