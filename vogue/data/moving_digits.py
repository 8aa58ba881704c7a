"""Two handwritten digits that cross the picture one after the other: a video task small enough for a laptop.

A video has a few frames. In the first half of them a digit moves from one side to the other, in the second half another
one; the question is which came first or second, which way one moved, or what they add up to. No single frame holds both
digits, and the frames in another order have another answer. Splits are those of `vogue.data.digits`: no digit of the
test split was seen in training.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vogue.data.digits import INK_LEVELS, SPLITS, split_images
from vogue.data.samples import VIDEO, DataError, Sample, write_parquet
from vogue.data.videos import Frames

QUESTIONS = {
    "first": "Which digit comes first?",
    "second": "Which digit comes second?",
    "sum": "What is the sum of the two digits?",
    "way": "Which way does the first digit move, left or right?",
}
FPS = 2.0  # of the frames
WAYS = ("left", "right")


@dataclass(frozen=True)
class MovingPair:
    """Two digits, the way that each moves, and the question: "first", "second", "sum" or "way"."""

    first: int
    second: int
    ways: tuple[str, str]
    question: str
    frames: tuple[Image.Image, ...]
    place: str = "moving digits"

    def sample(self) -> Sample:
        """The pair as a sample to train or test on, with the digits printed in `state`."""
        answers = {"first": self.first, "second": self.second, "sum": self.first + self.second, "way": self.ways[0]}
        state = f"First digit: {self.first}, moves {self.ways[0]}\nSecond digit: {self.second}, moves {self.ways[1]}"
        return Sample(
            VIDEO + QUESTIONS[self.question],
            str(answers[self.question]),
            (),
            "moving digits",
            self.question,
            state,
            self.place,
            videos=(Frames(self.frames, FPS),),
        )


def moving_pairs(split: str, count: int, seed: int, frames: int = 4, size: int = 28) -> list[MovingPair]:
    """`count` videos of a split, of `frames` frames of 2·size × size px; equal seeds give equal videos.

    Raises DataError for an unknown split and for a number of frames that isn't a multiple of 4: models merge frames by
    two, and each digit needs two places to have moved between.
    """
    if split not in SPLITS:
        raise DataError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}.")
    if frames < 4 or frames % 4:
        raise DataError(f"{frames} frames: their number must be a multiple of 4.")
    images, labels = split_images(split)
    generator = np.random.default_rng((seed, SPLITS.index(split), 2))
    made = []
    for number in range(count):
        first, second = (int(i) for i in generator.integers(len(labels), size=2))
        ways = tuple(WAYS[i] for i in generator.integers(2, size=2))
        question = list(QUESTIONS)[generator.integers(len(QUESTIONS))]
        shown = _crossing(images[first], ways[0], frames // 2, size) + _crossing(
            images[second], ways[1], frames // 2, size
        )
        place = f"moving digits {split}, video {number}"
        made.append(MovingPair(int(labels[first]), int(labels[second]), ways, question, tuple(shown), place))
    return made


def write_moving_digits(
    folder: str | Path, train: int, validation: int, test: int, seed: int = 0, frames: int = 4, size: int = 28
) -> None:
    """Write train.parquet, validation.parquet and test.parquet with that many samples each."""
    for split, count in zip(SPLITS, (train, validation, test), strict=True):
        pairs = moving_pairs(split, count, seed, frames, size)
        write_parquet([pair.sample() for pair in pairs], Path(folder) / f"{split}.parquet")


def _crossing(digit: np.ndarray, way: str, frames: int, size: int) -> list[Image.Image]:
    """A digit that moves from one side of (2·size, size) px to the other, dark on white."""
    pixels = (255 * (1 - digit / INK_LEVELS)).astype(np.uint8)
    enlarged = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    places = np.linspace(0, size, frames).round().astype(int).tolist()
    made = []
    for x in places if way == "right" else reversed(places):
        frame = Image.new("RGB", (2 * size, size), "white")
        frame.paste(enlarged, (x, 0))
        made.append(frame)
    return made
