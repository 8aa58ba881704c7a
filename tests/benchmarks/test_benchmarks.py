"""Each benchmark on a few rows in its own schema: what is asked, and scores worked out by hand from its rules.

The rows are made up; their columns, keys and codes are the benchmarks'.
"""

import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vogue.benchmarks import BENCHMARKS
from vogue.benchmarks.answers import read_answers, write_answered
from vogue.benchmarks.mathvista import edit_distance
from vogue.data import DataError
from vogue.estimates import Estimate
from vogue.evaluate import benchmark_table
from vogue.rollout.engine import Completion


def encoded():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, name, content, *images):
    """A data file and its images; returns the folder."""
    for image in images:
        path = folder / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded())
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def answer(name, problems, *completions):
    """The problems with the same number of completions each, read by rules."""
    groups = [[Completion((1,), (0.0,), text, True) for text in texts] for texts in completions]
    return [read_answers(BENCHMARKS[name], problem, group) for problem, group in zip(problems, groups, strict=True)]


def scores(name, problem, *completions):
    return list(answer(name, [problem], completions)[0].right)


def table(name, answered, pass_at=(1,)):
    """{line: (units, value at each k)}, the values rounded to 4 digits."""
    lines = benchmark_table(BENCHMARKS[name], answered, pass_at)
    return {line: (units, *(round(estimate.value, 4) for estimate in found)) for line, units, found in lines}


# ------------------------------------------------------------------------------------------------------ MathVerse


def mathverse_row(answer, version="Text Dominant", kind="multi-choice", question=None, subject="Plane Geometry"):
    question = "Find the angle. ()\nChoices:\nA:40°\nB:60°\nC:1/2\nD:140°" if question is None else question
    return {
        "sample_index": "1",
        "problem_index": "1",
        "problem_version": version,
        "question": question,
        "image": "images_version_1-4/image_1.png",
        "answer": answer,
        "question_type": kind,
        "metadata": {"split": "testmini", "source": "made up", "subject": subject, "subfield": "Angle"},
        "query_wo": f"Directly.\nQuestion: {question}",
        "query_cot": f"Reason first.\nQuestion: {question}",
    }


def mathverse(folder, *rows):
    image = "images/images_version_1-4/image_1.png"
    return BENCHMARKS["mathverse"].load(write(folder, "testmini.json", rows, image))


def test_mathverse_asks_its_reasoning_query_about_the_image(tmp_path):
    (problem,) = mathverse(tmp_path, mathverse_row("D"))
    assert problem.sample.problem.startswith("Reason first.\nQuestion: Find the angle.")
    assert problem.sample.load_images()[0].size == (8, 8)
    assert problem.sample.place == f"{tmp_path}/testmini.json, row 0"


def test_mathverse_scores_choices_and_expressions(tmp_path):
    choice, length, ratio, angle, area, hidden = mathverse(
        tmp_path,
        mathverse_row("D"),
        mathverse_row("$C=40.84 \\mathrm{~cm}$", kind="free-form", question="How long is it?"),
        mathverse_row("\\frac{9\\sqrt{3}}{2}", kind="free-form", question="How long is a?"),
        mathverse_row("53.6^\\circ ", kind="free-form", question="Find b."),
        mathverse_row("Area $=\\frac{147 \\pi}{4} \\mathrm{~cm}^{2}$", kind="free-form", question="How large is it?"),
        mathverse_row("B", "Vision Only", question=""),
    )
    found = scores("mathverse", choice, "\\boxed{D}", "\\boxed{140°}", "(D) 140°", "\\boxed{A}", "no idea")
    assert found == [True, True, True, False, False]
    found = scores("mathverse", length, "\\boxed{40.84}", "\\boxed{40.84 \\text{ cm}}", "\\boxed{40.85}")
    assert found == [True, True, False]
    assert scores("mathverse", ratio, "\\boxed{4.5\\sqrt{3}}", "\\boxed{4.5}") == [True, False]
    assert scores("mathverse", angle, "The answer is 53.6 degrees.", "\\boxed{53.6°}", "\\boxed{53}") == [
        True,
        True,
        False,
    ]
    found = scores("mathverse", area, "\\boxed{36.75\\pi}", "\\boxed{36.75\\pi \\text{ cm}^2}", "\\boxed{36.75}")
    assert found == [True, True, False]
    assert scores("mathverse", hidden, "\\boxed{B}", "\\boxed{(C)}") == [True, False]


def test_mathverse_sums_up_by_version_and_subject(tmp_path):
    rows = [
        mathverse_row("A"),
        mathverse_row("B", "Vision Only", question=""),
        mathverse_row("C", subject="Functions"),
    ]
    answered = answer("mathverse", mathverse(tmp_path, *rows), *[["\\boxed{A}", "\\boxed{C}"]] * 3)
    assert table("mathverse", answered, (1, 2)) == {
        "all": (3, 0.3333, 0.6667),
        "version: Text Dominant": (2, 0.5, 1.0),
        "version: Vision Only": (1, 0.0, 0.0),
        "subject: Plane Geometry": (2, 0.25, 0.5),
        "subject: Functions": (1, 0.5, 1.0),
    }


# ------------------------------------------------------------------------------------------------------ MathVista


def mathvista_row(pid, answer, answer_type="integer", choices=None, precision=None, unit=None, skills=("arithmetic",)):
    return {
        "pid": pid,
        "question": "How much is it?",
        "image": f"images/{pid}.jpg",
        "choices": choices,
        "unit": unit,
        "precision": precision,
        "answer": answer,
        "question_type": "multi_choice" if choices else "free_form",
        "answer_type": answer_type,
        "metadata": {"task": "figure question answering", "skills": list(skills), "split": "testmini"},
    }


@pytest.fixture
def mathvista(tmp_path):
    rows = [
        mathvista_row("1", "1.2", "float", precision=1, unit="cm"),
        mathvista_row("2", "1000"),
        mathvista_row("3", "half", "text", choices=["half", "quarter", "quarter past"], skills=("arithmetic", "logic")),
        mathvista_row("4", "[2014, 2016]", "list"),
        mathvista_row("5", "0.30", "float", precision=2),
    ]
    images = [row["image"] for row in rows]
    folder = write(tmp_path, "testmini.json", {row["pid"]: row for row in rows}, *images)
    return BENCHMARKS["mathvista"].load(folder)


def test_mathvista_asks_with_unit_and_choices_or_with_its_own_query(mathvista):
    assert mathvista[0].sample.problem == (
        "How much is it? (Unit: cm)\nAnswer with a number alone, rounded to 1 digit(s) behind the point."
    )
    assert "\n(A) half\n(B) quarter\n(C) quarter past\n" in mathvista[2].sample.problem
    row = mathvista[0].row | {"query": "Hint: its own.\nQuestion: How much is it?"}
    assert BENCHMARKS["mathvista"].prompt(row) == "Hint: its own.\nQuestion: How much is it?"


def test_mathvista_rounds_floats_to_their_precision_and_truncates_integers(mathvista):
    decimal, whole, *_, trailing = mathvista
    # round(1.24, 1) = 1.2 and round(1.26, 1) = 1.3
    found = scores("mathvista", decimal, "\\boxed{1.2}", "\\boxed{1.24}", "\\boxed{1.26}", "\\boxed{1.2 cm}", "none")
    assert found == [True, True, False, True, False]
    # int(float("1000.9")) = 1000
    found = scores("mathvista", whole, "\\boxed{1,000}", "\\boxed{1000.9}", "\\boxed{999.9}", "\\boxed{1e999}")
    assert found == [True, True, False, False]
    assert scores("mathvista", trailing, "\\boxed{0.30}") == [False]  # as text "0.3" is not "0.30", there too


def test_mathvista_takes_the_nearest_choice_for_what_is_no_letter(mathvista):
    choice = mathvista[2]
    completions = [
        "\\boxed{A}",
        "\\boxed{(A) half}",
        "\\boxed{Half of it}",
        "\\boxed{quarters}",
        "\\boxed{B}",
        "Hm.\nHm",
    ]
    # Of "Half of it" the distances are 7 to half, 9 to quarter and 10 or more to quarter past.
    assert scores("mathvista", choice, *completions) == [True, True, True, False, False, False]


def test_a_letter_is_of_the_choice_that_mathvistas_query_lists_by_it(tmp_path):
    query = "Hint: a letter.\nQuestion: How much is it?\nChoices:\n(A) quarter\n(B) half"
    row = mathvista_row("1", "half", "text", choices=["half", "quarter"]) | {"query": query}
    (problem,) = BENCHMARKS["mathvista"].load(write(tmp_path, "testmini.json", {"1": row}, row["image"]))
    assert scores("mathvista", problem, "\\boxed{A}", "\\boxed{B}", "\\boxed{half}") == [False, True, True]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"precision": None}, "'precision' of a float must be a whole number, but is None"),
        ({"precision": float("nan")}, "'precision' of a float must be a whole number, but is nan"),
        ({"precision": "two"}, "'precision' of a float must be a whole number, but is 'two'"),
        ({"question_type": "multi_choice"}, "'answer' '1.2' is none of 'choices', None"),
        ({"question_type": "multi_choice", "choices": ["1", "2"]}, "'answer' '1.2' is none of 'choices', ['1', '2']"),
        (
            {"question_type": "multi_choice", "choices": ["1.2", "2"], "query": "Which?\n(A) 1.2\n(B) 3"},
            "'query' lists ['1.2', '3'], but 'choices' are ['1.2', '2']",
        ),
    ],
)
def test_a_mathvista_row_that_no_answer_can_be_scored_by_is_told_before_any_is_generated(change, told, tmp_path):
    row = mathvista_row("1", "1.2", "float", precision=1) | change
    with pytest.raises(DataError, match=re.escape(f"testmini.json, row 0: {told}.")):
        BENCHMARKS["mathvista"].load(write(tmp_path, "testmini.json", {"1": row}, row["image"]))


def test_the_edit_distance_counts_changed_letters():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("flaw", "lawn") == 2


def test_mathvista_compares_lists_as_text_and_sums_up_by_task_and_skill(mathvista):
    assert scores("mathvista", mathvista[3], "\\boxed{[2014,2016]}", "\\boxed{[2016, 2014]}") == [True, False]
    wrong, right = ["\\boxed{7}"], ["\\boxed{A}"]
    assert table("mathvista", answer("mathvista", mathvista[1:3], wrong, right)) == {
        "all": (2, 0.5),
        "task: figure question answering": (2, 0.5),
        "skill: arithmetic": (2, 0.5),
        "skill: logic": (1, 1.0),
    }


# -------------------------------------------------------------------------------------------------------- We-Math


def wemath_rows(number, count):
    parts = [*map(str, range(1, count + 1)), "multi"]
    return [
        {
            "ID": f"{count}steps_{number}",
            "split": "testmini",
            "knowledge concept": "Angles",
            "question": f"Step {part}?",
            "option": "A. 3 cm;B. 4 cm; C. 5 cm;D. 12; 13; E. No correct answer",
            "answer": "B",
            "image_path": "1.png",
            "key": f"{count}steps_{part}",
            "question number": 1,
            "knowledge concept description": "",
        }
        for part in parts
    ]


@pytest.fixture
def wemath(tmp_path):
    """Problems 1 to 4 of two steps, problem 1 of three, and one whose steps are missing."""
    rows = [row for number in range(1, 5) for row in wemath_rows(number, 2)] + wemath_rows(1, 3)
    rows += wemath_rows(9, 2)[2:]
    return BENCHMARKS["wemath"].load(write(tmp_path, "testmini.json", rows, "1.png"))


def test_wemath_asks_with_its_options_and_knows_them_by_text(wemath):
    assert wemath[0].sample.problem == ("Step 1?\nOptions: A. 3 cm;B. 4 cm; C. 5 cm;D. 12; 13; E. No correct answer")
    completions = ["<Answer>: B", "\\boxed{4 cm}", "\\boxed{B. 4 cm}", "\\boxed{12; 13}", "\\boxed{E}"]
    assert scores("wemath", wemath[0], *completions) == [True, True, True, False, False]


def test_wemath_tells_four_kinds_of_mastery_apart(wemath):
    y, n = ["\\boxed{B}"], ["\\boxed{A}"]
    steps = [
        *(y, y, y),  # CM strict and loose
        *(y, n, y),  # RM strict, CM loose
        *(n, n, y),  # RM strict and loose
        *(n, y, n),  # IK
        *(y, y, y, n),  # IG
        y,
    ]
    found = table("wemath", answer("wemath", wemath, *steps))
    assert found["one-step"] == (11, round(7 / 11, 4))
    assert found["two-step"] == (5, 0.8)  # with the problem whose steps are missing
    assert found["three-step"] == (1, 0.0)
    assert (found["IK"], found["IG"]) == ((5, 0.2), (5, 0.2))
    assert (found["CM strict"], found["CM loose"]) == ((5, 0.2), (5, 0.4))
    assert found["RM strict"] == (5, round(2 / 3, 4))  # of the three problems that are right
    assert found["RM loose"] == (5, round(1 / 3, 4))
    # (total - IG / 2 - RM - IK) / total, as it is published: (5 - 0.5 - 2 - 1) / 5 and (5 - 0.5 - 1 - 1) / 5
    assert (found["score strict"], found["score loose"]) == ((5, 0.3), (5, 0.5))


def test_wemath_judges_each_attempt_at_a_problem_with_its_steps_on_its_own(wemath):
    y, n = "\\boxed{B}", "\\boxed{A}"
    # The first attempt knows step 1 alone, the second step 2 alone, and both solve the problem: never mastered.
    found = table("wemath", answer("wemath", wemath[:3], [y, n], [n, y], [y, y]), (1, 2))
    assert found["one-step"] == (2, 0.5, 1.0)
    assert found["CM strict"] == (1, 0.0)
    assert found["RM strict"] == (1, 1.0)
    assert found["CM loose"] == (1, 1.0)


def test_nothing_is_memorised_where_nothing_is_right(wemath):
    answered = answer("wemath", wemath[:3], *[["\\boxed{A}"]] * 3)
    lines = {line: found for line, _, found in benchmark_table(BENCHMARKS["wemath"], answered, (1,))}
    assert str(lines["RM strict"][0]) == "–"
    assert lines["IK"] == [Estimate(1.0, 1.0, 1.0)]


# ------------------------------------------------------------------------------------------------- HallusionBench


def hallusion_row(category, figure, question, truth, visual_input):
    name = None if visual_input == "0" else f"./{category}/chart/0_{figure}.png"
    return {
        "category": category,
        "subcategory": "chart",
        "visual_input": visual_input,
        "set_id": "0",
        "figure_id": figure,
        "sample_note": "",
        "question_id": question,
        "question": f"Is {question} larger?",
        "gt_answer_details": "",
        "gt_answer": truth,
        "filename": name,
    }


@pytest.fixture
def hallusion(tmp_path):
    rows = [
        hallusion_row("VD", "0", "0", "1", "1"),
        hallusion_row("VD", "0", "1", "0", "1"),
        hallusion_row("VD", "1", "0", "0", "2"),
        hallusion_row("VD", "1", "1", "1", "2"),
        hallusion_row("VS", "0", "0", "1", "0"),
        hallusion_row("VS", "1", "0", "1", "1"),
    ]
    images = [f"hallusion_bench/{row['filename']}" for row in rows if row["filename"]]
    return BENCHMARKS["hallusionbench"].load(write(tmp_path, "HallusionBench.json", rows, *images))


def test_hallusionbench_asks_for_yes_or_no_with_a_figure_where_there_is_one(hallusion):
    assert hallusion[0].sample.problem == "Is 0 larger?\nAnswer with yes or no."
    assert [len(problem.sample.load_images()) for problem in hallusion] == [1, 1, 1, 1, 0, 1]
    assert [problem.sample.answer for problem in hallusion] == ["yes", "no", "no", "yes", "yes", "yes"]


def test_hallusionbench_takes_uncertainty_only_without_a_figure_that_merely_adds_to_the_answer(hallusion):
    completions = ["\\boxed{Yes}", "\\boxed{no}", "\\boxed{uncertain}", "\\boxed{blue}"]
    assert scores("hallusionbench", hallusion[0], *completions) == [True, False, False, False]
    assert scores("hallusionbench", hallusion[4], *completions) == [True, False, True, False]


def test_hallusionbench_counts_questions_pairs_and_figures(hallusion):
    said = ["yes", "no", "no", "no", "uncertain", "yes"]
    answered = answer("hallusionbench", hallusion, *[[f"\\boxed{{{word}}}"] for word in said])
    assert table("hallusionbench", answered) == {
        "aAcc": (6, round(5 / 6, 4)),
        "qAcc": (3, round(2 / 3, 4)),  # VD 0: both right; VD 1: one wrong; VS 0: both right
        "fAcc": (3, round(2 / 3, 4)),  # VD 0; not VD 1; VS 1; the question without a figure has none
        "mean": (6, round((5 / 6 + 2 / 3 + 2 / 3) / 3, 4)),
        "aAcc VD": (4, 0.75),
        "aAcc VS": (2, 1.0),
        "aAcc easy": (4, 1.0),  # what isn't an edited figure
        "aAcc hard": (2, 0.5),
    }


def test_a_pair_is_right_in_one_attempt_or_not_at_all(hallusion):
    # Each attempt is right about one figure of the pair: pass@2 of the questions is 1, of the pair 0.
    answered = answer(
        "hallusionbench", [hallusion[0], hallusion[2]], ["\\boxed{yes}"] * 2, ["\\boxed{yes}", "\\boxed{no}"]
    )
    found = table("hallusionbench", answered, (1, 2))
    assert found["aAcc"] == (2, 0.75, 1.0)
    assert found["qAcc"] == (1, 0.5, 1.0)
    crossed = answer(
        "hallusionbench",
        [hallusion[0], hallusion[2]],
        ["\\boxed{yes}", "\\boxed{no}"],
        ["\\boxed{yes}", "\\boxed{no}"],
    )
    assert table("hallusionbench", crossed, (1, 2))["qAcc"] == (1, 0.0, 0.0)


# -------------------------------------------------------------------------------------------------------- ChartQA


@pytest.fixture
def chartqa(tmp_path):
    human = [
        {"imgname": "1.png", "query": "How many?", "label": "100"},
        {"imgname": "1.png", "query": "Which share?", "label": "0.12"},
        {"imgname": "1.png", "query": "Which colour?", "label": "Light Blue"},
    ]
    augmented = [
        {"imgname": "1.png", "query": "How many?", "label": "0"},
        {"imgname": "1.png", "query": "When?", "label": "-2010"},
    ]
    write(tmp_path, "test_human.json", human, "png/1.png")
    return BENCHMARKS["chartqa"].load(write(tmp_path, "test_augmented.json", augmented))


@pytest.mark.parametrize(
    ("row", "said", "right"),
    [
        (0, "105", True),  # exactly 5% off
        (0, "95", True),
        (0, "105.1", False),
        (0, "94.9", False),
        (0, "about 1,00 people", False),  # 1
        (0, "102 people", True),
        (0, "10,000%", True),  # 10000 / 100
        (0, "100%", False),  # 1
        (0, "a hundred", False),
        (1, "12\\%", True),
        (1, "12", False),
        (1, "0.1259", True),
        (2, "light blue", True),
        (2, "\\text{Light Blue}.", True),
        (2, "blue", False),
        (3, "0", True),
        (3, "0.0", False),  # 5% of 0 is no tolerance: the text must be the same
        (3, "0.01", False),
        (4, "-2000", True),  # 0.5% off
        (4, "2010", False),
    ],
)
def test_chartqa_accepts_numbers_within_5_percent_and_the_same_words(chartqa, row, said, right):
    assert scores("chartqa", chartqa[row], f"\\boxed{{{said}}}") == [right]


def test_chartqa_sums_up_by_who_asked(chartqa):
    answered = answer("chartqa", chartqa, *[[f"\\boxed{{{said}}}"] for said in ("100", "7", "red", "0", "-2010")])
    assert table("chartqa", answered) == {"all": (5, 0.6), "human": (3, 0.3333), "augmented": (2, 1.0)}


def test_chartqa_is_read_from_the_hubs_parquet_files_too(tmp_path):
    image = {"bytes": encoded(), "path": None}
    rows = [
        {"image": image, "query": "How many?", "label": ["3"], "human_or_machine": 0},
        {"image": image, "query": "How many?", "label": ["4"], "human_or_machine": 1},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet")
    problems = BENCHMARKS["chartqa"].load(str(tmp_path))
    assert problems[0].sample.load_images()[0].size == (8, 8)
    assert table("chartqa", answer("chartqa", problems, ["3"], ["3"])) == {
        "all": (2, 0.5),
        "human": (1, 1.0),
        "augmented": (1, 0.0),
    }


# ----------------------------------------------------------------------------------------------------- LogicVista


@pytest.fixture
def logicvista(tmp_path):
    rows = {
        "v1_0": {"imagename": "v1_0.png", "question": "Which (A-D)?", "answer": "C", "skill": ["inductive"]},
        "v1_1": {"imagename": "v1_0.png", "question": "Which two?", "answer": "A, C", "skill": ["spatial"]},
        "v1_2": {"imagename": "v1_0.png", "question": "", "answer": "", "skill": ["spatial"]},
    }
    return BENCHMARKS["logicvista"].load(write(tmp_path, "dataset.json", rows, "images/v1_0.png"))


def test_logicvista_wants_exactly_the_right_letters(logicvista):
    one, two, none = logicvista
    completions = ["\\boxed{C}", "\\boxed{(C)}", "\\boxed{C. 3}", "\\boxed{A, C}", "Hm."]
    assert scores("logicvista", one, *completions) == [True, True, True, False, False]
    completions = ["\\boxed{A, C}", "\\boxed{C and A}", "\\boxed{AC}", "\\boxed{A}", "\\boxed{A, B, C}"]
    assert scores("logicvista", two, *completions) == [True, True, True, False, False]
    assert none.sample.problem == "Answer the question in the image."
    assert scores("logicvista", none, "\\boxed{A}", "none", "") == [False, False, False]


def test_logicvista_sums_up_by_skill(logicvista):
    answered = answer("logicvista", logicvista, ["\\boxed{C}"], ["\\boxed{A, C}"], ["\\boxed{A}"])
    assert table("logicvista", answered) == {
        "all": (3, 0.6667),
        "skill: inductive": (1, 1.0),
        "skill: spatial": (2, 0.5),
    }


# -------------------------------------------------------------------------------------------------- AlgoPuzzleVQA


def test_algopuzzlevqa_reads_a_file_of_lines_for_each_puzzle_and_sums_up_by_it(tmp_path):
    clock = {
        "image": "images/clock/clock_0000.jpg",
        "question": "When does it start? ",
        "options": ["1:14", "8:09", "4:23", "2:07"],
        "answer": "4:23",
        "solution": {},
    }
    tile = clock | {"image": "images/board_tile/board_tile_0007.jpg", "options": ["Yes", "No"], "answer": "No"}
    write(tmp_path, "clock.json", json.dumps(clock) + "\n" + json.dumps(clock) + "\n", clock["image"], tile["image"])
    problems = BENCHMARKS["algopuzzlevqa"].load(write(tmp_path, "board_tile.json", json.dumps(tile) + "\n"))
    assert problems[0].sample.problem == "When does it start?\nOptions:\n(A) Yes\n(B) No"
    assert problems[1].sample.problem == "When does it start?\nOptions:\n(A) 1:14\n(B) 8:09\n(C) 4:23\n(D) 2:07"
    completions = ["\\boxed{C}", "\\boxed{4:23}", "Therefore (C).", "\\boxed{A}", "4:24"]
    assert scores("algopuzzlevqa", problems[1], *completions) == [True, True, True, False, False]
    assert scores("algopuzzlevqa", problems[0], "\\boxed{no}", "\\boxed{C}") == [True, False]
    answered = answer("algopuzzlevqa", problems, ["\\boxed{B}"], ["\\boxed{C}"], ["\\boxed{A}"])
    assert table("algopuzzlevqa", answered) == {"all": (3, 0.6667), "board_tile": (1, 1.0), "clock": (2, 0.5)}


# ------------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", BENCHMARKS)
def test_without_a_place_a_benchmark_is_read_from_the_hub(name, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, split):
        asked.append("/".join(names) + "@" + split)
        return datasets.Dataset.from_list([{"unknown": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"@\w+: no column '.*' \(it has: unknown\)"):
        BENCHMARKS[name].load(None)
    assert asked == [BENCHMARKS[name].hub.removeprefix("hub:")]


def test_what_is_no_data_of_the_benchmark_is_refused_with_its_place(tmp_path):
    chartqa = BENCHMARKS["chartqa"]
    with pytest.raises(DataError, match=r"holds neither test_human.json nor test_augmented.json nor \*.parquet"):
        chartqa.load(str(tmp_path))
    with pytest.raises(DataError, match=r"test_human.json, row 0: no column 'label' \(it has: query\)"):
        chartqa.load(write(tmp_path, "test_human.json", [{"query": "?"}]))
    with pytest.raises(DataError, match=r"test_human.json, row 0: not valid JSON"):
        chartqa.load(write(tmp_path, "test_human.json", "{"))
    with pytest.raises(DataError, match=r"test_human.json, row 0: must be a record, but is a int"):
        chartqa.load(write(tmp_path, "test_human.json", [5]))
    with pytest.raises(DataError, match=r"test_human.json: must hold rows, but holds a int"):
        chartqa.load(write(tmp_path, "test_human.json", "5"))
    with pytest.raises(DataError, match=r"nowhere.json: no such file"):
        chartqa.load(str(tmp_path / "nowhere.json"))


def test_the_first_problems_alone_are_read(chartqa, tmp_path):
    assert len(BENCHMARKS["chartqa"].load(str(tmp_path), 2)) == 2


def test_every_completion_is_written_with_the_answer_found_in_it(chartqa, tmp_path):
    answered = answer("chartqa", chartqa[:1], ["\\boxed{99}", "none"])
    write_answered(answered, tmp_path / "out.jsonl")
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert first == {
        "problem": 0,
        "place": f"{tmp_path}/test_human.json, row 0",
        "question": "How many?",
        "answer": "100",
        "completion": "\\boxed{99}",
        "parsed": "99",
        "parsed_by": "rules",
        "right": True,
    }
    assert (second["parsed"], second["right"]) == (None, False)
