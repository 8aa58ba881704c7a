"""The replay buffer: what it keeps of a step's groups, and what of it joins the groups of later steps.

`vogue.method.replay` has the equations. A stored completion is kept with two log-probabilities of each token, both of
the policy that generated it: the trainer's, which ratios are taken to, and the engine's, for the correction between the
two. One that went through no forward, since its advantage was 0, has the engine's in place of the trainer's.

The buffer is the same on every rank, and part of the run's state: it isn't a function of seed and step. Only what was
generated from the raw image and is trained on it is stored, so that no perturbed image has to be made again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from vogue import distributed
from vogue.config import Config
from vogue.inputs import RAW
from vogue.method.replay import off_policy_advantages, surplus, tiers
from vogue.metrics import Means
from vogue.rollout.engine import Completion
from vogue.seeds import Purpose, rng_for
from vogue.step.groups import Group, Replayed
from vogue.step.loader import REPLAYABLE
from vogue.step.run_state import RunState

BUFFER = "replay"  # the training's state under this name
Stored = dict[
    str, Any
]  # a completion: index of its sample, step, reward, token_ids (T,), logprob and engine_logprob (T,)


def with_replayed(groups: list[Group], state: RunState, config: Config, step: int, means: Means) -> list[Group]:
    """The step's judged groups with at most `replay.n` stored completions of their prompt each, and their advantages.

    A group that nothing is kept of has none. Which are taken is drawn by seed, step and prompt.
    """
    settings, buffer = config.replay, state.training.get(BUFFER)
    if buffer is None or not settings.size:
        return groups
    by_index: dict[int, list[Stored]] = {}
    for stored in buffer["stored"]:
        if settings.fresh_enough(step - stored["step"]):
            by_index.setdefault(stored["index"], []).append(stored)
    found = []
    for group in groups:
        known = by_index.get(group.item.index, []) if group.item.index is not None else []
        if known and group.view == RAW and any(group.kept):
            rng = rng_for(config.seed, Purpose.REPLAY, step, group.item.number)
            places = sorted(rng.permutation(len(known))[: settings.n].tolist())
            recent = [*buffer["recent"].get(group.item.index, ()), *_fresh_rewards(group)]
            group = _joined([known[i] for i in places], group, recent[-settings.window :], config, step)
        for one in group.replayed:
            means.add("replay/age", one.age)
        means.add("replay/share", len(group.replayed), len(group.replayed) + sum(group.kept))
        found.append(group)
    return found


def remember(groups: Sequence[Group], state: RunState, config: Config, step: int, means: Means) -> None:
    """Put what a step's trained groups of all ranks have generated into the buffer, and drop what is too much or old.

    Collective. The prompts that have something stored, with their R̄, are in the state for the loader.
    """
    settings = config.replay
    if not settings.size:
        return
    before = state.training.get(BUFFER, {"recent": {}, "stored": []})
    mine = [(group.item.number, _rewards_and_stored(group, step)) for group in groups if group.view == RAW]
    parts = (part for of_rank in distributed.gather(mine) for part in of_rank)
    recent, stored = dict(before["recent"]), list(before["stored"])
    for _, (index, rewards, new) in sorted(parts, key=lambda part: part[0]):
        if index is not None:
            recent[index] = [*recent.get(index, ()), *rewards][-settings.window :]
            stored += new
    stored = [one for one in stored if settings.fresh_enough(step + 1 - one["step"])]
    stored = _in_their_room(stored, recent, config)
    state.training[BUFFER] = {"recent": recent, "stored": stored}
    indices = sorted({one["index"] for one in stored})
    averages = [_mean(recent[index]) for index in indices]
    state.current[REPLAYABLE] = {"index": torch.tensor(indices), "mean": torch.tensor(averages, dtype=torch.float64)}
    means.add("replay/stored", len(stored))


def _joined(stored: Sequence[Stored], group: Group, recent: Sequence[float], config: Config, step: int) -> Group:
    scaled = config.advantage.kind == "group" and config.advantage.scale != "none"
    rewards = [one["reward"] for one in stored]
    advantages = off_policy_advantages(rewards, recent, scaled=scaled, weight=config.replay.weight)
    replayed = (
        Replayed(
            Completion(tuple(one["token_ids"].tolist()), tuple(one["engine_logprob"].tolist()), "", one["finished"]),
            one["logprob"],
            advantage,
            step - one["step"],
        )
        for one, advantage in zip(stored, advantages.tolist(), strict=True)
    )
    return replace(group, replayed=tuple(replayed))


def _rewards_and_stored(group: Group, step: int) -> tuple[int | None, list[float], list[Stored]]:
    """Of a raw group: its sample, what counts in R̄, and what is stored, which is what was trained on."""
    stored = []
    traces = group.traces or (None,) * len(group.completions)
    completions = zip(group.completions, group.scores, traces, group.kept, group.sources, strict=True)
    for completion, score, trace, kept, source in completions:
        if kept and source == RAW:
            engine_logprob = torch.tensor(completion.logprobs)
            stored.append(
                {
                    "index": group.item.index,
                    "step": step,
                    "reward": score.reward,
                    "finished": completion.finished,
                    "token_ids": torch.tensor(completion.token_ids, dtype=torch.int32),
                    # A copy, since of a part of a tensor all of it would be sent and saved.
                    "logprob": engine_logprob if trace is None else trace.logprob.clone(),
                    "engine_logprob": engine_logprob,
                }
            )
    return group.item.index, _fresh_rewards(group), stored


def _in_their_room(stored: list[Stored], recent: dict[int, list[float]], config: Config) -> list[Stored]:
    """What of the stored completions, oldest first, the buffer has room for."""
    size, shares = config.replay.size, config.replay.tiers
    if len(stored) <= size:
        return stored
    indices = sorted({one["index"] for one in stored})
    tier = dict(zip(indices, tiers([_mean(recent[index]) for index in indices], shares), strict=True))
    counts = [sum(tier[one["index"]] == number for one in stored) for number in range(len(shares))]
    going, left = surplus(counts, size, shares), []
    for one in stored:
        if going[tier[one["index"]]]:
            going[tier[one["index"]]] -= 1
        else:
            left.append(one)
    return left


def _fresh_rewards(group: Group) -> list[float]:
    return [score.reward for score, source in zip(group.scores, group.sources, strict=True) if source == RAW]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
