"""Board tiling: can dominoes cover a chequered board from which one or two squares were cut?

Boards of 4..9 × 4..9 squares; one square is cut from a board of an odd number of squares, two from the others.
A domino covers a square of each colour, so what is left must have as many of one colour as of the other. That is enough
too: boards this large with an even side have a round trip over all squares, which two cut squares of different colours
part into two ways that dominoes cover (Gomory); a board with odd sides less a square of the colour it has more of can
be cut into such pieces.
"""

from collections.abc import Iterator
from functools import cache, partial
from itertools import combinations, product

import numpy as np

from vogue.data.puzzles.drawing import BLACK, GREY, Canvas, board
from vogue.data.puzzles.puzzle import Puzzle, balanced

SIDES = range(4, 10)

Square = tuple[int, int]  # row, column from 1


def puzzles(rng: np.random.Generator) -> Iterator[Puzzle]:
    """Yield all boards in random order, each size and answer equally often while any are left."""
    for rows, columns, cut, answer in balanced(_boards(), rng):
        left = rows * columns - len(cut)
        squares = "square was" if len(cut) == 1 else "squares were"
        yield Puzzle(
            question=f"{len(cut)} {squares} cut from the {rows} × {columns} chequered board. Can the {left} squares "
            "left be covered exactly by dominoes, each over two squares that share a side, without overlap? "
            "Answer Yes or No.",
            answer=answer,
            state=f"Board: {rows} rows × {columns} columns\n"
            f"Cut out (row, column), (1, 1) being the top left square: {', '.join(map(str, cut))}",
            paint=partial(_paint, rows, columns, cut),
        )


@cache
def _boards() -> list[list[tuple[int, int, tuple[Square, ...], str]]]:
    """All boards as (rows, columns, squares cut, answer), in groups of one size and answer."""
    groups = []
    for rows, columns in product(SIDES, SIDES):
        cuts = list(combinations(product(range(1, rows + 1), range(1, columns + 1)), 2 - rows * columns % 2))
        for answer in ("Yes", "No"):
            groups.append([(rows, columns, cut, answer) for cut in cuts if _answer(rows, columns, cut) == answer])
    return groups


def _answer(rows: int, columns: int, cut: tuple[Square, ...]) -> str:
    """Whether dominoes cover the board, which they do where both colours are left in equal numbers.

    Square (1, 1) has the colour that an odd board has more of.
    """
    surplus = rows * columns % 2 - sum(-1 if (row + column) % 2 else 1 for row, column in cut)
    return "No" if surplus else "Yes"


def _paint(rows: int, columns: int, cut: tuple[Square, ...], canvas: Canvas) -> None:
    square = board(rows, columns)
    for row, column in product(range(rows), range(columns)):
        if (row + 1, column + 1) in cut:
            canvas.box(square(row, column), "white", GREY, 0.004)
        else:
            canvas.box(square(row, column), "#c9982f" if (row + column) % 2 else "#f7e3a1", BLACK, 0.003)
