r"""Puzzles whose state is known, drawn and printed: is a model's weakness seeing or thinking?

Nine kinds after the rules of AlgoPuzzleVQA (arXiv 2403.03864), each with one right answer that the verifiable reward
can check. A puzzle has a state, which is shown as an image or, to test thinking alone, printed as text.

The test split owns a tenth of the states of each kind, by a hash of the state: training and test puzzles of whatever
seeds have no state in common. Puzzle number i of a kind and split is a function of the seed alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from vogue.data.puzzles import (
    board_tiling,
    checker_move,
    clock,
    maze,
    move_box,
    n_queens,
    number_slide,
    tower_of_hanoi,
    water_jugs,
)
from vogue.data.puzzles.puzzle import Puzzle
from vogue.data.samples import PLACEHOLDER, DataError, Sample, write_parquet

__all__ = ["KINDS", "Puzzle", "draw_puzzles", "puzzle_samples", "write_puzzles"]

KINDS = {
    "clock": clock.puzzles,
    "maze": maze.puzzles,
    "move_box": move_box.puzzles,
    "n_queens": n_queens.puzzles,
    "water_jugs": water_jugs.puzzles,
    "tower_of_hanoi": tower_of_hanoi.puzzles,
    "number_slide": number_slide.puzzles,
    "checker_move": checker_move.puzzles,
    "board_tiling": board_tiling.puzzles,
}  # each turns a generator of random numbers into a stream of puzzles, which ends if there are no others
SPLITS = ("train", "test")
TEST_SHARE = 10  # one state in so many belongs to the test split
SMALLEST = 112  # px; the numbers on a number slide are hard to read below


def draw_puzzles(kind: str, split: str, count: int, seed: int) -> list[Puzzle]:
    """The first `count` puzzles of a kind in a split.

    No two have the same state, except that the 720 times of a clock are asked about with different shifts.

    Raises DataError for an unknown kind or split, and for more puzzles than there are.
    """
    _check((kind,), split)
    stream = KINDS[kind](np.random.default_rng([seed, SPLITS.index(split), *kind.encode()]))
    drawn = list(islice((puzzle for puzzle in stream if _split(puzzle.state) == split), count))
    if len(drawn) < count:
        raise DataError(f"{count} puzzles asked of kind {kind}, split {split}, which has {len(drawn)}.")
    return drawn


def puzzle_samples(
    kinds: Sequence[str], split: str, count: int, seed: int, size: int, console: Console | None = None
) -> Iterator[Sample]:
    """`count` puzzles of each kind, the kinds in turns; images of `size` × `size` px are made one by one.

    Raises DataError, before the first is asked for, for a `size` too small to read and as `draw_puzzles` does.
    """
    _check(kinds, split)
    if size < SMALLEST:
        raise DataError(f"size is {size} px; puzzles are legible from {SMALLEST} px.")
    shown = track(kinds, f"{split}: puzzles", console=console, disable=console is None)
    drawn = [draw_puzzles(kind, split, count, seed) for kind in shown]
    return (
        _sample(kind, split, number, puzzle, size)
        for number, puzzles in enumerate(zip(*drawn, strict=True))
        for kind, puzzle in zip(kinds, puzzles, strict=True)
    )


def write_puzzles(
    folder: str | Path,
    kinds: Sequence[str] = tuple(KINDS),
    count: int = 3000,
    test: int = 300,
    size: int = 224,
    seed: int = 0,
    console: Console | None = None,
) -> None:
    """Write train.parquet, with `count` puzzles of each kind, and test.parquet with `test` of each."""
    counts = {"train": count, "test": test}
    made = {split: puzzle_samples(kinds, split, number, seed, size, console) for split, number in counts.items()}
    for split, samples in made.items():
        total = counts[split] * len(kinds)
        shown = track(samples, f"{split}: images", total, console=console, disable=console is None)
        write_parquet(shown, Path(folder) / f"{split}.parquet")


def _sample(kind: str, split: str, number: int, puzzle: Puzzle, size: int) -> Sample:
    return Sample(
        PLACEHOLDER + puzzle.question,
        puzzle.answer,
        (puzzle.image(size),),
        source="puzzles",
        category=kind,
        state=puzzle.state,
        place=f"{kind} {split}, puzzle {number}",
        columns={"keywords": puzzle.keywords},
    )


def _check(kinds: Sequence[str], split: str) -> None:
    for name, values, known in (("kind", kinds, KINDS), ("split", (split,), SPLITS)):
        for value in values:
            if value not in known:
                raise DataError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")


def _split(state: str) -> str:
    digest = hashlib.sha256(state.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"
