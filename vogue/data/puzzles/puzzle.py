"""What the kinds of puzzles share: a puzzle, and ways to search for states and to draw them."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar

import numpy as np
from PIL import Image

from vogue.data.puzzles.drawing import Canvas

T = TypeVar("T")
State = TypeVar("State", bound=Hashable)


@dataclass(frozen=True)
class Puzzle:
    """A question about a state, which is shown as an image or printed as text.

    question   true of both; it says which form the answer takes
    answer     the one right answer, in that form
    state      all that the image shows, as text
    paint      draws the state
    """

    question: str
    answer: str
    state: str
    paint: Callable[[Canvas], None]

    @property
    def keywords(self) -> list[str]:
        """What a description of the image should hold, each once: the state's lines but for headings, with a colon."""
        return [line for line in dict.fromkeys(self.state.splitlines()) if not line.endswith(":")]

    def image(self, size: int) -> Image.Image:
        """Draw the state: `size` × `size` px, RGB."""
        canvas = Canvas(size)
        self.paint(canvas)
        return canvas.image()


def without_repeats(puzzles: Callable[[np.random.Generator], Iterator[Puzzle]]):
    """Decorate a stream of random puzzles: it leaves out those whose state came before."""

    @wraps(puzzles)
    def stream(rng: np.random.Generator) -> Iterator[Puzzle]:
        seen: set[str] = set()
        for puzzle in puzzles(rng):
            if puzzle.state not in seen:
                seen.add(puzzle.state)
                yield puzzle

    return stream


def levels(start: State, neighbours: Callable[[State], Iterable[State]], depth: int) -> list[list[State]]:
    """Search breadth-first: item d holds the states whose fewest moves from `start` are d, for d up to `depth`.

    Shorter where no state is that far.
    """
    found, seen = [[start]], {start}
    while len(found) <= depth:
        # a dict has no doubles and, other than a set, the same order in every process
        reached = dict.fromkeys(after for state in found[-1] for after in neighbours(state) if after not in seen)
        if not reached:
            break
        seen |= reached.keys()
        found.append(list(reached))
    return found


def balanced(groups: Iterable[Sequence[T]], rng: np.random.Generator) -> Iterator[T]:
    """Yield every member of `groups` once, in random order, each from a random group that isn't used up yet."""
    decks = [[group[i] for i in rng.permutation(len(group))] for group in groups]
    while decks:
        number = int(rng.integers(len(decks)))
        yield decks[number].pop()
        if not decks[number]:
            decks.pop(number)


def pick(items: Sequence[T], rng: np.random.Generator) -> T:
    """Draw one of `items` (`rng.choice` would turn it into an array)."""
    return items[int(rng.integers(len(items)))]
