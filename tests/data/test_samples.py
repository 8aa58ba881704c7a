import io
import json
import resource

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from vogue.data import DataError, Sample, load_samples, write_parquet
from vogue.data.dataset import broken_images

RED = Image.new("RGB", (4, 3), (255, 0, 0))


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def record(**changes):
    return {"problem": "<image>How many?", "answer": "3", "images": ["red.png"], "source": "toy"} | changes


def write_json(folder, *records):
    RED.save(folder / "red.png")
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return path


def pixels(image):
    return image.mode, image.size, image.tobytes()


def test_written_parquet_loads_with_equal_content_and_pixels(tmp_path):
    samples = [Sample("<image>How many?", "3", (RED,), "toy"), Sample("Which is larger?", "left", (RED, RED), "toy")]
    write_parquet(samples, tmp_path / "new" / "train.parquet")
    loaded = load_samples(tmp_path / "new" / "train.parquet")
    assert [(s.problem, s.answer, s.source) for s in loaded] == [(s.problem, s.answer, s.source) for s in samples]
    assert [len(s.images) for s in loaded] == [1, 2]
    assert pixels(loaded[1].load_images()[1]) == pixels(RED)
    assert loaded[1].place == f"{tmp_path}/new/train.parquet, row 1"


def test_written_parquet_is_read_by_the_datasets_library(tmp_path):
    from datasets import load_dataset

    write_parquet([Sample("<image>How many?", "3", (RED,))], tmp_path / "train.parquet")
    rows = load_dataset(
        "parquet", data_files=str(tmp_path / "train.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows[0]["problem"] == "<image>How many?"
    assert pixels(Image.open(io.BytesIO(rows[0]["images"][0]["bytes"]))) == pixels(RED)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "train.parquet"
    write_parquet([Sample("<image>How many?", "3", (RED,))], path)
    before = path.read_bytes()
    with pytest.raises(DataError):
        write_parquet([Sample("<image>How many?", "3", (b"broken",))], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_files():
    """No file may grow above 64 KB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_stops_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, small_files):
    path = tmp_path / "train.parquet"
    write_parquet([Sample("<image>How many?", "3", (RED,))], path)
    before = path.read_bytes()
    noise = Image.frombytes("RGB", (256, 256), np.random.default_rng(0).bytes(256 * 256 * 3))  # no PNG makes it smaller
    with pytest.raises(OSError, match="File too large"):
        write_parquet([Sample("<image>How many?", "4", (noise,))], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_every_way_of_storing_an_image_gives_the_same_rgb_image(tmp_path):
    RED.save(tmp_path / "red.png")
    stored = [
        [{"bytes": encoded(RED), "path": None}],
        [{"bytes": None, "path": "red.png"}],
        [{"bytes": None, "path": str(tmp_path / "red.png")}],
    ]
    for number, images in enumerate(stored):
        path = tmp_path / f"{number}.parquet"
        pd.DataFrame([record(images=images)]).to_parquet(path)
        assert pixels(load_samples(path)[0].load_images()[0]) == pixels(RED)
    pd.DataFrame([record(images=[encoded(RED)])]).to_parquet(tmp_path / "raw.parquet")
    assert pixels(load_samples(tmp_path / "raw.parquet")[0].load_images()[0]) == pixels(RED)
    assert pixels(load_samples(write_json(tmp_path, record()))[0].load_images()[0]) == pixels(RED)
    assert pixels(Sample("How many?", "3", (RED,)).load_images()[0]) == pixels(RED)


def test_loading_opens_no_image(tmp_path):
    path = tmp_path / "train.parquet"
    pd.DataFrame([record(images=[{"bytes": b"not an image", "path": None}])]).to_parquet(path)
    (image,) = load_samples(path)[0].images
    assert bytes(image) == b"not an image"


def test_transparent_pixels_become_white_and_keep_black_lines_visible():
    drawing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    ImageDraw.Draw(drawing).line((0, 0, 7, 0), fill=(0, 0, 0, 255))
    (image,) = Sample("What?", "a line", (drawing,)).load_images()
    assert image.mode == "RGB"
    assert image.getpixel((3, 0)) == (0, 0, 0)
    assert image.getpixel((3, 5)) == (255, 255, 255)


def test_json_lines_and_a_folder_of_parquet_files_are_read_in_order(tmp_path):
    lines = tmp_path / "train.jsonl"
    lines.write_text("\n".join(json.dumps(record(answer=number)) for number in (7, 8.5, "nine")) + "\n\n")
    assert [sample.answer for sample in load_samples(lines)] == ["7", "8.5", "nine"]
    for name, answer in (("b", "2"), ("a", "1")):
        write_parquet([Sample("How many?", answer, (RED,))], tmp_path / f"{name}.parquet")
    assert [sample.answer for sample in load_samples(tmp_path)] == ["1", "2"]


def test_limit_takes_the_first_samples(tmp_path):
    path = tmp_path / "train.parquet"
    write_parquet([Sample("How many?", str(number), ()) for number in range(600)], path)
    assert [sample.answer for sample in load_samples(path, limit=2)] == ["0", "1"]
    assert len(load_samples(path)) == 600
    assert load_samples(path)[599].place.endswith("row 599")


def test_source_is_optional(tmp_path):
    without = record()
    del without["source"]
    assert load_samples(write_json(tmp_path, without))[0].source == ""


def test_the_hub_is_asked_for_the_named_split_and_images_stay_encoded(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        rows = datasets.Dataset.from_list([record(images=[{"bytes": encoded(RED), "path": None}], level=5)])
        return rows.cast_column("images", datasets.List(datasets.Image()))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (sample,) = load_samples("hub:owner/geometry@test")
    load_samples("hub:owner/geometry")
    load_samples("hub:owner/geometry/angles@test")
    assert asked == [
        ("owner/geometry", "test"),
        ("owner/geometry", "train"),
        ("owner/geometry", "angles", "test"),
    ]
    assert bytes(sample.images[0]) == encoded(RED)
    assert sample.columns == {"level": 5}
    assert pixels(sample.load_images()[0]) == pixels(RED)
    assert sample.place == "hub:owner/geometry@test, row 0"


@pytest.mark.parametrize(
    "error", [ConnectionError("no network"), FileNotFoundError("gone"), ValueError("no such split")]
)
def test_what_the_hub_cannot_give_is_told_with_its_name(monkeypatch, error):
    import datasets

    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=f"^hub:owner/geometry@test: {error}$"):
        load_samples("hub:owner/geometry@test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": ""}, r"row 1: 'answer' must be text and not empty, but is ''"),
        ({"answer": None}, r"row 1: 'answer' must be text and not empty, but is None"),
        ({"problem": " "}, r"row 1: 'problem' must be text and not empty, but is ' '"),
        (
            {"problem": "<image><image>Which?"},
            r"row 1: the problem has 2 <image> but the row has 1 image\(s\): '<image>",
        ),
        ({"images": ["red.png"] * 2}, r"row 1: the problem has 1 <image> but the row has 2 image\(s\)"),
        ({"images": [7]}, r"row 1: an image must be encoded bytes, \{bytes, path\}, a file's path, .*, but is 7\."),
        ({"answer": "\u200b"}, r"row 1: 'answer' must be text and not empty, but is '\\u200b'"),
    ],
)
def test_an_unusable_row_is_named_with_its_value(tmp_path, changes, message):
    path = write_json(tmp_path, record(), record(**changes))
    samples = load_samples(path)
    with pytest.raises(DataError, match=f"train.json, {message}"):
        samples[1]


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    path = tmp_path / "train.parquet"
    pd.DataFrame([{"asked": "How many?", "answer": "3", "images": []}]).to_parquet(path)
    with pytest.raises(
        DataError, match=r"train.parquet: no column 'problem' \(it has: asked, answer, images\); data.problem_key names"
    ):
        load_samples(path)


def test_unusable_files_are_named(tmp_path):
    def refused(name, message):
        with pytest.raises(DataError, match=message):
            load_samples(tmp_path / name)

    (tmp_path / "broken.parquet").write_bytes(b"text")
    (tmp_path / "broken.json").write_text("[{,")
    (tmp_path / "broken.jsonl").write_text(json.dumps(record()) + "\n{")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "numbers.json").write_text("[5]")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    refused("absent.json", r"absent.json: no such file \(looked in ")
    refused("train.txt", r"train.txt: a data set is a folder, .* or a file in .parquet, .json, .jsonl, .csv, .tsv")
    refused("broken.parquet", "broken.parquet: not a readable parquet file")
    refused("broken.json", "broken.json: not valid JSON")
    refused("broken.jsonl", "broken.jsonl, row 1: not valid JSON")
    refused("object.json", "object.json: must hold a list of records, but holds a dict")
    refused("numbers.json", r"numbers.json, row 0: must be a record, but is a int: 5\.")
    refused("empty.json", "empty.json: no samples")
    refused("empty", "empty: no samples")


def test_a_missing_and_a_broken_image_are_all_named(tmp_path):
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    truncated = encoded(noise, "JPEG")[:-500]
    good = Sample("How many?", "3", (RED,))
    for reference in (truncated, b"not an image", tmp_path / "absent.png"):
        bad = Sample("Which?", "3", (RED, reference), place="train.json, row 4")
        with pytest.raises(DataError, match=r"train.json, row 4: image 2 of 2 \(.*\) cannot be read"):
            bad.load_images()
        found = broken_images([good, bad, good, bad])
        assert [offender.position for offender in found] == [1, 3]
        assert found[0].message.startswith("train.json, row 4: image 2 of 2 ")
    assert broken_images([good, good]) == []
