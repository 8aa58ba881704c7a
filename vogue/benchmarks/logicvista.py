"""LogicVista (arXiv 2407.04973, github.com/Yijia-Xiao/LogicVista): five skills of reasoning, options within the image.

Right is who names exactly the right letters, in whatever order: "A, C". The benchmark lets GPT-4 find them. One of its
448 rows has neither question nor answer; as there, it counts, and is never right.
"""

from collections.abc import Sequence

from vogue.benchmarks.benchmark import Benchmark, Line, Problem, Right, by_group
from vogue.benchmarks.extract import LETTERS

NO_QUESTION = "Answer the question in the image."


def _letters(text: str) -> list[str]:
    return sorted(letter.strip().upper() for letter in text.split(","))


def _groups(problem: Problem) -> list[str]:
    skills = problem.row.get("skill") or []
    return [f"skill: {skill}" for skill in ([skills] if isinstance(skills, str) else skills)]


def _table(problems: Sequence[Problem], right: Right) -> list[Line]:
    return by_group(problems, right, _groups)


LOGICVISTA = Benchmark(
    hub="hub:lscpku/LogicVista@test",
    files=("dataset.json",),
    columns=("question", "answer"),
    images=("image", "imagename"),
    prompt=lambda row: row["question"].strip() or NO_QUESTION,
    answer=lambda row: row["answer"].strip() or "none",
    form=lambda _: LETTERS,
    is_right=lambda answer, row: _letters(answer) == _letters(row["answer"]),
    table=_table,
)
