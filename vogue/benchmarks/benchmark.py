"""What a benchmark is: rows in its own schema, and its own rules for asking, reading, scoring and summing up."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from vogue.benchmarks.extract import Form
from vogue.data import DataError, Sample
from vogue.data.files import Row, as_record, decoded, each, open_rows, parse_json, require_columns
from vogue.data.images import ImageError, Reference, reference

IMAGE_FOLDERS = ("", "images", "png", "hallusion_bench")  # where the benchmarks' repositories keep them


@dataclass(frozen=True)
class Problem:
    """A question of a benchmark: what the policy is asked, and the row with all that scoring needs."""

    sample: Sample
    row: dict


@dataclass(frozen=True)
class Line:
    """A line of a benchmark's table: the mean pass@k of units with n attempts each, which are right or not."""

    name: str
    attempts: list[tuple[bool, ...]]


@dataclass(frozen=True)
class Share:
    """A line that is a quotient of two sums over units, for one attempt: each unit's numerator and denominator."""

    name: str
    parts: list[tuple[float, float]]


@dataclass(frozen=True)
class Average:
    """A line that is the mean of others. So is its interval, which is the widest: as if all of them erred together."""

    name: str
    lines: list[Line]


Right = list[tuple[bool, ...]]  # of each problem, which of its n attempts are right


@dataclass(frozen=True)
class Benchmark:
    """The rules of a benchmark, functions of a row of its data.

    hub       what is read where `data.test` isn't set
    files     the names, or patterns, of its data files where `data.test` is a folder
    columns   that every row must have
    images    columns for the image, of which the first that holds something is taken
    prompt    the question as the policy is asked it, behind the system prompt of `reward.design`; raises ValueError
              for a row that no answer could be scored by
    answer    the right answer as text
    form      what an answer looks like, and so how it is found in a completion
    is_right  whether an answer in that form is right
    table     its own table: from the problems and which attempts at them are right
    """

    hub: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    images: tuple[str, ...]
    prompt: Callable[[dict], str]
    answer: Callable[[dict], str]
    form: Callable[[dict], Form]
    is_right: Callable[[str, dict], bool]
    table: Callable[[Sequence[Problem], Right], Sequence[Line | Share | Average]]

    def load(self, spec: str | None, limit: int | None = None) -> list[Problem]:
        """The first `limit` problems of `spec`: folder or file in the benchmark's own schema, or hub:owner/name@split.

        Raises DataError for missing files and columns, and for a row that can't be used.
        """
        spec = spec or self.hub
        problems = [self._problem(row) for row in islice(self._rows(spec), limit)]
        if not problems:
            raise DataError(f"{spec}: no problems in it.")
        return problems

    def _problem(self, row: Row) -> Problem:
        values, place = row.values, row.place
        require_columns(values, self.columns, place)
        cells = [values[name] for name in self.images if values.get(name)]
        try:
            images = (_image(cells[0], row.folder),) if cells else ()
        except ImageError as error:
            raise DataError(f"{place}: {error}.") from error
        try:
            prompt, answer = self.prompt(values), self.answer(values)
        except ValueError as error:
            raise DataError(f"{place}: {error}.") from None
        return Problem(Sample(prompt, answer, images, place=place), values)

    def _rows(self, spec: str) -> Iterator[Row]:
        path = Path(spec)
        if path.is_dir():
            found = [file for name in self.files for file in sorted(path.glob(name))]
            if found:
                return chain.from_iterable(map(_json_rows, found))
            if not any(path.rglob("*.parquet")):
                raise DataError(f"{spec}: holds neither {' nor '.join(self.files)} nor *.parquet.")
        elif path.suffix == ".json" and path.is_file():
            return _json_rows(path)
        rows = open_rows(spec)
        require_columns(rows.columns, self.columns, spec)
        return each(rows)


def _json_rows(path: Path) -> Iterator[Row]:
    """Read a .json file, which may hold a list of rows, an object of rows by key, or a row a line."""
    text = decoded(path.read_bytes(), str(path))
    try:
        rows = parse_json(text, str(path))
    except DataError:
        lines = [line for line in text.split("\n") if line.strip()]
        rows = [parse_json(line, f"{path}, row {number}") for number, line in enumerate(lines)]
    if isinstance(rows, dict):
        keyed = all(isinstance(row, dict) for row in rows.values())
        rows = list(rows.values()) if keyed else [rows]
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold rows, but holds a {type(rows).__name__}.")
    for number, row in enumerate(rows):
        place = f"{path}, row {number}"
        yield Row(as_record(row, place), place, path.parent)


def _image(cell, folder: Path) -> Reference:
    found = reference(cell, Path())
    if not isinstance(found, Path):
        return found
    places = [folder / name / found for name in IMAGE_FOLDERS]
    return next((path for path in places if path.is_file()), places[0])


def by_group(problems: Sequence[Problem], right: Right, groups: Callable[[Problem], Sequence[str]]) -> list[Line]:
    """A line for all problems and one for each group, by name; a problem may be in several groups."""
    lines: dict[str, Right] = {}
    for problem, attempts in zip(problems, right, strict=True):
        for name in groups(problem):
            lines.setdefault(name, []).append(attempts)
    return [Line("all", right), *(Line(name, lines[name]) for name in sorted(lines))]


def together(name: str, problems: Sequence[Problem], right: Right, key: Callable[[dict], tuple | None]) -> Line:
    """A line whose units are problems with the same key; a unit is right where one attempt has all its problems right.

    A problem whose key is None belongs to no unit.
    """
    units: dict[tuple, Right] = {}
    for problem, attempts in zip(problems, right, strict=True):
        if (unit := key(problem.row)) is not None:
            units.setdefault(unit, []).append(attempts)
    return Line(name, [tuple(map(all, zip(*unit, strict=True))) for unit in units.values()])


def letter_choices(choices: Sequence[str]) -> dict[str, str]:
    """Name choices by letters, from A on."""
    return {chr(ord("A") + number): choice for number, choice in enumerate(choices)}
