"""AlgoPuzzleVQA (arXiv 2403.03864, github.com/declare-lab/LLM-PuzzleTest): 18 algorithmic puzzles, 100 of each.

Multiple choice, right by the letter, as the benchmark asks and scores it. Its own prompt also says how to think; here
the system prompt of `reward.design` does. (arXiv 2601.00215 asks nine of the puzzles without options: such questions
are data for a plain `vogue eval`, as `vogue data puzzles` makes them.)
"""

from collections.abc import Sequence
from pathlib import Path

from vogue.benchmarks.benchmark import Benchmark, Line, Problem, Right, by_group, letter_choices
from vogue.benchmarks.extract import options


def _prompt(row: dict) -> str:
    choices = [f"({letter}) {choice}" for letter, choice in letter_choices(row["options"]).items()]
    return "\n".join([row["question"].strip(), "Options:", *choices])


def _groups(problem: Problem) -> tuple[str, ...]:
    cell = problem.row["image"]  # images/clock/clock_0000.jpg
    path = cell.get("path") if isinstance(cell, dict) else cell
    return (Path(path).stem.rpartition("_")[0],) if isinstance(path, str) else ()


def _table(problems: Sequence[Problem], right: Right) -> list[Line]:
    return by_group(problems, right, _groups)


ALGOPUZZLEVQA = Benchmark(
    hub="hub:declare-lab/AlgoPuzzleVQA@train",
    files=("*.json",),
    columns=("image", "question", "options", "answer"),
    images=("image",),
    prompt=_prompt,
    answer=lambda row: row["answer"],
    form=lambda row: options(letter_choices(row["options"])),
    is_right=lambda answer, row: letter_choices(row["options"])[answer] == row["answer"],
    table=_table,
)
