r"""The one checker of answers, for rewards and for benchmarks: is what was given the right answer?

    tidy ──▶ the same text? right
      └────▶ read both ──▶ compare by kind ──▶ mathematics alone: ask `vogue.rewards.equality`

A false "right" is worse than a false "wrong", since a policy finds it within tens of steps; so what isn't known to be
equal is wrong. The rules are told in docs/rewards.md, and a verdict names the one that decided.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vogue.rewards.answer_types import (
    Collection,
    Mathematics,
    Number,
    Option,
    Reading,
    Series,
    Time,
    Words,
    latex,
    read,
)
from vogue.rewards.equality import Verifier
from vogue.rewards.tidy_answer import is_blank, tidy

LONGEST = 2000  # characters of an answer that is more than text

verifier = Verifier()
Equal = Callable[[str, str], bool]  # of two expressions in LaTeX


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and the rule that decided."""

    right: bool
    rule: str


def is_correct(given: str, answer: str) -> bool:
    """Whether what was given is the right answer; for several pairs, `verdicts` is faster."""
    return verdicts([(given, answer)])[0].right


def verdicts(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """The verdicts on pairs (given, right answer); equal ones are judged once, and mathematics by several processes.

    Never raises for what a model wrote.
    """
    found: dict[tuple[str, str], Verdict] = {}
    known: dict[tuple[str, str], bool] = {}
    open_pairs = set(pairs)
    while open_pairs:
        unknown: set[tuple[str, str]] = set()
        still_open = set()
        for pair in open_pairs:
            asked: set[tuple[str, str]] = set()
            found[pair] = _verdict(pair[0], pair[1], _oracle(known, asked))
            if asked:
                still_open.add(pair)
                unknown |= asked
        known |= verifier.equal_all(sorted(unknown))
        open_pairs = still_open
    return [found[pair] for pair in pairs]


def _oracle(known: dict[tuple[str, str], bool], asked: set[tuple[str, str]]) -> Equal:
    """Equality of expressions as far as it is known; what isn't is put down as asked, and taken for unequal so far."""

    def equal(given: str, answer: str) -> bool:
        pair = (latex(given), latex(answer))
        if pair[0].replace(" ", "") == pair[1].replace(" ", ""):
            return True
        if pair not in known:
            asked.add(pair)
        return known.get(pair, False)

    return equal


def _verdict(given: str, answer: str, equal: Equal) -> Verdict:
    if given.strip() == answer.strip():
        return Verdict(True, "the same text")
    if is_blank(given):
        return Verdict(False, "no answer was given")
    if max(len(given), len(answer)) > LONGEST:
        same = " ".join(given.split()).casefold() == " ".join(answer.split()).casefold()
        return Verdict(same, f"more than {LONGEST} characters: text, case and spacing apart")
    # With a space 120, 340 is two numbers and 2 : 15 no time; without one they may be, and the answer is both.
    if _close(tidy(given)) == _close(tidy(answer)):
        return Verdict(True, "the same text, but for how it is written")
    return compare(read(given), read(answer), equal)


def _close(text: str) -> str:
    """The text without spaces at , ; and :"""
    return re.sub(r"\s*([,;:])\s*", r"\1", text)


def compare(given: Reading, answer: Reading, equal: Equal) -> Verdict:
    """The verdict on two answers that were read; `equal` decides on expressions."""
    match given, answer:
        case Option(), Option():
            same = given.letter == answer.letter
            if same and given.text and answer.text:
                same = compare(read(given.text), read(answer.text), equal).right
            return Verdict(same, "options by their letter, and by their text where both have one")
        case Option(text=text), _ if text:
            return _because("the text behind a letter: ", compare(read(text), answer, equal))
        case _, Option(text=text) if text:
            return _because("the text behind a letter: ", compare(given, read(text), equal))
        case Time(), Time():
            same = (given.minute, given.second) == (answer.minute, answer.second) and _same_hour(given, answer)
            return Verdict(same, "times of day")
        case Series(), Series():
            return Verdict(given == answer, "numbers that are joined, one by one")
        case Words(), Words():
            return Verdict(given == answer, "words, case and spacing apart")
        case (Collection(), _) | (_, Collection()) if (found := _collections(given, answer, equal)) is not None:
            return found
        case (Number() | Mathematics(), Number() | Mathematics()):
            return _values(given, answer, equal)
        case (Collection() | Mathematics(), Collection() | Mathematics()):
            return Verdict(equal(given.text, answer.text), "mathematics")
    return Verdict(False, f"{_kind(given)} is not {_kind(answer)}")


def _same_hour(given: Time, answer: Time) -> bool:
    if bool(given.half) == bool(answer.half):
        return given.hour == answer.hour
    # One of them says am or pm; the other may be of either clock.
    said, bare = (given, answer) if given.half else (answer, given)
    return bare.hour in (said.hour, (said.hour - 1) % 12 + 1)


def _values(given: Number | Mathematics, answer: Number | Mathematics, equal: Equal) -> Verdict:
    """The verdict on two values: a name or a unit may be missing on one side, but two of them must be the same."""
    if given.name and answer.name and given.name != answer.name:
        if isinstance(given, Mathematics) and isinstance(answer, Mathematics):
            return Verdict(equal(given.text, answer.text), "mathematics: equations")
        return Verdict(False, f"names differ: {given.name}, {answer.name}")
    if given.unit and answer.unit and given.unit != answer.unit:
        return Verdict(False, f"units differ: {given.unit}, {answer.unit}")
    if isinstance(given, Number) and isinstance(answer, Number):
        return Verdict(_same_number(given, answer), "numbers")
    if any(isinstance(side, Mathematics) and _relates(side.value) for side in (given, answer)):
        return Verdict(equal(_whole(given), _whole(answer)), "mathematics: relations")
    return Verdict(equal(_bare(given), _bare(answer)), "mathematics")


def _same_number(given: Number, answer: Number) -> bool:
    if given.value == answer.value:
        return True
    if (given.unit == "%") != (answer.unit == "%"):
        scaled = [side.value / 100 if side.unit == "%" else side.value for side in (given, answer)]
        return scaled[0] == scaled[1]
    if (given.places is None) == (answer.places is None):
        return False
    rounded, exact = (given, answer) if given.places is not None else (answer, given)
    is_decimal = "." in exact.text or exact.value.denominator == 1
    return not is_decimal and abs(rounded.value - exact.value) * 2 * 10 ** (rounded.places or 0) <= 1


def _collections(given: Reading, answer: Reading, equal: Equal) -> Verdict | None:
    """The verdict where the items of collections can be compared one by one; None where something else decides."""
    first_side, second_side = _items(given), _items(answer)
    if first_side is None or second_side is None:
        return None
    (kind, items), (right_kind, right_items) = first_side, second_side
    free = {"\\{\\}", "or"}
    loose = free | {"list", "one"}  # without brackets
    if not (kind == right_kind or {kind, right_kind} <= loose or {kind, right_kind} == {"or", "union"}):
        return Verdict(False, f"brackets differ: {kind}, {right_kind}")

    def same(first: str, second: str) -> bool:
        return compare(read(first), read(second), equal).right

    if right_kind in free | {"union"}:  # in any order
        found = [[same(first, second) for second in right_items] for first in items]
        right = all(map(any, found)) and all(map(any, zip(*found, strict=True)))
        return Verdict(right, "the same items in any order")
    found = [same(first, second) for first, second in zip(items, right_items, strict=False)]
    return Verdict(len(items) == len(right_items) and all(found), "the same items in the same order")


def _items(side: Reading) -> tuple[str, tuple[str, ...]] | None:
    if isinstance(side, Collection):
        return side.kind, side.items
    return None if isinstance(side, Mathematics) and _relates(side.text) else ("one", (_whole(side),))


def _relates(text: str) -> bool:
    return any(sign in text for sign in ("=", "<", ">", "\\le", "\\ge", "\\ne"))


def _whole(side: Reading) -> str:
    match side:
        case Number(text=text, name=name):
            return f"{name} = {text}" if name else text
        case Mathematics(text=text) | Collection(text=text) | Words(text=text):
            return text
    return str(side)


def _bare(side: Number | Mathematics) -> str:
    return side.text if isinstance(side, Number) else side.value


def _because(reason: str, verdict: Verdict) -> Verdict:
    return Verdict(verdict.right, reason + verdict.rule)


def _kind(side: Reading) -> str:
    names = {Option: "an option", Time: "a time", Number: "a number", Series: "a series", Words: "words"}
    return names.get(type(side), "mathematics" if isinstance(side, Mathematics) else "several answers")
