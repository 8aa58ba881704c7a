r"""MathVerse (arXiv 2403.14624, github.com/ZrrSkywalker/MathVerse): a problem in six versions, with ever less text.

Asked with its own `query_cot`; the system prompt of `reward.design` may ask for another form of the answer besides.
The benchmark lets GPT-4 extract an answer and judge it against the right one. Ours in place of the judge: a letter for
multiple choice, by the text of the option too (its own judging examples count that as right); otherwise equality as
text or as mathematics, without the name in front of "=" and without degrees and units behind a number.
"""

import re
from collections.abc import Sequence

from vogue.benchmarks.benchmark import Benchmark, Line, Problem, Right, by_group
from vogue.benchmarks.extract import EXPRESSION, Form, options
from vogue.rewards.correctness import is_correct

CHOICE = re.compile(r"^\s*\(?([A-H])\s*[:.)]\s*(.*?)\s*$", re.MULTILINE)
LETTER = re.compile(r"\(?([A-H])\)?")


def _letter(row: dict) -> str | None:
    found = LETTER.fullmatch(row["answer"].strip())
    return found[1] if found and row["question_type"] == "multi-choice" else None


def _form(row: dict) -> Form:
    if not _letter(row):
        return EXPRESSION
    # Of "Vision Only" the image alone holds the options; the hub's data has them in `question_for_eval`.
    choices = dict(CHOICE.findall(row.get("question_for_eval") or row["question"]))
    return options(choices if _letter(row) in choices else dict.fromkeys("ABCDEF", ""))


def _is_right(answer: str, row: dict) -> bool:
    if letter := _letter(row):
        return answer == letter
    return is_correct(answer, row["answer"])


def _groups(problem: Problem) -> tuple[str, str]:
    return f"version: {problem.row['problem_version']}", f"subject: {problem.row['metadata']['subject']}"


def _table(problems: Sequence[Problem], right: Right) -> list[Line]:
    return by_group(problems, right, _groups)


MATHVERSE = Benchmark(
    hub="hub:AI4Math/MathVerse/testmini@testmini",
    files=("testmini.json",),
    columns=("query_cot", "question", "answer", "question_type", "problem_version", "metadata", "image"),
    images=("image",),
    prompt=lambda row: row["query_cot"],
    answer=lambda row: row["answer"],
    form=_form,
    is_right=_is_right,
    table=_table,
)
