"""The rows of a data set as they stand in its file, each read when it is asked for.

A parquet file of some size is opened through `datasets`, whose copy in Arrow's format all processes of a machine share:
images stay in the file, and a row's are a view of it. Of JSON Lines the place of each line is known, no more.
A row is numbered from 0, as pandas and `datasets` number it.
"""

import csv
import io
import itertools
import json
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vogue.data.images import short

IN_MEMORY = 64 << 20  # bytes of a parquet file that is read whole: a small one is slower to open through a copy
SHOW_PROGRESS = 1 << 30  # bytes of a parquet file whose copy takes so long that one wants to see it go on
TABLES = (".csv", ".tsv")
SUFFIXES = (".parquet", ".json", ".jsonl", *TABLES)
SHARD = re.compile(r"(?P<split>.+?)([-_.]\d+(-of-\d+)?)?(-[0-9a-f]{16})?\.parquet")  # as the hub names files
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval", "testmini")


class DataError(ValueError):
    """A sample that cannot be used; the message names the file, the row and the value."""


class Row(NamedTuple):
    """A row's values by column; those of a binary column are buffers. `place` is for messages, as "a.json, row 3"."""

    values: dict[str, Any]
    place: str
    folder: Path  # that relative paths are resolved against


class Rows(Protocol):
    """The rows of a data set; `columns` are those that any row has."""

    columns: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Row: ...


class ArrowRows:
    def __init__(self, table: pa.Table, name: str, folder: Path):
        self.table, self.name, self.folder = table, name, folder
        self.columns = tuple(table.column_names)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Row:
        cells = self.table.slice(row, 1)
        values = {name: _values(cells.column(name).chunk(0))[0] for name in self.columns}
        return Row(values, f"{self.name}, row {row}", self.folder)


class ListRows:
    """Rows of a JSON or CSV file, which are held in memory."""

    def __init__(self, records: Sequence[Any], path: Path):
        self.path = path
        self.records = [as_record(record, f"{path}, row {row}") for row, record in enumerate(records)]
        self.columns = tuple(dict.fromkeys(name for record in self.records for name in record))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> Row:
        return Row(self.records[row], f"{self.path}, row {row}", self.path.parent)


class LineRows:
    """Rows of a JSON Lines file, a record a line; empty lines aside."""

    def __init__(self, path: Path):
        self.path = path
        self.starts: list[int] = []
        columns: dict[str, None] = {}
        start = 0
        with path.open("rb") as file:
            for line in file:  # ends at \n alone, unlike str.splitlines
                if line.strip().removeprefix(b"\xef\xbb\xbf"):
                    self.starts.append(start)
                    columns |= dict.fromkeys(self._parsed(line, len(self.starts) - 1))
                start += len(line)
        self.columns = tuple(columns)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> Row:
        with self.path.open("rb") as file:
            file.seek(self.starts[row])
            return Row(self._parsed(file.readline(), row), f"{self.path}, row {row}", self.path.parent)

    def _parsed(self, line: bytes, row: int) -> dict[str, Any]:
        place = f"{self.path}, row {row}"
        return as_record(parse_json(decoded(line, place), place), place)


class JoinedRows:
    """The rows of several files, one after the other; each keeps the number it has in its own file."""

    def __init__(self, parts: Sequence[Rows]):
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))
        self.columns = tuple(dict.fromkeys(name for part in parts for name in part.columns))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, row: int) -> Row:
        part = bisect_right(self.ends, row)
        return self.parts[part][row - (self.ends[part - 1] if part else 0)]


def open_rows(spec: str) -> Rows:
    """The rows of a data set.

    spec: a .parquet, .json (a list of records), .jsonl, .csv or .tsv file; a folder of parquet files (read in the order
    of their names), of which `folder@split` takes one split; a folder that `datasets` saved; or
    `hub:owner/name@split` (split "train" by default, `hub:owner/name/subset@split` where there are subsets).

    Raises DataError for a missing file, one that can't be read, and a folder of several splits of which none is named.
    """
    if spec.startswith("hub:"):
        return _hub(spec)
    path, split = Path(spec), None
    if not path.exists() and "@" in path.name:
        folder, _, split = spec.rpartition("@")
        path = Path(folder)
    if path.is_dir():
        return _folder(path, split)
    if path.suffix not in SUFFIXES or split:
        raise DataError(f"{spec}: a data set is a folder, hub:owner/name@split, or a file in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise DataError(f"{spec}: no such file (looked in {path.absolute().parent}).")
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix in TABLES:
        return _table(path)
    return LineRows(path) if path.suffix == ".jsonl" else _json(path)


def each(rows: Rows) -> Iterator[Row]:
    """All rows, one after the other."""
    return (rows[row] for row in range(len(rows)))


def require_columns(names: Iterable[str], required: Iterable[str], place: str) -> None:
    """Raise DataError where one of `required` isn't among `names`."""
    names = list(names)
    for column in required:
        if column not in names:
            raise DataError(f"{place}: no column '{column}' (it has: {', '.join(names)}).")


def decoded(content: bytes, place: str) -> str:
    """UTF-8 with or without a byte-order mark as text; raises DataError for other encodings."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 (byte {error.start} is {content[error.start]:#04x}); convert it, as with "
            "iconv -f ENCODING -t UTF-8"
        ) from None


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text; raises DataError for what isn't JSON and for a key that a record has twice."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, place))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}.") from error


def as_record(value: Any, place: str) -> dict[str, Any]:
    """`value` if it is a record; raises DataError for anything else."""
    if not isinstance(value, dict):
        raise DataError(f"{place}: must be a record, but is a {type(value).__name__}: {short(value)}.")
    return value


def _json(path: Path) -> Rows:
    text = decoded(path.read_bytes(), str(path))
    try:
        records = parse_json(text, str(path))
    except DataError:
        if _is_lines(text):
            return LineRows(path)
        raise
    if not isinstance(records, list):
        keys = f" with the keys {', '.join(map(short, list(records)[:5]))}" if isinstance(records, dict) else ""
        raise DataError(f"{path}: must hold a list of records, but holds a {type(records).__name__}{keys}.")
    return ListRows(records, path)


def _is_lines(text: str) -> bool:
    """Whether the first line is a record by itself, as in JSON Lines under another name."""
    first = text.lstrip().split("\n", 1)[0]
    try:
        return isinstance(json.loads(first), dict)
    except json.JSONDecodeError:
        return False


def _table(path: Path) -> Rows:
    """A CSV or TSV file, whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)  # images in base64
    text = decoded(path.read_bytes(), str(path))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        header, *rows = [line for line in lines if line] or [[]]
    except csv.Error as error:
        raise DataError(f"{path}: not a readable table: {error}, line {lines.line_num}.") from error
    if len(set(header)) < len(header):
        raise DataError(f"{path}: two columns have the same name: {', '.join(header)}.")
    for row, line in enumerate(rows):
        if len(line) != len(header):
            raise DataError(f"{path}, row {row}: {len(line)} fields, but {len(header)} columns ({', '.join(header)}).")
    return ListRows([dict(zip(header, line, strict=True)) for line in rows], path)


def _parquet(path: Path) -> Rows:
    size = path.stat().st_size
    try:
        if size <= IN_MEMORY:
            return ArrowRows(pq.ParquetFile(path).read(), str(path), path.parent)
        return ArrowRows(_mapped(path, size), str(path), path.parent)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}.") from error


def _mapped(path: Path, size: int) -> pa.Table:
    """The file's rows by way of a copy in Arrow's format in the cache of `datasets`, made where there is none."""
    import datasets
    from datasets.exceptions import DatasetGenerationError
    from pyarrow.dataset import ParquetFragmentScanOptions

    pq.ParquetFile(path).close()  # what is no parquet file is told as such
    shown = datasets.is_progress_bar_enabled()
    if size < SHOW_PROGRESS:
        datasets.disable_progress_bars()
    try:
        # Without pre_buffer, since with it all that was read stays in memory until the file is closed.
        options = ParquetFragmentScanOptions(pre_buffer=False)
        rows = datasets.load_dataset(
            "parquet", data_files=str(path.absolute()), split="train", fragment_scan_options=options
        )
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be copied into the cache of `datasets`: {cause}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    pa.default_memory_pool().release_unused()  # what copying took, which Arrow would keep for later
    return _arrow(rows)


def _arrow(rows) -> pa.Table:
    """All rows of a `datasets.Dataset`, as they are stored: images stay encoded, files mapped."""
    return rows.with_format("arrow")[:]


def _hub(spec: str) -> Rows:
    from datasets import load_dataset

    name, _, split = spec.removeprefix("hub:").partition("@")
    parts = name.split("/")  # owner, name, and maybe a subset
    try:
        rows = load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train")
    except (OSError, ValueError) as error:  # no network, no such data set, subset or split
        raise DataError(f"{spec}: {error}") from error
    return ArrowRows(_arrow(rows), spec, Path())


def _folder(folder: Path, split: str | None) -> Rows:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _saved(folder, split)
    files = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    if not files:
        others = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in SUFFIXES)
        told = f"; name one of its files: {', '.join(others[:5])}" if others else ""
        raise DataError(f"{folder}: no samples in it: it holds no *.parquet{told}.")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    if split is not None or any(_is_split(name) for name in splits):
        files = splits[_chosen(folder, split, list(splits))]
    return JoinedRows([_parquet(file) for file in files])


def _saved(folder: Path, split: str | None) -> Rows:
    """Rows that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` left."""
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(folder))
    if isinstance(saved, DatasetDict):
        saved = saved[_chosen(folder, split, list(map(str, saved)))]
    return ArrowRows(_arrow(saved), str(folder), folder)


def _split_of(file: Path) -> str:
    match = SHARD.fullmatch(file.name)
    return match["split"] if match else file.stem


def _is_split(name: str) -> bool:
    return any(word in SPLITS for word in re.split(r"[-_.]", name.lower()))


def _chosen(folder: Path, split: str | None, found: list[str]) -> str:
    if split is None and len(found) == 1:
        return found[0]
    if split not in found:
        wanted = "several splits" if split is None else f"no split {split!r}"
        raise DataError(f"{folder}: {wanted}; it has {', '.join(f'{folder}@{name}' for name in found)}.")
    return split


def _values(array: Any) -> list[Any]:
    """An array's cells as Python has them, except that binary ones are views of the array's memory.

    Arrow's own conversion copies those, and so reads them from the file, whether they are looked at or not.
    """
    kind, valid = array.type, array.is_valid().to_pylist()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner, ends = _values(array.flatten()), [0, *accumulate(array.value_lengths().fill_null(0).to_pylist())]
        cells = [inner[start:end] for start, end in itertools.pairwise(ends)]
    elif pa.types.is_struct(kind):
        names = [field.name for field in kind]
        columns = [_values(array.field(number)) for number in range(len(names))]
        cells = [dict(zip(names, cell, strict=True)) for cell in zip(*columns, strict=True)]
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        _, offsets, content = array.buffers()
        wide = np.dtype(np.int64 if pa.types.is_large_binary(kind) else np.int32)
        ends = np.frombuffer(offsets, wide, len(array) + 1, array.offset * wide.itemsize).tolist()
        cells = [content.slice(start, end - start) if content else b"" for start, end in itertools.pairwise(ends)]
    elif pa.types.is_float32(kind) or pa.types.is_float16(kind):  # as they are written: 0.1, not 0.10000000149
        cells = [float(str(value)) for value in array.fill_null(0).to_numpy(zero_copy_only=False)]
    else:
        cells = array.to_pylist()
    return [cell if there else None for cell, there in zip(cells, valid, strict=True)]


def _once(pairs: list[tuple[str, Any]], place: str) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{place}: the key {twice!r} stands twice in one record.")
    return record
