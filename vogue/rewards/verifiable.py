r"""The reward of VOGUE (arXiv 2510.01444): is the answer right, and is it where it was asked for.

reward = 0.9 · accuracy + 0.1 · format,   accuracy and format in {0, 1}

completion:  <think> … </think>  …  \boxed{answer}  …
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from vogue.rewards.equality import Verifier

WEIGHTS = (0.9, 0.1)  # accuracy, format
NUMBER = re.compile(r"[+-]?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)?(\.[0-9]+)?(?<=[0-9])")
WORD = re.compile(r"[A-Za-z]+")
TIME = re.compile(r"([0-9]{1,2}):([0-5][0-9])")
TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
BRACE = re.compile(r"\\boxed\s*\{|[{}]")

verifier = Verifier()


@dataclass(frozen=True)
class Score:
    r"""What a completion earned; `parsed` is the content of its last \boxed{}, None without one."""

    reward: float
    accuracy: float
    format: float
    parsed: str | None


def score(completion: str, answer: str, weights: tuple[float, float] = WEIGHTS) -> Score:
    """The score of a completion; `weights` are those of accuracy and of format.

    Never raises for what a model wrote: what cannot be parsed is wrong.
    """
    parsed = boxed(completion)
    accuracy = float(parsed is not None and is_correct(parsed, answer))
    form = float(is_formatted(completion))
    return Score(weights[0] * accuracy + weights[1] * form, accuracy, form, parsed)


def score_batch(
    completions: Sequence[str], answers: Sequence[str], weights: tuple[float, float] = WEIGHTS
) -> list[Score]:
    """The scores of completions, each against the answer at its position.

    Raises ValueError where the lengths differ.
    """
    return [score(completion, answer, weights) for completion, answer in zip(completions, answers, strict=True)]


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
    parsed, answer = _normalise(parsed), _normalise(answer)
    if parsed == answer:
        return True
    value, expected = _plain(parsed), _plain(answer)
    if isinstance(expected, tuple) or (value is not None and expected is not None):
        return value == expected
    return verifier.equal(answer, parsed)


def _normalise(text: str) -> str:
    """Without what changes no meaning: spacing, $, \\text{}, a full stop, the brackets of a choice "(A)"."""
    text = TEXT.sub(r"\1", text.replace("\\$", "").replace("$", ""))
    text = " ".join(text.split()).removesuffix(".")
    return text[1:-1] if re.fullmatch(r"\([A-Za-z]\)", text) else text


def _plain(text: str) -> Decimal | str | tuple[int, int] | None:
    """The value of a number, a word or a time of day H:MM; None for anything else."""
    if NUMBER.fullmatch(text):
        return Decimal(text.replace(",", ""))
    if WORD.fullmatch(text):
        return text.casefold()
    if time := TIME.fullmatch(text):
        return int(time[1]), int(time[2])
    return None
