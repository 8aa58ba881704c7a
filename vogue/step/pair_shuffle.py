"""Shuffle-R1's batch shuffle: the pairs of a step's groups, whichever rank has them, are dealt to its updates.

All ranks draw the same pairs (`vogue.method.pairs`), and each keeps its own. A prompt may be in several updates, and a
completion several times in one: it is computed once there, and its tokens weigh so many times as much in the loss.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import NamedTuple

from vogue import distributed
from vogue.config import Config
from vogue.method.pairs import drawn_pairs, paired
from vogue.metrics import Clock, Means
from vogue.seeds import Purpose, rng_for
from vogue.step.groups import Group


class Pair(NamedTuple):
    """Two completions of a group; known on all ranks by where they stand in the step."""

    prompt: int  # number of the prompt, over all ranks and rounds
    view: str  # that the group is trained on
    number: int  # of the pair in its group, the widest first


def shuffled(groups: Sequence[Group], config: Config, step: int, means: Means, clock: Clock) -> list[dict[int, Group]]:
    """This rank's groups by their number, for each of `trainer.updates`, with what the shuffle keeps of them there.

    Of a pair only what is kept is trained on and weighed; one of which nothing is kept isn't drawn. Collective.
    """
    own = {pair: weight for group in groups for pair, weight in weights_of(group).items()}
    with clock.waiting():
        weights = {pair: weight for part in distributed.gather(own, Pair) for pair, weight in part.items()}
    pairs, updates = sorted(weights), config.trainer.updates
    rng = rng_for(config.seed, Purpose.SHUFFLE, step)
    drawn = [pairs[i] for i in drawn_pairs([weights[pair] for pair in pairs], config.trainer.shuffle, rng)]
    means.add("shuffled_share", len(set(drawn)), len(pairs))
    found = []
    for update in range(updates):
        times = Counter(drawn[len(drawn) * update // updates : len(drawn) * (update + 1) // updates])
        chosen = ((number, repeated(group, times)) for number, group in enumerate(groups))
        found.append({number: group for number, group in chosen if any(group.kept)})
    return found


def weights_of(group: Group) -> dict[Pair, float]:
    """W of each of the group's pairs of which something is kept."""
    found = {}
    for number, pair in enumerate(paired(group.advantages)):
        kept = [*compress(pair, (group.kept[i] for i in pair))]
        if kept:
            found[Pair(group.item.number, group.view, number)] = sum(abs(group.advantages[i]) for i in kept)
    return found


def repeated(group: Group, times: Counter[Pair]) -> Group:
    """The group with only what these pairs hold, each as often as it was drawn."""
    repeats = [0] * len(group.completions)
    for number, pair in enumerate(paired(group.advantages)):
        for i in pair:
            repeats[i] = times[Pair(group.item.number, group.view, number)]
    kept = tuple(keep and count > 0 for keep, count in zip(group.kept, repeats, strict=True))
    return replace(group, kept=kept, repeats=tuple(repeats))
