"""PeBR-R1's two designs (arXiv 2509.13031): completions under four headings, first paid for what they see.

    ### Image Description:   ### Rationales:   ### Let's think step by step.   ### The final answer is:

`pebr_perception`, the first stage, on easy problems: no accuracy in it
    similarity  cosine of image and description by `reward.scorer`, as a share of `reward.similar_enough`, at most 1;
                negative where the cosine is
    keywords    share of the sample's keywords that stand anywhere in the completion, whatever their case; 0 without any
    format      1 where all four headings are there, in any order
    length      1 up to `reward.expected_length` tokens, from there on their share of the completion's
`pebr_reasoning`, the second stage: accuracy and format

The answer is what stands behind the last heading, inside its box if it has one; without that heading it is the whole
completion. A keyword is a substring, as in the authors' code: "1" is in "12". Keywords are the column `keywords` of
the data, a list or a text with semicolons.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vogue.answer_extraction import boxed
from vogue.data import Sample
from vogue.rewards.function import RewardError, RewardFunction

DESCRIPTION, RATIONALES, THOUGHT, ANSWER = HEADINGS = (
    "### Image Description:",
    "### Rationales:",
    "### Let's think step by step.",
    "### The final answer is:",
)


def headed_demonstration(state: str, answer: str) -> tuple[str, str]:
    """A completion that describes the state and answers, cut behind the last heading; the two between have no text."""
    return f"{DESCRIPTION}\n{state}\n{RATIONALES}\n{THOUGHT}\n{ANSWER}", f" {answer}"


def description(completion: str) -> str:
    """What stands under the first heading, up to the second or the end; nothing without it."""
    return completion.partition(DESCRIPTION)[2].partition(RATIONALES)[0].strip()


def headed_answer(completion: str) -> str:
    """What stands behind the last heading, or in its last box; of the whole completion without that heading."""
    text = completion.rpartition(ANSWER)[2].strip()
    inner = boxed(text)
    return text if inner is None else inner


def has_headings(completion: str) -> bool:
    """Whether all four headings are there, in any order."""
    return all(heading in completion for heading in HEADINGS)


def share_of_enough(cosine: float, enough: float) -> float:
    """The cosine as a share of what is enough, at most 1."""
    return min(1.0, cosine / enough)


def keyword_score(completion: str, keywords: Sequence[str]) -> float:
    """The share of the keywords that are substrings of the completion, case aside; 0 without keywords."""
    text = completion.casefold()
    return sum(word.casefold() in text for word in keywords) / len(keywords) if keywords else 0.0


def length_score(tokens: int, expected: int) -> float:
    """1 for a completion of at most `expected` tokens, for a longer one their share of it."""
    return min(1.0, expected / max(1, tokens))


def keywords_of(sample: Sample) -> list[str]:
    """The sample's keywords; raises RewardError where its column `keywords` is neither a list of texts nor a text."""
    given: Any = sample.columns.get("keywords") or []
    words = given.split(";") if isinstance(given, str) else given
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise RewardError(f"{sample.place}: keywords={given!r} is neither a list of texts nor a text with semicolons")
    return [word.strip() for word in words if word.strip()]


def cosines(scorer: RewardFunction, completions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """What the scorer says of each completion's description and its sample's images, which it gets as PNG files.

    Raises RewardError as the scorer does.
    """
    with TemporaryDirectory() as folder:
        paths: dict[int, list[str]] = {}  # by the sample: its completions share its files
        for sample in samples:
            if id(sample) not in paths:
                paths[id(sample)] = _written(sample, Path(folder), len(paths))
        seen = [replace(sample, columns={**sample.columns, "images": paths[id(sample)]}) for sample in samples]
        return [earned.reward for earned in scorer([description(text) for text in completions], seen)]


def _written(sample: Sample, folder: Path, number: int) -> list[str]:
    files = []
    for i, image in enumerate(sample.load_images()):
        path = folder / f"{number}_{i}.png"
        image.save(path)
        files.append(str(path))
    return files
