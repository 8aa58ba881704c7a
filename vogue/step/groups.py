"""Groups of completions: generated for a step's items, judged, and turned into rows that are trained on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor

from vogue import distributed
from vogue.config import Config
from vogue.estimates import pass_at_k
from vogue.inputs import NOISY, RAW
from vogue.method import curiosity
from vogue.method.advantage import (
    deviation,
    group_advantages,
    over,
    over_tokens,
    passk_advantages,
    rloo_advantages,
)
from vogue.method.critic import dealt_prefixes
from vogue.method.pairs import kept_by_pairs
from vogue.method.uncertainty import TokenStats
from vogue.metrics import Means
from vogue.model.packing import Batch, Place, Row
from vogue.rewards import Score
from vogue.rollout.engine import Completion, Generates, Request
from vogue.rollout.sampling import of_rollouts
from vogue.seeds import Purpose, rng_for, seed_for
from vogue.step.loader import Item
from vogue.step.objective import has_gradient, reads_all

RIGHT, WRONG = "log_perplexity/right", "log_perplexity/wrong"  # metrics


@dataclass(frozen=True)
class Trace:
    """What the training forward found of a completion's tokens."""

    entropy: Tensor  # (T,) nats, exact
    u_per: Tensor | None  # (T,) nats, the symmetric divergence; None where one branch alone was computed
    logprob: Tensor  # (T,) nats, by the policy before the step's first update
    kl: Tensor | None = None  # (T,) nats, to the reference; None where it wasn't computed


def traced(batch: Batch, stats: TokenStats) -> dict[Place, Trace]:
    """What the forward found of each completion, by its place among the step's groups."""
    entropy = stats.entropy.detach().cpu()
    u_per = entropy[:0] if stats.other is None else stats.other.symmetric_kl.detach().cpu()
    logprob = (stats if batch.old is None else batch.old).logprob.detach().cpu()
    kl = None if stats.reference is None else stats.reference.kl.detach().cpu()
    traces = {}
    for here, place in zip(batch.slices, batch.places, strict=True):
        if place is not None:
            compared = u_per[here] if here.stop <= len(u_per) else None
            traces[place] = Trace(entropy[here], compared, logprob[here], None if kl is None else kl[here])
    return traces


@dataclass(frozen=True)
class Replayed:
    """A completion of an earlier step that is trained on again, on the raw view."""

    completion: Completion  # with the engine's log-probabilities of that time
    behaviour: Tensor  # (T,) nats: those of the policy that generated it, by the trainer, which ratios are taken to
    advantage: float
    age: int  # steps since it was generated


@dataclass(frozen=True, kw_only=True)
class Group:
    """G completions of one item, scored against each other, and trained on one view of its images."""

    item: Item
    view: str  # that they are trained on
    completions: tuple[Completion, ...]
    sources: tuple[str, ...]  # the view that each was generated from
    kept: tuple[bool, ...]  # those that are trained on
    paid: tuple[bool, ...]  # those whose u_per is paid
    repeats: tuple[int, ...] = ()  # how often each that is kept is trained on in its update; empty: once
    scores: tuple[Score, ...] = ()
    advantages: tuple[float, ...] = ()
    traces: tuple[Trace | None, ...] = ()  # after training; None of those that needed no forward
    replayed: tuple[Replayed, ...] = ()  # that are trained on beside these
    behaviours: tuple[Tensor | None, ...] = ()  # of each completion, as `Row`'s


def generate(engine: Generates, config: Config, items: Sequence[Item], step: int) -> list[Group]:
    """The groups that the items' draws ask for, unscored.

    With `branch.rollout=drawn` one of every view that is drawn: both, where draws are per response and differ. With
    `raw` the raw one alone, whose draws decide where u_per is paid. With `rollout.noisy_share` (NoisyRollout) one group
    of completions of both views, trained on the raw one.
    """
    n, noisy_n = config.rollout.n, config.rollout.noisy_count
    if noisy_n:
        clean = _complete(engine, config, step, [(item, RAW) for item in items], n - noisy_n)
        noisy = _complete(engine, config, step, [(item, NOISY) for item in items], noisy_n)
        sources = (RAW,) * (n - noisy_n) + (NOISY,) * noisy_n
        return [
            Group(item=item, view=RAW, completions=a + b, sources=sources, kept=(True,) * n, paid=(False,) * n)
            for item, a, b in zip(items, clean, noisy, strict=True)
        ]
    if config.branch.rollout == "raw":
        wanted = [(item, RAW) for item in items]
    else:
        wanted = [(item, view) for item in items for view in (RAW, NOISY) if (view == NOISY) in item.draws]
    groups = []
    for (item, view), completions in zip(wanted, _complete(engine, config, step, wanted, n), strict=True):
        drawn = tuple(z == (view == NOISY) for z in item.draws)
        kept, paid = ((True,) * n, item.draws) if config.branch.rollout == "raw" else (drawn, (view == NOISY,) * n)
        groups.append(Group(item=item, view=view, completions=completions, sources=(view,) * n, kept=kept, paid=paid))
    return groups


def _complete(
    engine: Generates, config: Config, step: int, wanted: Sequence[tuple[Item, str]], n: int
) -> list[tuple[Completion, ...]]:
    """`n` completions for each item's view of that name."""
    requests = [
        Request(
            item.prompt,
            item.views[view],
            seed_for(config.seed, Purpose.ROLLOUT, step, item.number, view == NOISY),
        )
        for item, view in wanted
    ]
    return list(map(tuple, engine.generate(requests, n, of_rollouts(config))))


def judged(group: Group, scores: Iterable[Score], config: Config) -> Group:
    """The group with its scores, shaped for length where `reward.overlong_buffer` asks for it, and its advantages.

    With `loss.drop_unfinished` it keeps no completion that was cut off; these count in its baseline all the same.
    """
    buffer = round(config.reward.overlong_buffer * config.rollout.max_tokens)
    if buffer:
        lengths = (completion.steps for completion in group.completions)
        punishments = [overlong_punishment(length, config.rollout.max_tokens, buffer) for length in lengths]
        scores = [
            replace(score, reward=score.reward + value, components=score.components | {"overlong": value})
            for score, value in zip(scores, punishments, strict=True)
        ]
    kept = group.kept
    if config.loss.drop_unfinished:
        kept = tuple(keep and completion.finished for keep, completion in zip(kept, group.completions, strict=True))
    scores = tuple(scores)
    group = replace(group, scores=scores, advantages=_advantages(scores, config), kept=kept)
    return in_pairs(group, config.advantage.pairs)


def penalised(group: Group, traces: Sequence[Trace], config: Config) -> Group:
    """The group with kl.coef times each completion's KL to the reference taken off its reward, and its new advantages.

    A completion's is the sum over its tokens, as for the reward of the whole, r(o) − coef log π(o)/ref(o).
    """
    taken = [-config.kl.coef * float(trace.kl.sum()) for trace in traces]  # pyright: ignore[reportOptionalMemberAccess]
    scores = tuple(
        replace(score, reward=score.reward + value, components=score.components | {"kl": value})
        for score, value in zip(group.scores, taken, strict=True)
    )
    return replace(group, scores=scores, advantages=_advantages(scores, config))


def _advantages(scores: tuple[Score, ...], config: Config) -> tuple[float, ...]:
    rewards, settings = torch.tensor([[score.reward for score in scores]]), config.advantage
    if settings.valued:  # what the tokens' advantages are made of once their values are known
        return tuple(rewards[0].tolist())
    if settings.kind == "passk":
        advantages = passk_advantages(torch.tensor([[score.accuracy == 1 for score in scores]]), settings.k)
    elif settings.kind == "rloo":
        advantages = rloo_advantages(rewards)
    else:
        advantages = group_advantages(rewards, scaled=settings.scale == "group")
    return tuple(advantages[0].tolist())


def scaled_over_step(groups: list[Group], config: Config, chosen: set[int] | None = None) -> list[Group]:
    """The groups with advantages over the std of the step's rewards, of all ranks, where `advantage.scale=batch`.

    chosen  the prompts whose rewards count, which are those that are trained on; None: all. Of others the std would
            say how many rounds it took, and the size of a step would depend on that
    """
    if config.advantage.scale != "batch":
        return groups
    mine = [group for group in groups if chosen is None or group.item.number in chosen]
    rewards = distributed.gather([score.reward for group in mine for score in group.scores])
    std = deviation([reward for part in rewards for reward in part])
    return [replace(group, advantages=tuple(over(torch.tensor(group.advantages), std).tolist())) for group in groups]


def in_pairs(group: Group, share: float) -> Group:
    """The group with only what lies in this share of its pairs kept, the widest ones (Shuffle-R1); all of it for 1."""
    if share == 1:
        return group
    chosen = kept_by_pairs(group.advantages, share)
    return replace(group, kept=tuple(a and b for a, b in zip(group.kept, chosen, strict=True)))


def curious(group: Group, scores: Iterable[Score], config: Config, step: int) -> list[Score]:
    """The group's scores with CDE's bonus in their rewards, told as the component "curiosity", if there is one.

    B is of the engine's log-probabilities, which the rollout has: the bonus costs no forward. Accuracies stay, so that
    dynamic sampling still calls a group of right answers alone unmixed, though its bonuses may differ.
    """
    settings = config.curiosity
    if not settings.weight:
        return list(scores)
    weight = curiosity.weight_at(step, config.trainer.steps, settings.weight, settings.schedule, settings.drop_at)
    found = []
    for score, completion in zip(scores, group.completions, strict=True):
        surprise = curiosity.log_perplexity(completion.logprobs)
        extra = curiosity.bonus(score.reward, surprise, weight=weight, alpha=settings.alpha, cap=settings.cap)
        components = score.components | {"curiosity": extra}
        found.append(replace(score, reward=score.reward + extra, components=components))
    return found


def overlong_punishment(length: int, longest: int, buffer: int) -> float:
    """DAPO's soft punishment (arXiv 2503.14476): 0 up to `longest` - `buffer` tokens, from there linearly to -1."""
    return min(0.0, (longest - buffer - length) / buffer)


def in_updates(groups: Sequence[Group], updates: int) -> list[dict[int, Group]]:
    """Groups by their number in the step, for each of its updates."""
    return [
        {number: group for number, group in enumerate(groups) if group.item.update == update}
        for update in range(updates)
    ]


def rows(groups: Mapping[int, Group], config: Config, step: int, shared_prefix: bool, rank: int = 0) -> list[Row]:
    """This rank's groups by their number as rows: one a group, or one a completion where none can share a prompt.

    A group that is longer than `trainer.micro_batch_tokens` is several rows, each with the prompt again, so that memory
    is bounded; a row of one completion may be longer all the same.
    What the loss and the log don't read is left out: completions whose loss has no gradient, unless it reads all of
    them, and the other view of those that nothing compares. A step that measures leaves out nothing that is kept.
    Completions that are paid and those that aren't, which a draw a response leaves in one raw group, are two rows, so
    that VOGUE's second forward is of the paid ones alone.
    """
    measures, made = config.trainer.measures(step), []
    everything = measures or reads_all(config.loss) or config.kl.in_loss or config.perception.on
    everything |= config.advantage.valued
    robust, all_compared = config.robust, measures or config.compares
    for number, group in groups.items():
        group = joined(group)
        shown = group.item.views[RAW].shown  # without images and videos the views are one
        trained = group.view if shown else RAW
        other = RAW if trained == NOISY else NOISY
        lengths = [len(completion.token_ids) for completion in group.completions]
        shape = config.advantage.shape
        advantages = [over_tokens(a, length, shape) for a, length in zip(group.advantages, lengths, strict=True)]
        right = [score.accuracy == 1 for score in group.scores]
        right += [False] * (len(lengths) - len(right))  # of what is replayed the scores aren't kept
        held = [shown and robust.holds(each) for each in right]
        needed = [
            i for i, kept in enumerate(group.kept) if kept and (everything or held[i] or has_gradient(advantages[i]))
        ]
        # Whatever is compared is so with the same views, so that ranks have as many forwards.
        kinds = [(paid, all_compared or hold) for paid in (False, True) for hold in (False, True)]
        for paid, hold in dict.fromkeys(kinds):
            chosen = [i for i in needed if group.paid[i] == paid and (all_compared or held[i] == hold)]
            # Without an advantage there is no bonus: such completions are there for their entropy alone.
            bonus = paid and shown and (measures or any(has_gradient(advantages[i]) for i in chosen))
            compared = shown and (measures or config.compares or (bonus and reads_other(config)))
            others = compared_views(config, step, other) if compared or (shown and hold) else ()
            budget = config.trainer.micro_batch_tokens - len(group.item.prompt.token_ids)
            sizes = [completion.steps for completion in group.completions]
            for part in cut(chosen, sizes, budget if shared_prefix else 0):
                row = Row(
                    prompt=group.item.prompt,
                    views=group.item.views,
                    trained=trained,
                    completions=tuple(group.completions[i] for i in part),
                    advantages=tuple(advantages[i] for i in part),
                    others=others,
                    degraded=len(robust.views) if others else 0,
                    right=tuple(right[i] for i in part),
                    sources=tuple(group.sources[i] if shown else RAW for i in part),
                    paid=bonus,
                    places=tuple(Place(number, i, rank) for i in part),
                    repeats=tuple(group.repeats[i] for i in part) if group.repeats else (),
                    behaviours=tuple(group.behaviours[i] for i in part) if group.behaviours else (),
                    dealt=tuple(_dealt(group, i, config, step) for i in part) if config.advantage.valued else (),
                )
                made.append(row)
    return made


def joined(group: Group) -> Group:
    """The group with its replayed completions behind its own ones, without scores and traces of them.

    Whether u_per is paid on one is the draw of the completion in the same place: with a draw a prompt, all's.
    """
    more = group.replayed
    if not more:
        return group
    count = len(more)
    return replace(
        group,
        completions=group.completions + tuple(one.completion for one in more),
        sources=group.sources + (RAW,) * count,
        kept=group.kept + (True,) * count,
        paid=group.paid + tuple(group.paid[i % len(group.paid)] for i in range(count)),
        advantages=group.advantages + tuple(one.advantage for one in more),
        behaviours=(None,) * len(group.completions) + tuple(one.behaviour for one in more),
        replayed=(),
    )


def _dealt(group: Group, i: int, config: Config, step: int) -> Tensor:
    """Which value head learns of which token of the group's completion `i`."""
    where = step, group.item.number, group.view == NOISY, i
    generator = rng_for(config.seed, Purpose.DEALT, *where)
    length, settings = len(group.completions[i].token_ids), config.critic
    return dealt_prefixes(length, settings.heads, settings.share, generator)


def cut(chosen: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """`chosen` completions in order, in parts of at most `budget` tokens; one that is longer is a part of its own."""
    parts: list[list[int]] = []
    total = 0  # tokens of the last part
    for i in chosen:
        if parts and total + lengths[i] <= budget:
            parts[-1].append(i)
            total += lengths[i]
        else:
            parts.append([i])
            total = lengths[i]
    return parts


def compared_views(config: Config, step: int, other: str) -> tuple[str, ...]:
    """The views of a row that is compared with any: the `other` of x and T(x), the degraded ones, or both."""
    plain = not config.robust.on or config.compares or config.trainer.measures(step)
    return (other,) * plain + config.robust.views


def idle_row(group: Group, others: tuple[str, ...], degraded: int) -> Row:
    """A row that only keeps a rank in step, of the group's first completion."""
    completion = group.completions[0]
    return Row(
        prompt=group.item.prompt,
        views=group.item.views,
        trained=RAW,
        completions=(completion,),
        advantages=(torch.zeros(len(completion.token_ids)),),
        others=others,
        degraded=degraded if others else 0,
        weight=0.0,
    )


def reads_other(config: Config) -> bool:
    """Whether the loss of a completion whose draw was noisy reads the view that it isn't trained on."""
    of_drawn = config.branch.rollout == "raw" and config.uncertainty.entropy == "drawn"
    return config.guidance.alpha_per > 0 or (of_drawn and config.guidance.alpha_out > 0)


def kept_lengths(groups: Iterable[Group]) -> list[int]:
    """Tokens of each completion that is trained on, as often as it is, whether it goes through a forward or not."""
    return [
        len(completion.token_ids)
        for group in map(joined, groups)
        for completion, times in compress(zip(group.completions, times_of(group), strict=True), group.kept)
        for _ in range(times)
    ]


def times_of(group: Group) -> tuple[int, ...]:
    """How often each completion that is kept is trained on in its update."""
    return group.repeats or (1,) * len(group.completions)


def has_signal(group: Group) -> bool:
    """Whether the group's completions are worth different things, so that one is learned and another unlearned."""
    return len(set(group.advantages)) > 1


def tally(groups: Iterable[Group], means: Means) -> None:
    """Add the metrics of all groups and completions that were generated."""
    for group in groups:
        scores = group.scores
        right = sum(score.accuracy == 1 for score in scores)
        means.add("solved_share", right == len(scores))
        means.add("mixed_share", 0 < right < len(scores))
        means.add("differing_share", has_signal(group))
        means.add("alike_share", len({completion.token_ids for completion in group.completions}) == 1)
        means.add("distinct_answers", len({score.parsed for score in scores}))
        means.add("pass_at_n", pass_at_k(len(scores), right, len(scores)))
        completions = zip(scores, group.completions, group.kept, group.sources, group.paid, strict=True)
        for score, completion, kept, source, paid in completions:
            means.add("reward", score.reward)
            means.add("accuracy", score.accuracy)
            means.add("format", score.format)
            for name, value in score.components.items():
                means.add(f"reward/{name}", value)
            means.add("answered", score.parsed is not None)
            means.add("finished", completion.finished)
            means.add("tokens", len(completion.token_ids))
            if completion.latents is not None:
                means.add("latents", len(completion.latents))
            side = RIGHT if score.accuracy == 1 else WRONG
            means.add(side, curiosity.log_perplexity(completion.logprobs))
            if kept:
                means.add("noisy_share", source == NOISY)
                means.add("paid_share", paid)
