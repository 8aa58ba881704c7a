r"""Which answers are right: the table answers.tsv, of pairs of every kind, each judged in both directions."""

import re
import time
from pathlib import Path

import pytest

from vogue.rewards.correctness import is_correct, verdicts
from vogue.rewards.tidy_answer import is_blank

UNSEEN = re.compile(r"\\u([0-9a-f]{4})")


def table():
    """Rows (given, whether it is right, right answer) of answers.tsv."""
    lines = Path(__file__).with_name("answers.tsv").read_text(encoding="utf-8").split("\n")
    parts = [UNSEEN.sub(lambda code: chr(int(code[1], 16)), line).split("\t") for line in lines if "\t" in line]
    return [(given, sign == "=", answer) for given, sign, answer in parts]


@pytest.fixture(scope="module")
def judged():
    """The verdicts on all pairs in both directions, found together."""
    pairs = [pair for given, _, answer in table() for pair in ((given, answer), (answer, given))]
    return dict(zip(pairs, verdicts(pairs), strict=True))


@pytest.mark.parametrize(("given", "right", "answer"), table())
def test_equal_answers_are_right_however_they_are_written_and_no_others(judged, given, right, answer):
    for pair in ((given, answer), (answer, given)):
        assert judged[pair].right is right, (pair, judged[pair].rule)


@pytest.mark.parametrize(
    "text", ["", " ", "?", "...", "…", "-", "\\text{}", "\\ldots", "{}", "$ $", "\u200b", "__", "。"]
)
def test_marks_alone_are_no_answer(text):
    assert is_blank(text)
    assert not is_correct(text, "8")


@pytest.mark.parametrize("text", ["0", "x", ">", "=", "是", "∞", "\\emptyset", "/", "√", "+"])
def test_a_sign_with_a_meaning_is_an_answer(text):
    assert not is_blank(text)
    assert is_correct(text, text)


def test_a_long_text_is_compared_as_text_alone():
    prose = "The clock shows five past three. " * 100
    assert is_correct(prose.upper(), prose)
    assert not is_correct(prose + " No.", prose)
    assert not is_correct("(" * 5000 + "8" + ")" * 5000, "8")


@pytest.mark.parametrize(
    "opening", ["(", "{", "[", "\\frac{", "\\sqrt(", "\\text{", "**", "1,", "1 ", "-", "x = ", "A. ", "\\left("]
)
def test_nothing_that_is_repeated_takes_long(opening):
    text = opening * (1900 // len(opening))
    began = time.monotonic()
    for given in (text, text + "8", "8" + text):
        assert not is_correct(given, "9")
    assert time.monotonic() - began < 5
