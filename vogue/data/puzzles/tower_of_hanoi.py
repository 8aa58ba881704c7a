"""Tower of Hanoi: the fewest moves between two positions of 3..6 disks, 1..6 of them."""

from collections.abc import Iterator
from functools import cache, partial

import numpy as np

from vogue.data.puzzles.drawing import BLUE, GREEN, GREY, LIGHT, ORANGE, PURPLE, RED, TEAL, Canvas
from vogue.data.puzzles.puzzle import Puzzle, balanced, levels

DISKS = (3, 4, 5, 6)
MOVES = 6
RODS = 3
COLORS = (RED, ORANGE, GREEN, BLUE, PURPLE, TEAL)  # from the smallest disk
QUESTION = (
    "In the tower of Hanoi one disk is moved at a time, from the top of a rod to the top of another, and never onto a "
    "smaller disk. What is the smallest number of moves from the start to the end? Answer with an integer."
)

Position = tuple[int, ...]  # the rod, from 0, of each disk from the smallest


def puzzles(rng: np.random.Generator) -> Iterator[Puzzle]:
    """Yield all pairs of positions at most MOVES moves apart, each number of disks and of moves equally often while any
    are left.
    """
    groups = [_pairs(disks, moves) for disks in DISKS for moves in range(1, MOVES + 1)]
    for moves, start, end in balanced(groups, rng):
        yield Puzzle(
            QUESTION,
            str(moves),
            f"{_print('Start', start)}\n{_print('End', end)}",
            partial(_paint, start, end),
        )


@cache
def _pairs(disks: int, moves: int) -> list[tuple[int, Position, Position]]:
    """Every two positions as (moves, start, end), where `moves` are the fewest between them."""
    return [(moves, start, end) for start in np.ndindex((RODS,) * disks) for end in _reached(start)[moves]]


@cache
def _reached(start: Position) -> list[list[Position]]:
    return levels(start, _after_a_move, MOVES)


def _after_a_move(position: Position) -> Iterator[Position]:
    tops = [next((disk for disk, at in enumerate(position) if at == rod), len(position)) for rod in range(RODS)]
    for source, disk in enumerate(tops):
        for target, other in enumerate(tops):
            if disk < other and source != target:
                yield (*position[:disk], target, *position[disk + 1 :])


def _print(name: str, position: Position) -> str:
    lines = [f"{name}, disks on each rod from bottom to top (disk 1 is the smallest):"]
    for rod in range(RODS):
        disks = [str(disk + 1) for disk in reversed(range(len(position))) if position[disk] == rod]
        lines.append(f"Rod {rod + 1}: {', '.join(disks) or 'empty'}")
    return "\n".join(lines)


def _paint(start: Position, end: Position, canvas: Canvas) -> None:
    for name, position, top in (("Start", start, 0.0), ("End", end, 0.5)):
        canvas.text((0.1, top + 0.055), name, 0.065)
        floor, height = top + 0.455, 0.3 / len(position)
        canvas.box((0.03, floor, 0.97, floor + 0.02), GREY)
        for rod in range(RODS):
            x = 0.19 + 0.31 * rod
            canvas.box((x - 0.01, top + 0.1, x + 0.01, floor), GREY)
            disks = [disk for disk in reversed(range(len(position))) if position[disk] == rod]
            for level, disk in enumerate(disks):
                half = 0.035 + 0.11 * (disk + 1) / len(position)
                bottom = floor - level * height
                canvas.box((x - half, bottom - height, x + half, bottom), COLORS[disk], LIGHT, 0.004, 0.01)
    canvas.line((0.03, 0.5), (0.97, 0.5), LIGHT, 0.006)
