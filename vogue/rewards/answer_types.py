r"""What an answer says: an option, a time, a number with its unit, a series, a collection, words, or mathematics.

    "（B）12 cm"  →  Option B, "12 cm"        "３．50 cm"  →  Number 7/2, cm          "{2, 1}"  →  Collection, any order
    "3:05 pm"    →  Time 15:05               "4:3"       →  Series of 4 and 3       "x = 2\sqrt{3}"  →  Mathematics

An answer is read in this order, and what fits nowhere is words. Mathematics is what has an operator, a digit or a
command of LaTeX and no word; that keeps "no pot" from being the product n·o·p·o·t.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from vogue.rewards.tidy_answer import tidy
from vogue.rewards.units import split_unit

LONGEST_NUMBER = 1000  # characters; and of powers of ten
LONGEST_MATHEMATICS = 500  # characters of an expression that is compared as one
WHOLE = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?:[ '][0-9]{3})+|[0-9]+)(?![0-9])"
DECIMAL = rf"(?:{WHOLE}(?:\.[0-9]*)?|\.[0-9]+)"
POWER = r"(?:[eE]([+-]?[0-9]{1,3})|\s*(?:\\times|\\cdot|\*|[xX])\s*10\s*\^\s*\{([+-]?[0-9]{1,3})\})"
SIGN = r"([+-]?)\s*"
NUMBER = re.compile(rf"{SIGN}({DECIMAL}){POWER}?")
POWER_OF_TEN = re.compile(rf"{SIGN}10\s*\^\s*\{{([+-]?[0-9]{{1,3}})\}}")
FRACTION = re.compile(
    rf"{SIGN}(?:([0-9]+)\s*(?=\\frac)|([0-9]+)\s+)?"
    rf"(?:\\frac\s*\{{\s*{SIGN}({DECIMAL})\s*\}}\s*\{{\s*({DECIMAL})\s*\}}|({DECIMAL})\s*/\s*({DECIMAL}))"
)
TIME = re.compile(r"([0-9]{1,2}):([0-5][0-9])(?::([0-5][0-9]))?\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)
SERIES = [  # of plain numbers: what joins them
    (name, re.compile(rf"{DECIMAL}(?:\s*{joint}\s*{DECIMAL}){{{least},}}"), re.compile(rf"\s*{joint}\s*"))
    for name, joint, least in (
        ("ratio", ":", 1),
        ("range", "-", 1),
        ("dimensions", r"(?:\\times|[xX])", 1),
        ("date", "/", 2),
    )
]
LETTER = re.compile(r"(?:(?:option|choice|选项?)\s*)?(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])\)?)", re.IGNORECASE)
LETTER_AND_TEXT = re.compile(
    r"(?:(?:option|choice|选项?)\s*)?(?:\(([A-Ja-j])\)\s*[.:]?\s*|([A-J])(?:\s*[.:)]\s*(?=[^A-Za-z\s])|\s*[.:)]\s+|\.(?=[A-Z][a-z])|\s+(?=\(.+\)$))"
    r"|([a-j])\)\s*)(\S.*)",
)
OTHER_LETTER = re.compile(
    r"\(([A-J])\)|(?:^|\bor\b|\band\b|[,/&|])\s*([A-J])(?![\w'])|(?<![\w\\])([A-J])\s*[.:)](?=\s)"
)
NAME = re.compile(
    r"((?:\\[A-Za-z]+|[A-Za-z])(?:\\[A-Za-z]+|[A-Za-z0-9' ]|_\{[^{}]*\}|\([A-Za-z]\))*?)"
    r"\s*(?:=|\\approx|\\in(?![A-Za-z]))(?!.*=)\s*"
)
BRACKETS = {"(": ")", "[": "]", "\\{": "\\}", "{": "}", "\\langle": "\\rangle"}
OPENING = re.compile(r"\\\{|\\langle(?![A-Za-z])|[(\[{]")
CLOSING = re.compile(r"(?:\\\}|\\rangle|[)\]}])$")
SEPARATORS = {"union": re.compile(r"\\cup(?![A-Za-z])"), "or": re.compile(r"(?:,\s*)?\bor\b|或")}
JOINTS = re.compile(r"(?:,\s*)?\band\b|[;和与]")
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|max|min|gcd|lcm|mod|det|lim|pi"
RUN = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
COMMAND = re.compile(r"\\[A-Za-z]+")
BARE_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({FUNCTIONS})(?![A-Za-z])")
MATHEMATICAL = re.compile(r"[0-9+=^*<>!|]|\\[A-Za-z]")
SPACED_DIGITS = re.compile(r"[0-9]\s+[0-9]")
TRIGONOMETRIC = re.compile("sin|cos|tan|cot|sec|csc")
DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*\^\\circ")
CONSTANTS = {"pi": r"\pi", "infinity": r"\infty", "-infinity": r"-\infty", "empty set": r"\emptyset"}


@dataclass(frozen=True)
class Option:
    """A letter, with the option's text where it was given too."""

    letter: str  # a capital
    text: str = ""


@dataclass(frozen=True)
class Time:
    """A time of day. `half` is "a", "p", or "" where neither am nor pm was said; then the hour is as it was written."""

    hour: int
    minute: int
    second: int
    half: str


@dataclass(frozen=True)
class Number:
    """An exact number, with the unit and the name in front of its "=" (None for none).

    places  digits behind the point of a decimal with at least six significant ones, which may be a rounded value;
            None otherwise
    """

    value: Fraction
    text: str
    unit: str | None = None
    name: str | None = None
    places: int | None = None


@dataclass(frozen=True)
class Series:
    """Plain numbers that are joined: a ratio 4:3, a range 10-20, dimensions 3 x 4, a date 1/2/2020."""

    joined: str
    numbers: tuple[Fraction, ...]


@dataclass(frozen=True)
class Collection:
    r"""Several answers: `kind` is its brackets ("[)", "()", "\{\}" …), "list", "or" or "union"."""

    kind: str
    items: tuple[str, ...]
    text: str
    name: str | None = None

    @property
    def is_ordered(self) -> bool:
        return self.kind not in ("\\{\\}", "or", "union")


@dataclass(frozen=True)
class Words:
    """Anything in words, without case and without a mark at its end."""

    text: str


@dataclass(frozen=True)
class Mathematics:
    """An expression in LaTeX: the whole text, and its value without name and unit."""

    text: str
    value: str
    unit: str | None = None
    name: str | None = None


Reading = Option | Time | Number | Series | Collection | Words | Mathematics


def read(text: str) -> Reading:
    """What a text says as an answer."""
    text = tidy(text)
    text = CONSTANTS.get(text.casefold(), text)
    return option(text) or _time(text) or _named(text) or _number(text) or _series(text) or _other(text, None)


def option(text: str) -> Option | None:
    """The one option that a tidy text names by its letter: "B", "(b)", "B. 12 cm"; None for "B or C" and "A box"."""
    if found := LETTER.fullmatch(text):
        return Option((found[1] or found[2] or found[3]).upper())
    found = LETTER_AND_TEXT.fullmatch(text)
    if not found:
        return None
    letter, said = (found[1] or found[2] or found[3]).upper(), found[4]
    others = {one for parts in OTHER_LETTER.findall(said) for one in parts if one} - {letter}
    if others or LETTER.fullmatch(said) or re.match(r"(?:or|and|not)\b", said):
        return None
    return Option(letter, said)


def _named(text: str) -> Reading | None:
    r"""What stands behind "x =" or "x \in", with the name; None where there is no name or nothing behind it."""
    found = NAME.match(text)
    if not found or found.end() == len(text):
        return None
    name, rest = " ".join(found[1].split()), text[found.end() :]
    return _number(rest, name) or _other(rest, name, text)


def _time(text: str) -> Time | None:
    found = TIME.fullmatch(text)
    if not found or int(found[1]) > 24:
        return None
    hour, half = int(found[1]), (found[4] or "").casefold()
    if half and 1 <= hour <= 12:
        hour = hour % 12 + 12 * (half == "p")
    return Time(hour, int(found[2]), int(found[3] or 0), half)


def _number(text: str, name: str | None = None) -> Number | None:
    plain, unit = split_unit(text)
    value = _value(plain) if len(plain) <= LONGEST_NUMBER else None
    return None if value is None else Number(value, plain, unit, name, _places(plain))


def _value(text: str) -> Fraction | None:
    """The value of a number: 1,234.5; 2e-3; 2 \\times 10^{-3}; 1/2; 2\\frac{1}{2}."""
    if found := NUMBER.fullmatch(text):
        sign, digits, *powers = found.groups()
        return _signed(sign, _decimal(digits) * Fraction(10) ** int(powers[0] or powers[1] or 0))
    if found := POWER_OF_TEN.fullmatch(text):
        return _signed(found[1], Fraction(10) ** int(found[2]))
    if not (found := FRACTION.fullmatch(text)):
        return None
    sign, whole, spaced, sign_above, above, below, over, under = found.groups()
    below = _decimal(below or under)
    if not below:
        return None
    whole = whole or spaced
    return _signed(sign, (_decimal(whole) if whole else 0) + _signed(sign_above or "", _decimal(above or over) / below))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _decimal(digits: str) -> Fraction:
    return Fraction(re.sub("[, ']", "", digits))


def _places(text: str) -> int | None:
    found = re.fullmatch(r"[+-]?\s*([0-9,]*)\.([0-9]+)", text)
    significant = len((found[1] + found[2]).replace(",", "").lstrip("0")) if found else 0
    return len(found[2]) if found and significant >= 6 else None


def _series(text: str) -> Series | None:
    for name, whole, joint in SERIES:
        if len(text) <= LONGEST_NUMBER and whole.fullmatch(text):
            return Series(name, tuple(map(_decimal, joint.split(text))))
    return None


def _other(text: str, name: str | None, whole: str | None = None) -> Reading:
    """What is no number: a collection, mathematics, or words."""
    whole = text if whole is None else whole
    if (inner := _group(text)) is not None:
        return _number(inner, name) or _other(inner, name, whole)
    if found := _collection(text, name):
        return found
    value, unit = split_unit(text)
    if unit == "deg" and TRIGONOMETRIC.search(value):  # of the angle
        value, unit = text, None
    if is_words(value) or len(value) > LONGEST_MATHEMATICS or not _balances(value):
        return Words(whole.rstrip("!").casefold())
    return Mathematics(whole, value, unit, name)


def _balances(text: str) -> bool:
    return sum(map(text.count, "([{")) == sum(map(text.count, ")]}"))


def _group(text: str) -> str | None:
    """What stands in round brackets around one thing: (1/2)."""
    if not text.startswith("(") or _closes(text, 0) != len(text):
        return None
    inner = text[1:-1].strip()
    return inner if inner and len(_split(inner, ",")) == 1 else None


def _collection(text: str, name: str | None) -> Collection | None:
    if text.count("\\pm") == 1 and not re.search(r"\\pm[A-Za-z]", text):
        plus, minus = (text.replace("\\pm", sign).lstrip("+ ") for sign in "+-")
        return Collection("or", (plus, minus), text, name)
    for kind, separator in SEPARATORS.items():
        parts = _split(text, separator)
        if len(parts) > 1 and all(parts):
            return Collection(kind, tuple(parts), text, name)
    opening, closing = OPENING.match(text), CLOSING.search(text)
    if opening and closing and _closes(text, 0) == len(text):
        inner = text[opening.end() : closing.start()]
        kind = (opening.group() + closing.group()).replace("\\", "").replace("{", "\\{").replace("}", "\\}")
        return Collection(kind, tuple(_items(inner)), text, name)
    items = _items(text)
    if len(items) > 1 and all(items) and "\\begin" not in text:
        names = {found[1] for item in items if (found := NAME.match(item))}
        solutions = len(names) == 1 and all(NAME.match(item) for item in items)
        return Collection("or" if solutions else "list", tuple(items), text, name)
    return None


def _items(text: str) -> list[str]:
    return _split(JOINTS.sub(",", text) if "\\begin" not in text else text, ",")


def _split(text: str, separator: str | re.Pattern) -> list[str]:
    """The parts of a text between separators that stand in no bracket."""
    pattern = re.compile(re.escape(separator)) if isinstance(separator, str) else separator
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        found = pattern.match(text, place) if depth == 0 else None
        if found and found.end() > place and not (text[place].isalpha() and place and text[place - 1].isalpha()):
            parts.append(text[start:place])
            start = place = found.end()
            continue
        depth = max(0, depth + (text[place] in "([{") - (text[place] in ")]}"))
        place += 1
    return [part.strip() for part in [*parts, text[start:]]]


def _closes(text: str, start: int) -> int:
    """The position behind the bracket, of whatever kind, that closes the first one; -1 where none does."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth == 0 and text[place] in ")]}":
            return place + 1
    return -1


def is_words(text: str) -> bool:
    """Whether a tidy text is no mathematics: it has a word, nothing mathematical, or numbers side by side."""
    if SPACED_DIGITS.search(text) or re.search("[^\\x00-\\x7f]", text):
        return True
    text = re.sub("(?<=[A-Za-z]{2})!+$", "", text)  # said loudly, and no factorial
    bare = BARE_FUNCTION.sub(r"\\\1", text)
    if re.search("[A-Za-z][0-9]", COMMAND.sub("", bare)):  # H2O: a factor stands in front
        return True
    runs = list(RUN.finditer(re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}", r"\\x", bare)))
    if not MATHEMATICAL.search(bare):
        return bool(runs) or " " in text or not re.search(r"[-/(]", text)
    return any(len(run.group()) > 3 or _stands_alone(bare, run) for run in runs)


def _stands_alone(text: str, run: re.Match) -> bool:
    """Whether a run of letters is a word: spaces around it, and no operator at either side."""
    before, after = text[: run.start()], text[run.end() :]
    apart = (not before or before[-1] == " ") and (not after or after[0] == " ")
    joined = before.rstrip()[-1:] in {*"+-*/^=({,<>|"} or after.lstrip()[:1] in {*"+*/^=)},<>|"}
    return apart and not joined and bool(before or after)


def latex(text: str) -> str:
    """A tidy text as a reader of LaTeX takes it: sin, log and pi as commands, degrees as radians."""
    text = DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    return BARE_FUNCTION.sub(r"\\\1 ", text)
