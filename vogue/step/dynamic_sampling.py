"""Dynamic sampling (DAPO, arXiv 2503.14476): rollouts of new prompts until enough of them teach something.

A prompt is mixed where accuracies differ within one of its groups; all others have advantages of 0. `rollout.rounds` of
new prompts are generated at most, and too few mixed ones after the last round are filled up with others.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from vogue import distributed
from vogue.config import Config
from vogue.method.advantage import mixed
from vogue.metrics import Means
from vogue.step.groups import Group


def dynamic_sampling(
    rolled_out: Callable[[int], list[Group]], config: Config, means: Means
) -> tuple[list[Group], set[int]]:
    """This rank's judged groups of all rounds that it took, and the numbers of the prompts that are trained on.

    rolled_out  this rank's judged groups of the round with this number

    What isn't trained on stays in the list, with nothing kept. All ranks decide together.
    """
    groups: list[Group] = []
    for number in range(config.rollout.rounds):
        groups += rolled_out(number)
        found = {k: v for part in distributed.gather(found_mixed(groups)) for k, v in part.items()}
        if sum(found.values()) >= config.rollout.prompts:
            break
    chosen = choose(found, config.rollout.prompts)
    means.add("rounds", number + 1)
    means.add("filled_share", sum(not found[prompt] for prompt in chosen) / len(chosen))
    return assigned(groups, chosen, config.trainer.updates), set(chosen)


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


def assigned(groups: Iterable[Group], chosen: list[int], updates: int) -> list[Group]:
    """Groups of the chosen prompts, dealt to the step's updates; of the others nothing is kept."""
    update = {number: place * updates // len(chosen) for place, number in enumerate(chosen)}
    return [
        replace(group, item=replace(group.item, update=update[group.item.number]))
        if group.item.number in update
        else replace(group, kept=(False,) * len(group.kept))
        for group in groups
    ]
