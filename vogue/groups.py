"""A step's prompts and groups of completions: which samples, what each group is worth, and which are trained on."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor

from vogue.config import Config
from vogue.estimates import pass_at_k
from vogue.inputs import Prompt, View
from vogue.method.advantage import group_advantages, mixed, passk_advantages
from vogue.metrics import Sums
from vogue.rewards import Score
from vogue.rollout import Completion
from vogue.seeds import Purpose, rng_for


@dataclass(frozen=True)
class Item:
    """Prompt `number` of a step: `raw` and `noisy` views, and the draw of each of its G completions, noisy or not.

    `part`: which of the step's optimizer updates trains on it.
    """

    number: int
    prompt: Prompt
    raw: View
    noisy: View | None
    draws: tuple[bool, ...]
    part: int = 0


@dataclass(frozen=True)
class Trace:
    """Of a completion's tokens (T,) in nats, as the training forward found them.

    The exact entropy, and the symmetric divergence of the branches where both were computed.
    """

    entropy: Tensor
    u_per: Tensor | None


@dataclass(frozen=True)
class Group:
    """G completions of one item, scored, and trained on one branch; `kept` are those that are trained on.

    `paid`: those whose u_per is paid. `foreign`: those that were generated from the other branch's view
    (NoisyRollout's), none where it's empty. `traces`, after training: of each completion, None for those that needed no
    forward.
    """

    item: Item
    noisy: bool
    completions: tuple[Completion, ...]
    kept: tuple[bool, ...]
    paid: tuple[bool, ...]
    scores: tuple[Score, ...] = ()
    advantages: tuple[float, ...] = ()
    foreign: tuple[bool, ...] = ()
    traces: tuple[Trace | None, ...] = ()

    @property
    def sources(self) -> tuple[bool, ...]:
        """Which completions were generated from the noisy view."""
        return tuple(self.noisy != foreign for foreign in self.foreign) or (self.noisy,) * len(self.completions)


def sample_order(size: int, start: int, count: int, seed: int) -> list[int]:
    """Indices of samples number `start` to `start + count` of an endless sequence of shuffled epochs."""
    order: list[int] = []
    epoch, offset = divmod(start, size)
    while len(order) < count:
        shuffled = rng_for(seed, Purpose.DATA, epoch).permutation(size)
        order += shuffled[offset : offset + count - len(order)].tolist()
        epoch, offset = epoch + 1, 0
    return order


def judged(group: Group, scores: Iterable[Score], config: Config) -> Group:
    """The group with its scores, shaped for length where `reward.overlong_buffer` asks for it, and its advantages.

    With `loss.drop_unfinished` it keeps no completion that was cut off; these count in its baseline all the same.
    """
    buffer = round(config.reward.overlong_buffer * config.rollout.max_tokens)
    if buffer:
        lengths = (len(completion.token_ids) for completion in group.completions)
        punishments = [overlong_punishment(length, config.rollout.max_tokens, buffer) for length in lengths]
        scores = [
            replace(score, reward=score.reward + value, components=score.components | {"overlong": value})
            for score, value in zip(scores, punishments, strict=True)
        ]
    scores = tuple(scores)
    if config.advantage.kind == "passk":
        advantages = passk_advantages(torch.tensor([[score.accuracy == 1 for score in scores]]), config.advantage.k)
    else:
        advantages = group_advantages(torch.tensor([[score.reward for score in scores]]))
    kept = group.kept
    if config.loss.drop_unfinished:
        kept = tuple(keep and completion.finished for keep, completion in zip(kept, group.completions, strict=True))
    return replace(group, scores=scores, advantages=tuple(advantages[0].tolist()), kept=kept)


def overlong_punishment(length: int, longest: int, buffer: int) -> float:
    """DAPO's soft punishment (arXiv 2503.14476): 0 up to `longest` - `buffer` tokens, from there linearly to -1."""
    return min(0.0, (longest - buffer - length) / buffer)


def found_mixed(groups: Iterable[Group]) -> dict[int, bool]:
    """By prompt, whether accuracies differ within one of its groups."""
    found: dict[int, bool] = {}
    for group in groups:
        differ = bool(mixed(torch.tensor([[score.accuracy for score in group.scores]])))
        found[group.item.number] = differ or found.get(group.item.number, False)
    return found


def choose(found: dict[int, bool], count: int) -> list[int]:
    """`count` numbers of prompts to train on: the first whose groups are mixed, then the first others; ascending."""
    return sorted(sorted(found, key=lambda number: (not found[number], number))[:count])


def assigned(groups: Iterable[Group], chosen: list[int], parts: int) -> list[Group]:
    """Groups of the chosen prompts, dealt to `parts` updates; of the others nothing is kept."""
    part = {number: place * parts // len(chosen) for place, number in enumerate(chosen)}
    return [
        replace(group, item=replace(group.item, part=part[group.item.number]))
        if group.item.number in part
        else replace(group, kept=(False,) * len(group.kept))
        for group in groups
    ]


def split(groups: list[Group], parts: int) -> list[list[Group]]:
    """Groups by the update that trains on them; never none, since an idle one keeps this rank in step."""
    idle = replace(groups[0], kept=(False,) * len(groups[0].kept))
    return [[group for group in groups if group.item.part == part] or [idle] for part in range(parts)]


def kept_lengths(groups: Iterable[Group]) -> list[int]:
    """Tokens of each completion that is trained on, whether it goes through a forward or not."""
    return [len(completion.token_ids) for group in groups for completion in compress(group.completions, group.kept)]


def tally(groups: Iterable[Group], sums: Sums) -> None:
    """Metrics of all groups and completions that were generated."""
    for group in groups:
        scores = group.scores
        right = sum(score.accuracy == 1 for score in scores)
        sums.add("solved_share", right == len(scores))
        sums.add("mixed_share", 0 < right < len(scores))
        sums.add("distinct_answers", len({score.parsed for score in scores}))
        sums.add("pass_at_n", pass_at_k(len(scores), right, len(scores)))
        completions = zip(scores, group.completions, group.kept, group.sources, group.paid, strict=True)
        for score, completion, kept, noisy, paid in completions:
            sums.add("reward", score.reward)
            sums.add("accuracy", score.accuracy)
            sums.add("format", score.format)
            for name, value in score.components.items():
                sums.add(f"reward/{name}", value)
            sums.add("finished", completion.finished)
            sums.add("tokens", len(completion.token_ids))
            if kept:
                sums.add("noisy_share", noisy)
                sums.add("paid_share", paid)
