"""Rows are dealt to the ranks once rewards are known: what one rank has generated, another one may train on.

Which completions are trained on (A != 0) and how long they are is only known after the rollout. If each rank trained on
what it has generated, most would wait for the one with the longest completions: ZeRO-3's collectives make the i-th
micro-batch of all ranks end together. So the rows of all ranks are packed as if they were one rank's, and the
micro-batches of similar size are the ranks' i-th ones:

    all rows, longest first  ->  micro-batches 0 1 2 3 4 5 ...  ->  0 1 of the ranks first, 2 3 second, ...

What a row weighs in the loss doesn't depend on where it is computed: results differ in the order of their sums alone.
Token ids and states travel, images don't: the loader makes them again from the seed, the step and their prompt's
`Origin`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from vogue import distributed
from vogue.data import DataError
from vogue.metrics import Clock, Mean
from vogue.model.packing import Place, Row, pack, spread, tokens_of
from vogue.rollout.engine import Completion
from vogue.step.groups import Trace
from vogue.step.loader import Item, Loader, Origin

MADE_AGAIN = ("prompt", "views")  # of a row on the rank that gets it
NOBODY = -1  # the rank of a row that only keeps ranks in step
STEPS = 64  # of the budget, in which a smaller one is looked for


class Load(NamedTuple):
    """All that the deal knows of a row."""

    rank: int  # that generated its completions
    number: int  # among that rank's rows of the update
    tokens: int
    others: tuple[str, ...]  # as in `Row`


class Parcel(NamedTuple):
    """A row on its way to another rank."""

    origin: Origin
    fields: dict[str, Any]  # of the `Row`, but for MADE_AGAIN


Share = list[list[Load]]  # a rank's micro-batches
IDLE, IDLE_COMPARED = Load(NOBODY, 0, 0, ()), Load(NOBODY, 0, 0, ("any",))


def all_loads(rows: Sequence[Row], rank: int) -> list[list[Load]]:
    """What the deal has to know of every rank's rows, in order of rank; `rows` are this rank's. Collective."""
    return distributed.gather([Load(rank, i, row.tokens, row.others) for i, row in enumerate(rows)], Load)


def deal(loads: Sequence[Load], budget: int, ranks: int) -> list[Share]:
    """Each rank's micro-batches of at most `budget` tokens: as many on every rank, those with compared rows first.

    Every rank has to take part in as many forwards of each kind as the others; where rows don't suffice for that,
    there are `IDLE` ones. With several ranks the budget is lowered as far as it makes no rank's micro-batches more, and
    the i-th ones are next to one another in order of size, each on the rank that has generated most of it. Every rank
    computes the same deal.
    """
    packed = pack(loads, budget) if ranks == 1 else _evenly_packed(loads, budget, ranks)
    kinds, shares = _kinds(packed), [[] for _ in range(ranks)]
    counts = _slots(packed, ranks)
    if not any(counts):
        counts = (0, 1)  # nothing sends a gradient, but the optimizer's moments and decay go on
    for micro_batches, count, filler in zip(kinds, counts, (IDLE_COMPARED, IDLE), strict=True):
        filled = spread(micro_batches, count * ranks, filler)
        if ranks > 1:
            filled.sort(key=tokens_of, reverse=True)
        for first in range(0, len(filled), ranks):
            for share, taken in zip(shares, _near_home(filled[first : first + ranks]), strict=True):
                share.append(taken)
    return shares


def balance(shares: Sequence[Share]) -> Mean:
    """Of the time that ranks in lock-step need for tokens, the part in which they compute some: 1 where none waits."""
    longest = sum(max(map(tokens_of, slot)) for slot in zip(*shares, strict=True))
    return Mean(sum(load.tokens for share in shares for load in _all(share)), len(shares) * longest)


def exchange(
    shares: Sequence[Share], rows: Sequence[Row], items: Sequence[Item], loader: Loader, step: int, clock: Clock
) -> dict[Load, Row]:
    """The rows that this rank gets of others, who each give what is dealt away of their `rows`.

    items  that each of the rows is of

    Collective; nothing is sent where every rank keeps what it has. Raises, on all ranks, the `DataError` of a prompt
    that one of them can't make again.
    """
    leaving = [load for new, share in enumerate(shares) for load in _all(share) if load.rank not in (new, NOBODY)]
    if not leaving:
        return {}
    own = {load: _parcel(rows[load.number], items[load.number].origin) for load in leaving if load.rank == loader.rank}
    wanted = {load for load in _all(shares[loader.rank]) if load.rank != loader.rank}
    everyone = distributed.gather(own, Load, Parcel, Origin, Completion, Place)
    parcels = {load: parcel for sent in everyone for load, parcel in sent.items() if load in wanted}
    with distributed.together(DataError, meeting=clock.waiting):
        again = loader.again(sorted({parcel.origin for parcel in parcels.values()}), step)
    return {load: _opened(parcel, again[parcel.origin]) for load, parcel in parcels.items()}


def bring_home(traces: Mapping[Place, Trace], rank: int) -> dict[Place, Trace]:
    """The traces of what this rank has generated, whichever rank trained on it. Collective."""
    # Copies, since of a part of a tensor all of it would be sent.
    away = {
        place: Trace(*(None if x is None else x.clone() for x in vars(trace).values()))  # pyright: ignore
        for place, trace in traces.items()
        if place.rank != rank
    }
    found = {place: trace for part in distributed.gather(away, Place, Trace) for place, trace in part.items()}
    return {place: trace for place, trace in (found | dict(traces)).items() if place.rank == rank}


def _parcel(row: Row, origin: Origin) -> Parcel:
    silent = tuple(replace(completion, text="") for completion in row.completions)  # training reads no text
    fields = {name: value for name, value in vars(row).items() if name not in MADE_AGAIN}
    return Parcel(origin, fields | {"completions": silent})


def _opened(parcel: Parcel, item: Item) -> Row:
    return Row(prompt=item.prompt, views=item.views, **parcel.fields)


def _all(share: Share) -> Iterable[Load]:
    return (load for micro_batch in share for load in micro_batch)


def _kinds(packed: Share) -> tuple[Share, Share]:
    """The micro-batches with compared rows, and those without."""
    compared = sum(bool(micro_batch[0].others) for micro_batch in packed)
    return packed[:compared], packed[compared:]


def _slots(packed: Share, ranks: int) -> tuple[int, int]:
    """Micro-batches of each kind that every rank computes."""
    with_others, without = _kinds(packed)
    return -(-len(with_others) // ranks), -(-len(without) // ranks)


def _evenly_packed(loads: Sequence[Load], budget: int, ranks: int) -> Share:
    """Packed by the smallest budget, within a 64th, with which no rank has more micro-batches than with the given one.

    Full micro-batches and a remainder would leave most ranks waiting while few compute the last ones.
    """
    packed = pack(loads, budget)
    most, low, high = sum(_slots(packed, ranks)), 0, budget
    while high - low > max(1, budget // STEPS):
        middle = (low + high) // 2
        tried = pack(loads, middle)
        if sum(_slots(tried, ranks)) <= most:
            packed, high = tried, middle
        else:
            low = middle
    return packed


def _near_home(slot: Share) -> Share:
    """The micro-batches of a slot in order of rank, so that few of their prompts have to be made again."""
    claims: Counter[tuple[int, int]] = Counter()  # tokens of a micro-batch, by its number, that a rank has generated
    for number, micro_batch in enumerate(slot):
        for load in micro_batch:
            claims[number, load.rank] += load.tokens
    free, taken = set(range(len(slot))), {}  # numbers of micro-batches; by rank the one that it gets
    for number, rank in sorted(claims, key=lambda claim: (-claims[claim], claim)):
        if rank != NOBODY and rank not in taken and number in free:
            taken[rank] = number
            free.remove(number)
    left = iter(sorted(free))
    return [slot[taken[rank] if rank in taken else next(left)] for rank in range(len(slot))]
