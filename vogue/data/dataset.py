"""A data set as a sequence of samples, each made of its row when it is asked for, and what a run has to know of it."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, overload

from vogue.config.sections import DataConfig
from vogue.data.columns import Reader, Shape, shape_of
from vogue.data.files import DataError, Rows, open_rows
from vogue.data.samples import Sample
from vogue.data.videos import QWENS
from vogue.settings import ConfigError

CHUNK = 256  # samples whose prompts are tokenized together
DECODED = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vogue" / "decoded"
LISTED = 20  # offenders that a message names


class Samples(Sequence[Sample]):
    """The samples of a data set, by position; `rows` are the numbers of the rows that are used."""

    def __init__(self, source: Rows, reader: Reader, rows: Sequence[int], spec: str):
        self.source, self.reader, self.rows, self.spec = source, reader, rows, spec

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Sample: ...

    @overload
    def __getitem__(self, at: slice) -> list[Sample]: ...

    def __getitem__(self, at: int | slice) -> Sample | list[Sample]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        return self.reader.sample(self.source[self.rows[at]])

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def at(self, positions: Iterable[int]) -> "Samples":
        """Those at `positions`, in their order."""
        return Samples(self.source, self.reader, [self.rows[i] for i in positions], self.spec)


class Offender(NamedTuple):
    """A sample that can't be used, at `position` of its data set; `overlong` ones may be left out on request."""

    position: int
    message: str
    overlong: bool = False


class OverlongError(DataError):
    """A prompt that is longer than it may be."""


class Checked(NamedTuple):
    """Samples that are known to be good as far as texts and images' headers tell.

    lengths      tokens of each prompt with its images
    fingerprint  tells this data set from others: of all samples, in their order
    digests      of each sample
    """

    samples: Sequence[Sample]
    lengths: list[int]
    fingerprint: str
    digests: list[bytes]


Measure = Callable[[list[Sample]], list[int | DataError]]  # lengths of prompts, as `Preprocessor.lengths`


def load_samples(
    spec: str | Path, limit: int | None = None, shape: Shape | None = None, skip: str | Path | None = None
) -> Samples:
    """The first `limit` samples (all by default) of a data set; nothing but columns is read before one is asked for.

    spec: see `vogue.data.files.open_rows`. shape: where things stand in a row. skip: a file of row numbers to omit.

    Raises DataError for a missing file or column, and an empty data set; asking for a sample, for an unusable row.
    """
    spec = str(spec)
    source = open_rows(spec)
    if not len(source):
        raise DataError(f"{spec}: no samples in it.")
    left_out = read_skip(skip, len(source)) if skip else frozenset()
    rows = [row for row in range(len(source)) if row not in left_out][:limit]
    if not rows:
        raise DataError(f"{spec}: no samples are left: data.skip={skip} names them all.")
    return Samples(source, Reader(shape or Shape(), source.columns, source[rows[0]], spec), rows, spec)


def training_samples(settings: DataConfig) -> Samples:
    """The samples of `data.train`; `settings` are those under `data`. Raises ConfigError where it isn't set."""
    if settings.train is None:
        raise ConfigError("data.train is not set: the samples to train on")
    return load_samples(settings.train, settings.limit, shape_of(settings), settings.skip)


def test_samples(settings: DataConfig) -> Samples:
    """The samples of `data.test`; raises ConfigError where it isn't set."""
    if settings.test is None:
        raise ConfigError("data.test is not set: the samples to evaluate on")
    return load_samples(settings.test, settings.test_limit, shape_of(settings))


def read_skip(path: str | Path, count: int) -> frozenset[int]:
    """The row numbers that a file names, one a line, what follows a # aside; raises DataError for others."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.skip={path}: {error}") from error
    rows = set()
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if text and not (text.isdecimal() and int(text) < count):
            raise DataError(
                f"data.skip={path}, line {number}: {text!r} is no row's number; they go from 0 to {count - 1}."
            )
        if text:
            rows.add(int(text))
    return frozenset(rows)


def check_samples(
    samples: Sequence[Sample],
    measure: Measure,
    drop_overlong: bool = False,
    tell: Callable[[str], None] = print,
    gather: Callable[[list], list[list]] = lambda mine: [mine],
    rank: int = 0,
    ranks: int = 1,
) -> Checked:
    """Look at every sample's text and its images' headers; each of `ranks` looks at its part and `gather`s all parts.

    Raises DataError that names all that can't be used, or the first twenty of them.
    """
    starts = range(0, len(samples), CHUNK)
    size = -(-len(starts) // ranks)
    mine = [_looked_at(samples, start, measure) for start in starts[rank * size : (rank + 1) * size]]
    found = [item for part in gather(mine) for chunk in part for item in chunk]
    offenders = [item for item in found if isinstance(item, Offender)]
    refused = [item for item in offenders if not (item.overlong and drop_overlong)]
    if refused:
        raise DataError(listed(refused))
    good = [(i, *item) for i, item in enumerate(found) if not isinstance(item, Offender)]
    if not good:
        raise DataError(
            f"no samples are left: all {len(samples)} prompts are too long. The first: {offenders[0].message}"
        )
    if offenders:
        tell(f"{len(offenders)} of {len(samples)} samples are left out, since their prompts are too long")
        positions = [i for i, _, _ in good]
        samples = samples.at(positions) if isinstance(samples, Samples) else [samples[i] for i in positions]
    digests = [digest for _, _, digest in good]
    return Checked(samples, [length for _, length, _ in good], fingerprint_of(digests), digests)


def offenders_of(samples: Sequence[Sample], measure: Measure) -> list[Offender]:
    """All samples that can't be used, as far as texts and images' headers tell."""
    chunks = (_looked_at(samples, start, measure) for start in range(0, len(samples), CHUNK))
    return [item for chunk in chunks for item in chunk if isinstance(item, Offender)]


def fingerprint_of(digests: Iterable[bytes]) -> str:
    """What tells a data set from others: all of its samples' digests in their order."""
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def remember_decoded(fingerprint: str) -> None:
    """Note, for this user on this machine, that all images of a data set were decoded."""
    with suppress(OSError):  # a home that can't be written to costs a hint at the start of a run
        DECODED.mkdir(parents=True, exist_ok=True)
        (DECODED / fingerprint).touch()


def was_decoded(fingerprint: str) -> bool:
    return (DECODED / fingerprint).exists()


def listed(offenders: Sequence[Offender]) -> str:
    """All offenders in one message, or the first twenty and the number of the others."""
    lines = [offender.message for offender in offenders[:LISTED]]
    if len(offenders) == 1:
        return lines[0]
    others = [f"and {len(offenders) - LISTED} more"] if len(offenders) > LISTED else []
    return "\n  ".join([f"{len(offenders)} samples cannot be used:", *lines, *others])


def _looked_at(samples: Sequence[Sample], start: int, measure: Measure) -> list[tuple[int, bytes] | Offender]:
    """Length and digest of each sample from `start` on, or what is wrong with it."""
    found: dict[int, tuple[int, bytes] | Offender] = {}
    readable: dict[int, Sample] = {}
    for position in range(start, min(start + CHUNK, len(samples))):
        try:
            readable[position] = samples[position]
        except DataError as error:
            found[position] = Offender(position, str(error))
    for (position, sample), length in zip(readable.items(), measure(list(readable.values())), strict=True):
        if isinstance(length, DataError):
            found[position] = Offender(position, str(length), isinstance(length, OverlongError))
        else:
            found[position] = length, sample.digest()
    return [found[position] for position in sorted(found)]


def broken_images(samples: Sequence[Sample], progress: Callable[[Iterable], Iterable] = iter) -> list[Offender]:
    """Decode every image and video, in threads; those that can't be. `progress` sees each sample's number go by.

    Pillow's `verify` would be quicker, but lets a truncated JPEG through.
    """
    with ThreadPoolExecutor() as pool:
        found = progress(pool.map(lambda position: _decoding_error(samples, position), range(len(samples))))
        return [offender for offender in found if offender]


def _decoding_error(samples: Sequence[Sample], position: int) -> Offender | None:
    try:
        samples[position].load_images()
        samples[position].load_videos(QWENS)
    except DataError as error:
        return Offender(position, str(error))
