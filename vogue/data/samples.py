r"""Samples in the EasyR1 schema: what to ask, the answer, the images.

| column   | content                                                                             |
|----------|-------------------------------------------------------------------------------------|
| problem  | the question; each `<image>` marks where an image goes                                |
| answer   | the one right answer, as text or a number                                             |
| images   | a list of {"bytes", "path"}, encoded bytes, or file paths relative to the data file   |
| source   | optional: the data set the row was taken from                                         |
| category | optional: the kind of problem                                                         |
| state    | optional: all that the images show and the question needs, as text                    |

A row is numbered from 0, as pandas and `datasets` number it.
"""

import io
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PLACEHOLDER = "<image>"
REQUIRED = ("problem", "answer", "images")
OPTIONAL = ("source", "category", "state")
COLUMNS = REQUIRED + OPTIONAL
SCHEMA = pa.schema(
    [
        ("problem", pa.string()),
        ("answer", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        *((name, pa.string()) for name in OPTIONAL),
    ]
)
BATCH_ROWS = 256  # rows held twice, in Arrow and in Python, while a file is read


class DataError(ValueError):
    """A sample that cannot be used; the message names the file, the row and the value."""


@dataclass(frozen=True)
class Sample:
    """One question about images, with its verifiable answer.

    problem  the question; a problem with no `<image>` at all has its images put in front
    answer   the right answer, not empty
    images   encoded bytes, paths or PIL images, opened by `load_images` and not before
    source   the data set it was taken from
    category the kind of problem, to report results by
    state    all that the images show and the question needs, as text
    place    where it was read, for messages: "train.parquet, row 12"

    Raises DataError for an empty problem or answer, and where the number of `<image>` in the
    problem is neither 0 nor the number of images.
    """

    problem: str
    answer: str
    images: tuple[bytes | str | Path | Image.Image, ...]
    source: str = ""
    category: str = ""
    state: str = ""
    place: str = "sample"

    def __post_init__(self):
        for name in ("problem", "answer"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{self.place}: '{name}' must be text and not empty, but is {text!r}.")
        placeholders = self.problem.count(PLACEHOLDER)
        if placeholders not in (0, len(self.images)):
            raise DataError(
                f"{self.place}: the problem has {placeholders} {PLACEHOLDER} but the row has "
                f"{len(self.images)} image(s): {self.problem[:80]!r}."
            )

    def load_images(self) -> list[Image.Image]:
        """The images, decoded, in RGB; transparent pixels become white.

        Raises DataError for an image that is missing or cannot be decoded.
        """
        return [self._load(number) for number in range(len(self.images))]

    def _load(self, number: int) -> Image.Image:
        reference = self.images[number]
        try:
            return _rgb(_open(reference))
        # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and more.
        except Exception as error:
            name = f"{len(reference)} bytes" if isinstance(reference, bytes) else reference
            raise DataError(
                f"{self.place}: image {number + 1} of {len(self.images)} ({name}) cannot be read: {error}."
            ) from error


def load_samples(spec: str | Path, limit: int | None = None) -> list[Sample]:
    """The first `limit` samples (all by default) of a data set; images stay encoded.

    spec: a .parquet, .json (a list of records) or .jsonl file, a folder of parquet files (read
    in the order of their names), or `hub:owner/name@split` (split "train" by default;
    `hub:owner/name/subset@split` where there are subsets), which needs the `datasets` package.

    Raises DataError for a missing file or column, an unusable row, and an empty data set.
    """
    records = itertools.islice(read_records(str(spec), REQUIRED, COLUMNS), limit)
    samples = [_sample(*record) for record in records]
    if not samples:
        raise DataError(f"{spec}: no samples in it.")
    return samples


def read_records(
    spec: str, required: Sequence[str], wanted: Sequence[str] | None = None
) -> Iterator[tuple[dict, str, Path]]:
    """The rows of a data set as they stand there, each with its place for messages and the folder of its file.

    spec      as in `load_samples`; `hub:owner/name/subset@split` where a data set on the hub has subsets
    required  columns that must be there; a JSON file's are the caller's to check
    wanted    columns to read, all by default

    Raises DataError for a missing file or column and for a file that can't be read.
    """
    if spec.startswith("hub:"):
        return _read_hub(spec, required, wanted)
    path = Path(spec)
    if path.is_dir():
        parts = sorted(path.glob("*.parquet"))
        return itertools.chain.from_iterable(_read_parquet(part, required, wanted) for part in parts)
    readers = {".json": _read_json, ".jsonl": _read_jsonl}
    suffixes = (".parquet", *readers)
    if path.suffix not in suffixes:
        raise DataError(f"{spec}: a data set is a folder, hub:owner/name@split, or a file in {', '.join(suffixes)}.")
    if not path.is_file():
        raise DataError(f"{spec}: no such file (looked in {path.absolute().parent}).")
    return readers[path.suffix](path) if path.suffix in readers else _read_parquet(path, required, wanted)


def require_columns(names, required: Iterable[str], place: str) -> None:
    """Raise DataError where one of `required` isn't among `names`: a record, or a list of names."""
    if not isinstance(names, dict | list):
        raise DataError(f"{place}: must be a record, but is a {type(names).__name__}: {str(names)[:80]!r}.")
    for column in required:
        if column not in names:
            raise DataError(f"{place}: no column '{column}' (it has: {', '.join(map(str, names))}).")


def check_images(samples: Iterable[Sample]) -> None:
    """Decode every image once, in threads, so that a broken one stops a run before it starts.

    Pillow's `verify` would be quicker, but lets a truncated JPEG through.

    Raises DataError for the first broken sample, with the number of the others.
    """
    with ThreadPoolExecutor() as pool:
        broken = [error for error in pool.map(_image_error, samples) if error]
    if broken:
        others = f" ({len(broken) - 1} other sample(s) have broken images too.)" if broken[1:] else ""
        raise DataError(f"{broken[0]}{others}") from broken[0]


def write_parquet(samples: Iterable[Sample], path: str | Path) -> None:
    """Write samples to a parquet file in the EasyR1 schema, with the images inside as PNG.

    The file appears whole or not at all: it is written under another name, then renamed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([_record(sample) for sample in samples], schema=SCHEMA)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        pq.write_table(table, unfinished, row_group_size=BATCH_ROWS)
        os.replace(unfinished, path)


def _read_parquet(path: Path, required: Sequence[str], wanted: Sequence[str] | None) -> Iterator[tuple]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            require_columns(names, required, str(path))
            batches = file.iter_batches(BATCH_ROWS, columns=[name for name in wanted or names if name in names])
            yield from _numbered(batches, str(path), path.parent)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {error}.") from error


def _read_hub(spec: str, required: Sequence[str], wanted: Sequence[str] | None) -> Iterator[tuple]:
    from datasets import load_dataset

    name, _, split = spec.removeprefix("hub:").partition("@")
    parts = name.split("/")  # owner, name, and maybe a subset
    try:
        rows = load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train")
    except (OSError, ValueError) as error:  # no network, no such data set, subset or split
        raise DataError(f"{spec}: {error}") from error
    require_columns(rows.column_names, required, spec)
    columns = [column for column in wanted or rows.column_names if column in rows.column_names]
    # The Arrow format hands out images as they are stored, encoded.
    batches = rows.select_columns(columns).with_format("arrow").iter(BATCH_ROWS)
    yield from _numbered(batches, spec, Path())


def _read_json(path: Path) -> Iterator[tuple]:
    records = _parse_json(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(records, list):
        raise DataError(f"{path}: must hold a list of records, but holds a {type(records).__name__}.")
    for row, record in enumerate(records):
        yield record, f"{path}, row {row}", path.parent


def _read_jsonl(path: Path) -> Iterator[tuple]:
    with path.open(encoding="utf-8") as lines:
        for row, line in enumerate(line for line in lines if line.strip()):
            place = f"{path}, row {row}"
            yield _parse_json(line, place), place, path.parent


def _parse_json(text: str, place: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON: {error}.") from error


def _numbered(batches, name: str, folder: Path) -> Iterator[tuple]:
    rows = itertools.count()
    for batch in batches:
        for record in batch.to_pylist():
            yield record, f"{name}, row {next(rows)}", folder


def _sample(record, place: str, folder: Path) -> Sample:
    require_columns(record, REQUIRED, place)
    answer = record["answer"]
    cells = record["images"] or []
    if not isinstance(cells, list):
        raise DataError(f"{place}: 'images' must be a list, but is a {type(cells).__name__}.")
    return Sample(
        problem=record["problem"],
        answer=str(answer) if isinstance(answer, (int, float)) else answer,
        images=tuple(reference(cell, place, folder) for cell in cells),
        **{name: record.get(name) or "" for name in OPTIONAL},
        place=place,
    )


def reference(cell, place: str, folder: Path) -> bytes | Path:
    """What a cell of `images` refers to: encoded bytes, or a path resolved against the data file's folder."""
    content = cell
    if isinstance(cell, dict):
        content = cell.get("bytes") or cell.get("path")
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return folder / content
    raise DataError(f"{place}: an image must be bytes, a path or {{bytes, path}}, but is {cell!r}.")


def _open(reference) -> Image.Image:
    if isinstance(reference, Image.Image):
        return reference
    return Image.open(io.BytesIO(reference) if isinstance(reference, bytes) else reference)


def _rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Plain conversion shows what lies under transparent pixels, as a rule black: the colour of a diagram's lines.
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _image_error(sample: Sample) -> DataError | None:
    try:
        sample.load_images()
    except DataError as error:
        return error


def _record(sample: Sample) -> dict:
    images = [{"bytes": _png(image), "path": None} for image in sample.load_images()]
    return {name: getattr(sample, name) for name in COLUMNS} | {"images": images}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
