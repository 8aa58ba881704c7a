"""Why a completion earned what it earned, step by step, and what a run's completions would earn now: `vogue score`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vogue.config.presets import DESIGNS, HEADED
from vogue.config.sections import RewardConfig
from vogue.rewards.answer_types import Collection, Mathematics, Number, Option, Reading, Series, Time, Words, read
from vogue.rewards.correctness import Verdict, verdicts
from vogue.rewards.designs import find_answer, score
from vogue.rewards.pebr_r1 import ANSWER


@dataclass(frozen=True)
class Change:
    """A logged completion whose accuracy is another one now."""

    row: int  # in its file, from 1 on
    parsed: str | None
    answer: str
    before: float
    verdict: Verdict


def steps(completion: str, answer: str, settings: RewardConfig) -> list[tuple[str, str]]:
    """The steps from a completion to its reward by the design, each with a name; `settings.function` is not called."""
    where = "<answer>" if "answer" in DESIGNS[settings.design] else "\\boxed{}"
    headed = settings.design in HEADED
    parsed = find_answer(completion, settings.design)
    if parsed is None:
        found = [("given", f"none: nothing in a finished {where}, which reward.design={settings.design} asks for")]
    else:
        verdict = verdicts([(parsed, answer)])[0]
        found = [
            ("given", f"{parsed!r}, {f'behind {ANSWER!r}' if headed else f'from the last finished {where}'}"),
            ("read as", described(read(parsed))),
            ("right answer", f"{answer!r}, read as {described(read(answer))}"),
            ("verdict", f"{'right' if verdict.right else 'wrong'}: {verdict.rule}"),
        ]
    of_sample = settings.design == "pebr_perception"
    scored = score(completion, answer, settings.unweighed() if of_sample else settings)
    parts = {"accuracy": scored.accuracy, "format": scored.format} | scored.components
    weights = settings.weights
    found += [(name, f"{value:.4g}, weight {weights.get(name, 0):g}") for name, value in parts.items()]
    if settings.wrong:
        found.append(("reward.wrong", f"{settings.wrong:g}, what a wrong answer counts as in place of 0"))
    if of_sample:
        return [*found, ("reward", "not told: its other scores take the sample with its image")]
    return [*found, ("reward", f"{scored.reward:.4g}")] if weights else found


def changes(rows: Sequence[dict[str, Any]], settings: RewardConfig) -> list[Change]:
    """The rows of a completions.jsonl whose accuracy is another one by today's rules."""
    parsed = [find_answer(row["completion"], settings.design) for row in rows]
    pairs = [(given or "", row["answer"]) for given, row in zip(parsed, rows, strict=True)]
    found = [
        Change(number, given, row["answer"], row["accuracy"], verdict)
        for number, (given, row, verdict) in enumerate(zip(parsed, rows, verdicts(pairs), strict=True), 1)
    ]
    return [change for change in found if change.before != float(change.verdict.right)]


def described(reading: Reading) -> str:
    """What an answer was read as, in words."""
    match reading:
        case Option(letter, text):
            return f"option {letter}" + (f" with the text {text!r}" if text else "")
        case Time():
            return f"the time {reading.hour}:{reading.minute:02}" + (f":{reading.second:02}" if reading.second else "")
        case Number(value, _, unit, name):
            return f"the number {value}{_unit(unit)}{_name(name)}"
        case Series(joined, numbers):
            return f"a {joined} of {', '.join(map(str, numbers))}"
        case Collection(kind, items):
            return f"several answers ({kind}): {' | '.join(items)}"
        case Mathematics(_, value, unit, name):
            return f"the expression {value}{_unit(unit)}{_name(name)}"
        case Words(text):
            return f"the words {text!r}"


def _unit(unit: str | None) -> str:
    return f" with the unit {unit}" if unit else ""


def _name(name: str | None) -> str:
    return f", called {name}" if name else ""
