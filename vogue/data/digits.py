r"""Arithmetic on two handwritten digits: a visual task small enough for a laptop.

The digits are the 1,797 real ones of scikit-learn's `load_digits` (8×8 px, UCI). An image shows
two of them side by side, and a question asks for their sum, their absolute difference or the
larger one. Splits are made of different digit images, so that no image of the test split holds
a handwritten digit that was seen in training. Digits may be faint: then noise hides some of them
and leaves others legible, which is what VOGUE is about.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from vogue.data.samples import PLACEHOLDER, DataError, Sample, write_parquet

SYSTEM_PROMPT = "Think in <think></think>, then answer in \\boxed{}."  # short: a small model reads every token slowly
SPLITS = ("train", "validation", "test")
QUESTIONS = {
    "sum": "What is the sum of the two digits?",
    "difference": "What is the absolute difference of the two digits?",
    "larger": "Which of the two digits is larger?",
}
INK_LEVELS = 16  # load_digits counts the inked pixels of each 4×4 block of the scan


@dataclass(frozen=True)
class DigitPair:
    """Two digits in one image and the question about them: "sum", "difference" or "larger"."""

    left: int
    right: int
    question: str
    image: Image.Image
    place: str = "digits"

    def sample(self) -> Sample:
        """The pair as a sample to train or test on, with the digits printed in `state`."""
        problem = PLACEHOLDER + QUESTIONS[self.question]
        answer = str(_answer(self.question, self.left, self.right))
        state = f"Left digit: {self.left}\nRight digit: {self.right}"
        return Sample(problem, answer, (self.image,), "digits", self.question, state, self.place)

    def demonstration(self, left: int | None = None, right: int | None = None) -> str:
        """The completion of someone who reads the digits as `left` and `right` (rightly by default)."""
        return demonstration(self.question, self.left if left is None else left, self.right if right is None else right)

    def misread(self, generator: np.random.Generator) -> tuple[int, int]:
        """Draw (left, right) with one of the two, chosen at random, taken for another digit."""
        shift = int(generator.integers(1, 10))
        if generator.integers(2):
            return (self.left + shift) % 10, self.right
        return self.left, (self.right + shift) % 10


def demonstration(question: str, left: int, right: int) -> str:
    r"""A short completion in the format of the rewards: `<think>3 and 5, 3 + 5 = 8</think>\n\boxed{8}`."""
    low, high = sorted((left, right))
    step = {
        "sum": f"{left} + {right} = {left + right}",
        "difference": f"{high} - {low} = {high - low}",
        "larger": f"{high} {'>' if high > low else '='} {low}",
    }[question]
    return f"<think>{left} and {right}, {step}</think>\n\\boxed{{{_answer(question, left, right)}}}"


def digit_pairs(
    split: str,
    count: int,
    seed: int,
    questions: tuple[str, ...] = tuple(QUESTIONS),
    size: int = 28,
    faintest: float = 1.0,
) -> list[DigitPair]:
    """`count` different (left image, right image, question) of a split, each digit `size` × `size` px.

    The seed decides which pairs are drawn; which digit images a split owns is always the same.
    "larger" is only asked about two different digits. A digit's ink has a contrast of
    U(faintest, 1), drawn for each digit of each pair; the same pairs are drawn whatever it is.

    Raises DataError for an unknown split or question, for more pairs than the split has, and for
    a contrast outside (0, 1].
    """
    _check(split, count, questions, faintest)
    images, labels = split_images(split)
    generator = np.random.default_rng((seed, SPLITS.index(split)))
    drawn = {}  # a dict keeps the order of the draws
    while len(drawn) < count:
        left, right = (int(i) for i in generator.integers(len(labels), size=2))
        question = questions[generator.integers(len(questions))]
        if question != "larger" or labels[left] != labels[right]:
            drawn[left, right, question] = None
    contrasts = np.random.default_rng((seed, SPLITS.index(split), 1)).uniform(faintest, 1, size=(count, 2))
    return [
        DigitPair(
            int(labels[left]),
            int(labels[right]),
            question,
            _render((images[left], images[right]), contrasts[number], size),
            f"digits {split}, pair {number}",
        )
        for number, (left, right, question) in enumerate(drawn)
    ]


def digits_samples(
    split: str,
    count: int,
    seed: int,
    questions: tuple[str, ...] = tuple(QUESTIONS),
    size: int = 28,
    faintest: float = 1.0,
) -> list[Sample]:
    """`digit_pairs` as samples; an image is 2·size px wide and size px high."""
    return [pair.sample() for pair in digit_pairs(split, count, seed, questions, size, faintest)]


def write_digits(
    folder: str | Path,
    train: int = 8000,
    validation: int = 500,
    test: int = 1000,
    seed: int = 0,
    size: int = 28,
    faintest: float = 1.0,
) -> None:
    """Write train.parquet, validation.parquet and test.parquet with that many samples each.

    Raises DataError, before anything is written, where a split has fewer.
    """
    counts = dict(zip(SPLITS, (train, validation, test), strict=True))
    for split, count in counts.items():
        _check(split, count, tuple(QUESTIONS), faintest)
    for split, count in counts.items():
        samples = digits_samples(split, count, seed, size=size, faintest=faintest)
        write_parquet(samples, Path(folder) / f"{split}.parquet")


def _answer(question: str, left: int, right: int) -> int:
    return {"sum": left + right, "difference": abs(left - right), "larger": max(left, right)}[question]


@cache
def split_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 8, 8) and labels (N,) of a split: 70% / 15% / 15% of every class.

    The seed is fixed: splits drawn with two seeds would overlap.
    """
    digits: Any = load_digits()  # scikit-learn's Bunch
    train, rest = train_test_split(np.arange(len(digits.target)), test_size=0.3, stratify=digits.target, random_state=0)
    validation, test = train_test_split(rest, test_size=0.5, stratify=digits.target[rest], random_state=0)
    chosen = {"train": train, "validation": validation, "test": test}[split]
    return digits.images[chosen], digits.target[chosen]


def _render(digits: tuple[np.ndarray, np.ndarray], contrasts: np.ndarray, size: int) -> Image.Image:
    """Draw dark ink on white, (2·size, size) px, with a margin, since a digit's ink touches the edge of its scan."""
    image = Image.new("RGB", (2 * size, size), "white")
    margin = size // 14
    inner = size - 2 * margin
    for column, (digit, contrast) in enumerate(zip(digits, contrasts, strict=True)):
        pixels = (255 * (1 - contrast * digit / INK_LEVELS)).astype(np.uint8)
        enlarged = Image.fromarray(pixels).resize((inner, inner), Image.Resampling.BICUBIC)
        image.paste(enlarged, (column * size + margin, margin))
    return image


def _check(split: str, count: int, questions: tuple[str, ...], faintest: float) -> None:
    if split not in SPLITS:
        raise DataError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}.")
    for question in questions:
        if question not in QUESTIONS:
            raise DataError(f"question is {question!r}; it must be one of {', '.join(QUESTIONS)}.")
    if not 0 < faintest <= 1:
        raise DataError(f"the faintest contrast is {faintest}; it must lie in (0, 1].")
    _, labels = split_images(split)
    equal = int((np.bincount(labels) ** 2).sum())
    available = sum(len(labels) ** 2 - (equal if question == "larger" else 0) for question in set(questions))
    if count > available:
        raise DataError(f"{count} pairs asked of the {split} split, which has {available}.")
