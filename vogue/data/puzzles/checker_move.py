"""Checker move: the fewest moves between two rows of checkers.

A row of squares, all but one with a checker (G_RR). Green checkers go right and red ones left, by a slide onto the open
square beside them or a jump over one checker of the other colour onto it.
"""

from collections.abc import Iterator
from functools import cache, partial
from itertools import permutations

import numpy as np

from vogue.data.puzzles.drawing import BLACK, GREEN, LIGHT, RED, Canvas
from vogue.data.puzzles.puzzle import Puzzle, balanced, levels

CHECKERS = (3, 6)  # of both colours together
MOVES = 10
QUESTION = (
    "Green checkers (G) move only to the right, red checkers (R) only to the left: one square onto the empty one, or "
    "two squares onto the empty one by jumping over one checker of the other colour. What is the smallest number of "
    "moves from the start to the end? Answer with an integer."
)


def puzzles(rng: np.random.Generator) -> Iterator[Puzzle]:
    """Yield all pairs of rows at most MOVES moves apart, each answer equally often while any are left."""
    for moves, start, end in balanced(_pairs(), rng):
        yield Puzzle(QUESTION, str(moves), f"Start: {start}\nEnd: {end}", partial(paint, start, end))


@cache
def _pairs() -> list[list[tuple[int, str, str]]]:
    """All pairs of rows as (moves, start, end), in groups of equal numbers of moves."""
    groups: list[list[tuple[int, str, str]]] = [[] for _ in range(MOVES)]
    for start in _rows():
        for moves, ends in enumerate(levels(start, _after_a_move, MOVES)[1:], 1):
            groups[moves - 1] += [(moves, start, end) for end in ends]
    return groups


def _rows() -> Iterator[str]:
    for count in range(CHECKERS[0], CHECKERS[1] + 1):
        for green in range(1, count):
            checkers = "G" * green + "R" * (count - green) + "_"
            yield from dict.fromkeys(map("".join, permutations(checkers)))


def _after_a_move(row: str) -> Iterator[str]:
    """The checkers of the four patterns around the open square that may enter it."""
    opening = row.index("_")
    for pattern, after in (("G_", "_G"), ("_R", "R_"), ("GR_", "_RG"), ("_GR", "RG_")):
        start = opening - pattern.index("_")
        if start >= 0 and row[start : start + len(pattern)] == pattern:
            yield row[:start] + after + row[start + len(pattern) :]


def paint(start: str, end: str, canvas: Canvas) -> None:
    side = 0.94 / len(start)
    for name, row, middle in (("Start", start, 0.32), ("End", end, 0.76)):
        canvas.text((0.5, middle - side / 2 - 0.075), name, 0.08)
        for column, checker in enumerate(row):
            left = 0.03 + column * side
            canvas.box((left, middle - side / 2, left + side, middle + side / 2), "#f3ead7", BLACK, 0.006)
            if checker != "_":
                color = {"G": GREEN, "R": RED}[checker]
                canvas.circle((left + side / 2, middle), 0.38 * side, color, BLACK, 0.006)
                canvas.text((left + side / 2, middle), checker, 0.4 * side, "white")
    canvas.line((0.03, 0.53), (0.97, 0.53), LIGHT, 0.006)
