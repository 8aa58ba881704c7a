"""Maze: how long is the way through, and how often does it turn?

A depth-first spanning tree of 3..6 × 3..6 cells, drawn as a grid of (2·rows + 1) × (2·columns + 1) squares, each free
or a wall. The entry is in the left border, the exit in the right or the bottom one. There is one way through.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import numpy as np

from vogue.data.puzzles.drawing import BLACK, BLUE, GREEN, GREY, Box, Canvas, board, center
from vogue.data.puzzles.puzzle import Puzzle, pick, without_repeats

CELLS = (3, 6)
RULES = (
    "Walk through the maze from the green arrow to the blue arrow the shortest way, from square to square, never "
    "diagonally and never onto a wall. You enter walking to the right. "
)
QUESTIONS = {
    "squares": "How many squares do you walk over, counting the two with the arrows?",
    "left": "How many left turns do you make?",
    "right": "How many right turns do you make?",
    "turns": "How many turns do you make, left and right together?",
}
STEPS = ((-1, 0), (0, 1), (1, 0), (0, -1))

Square = tuple[int, int]  # row, column from 0


@without_repeats
def puzzles(rng: np.random.Generator) -> Iterator[Puzzle]:
    """Yield random mazes without end."""
    while True:
        rows, columns = (int(number) for number in rng.integers(CELLS[0], CELLS[1] + 1, size=2))
        entry = (2 * int(rng.integers(rows)) + 1, 0)
        right = (2 * int(rng.integers(rows)) + 1, 2 * columns)
        bottom = (2 * rows, 2 * int(rng.integers(columns)) + 1)
        exit = pick((right, bottom), rng)
        free = _carve(rows, columns, rng) | {entry, exit}
        asked = pick(tuple(QUESTIONS), rng)
        yield Puzzle(
            question=f"{RULES}{QUESTIONS[asked]} Answer with an integer.",
            answer=str(_measures(_way(free, entry, exit))[asked]),
            state=_print(rows, columns, free, entry, exit),
            paint=partial(_paint, rows, columns, free, entry, exit),
        )


def _carve(rows: int, columns: int, rng: np.random.Generator) -> set[Square]:
    """Carve the free squares inside the border: cells, at odd places, and the openings between joined cells."""
    stack = [(2 * int(rng.integers(rows)) + 1, 2 * int(rng.integers(columns)) + 1)]
    free = set(stack)
    while stack:
        row, column = stack[-1]
        ahead = [
            (down, right)
            for down, right in STEPS
            if 0 < row + 2 * down < 2 * rows
            and 0 < column + 2 * right < 2 * columns
            and (row + 2 * down, column + 2 * right) not in free
        ]
        if not ahead:
            stack.pop()
            continue
        down, right = pick(ahead, rng)
        stack.append((row + 2 * down, column + 2 * right))
        free |= {(row + down, column + right), stack[-1]}
    return free


def _way(free: set[Square], entry: Square, exit: Square) -> list[Square]:
    """Walk from `entry` to `exit`; free squares form a tree, so that a depth-first walk finds the only way."""
    came_from, stack = {entry: entry}, [entry]
    while stack[-1] != exit:
        row, column = stack.pop()
        for down, right in STEPS:
            square = (row + down, column + right)
            if square in free and square not in came_from:
                came_from[square] = (row, column)
                stack.append(square)
    way = [exit]
    while way[-1] != entry:
        way.append(came_from[way[-1]])
    return way[::-1]


def _measures(way: list[Square]) -> dict[str, int]:
    headings = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(way)]
    # from (down, right) = (0, 1) to (-1, 0), that is from right to up, the cross product is 1: a left turn
    turns = [a[0] * b[1] - a[1] * b[0] for a, b in pairwise(headings)]
    left, right = turns.count(1), turns.count(-1)
    return {"squares": len(way), "left": left, "right": right, "turns": left + right}


def _print(rows: int, columns: int, free: set[Square], entry: Square, exit: Square) -> str:
    lines = [
        " ".join("0" if (row, column) in free else "1" for column in range(2 * columns + 1))
        for row in range(2 * rows + 1)
    ]
    return "\n".join(
        [
            "Maze (1 is a wall, 0 is free):",
            *lines,
            f"Green arrow (entry): row {entry[0] + 1}, column {entry[1] + 1}",
            f"Blue arrow (exit): row {exit[0] + 1}, column {exit[1] + 1}",
        ]
    )


def _paint(rows: int, columns: int, free: set[Square], entry: Square, exit: Square, canvas: Canvas) -> None:
    square = board(2 * rows + 1, 2 * columns + 1)
    for row in range(2 * rows + 1):
        for column in range(2 * columns + 1):
            canvas.box(square(row, column), "white" if (row, column) in free else BLACK, GREY, 0.002)
    _arrow(canvas, square(*entry), (0, 1), GREEN)
    _arrow(canvas, square(*exit), (0, 1) if exit[1] == 2 * columns else (1, 0), BLUE)


def _arrow(canvas: Canvas, box: Box, heading: Square, color: str) -> None:
    """Draw an arrow that fills `box` and points `heading` (down, right)."""
    (x, y), half = center(box), (box[2] - box[0]) / 2
    outline = ((-0.8, -0.3), (0, -0.3), (0, -0.75), (0.85, 0), (0, 0.75), (0, 0.3), (-0.8, 0.3))  # along, across
    down, right = heading
    canvas.polygon([(x + half * (a * right - b * down), y + half * (a * down + b * right)) for a, b in outline], color)
