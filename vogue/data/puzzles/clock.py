"""Clock: what time is it a while later, or was it a while before?

A time of hour 1..12 and minute 0..59, and a shift of 0..3 hours and 1..59 minutes either way. The dial's colours and
numerals vary and are no part of the state.
"""

from collections.abc import Iterator
from functools import partial
from math import cos, pi, prod, sin

import numpy as np

from vogue.data.puzzles.drawing import BLACK, GREY, LIGHT, Canvas, Point
from vogue.data.puzzles.puzzle import Puzzle, pick

SPACE = (12, 60, 4, 59, 2)  # hour, minute; hours and minutes of the shift; later or before
STYLES = (  # dial, rim, hands
    ("white", BLACK, BLACK),
    ("#fff6dc", "#7a4a1e", "#4a2c12"),
    ("#e8f1fb", "#2b4f81", "#173257"),
    ("#e9f5ea", "#2f6b3a", "#1d4525"),
    ("#2d3142", "#8d99ae", "#f5f5f5"),
)
NUMERALS = (
    ("12", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"),
    ("XII", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI"),
    ("12", "", "", "3", "", "", "6", "", "", "9", "", ""),
)


def puzzles(rng: np.random.Generator) -> Iterator[Puzzle]:
    """Yield all 12 · 60 · 4 · 59 · 2 = 339,840 puzzles, in random order."""
    indices = np.stack(np.unravel_index(rng.permutation(prod(SPACE)), SPACE), axis=1)
    for row in indices:
        hour, minute, hours, minutes, before = row.tolist()
        shift = 60 * hours + minutes + 1
        time = (60 * hour + minute + (-shift if before else shift)) % 720
        yield Puzzle(
            question="The clock shows the time. "
            + (f"What time was it {_words(shift)} before?" if before else f"What time is it {_words(shift)} later?")
            + " Answer in the form H:MM on the 12-hour clock, for example 9:05.",
            answer=_written(time),
            state=f"Current time: {_written(60 * hour + minute)}",
            paint=partial(_paint, 60 * hour + minute, pick(STYLES, rng), pick(NUMERALS, rng)),
        )


def _written(time: int) -> str:
    """Minutes since twelve as H:MM, with 12 for hour 0."""
    return f"{time // 60 or 12}:{time % 60:02}"


def _words(shift: int) -> str:
    """Minutes as "2 hours and 1 minute", or "1 minute" within the hour."""
    counts = {"hour": shift // 60, "minute": shift % 60}
    hours, minutes = (f"{count} {unit}" + "s" * (count != 1) for unit, count in counts.items())
    return f"{hours} and {minutes}" if shift >= 60 else minutes


def _paint(time: int, style: tuple[str, str, str], numerals: tuple[str, ...], canvas: Canvas) -> None:
    dial, rim, hands = style
    canvas.circle((0.5, 0.5), 0.47, dial, rim, 0.025)
    for minute in range(60):
        inner = 0.43 if minute % 5 else 0.405
        canvas.line(_at(minute / 60, inner), _at(minute / 60, 0.435), hands, 0.006 if minute % 5 else 0.014)
    height = 0.095 if numerals[0] == "12" else 0.075
    for hour, numeral in enumerate(numerals):
        canvas.text(_at(hour / 12, 0.335), numeral, height, hands)
    canvas.line((0.5, 0.5), _at(time / 720, 0.2), hands, 0.035)
    canvas.line((0.5, 0.5), _at(time % 60 / 60, 0.385), hands, 0.018)
    canvas.circle((0.5, 0.5), 0.028, hands, LIGHT if dial != "#2d3142" else GREY, 0.006)


def _at(turn: float, radius: float) -> Point:
    """The point at a distance from the centre, `turn` of a full turn clockwise from twelve."""
    return 0.5 + radius * sin(2 * pi * turn), 0.5 - radius * cos(2 * pi * turn)
