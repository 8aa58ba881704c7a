r"""One question about images with its answer, and the file that vogue writes of them.

| column   | content                                                                             |
|----------|-------------------------------------------------------------------------------------|
| problem  | the question; each `<image>` or `<video>` marks where one goes                        |
| answer   | the one right answer, as text or a number                                             |
| images   | a list of {"bytes", "path"}, encoded bytes, or file paths relative to the data file   |
| videos   | optional: a list of {"frames": a list as of images, "fps"}, or of files                |
| source   | optional: the data set the row was taken from                                         |
| category | optional: the kind of problem                                                         |
| state    | optional: all that the images show and the question needs, as text                    |

That is EasyR1's schema; how others are read stands in `vogue.data.columns`.
"""

import hashlib
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vogue.data import images, videos
from vogue.data.files import DataError
from vogue.data.images import NO_LIMITS, PixelLimits, Reference
from vogue.data.videos import Clip, Outline, Video, VideoLimits

PLACEHOLDER, VIDEO = "<image>", "<video>"
OPTIONAL = ("source", "category", "state")
COLUMNS = ("problem", "answer", "images", *OPTIONAL)
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
VIDEOS = pa.list_(pa.struct([("frames", IMAGES), ("fps", pa.float64())]))
SCHEMA = pa.schema(
    [
        ("problem", pa.string()),
        ("answer", pa.string()),
        ("images", IMAGES),
        *((name, pa.string()) for name in OPTIONAL),
    ]
)
BATCH_ROWS = 256  # of a row group of what is written


@dataclass(frozen=True)
class Sample:
    """One question about images, with its verifiable answer.

    problem  the question; one with neither `<image>` nor `<video>` has all of them put in front, images first
    answer   the right answer, not empty
    images   encoded bytes, paths or PIL images, opened by `load_images` and not before
    source   the data set it was taken from
    category the kind of problem, to report results by
    state    all that the images show and the question needs, as text
    place    where it was read, for messages: "train.parquet, row 12"
    system   the row's own system message, "" for none
    columns  the row's further columns, as JSON values, for a reward function of one's own
    videos   files, bytes, lists of frames or clips, opened by `load_videos` and not before

    Raises DataError for an empty problem or answer, and where the numbers of `<image>` and `<video>` in the
    problem are neither 0 both nor those of images and videos.
    """

    problem: str
    answer: str
    images: tuple[Reference | str, ...]
    source: str = ""
    category: str = ""
    state: str = ""
    place: str = "sample"
    system: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    videos: tuple[Video, ...] = ()

    def __post_init__(self):
        for name in ("problem", "answer"):
            text = getattr(self, name)
            if not isinstance(text, str) or not is_visible(text):
                raise DataError(f"{self.place}: '{name}' must be text and not empty, but is {text!r}.")
        kinds = ((PLACEHOLDER, self.images, "image"), (VIDEO, self.videos, "video"))
        counts = [self.problem.count(mark) for mark, _, _ in kinds]
        for count, (mark, media, name) in zip(counts, kinds, strict=True):
            if any(counts) and count != len(media):
                raise DataError(
                    f"{self.place}: the problem has {count} {mark} but the row has "
                    f"{len(media)} {name}(s): {self.problem[:80]!r}."
                )

    def load_images(self, limits: PixelLimits = NO_LIMITS) -> list[Image.Image]:
        """The images, decoded, upright and in RGB; transparent pixels become white.

        Raises DataError for an image that is missing or cannot be decoded.
        """
        return [self._each(number, images.load, limits) for number in range(len(self.images))]

    def image_sizes(self, limits: PixelLimits = NO_LIMITS) -> list[tuple[int, int]]:
        """Width and height of what `load_images` gives, from the images' headers; raises DataError as it does."""
        return [self._each(number, images.size_of, limits) for number in range(len(self.images))]

    def _each(self, number: int, function, limits: PixelLimits):
        found = self.images[number]
        try:
            return function(Path(found) if isinstance(found, str) else found, limits)
        # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and more.
        except Exception as error:
            raise DataError(f"{self.image_place(number)} cannot be read: {error}.") from error

    def load_videos(self, limits: VideoLimits) -> list[Clip]:
        """The frames of each video that are shown; raises DataError for one that is missing or can't be decoded."""
        return [self._of_video(number, videos.load, limits) for number in range(len(self.videos))]

    def video_outlines(self, limits: VideoLimits) -> list[Outline]:
        """Times and sizes of the frames that `load_videos` gives; raises DataError as it does."""
        return [self._of_video(number, videos.outline, limits) for number in range(len(self.videos))]

    def _of_video(self, number: int, function, limits: VideoLimits):
        try:
            return function(self.videos[number], limits)
        except Exception as error:  # PyAV's are of many kinds, as Pillow's
            raise DataError(f"{self.video_place(number)} cannot be read: {error}.") from error

    def video_place(self, number: int) -> str:
        """What a message calls a video: its row, its number and its file, length or frames."""
        name = videos.name_of(self.videos[number])
        return f"{self.place}: video {number + 1} of {len(self.videos)} ({name})"

    def image_place(self, number: int) -> str:
        """What a message calls an image: its row, its number and its file or length."""
        name = images.name_of(self.images[number])
        return f"{self.place}: image {number + 1} of {len(self.images)} ({name})"

    def digest(self) -> bytes:
        """16 bytes that tell this sample from others: by its texts, and its images' file names, lengths or pixels."""
        parts = [self.problem, self.answer, self.system, *(images.identity(found) for found in self.images)]
        parts += map(videos.identity, self.videos)
        return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def is_visible(text: str) -> bool:
    """Whether there is more in a text than spaces, control characters and such of no width."""
    return any(unicodedata.category(character)[0] not in "CZ" for character in text)


def write_parquet(samples: Iterable[Sample], path: str | Path) -> None:
    """Write samples to a parquet file in the EasyR1 schema, with the images inside as PNG, and their further columns.

    Videos, where there are any, are a column of frames as PNG.

    Raises DataError for a system message of a row's own, which the schema has no column for, and for a column of values
    of several kinds. The file appears whole or not at all: it is written under another name, then renamed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = list(samples)
    table = pa.Table.from_pylist([_record(sample) for sample in samples], schema=schema_of(samples, path))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        pq.write_table(table, unfinished, row_group_size=BATCH_ROWS)
        os.replace(unfinished, path)


def schema_of(samples: Sequence[Sample], path: Path) -> pa.Schema:
    """The columns of a file of these samples; raises DataError for what such a file can't hold."""
    for sample in samples:
        if sample.system:
            raise DataError(f"{sample.place}: {path} has no place for its own system message: {sample.system[:80]!r}")
    schema = SCHEMA.append(pa.field("videos", VIDEOS)) if any(sample.videos for sample in samples) else SCHEMA
    for name in dict.fromkeys(name for sample in samples for name in sample.columns):
        values = [sample.columns.get(name) for sample in samples]
        try:
            schema = schema.append(pa.field(name, pa.array(values).type))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"{path}: column {name!r} holds values of several kinds: {error}") from error
    return schema


def _record(sample: Sample) -> dict:
    cells = [{"bytes": images.png(image), "path": None} for image in sample.load_images()]
    shown = {"images": cells, "videos": [videos.record(video) for video in sample.videos]}
    return dict(sample.columns) | {name: getattr(sample, name) for name in COLUMNS} | shown
