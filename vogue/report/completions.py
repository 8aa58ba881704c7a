"""The completions of a report: read a few at a time, since a run may have logged more than memory holds.

What a page shows of them is bounded. Of all logged completions READ are read, every k-th one, and tell which tokens
have the highest u_per; of those SHOWN, or as many as have TOKENS tokens together, are on the page, every k-th one.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vogue.run.folder import parts, row_of
from vogue.settings import ConfigError

READ = 20_000  # completions, over all runs
SHOWN = 2000
TOKENS = 2_000_000  # of the completions on the page, about 35 MB
MIN_COUNT = 5  # a token seen less often isn't ranked
MAX_PIXELS = 100e6  # of all images on the page; about 50 MB where they are noise
SIDES = (512, 384, 256, 192, 128)  # longest side of an image on the page, in pixels: the first that fits

Record = dict[str, Any]


class Logged:
    """The completions of a run's completions.jsonl and its parts: counted and read when they are asked for."""

    def __init__(self, path: Path):
        self._path = path

    @cached_property
    def _counts(self) -> list[tuple[Path, int]]:
        return [(file, _whole_lines(file)) for file in parts(self._path)]

    def __len__(self) -> int:
        return sum(count for _, count in self._counts)

    def __iter__(self) -> Iterator[Record]:
        return self.at(range(len(self)))

    def at(self, places: Sequence[int]) -> Iterator[Record]:
        """The completions at these places, in ascending order.

        Raises `ConfigError` for a line that is no completion's, or whose signals don't fit its tokens.
        """
        wanted, before = set(places), 0
        for file, count in self._counts:
            here = {place - before for place in wanted if before <= place < before + count}
            before += count
            if here:
                with open(file, "rb") as opened:
                    for number, line in zip(range(count), opened, strict=False):
                        if number in here:
                            yield _checked(line, f"{file}, line {number + 1}")


@dataclass(frozen=True)
class UnsureToken:
    """A token's text, how often u_per is known for it, and its mean u_per and entropy there, in nats."""

    text: str
    count: int
    u_per: float
    entropy: float | None


class TokenSums:
    """Sums over the occurrences of every token, completion by completion."""

    def __init__(self):
        self._sums: dict[str, list[float]] = {}  # count, sum of u_per, count and sum of entropies

    def add(self, record: Record) -> None:
        if not record.get("u_per"):
            return
        entropies = record.get("entropy") or [None] * len(record["u_per"])
        for token, u_per, entropy in zip(record["tokens"], record["u_per"], entropies, strict=True):
            sums = self._sums.setdefault(token, [0, 0.0, 0, 0.0])
            sums[0] += 1
            sums[1] += u_per
            if entropy is not None:
                sums[2] += 1
                sums[3] += entropy

    def ranked(self, min_count: int = MIN_COUNT) -> list[UnsureToken]:
        """Tokens of at least `min_count` occurrences, by their mean u_per, the highest first."""
        rows = [
            UnsureToken(token, int(count), u_per / count, entropy / known if known else None)
            for token, (count, u_per, known, entropy) in self._sums.items()
            if count >= min_count
        ]
        return sorted(rows, key=lambda row: row.u_per, reverse=True)


@dataclass(frozen=True)
class Sampled:
    """What a page knows of completions: those it shows, each with its run's number, and what was made of all read."""

    logged: int
    read: int
    shown: list[tuple[int, Record]]
    tokens: list[UnsureToken]


def sample(logged: Sequence[Logged], read: int = READ, shown: int = SHOWN, most_tokens: int = TOKENS) -> Sampled:
    """Read the completions of several runs, evenly over all their steps, at most so many."""
    total = sum(map(len, logged))
    places = evenly(range(total), read)
    keep, sums, found, before = set(evenly(places, shown)), TokenSums(), [], 0
    for number, completions in enumerate(logged):
        mine = [place for place in places if before <= place < before + len(completions)]
        for place, record in zip(mine, completions.at([place - before for place in mine]), strict=True):
            sums.add(record)
            if place in keep:
                found.append((number, record))
        before += len(completions)
    tokens = sum(len(record.get("tokens") or ()) for _, record in found)
    fitting = max(1, len(found) * most_tokens // max(1, tokens))
    return Sampled(total, len(places), list(evenly(found, fitting)), sums.ranked())


def evenly(items: Sequence, most: int) -> Sequence:
    """Take at most so many items, evenly spread."""
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def browser(names: Sequence[str], folders: Sequence[Path], shown: Sequence[tuple[int, Record]], images) -> Record:
    """Collect what the page's browser of completions reads: records, their images, and the top of each colour scale.

    images  of the paths of images, what the page shows in each one's place: `embedded`, or `linked`
    """
    paths = [
        folders[number] / path
        for number, record in shown
        for path in (record.get("image") or []) + (record.get("perturbed") or [])
    ]
    found = images(list(dict.fromkeys(paths)))
    places = {path: place for place, path in enumerate(found)}
    records = []
    for number, record in shown:
        records.append(
            {name: record.get(name) for name in ("step", "answer", "category", "branch", "paid", "reward", "accuracy")}
            | {name: record.get(name) for name in ("components", "advantage", "tokens", "completion")}
            | {name: _rounded(record.get(name)) for name in ("entropy", "u_per")}
            | {"run": number, "problem": record["problem"].replace("<image>", "").replace("<video>", "").strip()}
            | {name: [places[folders[number] / p] for p in record.get(name) or []] for name in ("image", "perturbed")}
        )
    return {
        "runs": list(names),
        "records": records,
        "images": list(found.values()),
        "tops": {name: _top([r[name] for r in records if r[name]]) for name in ("u_per", "entropy")},
    }


def embedded(paths: list[Path]) -> dict[Path, Record]:
    """Each image as a data URI with its size in pixels, scaled down where all together would be too many pixels."""
    sizes = {path: size for path in paths if (size := _size(path))}
    for side in SIDES:
        scales = {path: min(1.0, side / max(size)) for path, size in sizes.items()}
        if sum(scales[path] ** 2 * math.prod(size) for path, size in sizes.items()) <= MAX_PIXELS:
            break
    return _shown(paths, sizes, lambda path: _uri(path, scales[path]))


def linked(paths: list[Path]) -> dict[Path, Record]:
    """Each image by its address below the page's own, with its size in pixels."""
    sizes = {path: size for path in paths if (size := _size(path))}
    return _shown(paths, sizes, lambda path: f"{path.parent.name}/{path.name}")


def _shown(paths: list[Path], sizes: dict[Path, tuple[int, int]], uri: Callable[[Path], str]) -> dict[Path, Record]:
    return {
        path: {"uri": uri(path), "size": sizes[path]} if path in sizes else {"missing": str(path)} for path in paths
    }


def _size(path: Path) -> tuple[int, int] | None:
    """The width and height of an image; None where the file is gone, which the page then says in its place."""
    try:
        with Image.open(path) as image:
            return image.size
    except (FileNotFoundError, UnidentifiedImageError):
        return None


def _uri(path: Path, scale: float) -> str:
    with Image.open(path) as image:
        kind, content = image.format, path.read_bytes()
        if scale < 1:
            size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
            stream = io.BytesIO()
            image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(stream, "WEBP", quality=80)
            kind, content = "WEBP", stream.getvalue()
    return f"data:{Image.MIME[str(kind)]};base64,{base64.b64encode(content).decode()}"


def _top(values: list[list[float]]) -> float | None:
    """The top of a colour scale: the 99th percentile, since the few tokens above it would leave the others pale."""
    if not values:
        return None
    found = np.concatenate([np.asarray(row, dtype=float) for row in values])
    return float(np.nanquantile(found, 0.99)) or float(np.nanmax(found)) or None


def _rounded(values: list[float] | None) -> list[float] | None:
    return None if values is None else [float(f"{value:.3g}") for value in values]


def _whole_lines(file: Path) -> int:
    """The lines of a file that have an end; another one is still being written."""
    with open(file, "rb") as opened:
        return sum(block.count(b"\n") for block in _blocks(opened))


def _blocks(opened) -> Iterable[bytes]:
    while block := opened.read(1 << 20):
        yield block


def _checked(line: bytes, place: str) -> Record:
    record = row_of(line, place)
    for signal in ("u_per", "entropy"):
        values, tokens = record.get(signal), record.get("tokens") or []
        if values is not None and len(values) != len(tokens):
            raise ConfigError(f"{place}: {len(tokens)} tokens, but {len(values)} values of {signal}")
    return record
