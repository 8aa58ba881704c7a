"""Files in the forms that people have them; what is wrong in one is told in a sentence."""

import base64
import csv
import io
import json
import re

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vogue.data import DataError, Sample, load_samples, write_parquet
from vogue.data import files as module

RED = Image.new("RGB", (4, 3), (255, 0, 0))
ROW = {"problem": "How many?", "answer": "3", "images": []}


def answers(spec, **options):
    return [sample.answer for sample in load_samples(spec, **options)]


def write_split(folder, *names):
    """A parquet file of each name, whose one answer is the name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_parquet([Sample("How many?", name, (RED,))], folder / f"{name}.parquet")


# ------------------------------------------------------------------------------------------------------------- text


def test_json_lines_under_another_name_and_with_a_byte_order_mark_are_read(tmp_path):
    lines = "\n".join(json.dumps(ROW | {"answer": str(n)}) for n in range(3))
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(lines + "\n", encoding="utf-8-sig")
        assert answers(tmp_path / name) == ["0", "1", "2"]
    (tmp_path / "list.json").write_text(json.dumps([ROW]), encoding="utf-8-sig")
    assert answers(tmp_path / "list.json") == ["3"]


def test_a_line_ends_at_a_newline_alone(tmp_path):
    text = "one\u2028two\x85three\x0bfour"
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW | {"problem": text}, ensure_ascii=False), encoding="utf-8")
    assert [sample.problem for sample in load_samples(tmp_path / "a.jsonl")] == [text]


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_other_encodings_are_told_with_their_file(tmp_path, encoding, name):
    text = "problem,answer,images\nWie groß? é,3,\n" if name == "a.csv" else json.dumps([ROW], ensure_ascii=False)
    text = text.replace("How many?", "Wie groß? é")
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(
        DataError, match=rf"{name}.*: not UTF-8 \(byte \d+ is 0x..\); convert it|{name}.*not valid JSON"
    ):
        list(load_samples(tmp_path / name))


def test_a_key_that_stands_twice_in_a_record_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "a", "answer": "1", "answer": "2", "images": []}\n')
    with pytest.raises(DataError, match=r"a.jsonl, row 0: the key 'answer' stands twice in one record"):
        load_samples(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text('[{"problem": "a", "answer": "1", "answer": "2", "images": []}]')
    with pytest.raises(DataError, match=r"a.json: the key 'answer' stands twice in one record"):
        load_samples(tmp_path / "a.json")


def test_a_row_without_images_is_read_where_others_have_some(tmp_path):
    RED.save(tmp_path / "red.png")
    without = {name: ROW[name] for name in ("problem", "answer")}
    (tmp_path / "a.json").write_text(json.dumps([ROW | {"images": ["red.png"]}, without]))
    assert [len(sample.images) for sample in load_samples(tmp_path / "a.json")] == [1, 0]
    (tmp_path / "b.json").write_text(json.dumps([without]))
    with pytest.raises(DataError, match=r"no column 'images' .*; data.images_key='' says that there are none"):
        load_samples(tmp_path / "b.json")


# ----------------------------------------------------------------------------------------------------------- tables


def test_a_table_with_a_column_of_paths_is_read(tmp_path):
    (tmp_path / "photos").mkdir()
    RED.save(tmp_path / "photos" / "a b.png")
    rows = [
        ["question", "image", "answer", "level"],
        ['How many "dots", and\nwhere?', "photos/a b.png", "1,234", "5"],
        ["What is 2 + 2?", "", "4", ""],
    ]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)
        first, second = load_samples(tmp_path / name)
        assert (first.problem, first.answer, first.columns) == (rows[1][0], "1,234", {"level": "5"})
        assert [image.size for image in first.load_images()] == [(4, 3)]
        assert (second.answer, second.images) == ("4", ())


def test_a_table_may_hold_whole_images(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((300, 300), 80).save(buffer, "PNG")  # longer than Python's limit of a field
    text = base64.b64encode(buffer.getvalue()).decode()
    (tmp_path / "a.tsv").write_text(f"question\timage\tanswer\nWhat?\t{text}\tnoise\n")
    assert [image.size for image in load_samples(tmp_path / "a.tsv")[0].load_images()] == [(300, 300)]


def test_a_table_that_is_not_one_is_told_with_its_row(tmp_path):
    def refused(text, message):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            load_samples(tmp_path / "a.csv")

    refused("question,image,answer\na,b.png\n", r"a.csv, row 0: 2 fields, but 3 columns \(question, image, answer\)")
    refused("question,image,answer\na,b.png,3,4\n", r"a.csv, row 0: 4 fields, but 3 columns")
    refused("question,question,answer\na,b,3\n", r"a.csv: two columns have the same name")
    refused('question,image,answer\n"a,b.png,3\n', r"a.csv: not a readable table")
    refused("", r"a.csv: no samples in it")
    refused("question,image,answer\n", r"a.csv: no samples in it")


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_folder_of_several_splits_wants_one_named(tmp_path):
    names = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"]
    write_split(tmp_path / "set", *names)
    with pytest.raises(DataError, match=r"set: several splits; it has .*set@test, .*set@train, .*set@validation\."):
        load_samples(tmp_path / "set")
    assert answers(f"{tmp_path}/set@train") == names[:2]
    assert answers(f"{tmp_path}/set@test") == names[3:]
    with pytest.raises(DataError, match=r"set: no split 'dev'; it has "):
        load_samples(f"{tmp_path}/set@dev")


@pytest.mark.parametrize(
    "names", [("train", "test"), ("train-0123456789abcdef", "val-0123456789abcdef"), ("train_0", "train_1", "test_0")]
)
def test_splits_are_known_by_the_names_that_tools_give(tmp_path, names):
    write_split(tmp_path, *names)
    with pytest.raises(DataError, match="several splits"):
        load_samples(tmp_path)
    assert answers(f"{tmp_path}@train") == [name for name in names if name.startswith("train")]


def test_one_split_needs_no_name_and_shards_are_no_splits(tmp_path):
    write_split(tmp_path / "one", "test-00000-of-00001")
    assert answers(tmp_path / "one") == ["test-00000-of-00001"]
    write_split(tmp_path / "shards", "part-0", "part-1", "extra")
    assert answers(tmp_path / "shards") == ["extra", "part-0", "part-1"]


def test_a_clone_of_a_repository_is_read_from_its_data_folder(tmp_path):
    write_split(tmp_path / "data", "train-00000-of-00001", "test-00000-of-00001")
    (tmp_path / "README.md").write_text("# A data set")
    assert answers(f"{tmp_path}@test") == ["test-00000-of-00001"]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(
        DataError, match=r"lines: no samples in it: it holds no \*.parquet; name one of its files: train"
    ):
        load_samples(tmp_path / "lines")


def test_what_the_datasets_library_saved_is_read(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([ROW | {"answer": str(n)} for n in range(4)])
    rows.select([3, 1]).save_to_disk(tmp_path / "saved")
    assert answers(tmp_path / "saved") == ["3", "1"]
    datasets.DatasetDict(train=rows, test=rows.select([2])).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="splits: several splits"):
        load_samples(tmp_path / "splits")
    assert answers(f"{tmp_path}/splits@test") == ["2"]


# ---------------------------------------------------------------------------------------------------------- parquet


def test_a_large_file_is_mapped_and_gives_the_same_samples(tmp_path, monkeypatch):
    samples = [Sample("How many?", str(number), (RED,), category="toy") for number in range(300)]
    write_parquet(samples, tmp_path / "a.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    in_memory = list(load_samples(tmp_path / "a.parquet"))
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    mapped = load_samples(tmp_path / "a.parquet")
    assert list(mapped) == in_memory
    assert mapped[299].place == f"{tmp_path}/a.parquet, row 299"
    assert [image.size for image in mapped[7].load_images()] == [(4, 3)]


@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()])
def test_images_of_a_row_are_no_copies_of_the_file(tmp_path, binary):
    content = bytes(range(256)) * 4096
    kind = pa.list_(pa.struct([("bytes", binary), ("path", pa.string())]))
    cells = [[{"bytes": content, "path": None}] * (n % 3) if n != 5 else None for n in range(48)]
    table = pa.table({"problem": ["a"] * 48, "answer": ["1"] * 48, "images": pa.array(cells, kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    del table, cells
    samples = load_samples(tmp_path / "a.parquet")
    before = resident()
    held = list(samples)
    assert resident() - before < 16 << 20  # of 45 MB
    assert [len(sample.images) for sample in held] == [n % 3 if n != 5 else 0 for n in range(48)]
    assert bytes(held[47].images[1]) == content


def resident():
    """Bytes of this process's own memory."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "string_view"])
def test_every_kind_of_text_column_is_read(tmp_path, kind):
    column = pa.array(["How many?", "Which?"])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"problem": column, "answer": ["1", "2"], "images": [[], []]}), tmp_path / "a.parquet")
    assert [sample.problem for sample in load_samples(tmp_path / "a.parquet")] == ["How many?", "Which?"]


# ------------------------------------------------------------------------------------------------------------ choice


def test_rows_are_left_out_by_number_and_keep_theirs(tmp_path):
    pd.DataFrame([ROW | {"answer": str(n)} for n in range(6)]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "skip.txt").write_text("1\n\n4  # broken\n# all\n")
    samples = load_samples(tmp_path / "a.parquet", skip=tmp_path / "skip.txt")
    assert [sample.answer for sample in samples] == ["0", "2", "3", "5"]
    assert samples[1].place.endswith("row 2")
    assert answers(tmp_path / "a.parquet", limit=2, skip=tmp_path / "skip.txt") == ["0", "2"]
    for text, message in (("6", "line 1: '6' is no row's number; they go from 0 to 5"), ("one", "'one' is no row's")):
        (tmp_path / "skip.txt").write_text(text)
        with pytest.raises(DataError, match=re.escape(f"data.skip={tmp_path}/skip.txt") + f".*{message}"):
            load_samples(tmp_path / "a.parquet", skip=tmp_path / "skip.txt")
    with pytest.raises(DataError, match=r"data.skip=gone.txt: .*No such file"):
        load_samples(tmp_path / "a.parquet", skip="gone.txt")
