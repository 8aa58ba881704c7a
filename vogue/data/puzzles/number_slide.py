"""Number slide: what is on a sliding board after given moves, or how many boards can k moves lead to?

Boards of n × n, n = 3..5, with the numbers 1..n² - 1 and one open square. A move slides a neighbour into the open
square; here it is named by the way the open square goes.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from vogue.data.puzzles.drawing import BLACK, BLUE, LIGHT, Canvas, board, center, inset
from vogue.data.puzzles.puzzle import Puzzle, pick, without_repeats

SIDES = (3, 5)
LISTED_MOVES = (1, 5)
COUNTED_MOVES = (1, 4)
MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}
BACK = {"up": "down", "right": "left", "down": "up", "left": "right"}
RULES = (
    "On the sliding board, a move slides a tile next to the open square into it, so that the open square moves one "
    "square up, down, left or right. "
)

Board = tuple[tuple[int, ...], ...]  # rows of numbers, 0 the open square
Square = tuple[int, int]  # row, column from 0


@without_repeats
def puzzles(rng: np.random.Generator) -> Iterator[Puzzle]:
    """Yield random boards without end, half of them with a list of moves and half with a number of moves."""
    while True:
        n = int(rng.integers(SIDES[0], SIDES[1] + 1))
        order = rng.permutation(n * n)
        tiles = tuple(tuple(int(number) for number in row) for row in order.reshape(n, n))
        opening = divmod(int(order.argmin()), n)
        question, answer = pick((_ask_sum, _ask_count), rng)(tiles, opening, rng)
        yield Puzzle(f"{RULES}{question} Answer with an integer.", str(answer), _print(tiles), partial(_paint, tiles))


def _ask_sum(tiles: Board, opening: Square, rng: np.random.Generator) -> tuple[str, int]:
    moves: list[str] = []
    for _ in range(int(rng.integers(LISTED_MOVES[0], LISTED_MOVES[1] + 1))):
        ways = _ways(len(tiles), opening, moves[-1] if moves else None)
        moves.append(pick(tuple(ways), rng))
        tiles, opening = _slide(tiles, opening, ways[moves[-1]]), ways[moves[-1]]
    number = int(rng.integers(len(tiles)))
    line, lines = pick((("row", tiles), ("column", tuple(zip(*tiles, strict=True)))), rng)
    place = f"{line} {number + 1} (counted from the {'top' if line == 'row' else 'left'})"
    times = "time" if len(moves) == 1 else "times"
    question = f"The open square moves {len(moves)} {times}: {', '.join(moves)}."
    return f"{question} What is the sum of the numbers in {place} then?", sum(lines[number])


def _ask_count(tiles: Board, opening: Square, rng: np.random.Generator) -> tuple[str, int]:
    """Ask how many boards k moves can lead to.

    One can move back, so these are the boards that k, k - 2, … moves without going back lead to.

    Two ways without going back meet in one board only in 12 moves or more together, around a block of 2 × 2.
    """
    k = int(rng.integers(COUNTED_MOVES[0], COUNTED_MOVES[1] + 1))
    moves = "1 move" if k == 1 else f"{k} moves"
    question = f"How many different boards can there be after exactly {moves}? A move may undo the one before it."
    return question, sum(_walks(len(tiles), opening, length, None) for length in range(k, -1, -2))


def _walks(n: int, opening: Square, length: int, last: str | None) -> int:
    """The number of ways of the open square, `length` moves long, that never go back."""
    if length == 0:
        return 1
    return sum(_walks(n, square, length - 1, move) for move, square in _ways(n, opening, last).items())


def _ways(n: int, opening: Square, last: str | None) -> dict[str, Square]:
    """The squares to which the open square can go, except the one that it came from."""
    squares = {move: (opening[0] + down, opening[1] + right) for move, (down, right) in MOVES.items()}
    return {
        move: square
        for move, square in squares.items()
        if min(square) >= 0 and max(square) < n and (last is None or move != BACK[last])
    }


def _slide(tiles: Board, opening: Square, target: Square) -> Board:
    rows = [list(row) for row in tiles]
    rows[opening[0]][opening[1]], rows[target[0]][target[1]] = rows[target[0]][target[1]], 0
    return tuple(map(tuple, rows))


def _print(tiles: Board) -> str:
    lines = [" ".join(str(number or "_") for number in row) for row in tiles]
    return "\n".join(["Board (_ is the open square):", *lines])


def _paint(tiles: Board, canvas: Canvas) -> None:
    n = len(tiles)
    square = board(n, n)
    left, top, _, _ = square(0, 0)
    _, _, right, bottom = square(n - 1, n - 1)
    canvas.box((left, top, right, bottom), "#5b5b66", BLACK, 0.008)
    for row, numbers in enumerate(tiles):
        for column, number in enumerate(numbers):
            if number:
                tile = inset(square(row, column), 0.06)
                canvas.box(tile, "#fdf4dc", LIGHT, 0.004, 0.02)
                canvas.text(center(tile), str(number), 0.5 * (tile[2] - tile[0]), BLUE)
