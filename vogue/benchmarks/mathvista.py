"""MathVista (arXiv 2310.02255, github.com/lupantech/MathVista): five tasks, seven skills; choices, numbers, lists.

Asked with its own `query`; a row without one, as in its repository's testmini.json, is asked in our words. Scored as
there, once an answer is found:

    multi_choice   the letter's choice, or else the choice with the smallest edit distance, the first of equal ones
    integer        int(float(answer)), as text, equals the right answer
    float          the answer rounded to `precision` digits, as text, equals the right answer
    list           the answer, as text, equals the right answer

An answer that isn't found is wrong (the benchmark's --ignore_empty_extractions), not the choice nearest to no text.
A letter is of the choice that the policy was shown by it: the query's own order counts, not that of `choices`.
"""

import re
from collections.abc import Sequence

from vogue.benchmarks.benchmark import Benchmark, Line, Problem, Right, by_group, letter_choices
from vogue.benchmarks.extract import LIST, NUMERIC, Form, options, plain


def _prompt(row: dict) -> str:
    _check(row)
    if row.get("query"):
        return row["query"]
    unit = f" (Unit: {row['unit']})" if row["unit"] else ""
    choices = [f"({letter}) {choice}" for letter, choice in letter_choices(row["choices"] or ()).items()]
    return "\n".join([row["question"] + unit, *choices, f"Answer with {_form(row).wanted}."])


def _check(row: dict) -> None:
    """Raise ValueError for a row that no answer to it could be scored by."""
    if row["question_type"] == "multi_choice":
        choices = row["choices"]
        if not isinstance(choices, Sequence) or row["answer"] not in choices:
            raise ValueError(f"'answer' {row['answer']!r} is none of 'choices', {choices!r}")
        if sorted(_choices(row).values()) != sorted(choices):
            raise ValueError(f"'query' lists {list(_choices(row).values())}, but 'choices' are {choices!r}")
    elif row["answer_type"] == "float":
        precision = row["precision"]
        if not isinstance(precision, int | float) or not float(precision).is_integer():
            raise ValueError(f"'precision' of a float must be a whole number, but is {precision!r}")


def _choices(row: dict) -> dict[str, str]:
    """The choices by letter, as the query lists them; where it lists none, in the row's order."""
    listed = re.findall(r"^\(([A-Z])\) (.*)$", row.get("query") or "", re.MULTILINE)
    return {letter: choice.strip() for letter, choice in listed} or letter_choices(row["choices"])


def _form(row: dict) -> Form:
    if row["question_type"] == "multi_choice":
        choice = options(_choices(row))
        return Form(choice.wanted, lambda statement: choice.read(statement) or plain(statement), choice.search)
    if row["answer_type"] == "list":
        return LIST
    digits = f"rounded to {int(row['precision'])} digit(s) behind the point" if row["precision"] else "a whole one"
    return Form(f"a number alone, {digits}", NUMERIC.read, NUMERIC.search)


def _is_right(answer: str, row: dict) -> bool:
    if row["question_type"] == "multi_choice":
        choices = _choices(row)
        chosen = choices.get(answer) or min(row["choices"], key=lambda choice: edit_distance(answer, choice))
        return chosen == row["answer"]
    if row["answer_type"] == "list":
        return answer == row["answer"]
    value = float(answer.removesuffix("%"))
    if abs(value) == float("inf"):
        return False
    return row["answer"] == str(int(value) if row["answer_type"] == "integer" else round(value, int(row["precision"])))


def edit_distance(first: Sequence, second: Sequence) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements that turn one sequence into the other."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _groups(problem: Problem) -> list[str]:
    about = problem.row["metadata"]
    return [f"task: {about['task']}", *(f"skill: {skill}" for skill in about["skills"])]


def _table(problems: Sequence[Problem], right: Right) -> list[Line]:
    return by_group(problems, right, _groups)


MATHVISTA = Benchmark(
    hub="hub:AI4Math/MathVista@testmini",
    files=("testmini.json",),
    columns=("question", "choices", "unit", "precision", "answer", "question_type", "answer_type", "metadata"),
    images=("decoded_image", "image"),
    prompt=_prompt,
    answer=lambda row: row["answer"],
    form=_form,
    is_right=_is_right,
    table=_table,
)
