"""Move box: the fewest pushes of Sokoban, with one box.

A floor of 6 × 6 squares within a brick border, some of them bricks; the answer is 1..5 pushes.
"""

from collections.abc import Iterator
from functools import cache, partial

import numpy as np

from vogue.data.puzzles.drawing import BLUE, ORANGE, RED, Box, Canvas, board, center, inset
from vogue.data.puzzles.puzzle import Puzzle, levels, pick, without_repeats

SIDE = 6
PUSHES = 5
WALLS = (3, 11)  # bricks on the floor
STEPS = ((-1, 0), (0, 1), (1, 0), (0, -1))
QUESTION = (
    "The player walks up, down, left and right over the floor, not through walls or the box, and pushes the box one "
    "square ahead by walking against it; the box cannot be pulled or pushed into a wall. What is the smallest number "
    "of pushes that brings the box onto the X? Answer with an integer."
)

Square = tuple[int, int]  # row, column from 0, the border included


@without_repeats
def puzzles(rng: np.random.Generator) -> Iterator[Puzzle]:
    """Yield random boards without end, each number of pushes as often as the others."""
    squares = [(row, column) for row in range(1, SIDE + 1) for column in range(1, SIDE + 1)]
    while True:
        pushes = int(rng.integers(1, PUSHES + 1))
        goals: list[Square] = []
        while not goals:
            order = [squares[i] for i in rng.permutation(len(squares))]
            player, box = order[:2]
            floor = frozenset(order[: len(order) - int(rng.integers(*WALLS))])
            goals = [goal for goal in _goals(floor, player, box, pushes) if goal != player]  # the X would be hidden
        goal = pick(goals, rng)
        yield Puzzle(
            QUESTION,
            str(pushes),
            _print(floor, player, box, goal),
            partial(_paint, floor, player, box, goal),
        )


def _goals(floor: frozenset[Square], player: Square, box: Square, pushes: int) -> list[Square]:
    """The squares to which the box comes in so many pushes and in no fewer.

    Where the player stands matters only up to walking, so a state is the box and the squares in reach.
    """
    reach = cache(partial(_reach, floor))

    def after_a_push(state: tuple[Square, frozenset[Square]]) -> Iterator[tuple[Square, frozenset[Square]]]:
        (row, column), reached = state
        for down, right in STEPS:
            ahead = (row + down, column + right)
            if (row - down, column - right) in reached and ahead in floor:
                yield ahead, reach((row, column), ahead)

    states = levels((box, reach(player, box)), after_a_push, pushes)
    found = [dict.fromkeys(square for square, _ in level) for level in states]
    earlier = {square for level in found[:pushes] for square in level}
    return [square for level in found[pushes:] for square in level if square not in earlier]


def _reach(floor: frozenset[Square], player: Square, box: Square) -> frozenset[Square]:
    """The squares the player can walk to around the box."""
    reach, stack = {player}, [player]
    while stack:
        row, column = stack.pop()
        for down, right in STEPS:
            square = (row + down, column + right)
            if square in floor and square != box and square not in reach:
                reach.add(square)
                stack.append(square)
    return frozenset(reach)


def _print(floor: frozenset[Square], player: Square, box: Square, goal: Square) -> str:
    symbols = {player: "P", box: "B", goal: "X"}
    lines = [
        "".join(symbols.get((row, column), "." if (row, column) in floor else "#") for column in range(SIDE + 2))
        for row in range(SIDE + 2)
    ]
    return "\n".join(["Board (# is a wall, . floor, P the player, B the box, X where it must go):", *lines])


def _paint(floor: frozenset[Square], player: Square, box: Square, goal: Square, canvas: Canvas) -> None:
    square = board(SIDE + 2, SIDE + 2)
    for row in range(SIDE + 2):
        for column in range(SIDE + 2):
            if (row, column) in floor:
                canvas.box(square(row, column), "#f7f3e8", "#cfc8b4", 0.003)
            else:
                _bricks(canvas, square(row, column))
    left, top, right, bottom = inset(square(*goal), 0.22)
    canvas.line((left, top), (right, bottom), RED, 0.022)
    canvas.line((left, bottom), (right, top), RED, 0.022)
    _crate(canvas, inset(square(*box), 0.1))
    _figure(canvas, square(*player))


def _bricks(canvas: Canvas, box: Box) -> None:
    """Draw two courses of bricks, set off against each other."""
    left, top, right, bottom = box
    middle, course = (left + right) / 2, (bottom - top) / 2
    canvas.box(box, "#c4622d", "#f0d9c8", 0.004)
    canvas.line((left, top + course), (right, top + course), "#f0d9c8", 0.005)
    canvas.line((middle, top), (middle, top + course), "#f0d9c8", 0.005)
    for x in (left, right):
        canvas.line((x, top + course), (x, bottom), "#f0d9c8", 0.005)


def _crate(canvas: Canvas, box: Box) -> None:
    left, top, right, bottom = box
    canvas.box(box, ORANGE, "#6b4010", 0.012)
    canvas.line((left, top), (right, bottom), "#6b4010", 0.01)
    canvas.line((left, bottom), (right, top), "#6b4010", 0.01)


def _figure(canvas: Canvas, box: Box) -> None:
    (x, y), side = center(box), box[2] - box[0]
    canvas.circle((x, y - 0.2 * side), 0.17 * side, BLUE)
    canvas.polygon([(x - 0.32 * side, y + 0.42 * side), (x, y - 0.12 * side), (x + 0.32 * side, y + 0.42 * side)], BLUE)
