"""N-queens: two queens of a solution are missing; how far apart do they stand?

Boards of n = 8..10. The n - 2 queens leave two rows and two columns free, so every way to place the last two has the
same Manhattan distance.
"""

from collections.abc import Iterator
from functools import cache, partial
from itertools import combinations

import numpy as np

from vogue.data.puzzles.drawing import BLACK, Canvas, board
from vogue.data.puzzles.puzzle import Puzzle, balanced

SIDES = (8, 9, 10)

Queens = tuple[tuple[int, int], ...]  # row, column from 1, in the order of the rows


def puzzles(rng: np.random.Generator) -> Iterator[Puzzle]:
    """Yield all boards in random order, each size as often as the others while any are left."""
    for n, queens in balanced([_boards(n) for n in SIDES], rng):
        rows, columns = ({*range(1, n + 1)} - {*taken} for taken in zip(*queens, strict=True))
        yield Puzzle(
            question=f"On the {n} × {n} chessboard stand {n - 2} queens. Two more are placed so that no two of the "
            f"{n} queens share a row, a column or a diagonal. What is the Manhattan distance between the two squares "
            "they are placed on (the rows plus the columns by which they differ)? Answer with an integer.",
            answer=str(max(rows) - min(rows) + max(columns) - min(columns)),
            state=f"Board: {n} × {n}\nQueens (row, column), (1, 1) being the top left square: "
            + ", ".join(map(str, queens)),
            paint=partial(_paint, n, queens),
        )


@cache
def _boards(n: int) -> list[tuple[int, Queens]]:
    """Every solution less every two of its queens, as (n, queens)."""
    kept = (kept for solution in _solutions(n, ()) for kept in combinations(enumerate(solution, 1), n - 2))
    return [(n, queens) for queens in dict.fromkeys(kept)]


def _solutions(n: int, columns: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The columns, one a row, of every placement of n queens that starts with `columns`."""
    row = len(columns)
    if row == n:
        yield columns
    for column in range(1, n + 1):
        if all(column != taken and abs(column - taken) != row - above for above, taken in enumerate(columns)):
            yield from _solutions(n, (*columns, column))


def _paint(n: int, queens: Queens, canvas: Canvas) -> None:
    square = board(n, n)
    for row in range(n):
        for column in range(n):
            canvas.box(square(row, column), "#b58863" if (row + column) % 2 else "#f0d9b5")
    left, top, _, _ = square(0, 0)
    _, _, right, bottom = square(n - 1, n - 1)
    canvas.box((left, top, right, bottom), line=BLACK, width=0.006)
    for row, column in queens:
        _crown(canvas, square(row - 1, column - 1))


def _crown(canvas: Canvas, box: tuple[float, ...]) -> None:
    left, top, right, _ = box
    side = right - left
    points = ((0.12, 0.28), (0.31, 0.52), (0.5, 0.18), (0.69, 0.52), (0.88, 0.28), (0.76, 0.84), (0.24, 0.84))
    canvas.polygon([(left + x * side, top + y * side) for x, y in points], BLACK)
    for x, y in points[:5:2]:
        canvas.circle((left + x * side, top + y * side), 0.075 * side, BLACK)
