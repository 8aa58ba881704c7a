"""Water jugs: the fewest pours from some amounts to others.

3..5 jugs of distinct capacities 1..14 litres. A pour goes from one jug into another until the one is empty or the other
full; nothing is filled or emptied otherwise. The answer is 1..4 pours.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from vogue.data.puzzles.drawing import BLACK, Canvas
from vogue.data.puzzles.puzzle import Puzzle, levels, pick, without_repeats

JUGS = (3, 5)
CAPACITY = 14
POURS = 4

Amounts = tuple[int, ...]  # litres, one a jug


@without_repeats
def puzzles(rng: np.random.Generator) -> Iterator[Puzzle]:
    """Yield random jugs without end, each number of pours as often as the others."""
    while True:
        pours = int(rng.integers(1, POURS + 1))
        goals: list[Amounts] = []
        while not goals:
            count = int(rng.integers(JUGS[0], JUGS[1] + 1))
            capacities = tuple(int(number) + 1 for number in rng.permutation(CAPACITY)[:count])
            amounts = tuple(int(rng.integers(capacity + 1)) for capacity in capacities)
            reached = levels(amounts, partial(_after_a_pour, capacities), pours)
            goals = reached[pours] if len(reached) > pours else []
        yield Puzzle(
            question=f"Pour water between the {count} jugs until they hold {_list(pick(goals, rng))} litres, from left "
            "to right. A pour goes from one jug into another and ends when the first is empty or the second is full. "
            "What is the smallest number of pours? Answer with an integer.",
            answer=str(pours),
            state=f"Capacities of the jugs, from left to right: {_list(capacities)} litres\n"
            f"Water in the jugs now, from left to right: {_list(amounts)} litres",
            paint=partial(_paint, capacities, amounts),
        )


def _after_a_pour(capacities: Amounts, amounts: Amounts) -> Iterator[Amounts]:
    for giver in range(len(amounts)):
        for taker in range(len(amounts)):
            poured = min(amounts[giver], capacities[taker] - amounts[taker])
            if giver != taker and poured:
                after = list(amounts)
                after[giver] -= poured
                after[taker] += poured
                yield tuple(after)


def _list(numbers: Amounts) -> str:
    return ", ".join(map(str, numbers))


def _paint(capacities: Amounts, amounts: Amounts, canvas: Canvas) -> None:
    """Draw glasses as high as their capacity, with a mark a litre and water/capacity below each."""
    width = 0.94 / len(capacities)
    bottom, litre = 0.88, 0.83 / CAPACITY
    for jug, (capacity, amount) in enumerate(zip(capacities, amounts, strict=True)):
        middle = 0.03 + (jug + 0.5) * width
        left, right = middle - 0.36 * width, middle + 0.36 * width
        top = bottom - capacity * litre
        if amount:
            canvas.box((left, bottom - amount * litre, right, bottom), "#58a9e6")
        for mark in range(1, capacity):
            canvas.line((left, bottom - mark * litre), (left + 0.16 * width, bottom - mark * litre), BLACK, 0.004)
        for start, end in (
            ((left, top), (left, bottom)),
            ((left, bottom), (right, bottom)),
            ((right, bottom), (right, top)),
        ):
            canvas.line(start, end, BLACK, 0.014)
        canvas.text((middle, bottom + 0.065), f"{amount}/{capacity}", 0.072)
