"""ChartQA (arXiv 2203.10244, github.com/vis-nlp/ChartQA): questions about charts, by people and by a machine.

Relaxed accuracy: a number is right within 5% of the right one; where the right answer is 0 or no number, the text must
be the same, whatever its case. "12%" is 0.12 on both sides, as in the code that the benchmark's users share. Asked with
the question alone. Ours: where the right answer is a number, that in "about 1,450 people" is what is compared.
"""

from collections.abc import Sequence

from vogue.benchmarks.benchmark import Benchmark, Line, Problem, Right, by_group
from vogue.benchmarks.extract import NUMERIC, SHORT, Form

TOLERANCE = 0.05


def _labels(row: dict) -> list[str]:
    return row["label"] if isinstance(row["label"], list) else [row["label"]]


def _form(row: dict) -> Form:
    return SHORT if all(_float(label) is None for label in _labels(row)) else NUMERIC


def _is_right(answer: str, row: dict) -> bool:
    return any(_is_near(answer, label) for label in _labels(row))


def _is_near(answer: str, label: str) -> bool:
    value, expected = _float(answer), _float(label)
    if value is not None and expected:
        return abs(value - expected) / abs(expected) <= TOLERANCE
    return answer.casefold() == label.casefold()


def _float(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def _groups(problem: Problem) -> tuple[str]:
    made_by = problem.row.get("human_or_machine")  # 0 and 1 on the hub; the repository has a file for each
    human = made_by == 0 if made_by is not None else "test_human" in problem.sample.place
    return ("human" if human else "augmented",)


def _table(problems: Sequence[Problem], right: Right) -> list[Line]:
    return by_group(problems, right, _groups)


CHARTQA = Benchmark(
    hub="hub:HuggingFaceM4/ChartQA@test",
    files=("test_human.json", "test_augmented.json"),
    columns=("query", "label"),
    images=("image", "imgname"),
    prompt=lambda row: row["query"],
    answer=lambda row: _labels(row)[0],
    form=_form,
    is_right=_is_right,
    table=_table,
)
