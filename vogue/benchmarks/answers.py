"""Completions become answers that are right or wrong: rules find them, or a language model at an endpoint does."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track

from vogue.benchmarks.benchmark import Benchmark, Problem
from vogue.benchmarks.extract import extract
from vogue.benchmarks.extractor import Extractor
from vogue.rollout.engine import Completion

ParsedBy = Literal["rules", "extractor"]


@dataclass(frozen=True)
class Answer:
    """A completion with the answer that was found in it (None for none), what found it, and whether it is right."""

    completion: Completion
    parsed: str | None
    parsed_by: ParsedBy
    right: bool


@dataclass(frozen=True)
class Answered:
    """A problem of a benchmark with n answers to it."""

    problem: Problem
    answers: tuple[Answer, ...]

    @property
    def right(self) -> tuple[bool, ...]:
        return tuple(answer.right for answer in self.answers)


def read_answers(benchmark: Benchmark, problem: Problem, completions: Sequence[Completion]) -> Answered:
    """The answers that rules find in a problem's completions."""
    form = benchmark.form(problem.row)
    parsed = [extract(completion.text, form) for completion in completions]
    answers = [
        _answer(benchmark, problem, completion, answer, "rules")
        for completion, answer in zip(completions, parsed, strict=True)
    ]
    return Answered(problem, tuple(answers))


def ask_extractor(
    benchmark: Benchmark, answered: Sequence[Answered], extractor: Extractor, everything: bool, console: Console
) -> list[Answered]:
    """Ask a language model for the answers that rules didn't find, or, with `everything`, for all answers.

    Raises EndpointError where the endpoint fails.
    """

    def is_asked(answer: Answer) -> bool:
        return everything or answer.parsed is None

    questions = [
        (item.problem.sample.problem, answer.completion.text, benchmark.form(item.problem.row))
        for item in answered
        for answer in filter(is_asked, item.answers)
    ]
    replies = iter([*track(extractor.extract_all(questions), "extract", len(questions), console=console)])
    return [
        Answered(
            item.problem,
            tuple(
                _answer(benchmark, item.problem, answer.completion, next(replies), "extractor")
                if is_asked(answer)
                else answer
                for answer in item.answers
            ),
        )
        for item in answered
    ]


def write_answered(answered: Sequence[Answered], path: Path) -> None:
    """Write one JSON object a completion: the answer that was found in it, what found it, and whether it is right."""
    with open(path, "w") as file:
        for number, item in enumerate(answered):
            sample = item.problem.sample
            row = {"problem": number, "place": sample.place, "question": sample.problem, "answer": sample.answer}
            for answer in item.answers:
                found = {"parsed": answer.parsed, "parsed_by": answer.parsed_by, "right": answer.right}
                file.write(json.dumps(row | {"completion": answer.completion.text} | found) + "\n")


def _answer(benchmark: Benchmark, problem: Problem, completion: Completion, parsed: str | None, by: ParsedBy) -> Answer:
    return Answer(completion, parsed, by, parsed is not None and benchmark.is_right(parsed, problem.row))
