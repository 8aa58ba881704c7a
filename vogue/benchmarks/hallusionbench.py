"""HallusionBench (arXiv 2310.14566, github.com/tianyi-lab/HallusionBench): yes or no, on figures and edited figures.

    aAcc  questions that are answered rightly
    qAcc  question pairs: one question about several figures, or with and without one, all answered rightly
    fAcc  figures of which all questions are answered rightly
    mean  of the three, which leaderboards show

easy: the original figure, or none; hard: an edited one. VD: no answer without a figure; VS: a figure adds to it. To a
VS question without a figure "uncertain" is right too. The benchmark lets GPT-4 compare an answer with the reference;
here yes or no is compared, as the common evaluation suites do. Ours: the request for yes or no, and that to be
uncertain takes words that say so. The hub's split is the one with figures, which is what is commonly reported; the
repository's HallusionBench.json has all questions.
"""

from collections.abc import Sequence

from vogue.benchmarks.benchmark import Average, Benchmark, Line, Problem, Right, by_group, together
from vogue.benchmarks.extract import YES_OR_NO


def _is_blind(row: dict) -> bool:
    return row["category"] == "VS" and str(row["figure_id"]) == "0"


def _answer(row: dict) -> str:
    return "yes" if str(row["gt_answer"]) == "1" else "no"


def _is_right(answer: str, row: dict) -> bool:
    return answer == _answer(row) or (answer == "uncertain" and _is_blind(row))


def _key(row: dict, number: str) -> tuple[str, ...]:
    return (row["category"], row["subcategory"], str(row["set_id"]), str(row[number]))


def _groups(problem: Problem) -> tuple[str, str]:
    return "hard" if str(problem.row["visual_input"]) == "2" else "easy", problem.row["category"]


def _table(problems: Sequence[Problem], right: Right) -> list[Line | Average]:
    everything, *groups = by_group(problems, right, _groups)
    figures = [
        Line("aAcc", everything.attempts),
        together("qAcc", problems, right, lambda row: _key(row, "question_id")),
        together("fAcc", problems, right, lambda row: None if _is_blind(row) else _key(row, "figure_id")),
    ]
    return [
        *figures,
        Average("mean", [line for line in figures if line.attempts]),
        *(Line(f"aAcc {line.name}", line.attempts) for line in groups),
    ]


HALLUSIONBENCH = Benchmark(
    hub="hub:lmms-lab/HallusionBench@image",
    files=("HallusionBench.json",),
    columns=("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "question", "gt_answer"),
    images=("image", "filename"),
    prompt=lambda row: f"{row['question']}\nAnswer with yes or no.",
    answer=_answer,
    form=lambda _: YES_OR_NO,
    is_right=_is_right,
    table=_table,
)
