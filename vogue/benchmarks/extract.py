r"""Rules find the answer that a completion gives.

    completion ── stated ──▶ "B. 12 cm", "$\frac{1}{2}$", "yes, it is" ──▶ read, by the form the answer should have
               └─ nothing stated ─▶ search the text behind the thinking for something of that form

`stated` is what stands in the last <answer> or \boxed{}, or else behind the last "the answer is" or "Answer:". The
benchmarks leave this step to a language model (`extractor.py`); these rules are ours. They find no answer rather than
guess one: the letter A of "A triangle" is no option, and a text that says yes and no says neither.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vogue.answer_extraction import boxed, tagged_answer
from vogue.rewards.answer_types import option
from vogue.rewards.correctness import verdicts
from vogue.rewards.tidy_answer import TEXT, tidy

MARK = re.compile(
    r"\b(?:answer|option|choice)(?:\s+(?:is|are|would be|should be|must be)\b|\W{0,4}:)[\s:*]*", re.IGNORECASE
)
STATEMENT_END = re.compile(r"\.\s|\n")
UNCERTAIN = re.compile(
    r"\b(?:uncertain|unclear|unknown|not (?:sure|clear|possible)|cannot|can't|can not|impossible)\b", re.IGNORECASE
)
DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
NUMBER = re.compile(rf"(?<![\w^.])[+-]?{DIGITS}(?:[eE][+-]?[0-9]+)?%?")
DECIMAL = r"([0-9]+(?:\.[0-9]+)?)"
FRACTION = re.compile(rf"([+-]?)(?:\\[dt]?frac\{{{DECIMAL}\}}\{{{DECIMAL}\}}|{DECIMAL}\s*/\s*{DECIMAL})")
POWER_OF_TEN = re.compile(r"\s*(?:\\times|×|\*|x)\s*10\s*\^\s*\{?([+-]?[0-9]+)\}?")
RAISED = re.compile(r"[\^_](?:\{[^{}]*\}|\w)")
LONGEST_VALUE = 80  # characters of what may be the value of an option, in other words than the option's
DROPPED = re.compile(r"\\?\$|\\[()\[\],!]|\*\*")


@dataclass(frozen=True)
class Form:
    """What an answer should look like, and how to find one.

    wanted  in words, for a language model
    read    the answer in a statement of it, None where it isn't of this form
    search  the answer in a text that nowhere says which part of it is the answer
    """

    wanted: str
    read: Callable[[str], str | None]
    search: Callable[[str], str | None]


def extract(completion: str, form: Form) -> str | None:
    """The answer that a completion gives, in a form that the benchmark's scoring compares; None without one."""
    statement = stated(completion)
    if statement is None:
        return form.search(completion.rpartition("</think>")[2].strip())
    return form.read(statement)


def stated(completion: str) -> str | None:
    r"""What a completion states as its answer: in the last <answer> or \boxed{}, or behind "the answer is"."""
    marked = tagged_answer(completion) or boxed(completion)
    if marked:
        return marked
    *_, mark = (None, *MARK.finditer(completion))
    if mark is None:
        return None
    return STATEMENT_END.split(completion[mark.end() :])[0].rstrip(" *.").lstrip(" *") or None


def plain(text: str) -> str:
    """`text` without the marks of LaTeX and Markdown around numbers and words, quotes, and a full stop."""
    text = DROPPED.sub("", TEXT.sub(r"\1", text)).replace("\\%", "%").replace("−", "-")
    return " ".join(text.split()).removesuffix(".").strip("\"'`“”")


def options(choices: Mapping[str, str]) -> Form:
    """The form of one of `choices` (text by letter): "B", "(b)", "B. 12", "option B", or a choice's text alone."""
    letters = "".join(choices)
    leading = re.compile(rf"([{letters}])\s+[(=:–-]")
    named = re.compile(rf"\(([{letters}])\)|\b(?:option|choice)\s+([{letters}])\b", re.IGNORECASE)

    def read(statement: str) -> str | None:
        chosen = option(tidy(statement))
        if chosen and chosen.letter in choices:
            return chosen.letter
        text = plain(statement)
        if start := leading.match(text):
            return start[1]
        same = [key for key, choice in choices.items() if choice and _begins(text.casefold(), plain(choice).casefold())]
        if not same and len(text) <= LONGEST_VALUE:
            found = verdicts([(statement, choice) for choice in choices.values()])
            same = [key for key, verdict in zip(choices, found, strict=True) if verdict.right]
        return same[0] if len(same) == 1 else last(text)

    def last(text: str) -> str | None:
        *_, found = (None, *named.finditer(text))
        return (found[1] or found[2]).upper() if found else None

    def search(text: str) -> str | None:
        return read(text) if text and "\n" not in text else last(text)

    return Form(f"the letter of the chosen option, one of {', '.join(letters)}", read, search)


def _begins(text: str, choice: str) -> bool:
    """Whether `text` is the choice, or a word that is the choice and then more: "no, it isn't"."""
    return text == choice or (choice.isalpha() and re.match(rf"{choice}\s*[,.;:(]", text) is not None)


def _letters(statement: str) -> str | None:
    text = plain(statement)
    if re.fullmatch(r"\(?[A-Ha-h]\)?((\s*(,|and|&|;)\s*|\s+)\(?[A-Ha-h]\)?)*|[A-H]{2,8}|[0-9]", text):
        return ", ".join(sorted(re.findall(r"[A-H0-9]", text.replace("and", "").upper())))
    if start := re.match(r"\(([A-H])\)|([A-H])[.:)]", text):
        return start[1] or start[2]
    found = set(re.findall(r"\(([A-H])\)|\b(?:option|choice)s? ([A-H])\b", text))
    return ", ".join(sorted(first or second for first, second in found)) or None


def _number(statement: str) -> str | None:
    """The first number behind the last equals sign, without separators of thousands and with its %."""
    text = re.split(r"=|≈|\\approx", plain(statement))[-1].strip()
    if fraction := FRACTION.fullmatch(text):
        sign, *parts = fraction.groups()
        above, below = (float(part) for part in parts if part)
        return f"{sign}{above / below}" if below else None
    text = RAISED.sub("", POWER_OF_TEN.sub(r"e\1", text))
    found = NUMBER.search(text)
    return found.group().replace(",", "") if found else None


def _last_number(text: str) -> str | None:
    found = NUMBER.findall(RAISED.sub("", POWER_OF_TEN.sub(r"e\1", plain(text))))
    return found[-1].replace(",", "") if found else None


def _list(statement: str) -> str | None:
    text = plain(statement)
    inside = re.findall(r"\[([^\[\]]*)\]", text)
    parts = inside[-1].split(",") if inside else NUMBER.findall(text)
    return f"[{', '.join(part.strip() for part in parts)}]" if len(parts) > 1 or inside else None


def _last_list(text: str) -> str | None:
    return _list(text) if "[" in text else None


def _yes_or_no(statement: str) -> str | None:
    said = set(re.findall(r"\b(yes|no)\b", statement.casefold()))
    if not said:
        return "uncertain" if UNCERTAIN.search(statement) else None
    return said.pop() if len(said) == 1 else None


def _yes_or_no_anywhere(text: str) -> str | None:
    opening = re.match(r"\W*(yes|no)\b", text.casefold())
    return opening[1] if opening else _yes_or_no(text)


def _line(text: str) -> str | None:
    return plain(text) if text and "\n" not in text else None


LETTERS = Form("the letter of the chosen option, or the letters where several are chosen: A, C", _letters, _letters)
NUMERIC = Form("a number alone", _number, _last_number)
LIST = Form("a list such as [1, 2, 3]", _list, _last_list)
YES_OR_NO = Form(
    "yes or no, or uncertain where the response says that it can't be told", _yes_or_no, _yes_or_no_anywhere
)
SHORT = Form("the number, word or phrase alone", lambda text: plain(text) or None, _line)
EXPRESSION = Form("the final value or expression alone", lambda text: text.strip() or None, _last_number)
