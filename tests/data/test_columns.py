"""Rows of other trainers' data sets; each is what its tool writes, and what must become of it is by hand."""

import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vogue.data import DataError, Shape, load_samples

RED = Image.new("RGB", (4, 3), (255, 0, 0))
BLUE = Image.new("RGB", (2, 5), (0, 0, 255))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


CELL = {"bytes": png(RED), "path": None}


@pytest.fixture
def read(tmp_path):
    """A function: the samples of records, from JSON, with red.png and blue.png beside it."""
    RED.save(tmp_path / "red.png")
    BLUE.save(tmp_path / "blue.png")

    def build(*records, **shape):
        (tmp_path / "rows.json").write_text(json.dumps(records))
        return load_samples(tmp_path / "rows.json", shape=Shape(**shape))

    return build


def parquet(tmp_path, *records):
    pq.write_table(pa.Table.from_pylist(list(records)), tmp_path / "rows.parquet")
    return load_samples(tmp_path / "rows.parquet")


def sizes(sample):
    return [image.size for image in sample.load_images()]


# ----------------------------------------------------------------------------------------------------------- formats


def test_easyr1(tmp_path):
    (sample,) = parquet(tmp_path, {"problem": "<image>How many?", "answer": "3", "images": [CELL]})
    assert (sample.problem, sample.answer, sizes(sample)) == ("<image>How many?", "3", [(4, 3)])


def test_verl(tmp_path):
    row = {
        "data_source": "hiyouga/geometry3k",
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image>Find x. Put it in \\boxed{}."},
        ],
        "images": [CELL],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "12"},
        "extra_info": {"split": "train", "index": 0, "question": "Find x."},
    }
    (sample,) = parquet(tmp_path, row)
    assert (sample.problem, sample.answer) == ("<image>Find x. Put it in \\boxed{}.", "12")
    assert (sample.system, sample.source, sizes(sample)) == ("Be brief.", "hiyouga/geometry3k", [(4, 3)])
    assert sample.columns["extra_info"] == {"split": "train", "index": 0, "question": "Find x."}


@pytest.mark.parametrize("column", [{"image": CELL}, {"images": [CELL]}])
def test_trl_with_images_in_a_column(tmp_path, column):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "How many?"}]
    (sample,) = parquet(tmp_path, {"prompt": [{"role": "user", "content": parts}], "solution": "3", **column})
    assert (sample.problem, sample.answer, sizes(sample)) == ("<image>How many?", "3", [(4, 3)])


def test_trl_with_a_plain_text_and_a_solution_in_tags(read):
    (sample,) = read({"prompt": "How many?", "image": "red.png", "solution": "<think>1, 2</think><answer> 2 </answer>"})
    assert (sample.problem, sample.answer, sizes(sample)) == ("How many?", "2", [(4, 3)])


def test_images_within_the_parts_of_a_message(read):
    content = [
        {"type": "text", "text": "Compare "},
        {"type": "image", "image": "blue.png"},
        {"type": "text", "text": " with "},
        {"type": "image_url", "image_url": {"url": "red.png"}},
    ]
    (sample,) = read({"messages": [{"role": "user", "content": content}], "answer": "red"})
    assert (sample.problem, sizes(sample)) == ("Compare <image> with <image>", [(2, 5), (4, 3)])


def test_ms_swift(read):
    row = {"messages": [{"role": "user", "content": "<image>How many?"}], "images": ["red.png"], "solution": "3"}
    turns = [*row["messages"], {"role": "assistant", "content": "There are \\boxed{\\frac{1}{2}} of them."}]
    with_solution, of_assistant = read(row, {"messages": turns, "images": ["red.png"]})
    assert (with_solution.problem, with_solution.answer) == ("<image>How many?", "3")
    assert of_assistant.answer == "\\frac{1}{2}"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("3", "3"),
        ("So \\boxed{1}, no, \\boxed{\\left\\{2, 3\\right.}", "\\left\\{2, 3\\right."),
        ("\\boxed{4} and \\boxed{5", "4"),
        ("<answer>6</answer> or <answer>\\boxed{7}</answer>", "7"),
    ],
)
def test_a_worked_solution_answers_with_its_last_finished_box(read, solution, answer):
    assert read({"problem": "a", "solution": solution, "images": []})[0].answer == answer


@pytest.mark.parametrize("image", ["red.png", ["red.png"]])
def test_llava(read, image):
    turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "3"}]
    (sample,) = read({"id": 7, "image": image, "conversations": turns})
    assert (sample.problem, sample.answer, sizes(sample)) == ("<image>\nHow many?", "3", [(4, 3)])
    assert sample.columns == {"id": 7}


def test_messages_as_json_in_a_table(tmp_path):
    RED.save(tmp_path / "red.png")
    messages = json.dumps([{"role": "user", "content": "<image>How many?"}])
    frame = pd.DataFrame([{"messages": messages, "images": '["red.png"]', "solution": 3}])
    frame.to_csv(tmp_path / "a.csv", index=False)
    (sample,) = load_samples(tmp_path / "a.csv")
    assert (sample.problem, sample.answer, sizes(sample)) == ("<image>How many?", "3", [(4, 3)])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "2 user turns and 0 of an assistant"),
        ([{"role": "system", "content": "a"}], "0 user turns"),
        ([{"role": "tool", "content": "a"}], "has the role 'tool', not one of system, user, assistant"),
        (["a"], "must hold messages, but holds 'a'"),
        (
            [{"role": "user", "content": [{"type": "audio", "audio": "a.mp3"}]}],
            "a part of 'messages' must be text, an image or a video",
        ),
        ([{"role": "user", "content": None}], "'messages' must be text and not empty, but is None"),
    ],
)
def test_messages_that_are_no_question_are_told_with_their_row(read, messages, message):
    good = {"messages": [{"role": "user", "content": "How many?"}], "images": [], "answer": "3"}
    samples = read(good, good | {"messages": messages})
    with pytest.raises(DataError, match=f"rows.json, row 1: .*{message}"):
        samples[1]


# ---------------------------------------------------------------------------------------------------------- settings


def test_settings_name_columns_and_reach_into_records(read):
    row = {"asked": "How many?", "meta": {"truth": {"value": 3}}, "picture": "red.png", "split": "x"}
    (sample,) = read(row, problem_key="asked", answer_key="meta.truth.value", images_key="picture")
    assert (sample.problem, sample.answer, sizes(sample)) == ("How many?", "3", [(4, 3)])
    assert sample.columns == {"meta": {"truth": {"value": 3}}, "split": "x"}


def test_no_images_at_all_is_said_by_an_empty_key(read):
    (sample,) = read({"question": "2 + 2?", "answer": 4}, images_key="")
    assert (sample.problem, sample.answer, sample.images) == ("2 + 2?", "4", ())


def test_images_are_looked_for_in_the_folder_that_is_named(read, tmp_path):
    (tmp_path / "photos").mkdir()
    BLUE.save(tmp_path / "photos" / "1.png")
    (sample,) = read({"question": "What?", "answer": "blue", "image": "1.png"}, image_folder=tmp_path / "photos")
    assert sizes(sample) == [(2, 5)]


def test_a_template_makes_the_problem_of_the_question_and_the_row(read, tmp_path):
    row = {"question": "  How many? ", "unit": "cm", "answer": "3", "image": "red.png"}
    (sample,) = read(row, format_prompt="<image>{{ content | trim }} Answer in {{ unit }}.")
    assert sample.problem == "<image>How many? Answer in cm."
    (tmp_path / "math.jinja").write_text("{{ content | trim }}\nThink first.\n")
    (sample,) = read(row, format_prompt=str(tmp_path / "math.jinja"))
    assert sample.problem == "How many?\nThink first."
    with pytest.raises(DataError, match=r"rows.json, row 0: 'units' is undefined"):
        read(row, format_prompt="{{ content }} {{ units }}")[0]
    with pytest.raises(DataError, match=r"data.format_prompt: unexpected"):
        read(row, format_prompt="{{ content ")
    with pytest.raises(DataError, match=r"data.format_prompt=gone.jinja: neither a template with .* nor a file of one"):
        read(row, format_prompt="gone.jinja")
    with pytest.raises(DataError, match="row 0: access to attribute '__class__' of 'str' object is unsafe"):
        read(row, format_prompt="{{ content.__class__ }}")[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "query": "b", "answer": "1", "images": []},
            "columns question and query may each hold the qu",
        ),
        (
            {"problem": "a", "solution": "1", "ground_truth": "2", "images": []},
            "columns solution and ground_truth may each hold",
        ),
        ({"problem": "a", "label": "1", "images": []}, r"no column 'answer' \(it has: problem, label, images\)"),
        (
            {"problem": "a", "answer": "1", "photo": "red.png"},
            r"no column 'images' .*; data.images_key names the one of im",
        ),
    ],
)
def test_a_column_is_never_guessed(read, row, message):
    with pytest.raises(DataError, match=f"rows.json: {message}"):
        read(row)


def test_a_column_that_is_named_must_be_there(read):
    with pytest.raises(DataError, match=r"rows.json: data.answer_key=truth: no such column \(it has: problem, answer"):
        read({"problem": "a", "answer": "1", "images": []}, answer_key="truth")


# ----------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (0.00001, "0.00001"),
        (1e22, "10000000000000000000000"),
        (-2.5e-7, "-0.00000025"),
        (0.1, "0.1"),
        (3.0, "3"),
        (12345678901234567890, "12345678901234567890"),
        (True, "True"),
        ("1e-05", "1e-05"),
        ("nan", "nan"),
    ],
)
def test_a_number_is_what_people_write(read, answer, text):
    assert read({"problem": "a", "answer": answer, "images": []})[0].answer == text


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), None, "", " \u200b\ufeff\n", [], ["3"], {}]
)
def test_what_is_no_answer_is_refused_with_row_and_value(read, value):
    samples = read({"problem": "a", "answer": "1", "images": []}, {"problem": "a", "answer": value, "images": []})
    with pytest.raises(DataError, match=r"rows.json, row 1: 'answer' must be text"):
        samples[1]


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_a_narrow_number_is_what_was_written(tmp_path, kind):
    answers = np.array([0.1, 2.35, 3, np.nan], kind)
    table = pa.table({"problem": ["a"] * 4, "answer": pa.array(answers), "images": [[]] * 4})
    pq.write_table(table, tmp_path / "a.parquet")
    samples = load_samples(tmp_path / "a.parquet")
    assert [samples[i].answer for i in range(3)] == ["0.1", "2.35", "3"]
    with pytest.raises(DataError, match="row 3: 'answer' must be text or a number, but is nan"):
        samples[3]


def test_a_missing_number_of_pandas_is_refused(tmp_path):
    pd.DataFrame({"problem": ["a", "b"], "answer": [1.0, np.nan], "images": [[], []]}).to_parquet(
        tmp_path / "a.parquet"
    )
    samples = load_samples(tmp_path / "a.parquet")
    assert samples[0].answer == "1"
    with pytest.raises(DataError, match=r"a.parquet, row 1: 'answer' must be text or a number, but is nan|but is None"):
        samples[1]


# ------------------------------------------------------------------------------------------------------------- marks


@pytest.mark.parametrize(
    ("problem", "expected", "order"),
    [
        ("Is <image 1> like <image 2>?", "Is <image> like <image>?", [(4, 3), (2, 5)]),
        ("Is <image 2> like <image 1>?", "Is <image> like <image>?", [(2, 5), (4, 3)]),
        ("<image 1> <image_2> Is <image 1> red?", "<image> <image> Is image 1 red?", [(4, 3), (2, 5)]),
        ("<|image_1|><|image_2|>Alike?", "<image><image>Alike?", [(4, 3), (2, 5)]),
        ("(image)[image-1.png] and (image)[image-2.png]", "<image> and <image>", [(4, 3), (2, 5)]),
        ("![](a.png) and ![a dog](b.png)?", "<image> and <image>?", [(4, 3), (2, 5)]),
        ("Alike?", "Alike?", [(4, 3), (2, 5)]),
        ("<image><image>See ![](a.png).", "<image><image>See ![](a.png).", [(4, 3), (2, 5)]),
    ],
)
def test_other_marks_for_an_image_are_understood(read, problem, expected, order):
    (sample,) = read({"problem": problem, "answer": "yes", "images": ["red.png", "blue.png"]})
    assert (sample.problem, sizes(sample)) == (expected, order)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("Is <image 1> red?", r"the problem names images \[1\], but the row has 2"),
        ("<image 1><image 3>", r"the problem names images \[1, 3\], but the row has 2"),
        (
            "See (image)[image-1.png].",
            r"the problem has 1 marks such as '\(image\)\[image-1.png\]', but the row has 2 image",
        ),
        ("<audio>What is said?", "the problem has <audio>, which can't be heard here"),
    ],
)
def test_marks_that_do_not_fit_the_images_are_told(read, problem, message):
    with pytest.raises(DataError, match=f"rows.json, row 0: {message}"):
        read({"problem": problem, "answer": "yes", "images": ["red.png", "blue.png"]})[0]


def test_marks_in_a_problem_without_images_are_text(read):
    (sample,) = read({"problem": "What does ![](a.png) do in Markdown?", "answer": "show", "images": []})
    assert sample.problem == "What does ![](a.png) do in Markdown?"


def test_further_columns_stay_with_the_sample_as_json_has_them(tmp_path):
    row = {
        "problem": "a",
        "answer": "1",
        "images": [CELL],
        "box": [1.5, 2.0],
        "when": pd.Timestamp("2026-01-02"),
        "mask": b"raw",
        "nested": {"n": 1, "picture": CELL},
    }
    (sample,) = parquet(tmp_path, row)
    assert json.loads(json.dumps(sample.columns)) == {
        "box": [1.5, 2.0],
        "when": "2026-01-02 00:00:00",
        "mask": None,
        "nested": {"n": 1, "picture": {"bytes": None, "path": None}},
    }
