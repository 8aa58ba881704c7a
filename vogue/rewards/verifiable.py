r"""Rules check whether an answer is right, and where it was asked for:  <think> … </think>  …  \boxed{answer}  …"""

import re
from decimal import Decimal

from vogue.rewards.equality import Verifier

NUMBER = re.compile(r"[+-]?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)?(\.[0-9]+)?(?<=[0-9])")
WORD = re.compile(r"[A-Za-z]+")
TIME = re.compile(r"([0-9]{1,2}):([0-5][0-9])")
TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
BRACE = re.compile(r"\\boxed\s*\{|[{}]")

verifier = Verifier()


def boxed(completion: str) -> str | None:
    r"""The content of the last \boxed{…} whose braces close, or None."""
    found, open_braces = (-1, ""), []
    for brace in BRACE.finditer(completion):
        if brace.group() != "}":
            open_braces.append(brace)
        elif open_braces:
            opening = open_braces.pop()
            if opening.group() != "{":
                found = max(found, (opening.start(), completion[opening.end() : brace.start()]))
    return found[1].strip() if found[0] >= 0 else None


def is_formatted(completion: str) -> bool:
    r"""Whether a completion opens with its one <think>…</think> and has a closed \boxed{} behind it.

    Text around the box is allowed: the papers show the format and don't say how it is checked.
    """
    thought, _, rest = completion.partition("</think>")
    return (
        thought.lstrip().startswith("<think>")
        and completion.count("<think>") == completion.count("</think>") == 1
        and boxed(rest) is not None
    )


def is_correct(parsed: str, answer: str) -> bool:
    """Whether two answers are the same: as text, as plain values, or, where neither decides, as mathematics.

    Mathematics would take "no" for n·o and so for "on", and 12:15 for 12/15 and so for 4:05;
    plain words, times of day and numbers are therefore compared as what they are.
    """
    parsed, answer = normalise(parsed), normalise(answer)
    if parsed == answer:
        return True
    value, expected = plain(parsed), plain(answer)
    if isinstance(expected, tuple) or (value is not None and expected is not None):
        return value == expected
    return verifier.equal(answer, parsed)


def normalise(text: str) -> str:
    """Remove what changes no meaning: spacing, $, \\text{}, a full stop, the brackets of a choice "(A)"."""
    text = TEXT.sub(r"\1", text.replace("\\$", "").replace("$", ""))
    text = " ".join(text.split()).removesuffix(".")
    return text[1:-1] if re.fullmatch(r"\([A-Za-z]\)", text) else text


def plain(text: str) -> Decimal | str | tuple[int, int] | None:
    """The value of a number, a word or a time of day H:MM as (hour, minute); None for anything else."""
    if NUMBER.fullmatch(text):
        return Decimal(text.replace(",", ""))
    if WORD.fullmatch(text):
        return text.casefold()
    if time := TIME.fullmatch(text):
        return int(time[1]), int(time[2])
    return None
