"""What docs/data.md shows is what is read: each of its rows, and the names in its table."""

import re
from pathlib import Path

import pytest
from PIL import Image

from vogue.data import load_samples
from vogue.data.columns import ANSWERS, IMAGES, QUESTIONS
from vogue.data.files import SUFFIXES

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
ROWS = re.findall(r"\*\*(.+?)\*\*[^\n]*\n\n```(json|csv)\n(.+?)```", TEXT, re.DOTALL)


def test_every_shape_has_a_row():
    assert [name for name, _, _ in ROWS] == ["EasyR1", "verl", "TRL", "ms-swift", "LLaVA, VLM-R1", "A table"]


@pytest.mark.parametrize(("name", "kind", "content"), ROWS, ids=[name for name, _, _ in ROWS])
def test_each_row_is_read_as_the_same_sample(tmp_path, name, kind, content):
    (tmp_path / "charts").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "charts" / "1.png")
    path = tmp_path / f"rows.{'jsonl' if kind == 'json' else kind}"
    path.write_text(content)
    (sample,) = load_samples(path)
    assert sample.problem.removeprefix("<image>") == "How many bars are red?"
    assert sample.answer == "3"
    assert [image.size for image in sample.load_images()] == [(4, 3)]


def test_the_table_lists_the_names_that_are_known():
    for what, names in (("the question", QUESTIONS), ("the right answer", ANSWERS), ("images", IMAGES)):
        (cell,) = re.findall(rf"^\| {what} \| (.*?) \|", TEXT, re.MULTILINE)
        assert tuple(re.findall(r"`(.+?)`", cell)) == names
    for suffix in SUFFIXES:
        assert f"`train{suffix}`" in TEXT
