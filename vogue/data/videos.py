"""How a video of a data set is found, its frames chosen and made upright RGB, and their number told without decoding.

A video is a file that PyAV decodes (the extra `video`), or a list of images, its frames. Of T frames at r frames
a second, n are taken, evenly from the first to the last:

    n = T fps / r,  at least 2, at most max_frames and T, and even, since models merge frames by two

A list of frames without a rate of its own counts as taken at `fps`, so that all of it is kept.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from vogue.data import images
from vogue.data.images import ImageError, PixelLimits, Reference

FORMS = "a file's path, encoded bytes, or a list of images"
GAP = 2  # pixels between the frames of a strip
NAMES = ("video", "frames", "path", "url", "bytes", "video_url")  # of what holds a video in a record


class VideoLimits(NamedTuple):
    """Which frames are taken, and how large they are."""

    fps: float = 2.0  # frames a second
    max_frames: int = 768
    pixels: PixelLimits = images.NO_LIMITS  # of a frame


QWENS = VideoLimits()  # as the processors of Qwen's models have them


@dataclass(frozen=True)
class Frames:
    """A video as a list of images; `fps` is how many there are a second, None where that isn't said."""

    images: tuple[Reference, ...]
    fps: float | None = None


@dataclass(frozen=True)
class Clip:
    """The frames of a video that are shown, all of one size."""

    frames: tuple[Image.Image, ...]
    times: tuple[float, ...]  # seconds from the video's beginning, of each
    interval: float  # mean seconds between two


Video = Frames | Clip | bytes | pa.Buffer | Path


class Outline(NamedTuple):
    """What is known of a clip without its pixels."""

    times: tuple[float, ...]
    interval: float
    size: tuple[int, int]  # width and height of a frame


def reference(cell: Any, folder: Path) -> Video:
    """What a cell refers to: a file, encoded bytes, or frames; raises `ImageError` for neither."""
    content, fps = cell, None
    if isinstance(cell, Mapping):
        name = next((name for name in NAMES if cell.get(name)), None)
        if name is None:
            raise ImageError(f"a video must be {FORMS}, but is {images.short(cell)}")
        content, fps = cell[name], cell.get("sample_fps") or cell.get("fps")
    if isinstance(content, Mapping):
        return reference(content, folder)
    if isinstance(content, list):
        if fps is not None and not (isinstance(fps, int | float) and fps > 0):
            raise ImageError(f"a video's fps must be a number above 0, but is {images.short(fps)}")
        return Frames(tuple(images.reference(frame, folder) for frame in content), fps)
    found = images.reference(content, folder)
    if isinstance(found, Image.Image):
        raise ImageError(f"a video must be {FORMS}, but is a single image")
    return found


def load(video: Video, limits: VideoLimits) -> Clip:
    """The frames that are shown; raises what decoders do, `ImageError`, and ImportError without PyAV."""
    if isinstance(video, Clip):
        return video
    if isinstance(video, Frames):
        outline, chosen = _outline_of_frames(video, limits), _of_list(video, limits)
        loaded = [images.load(video.images[i], limits.pixels) for i in chosen]
    else:
        total, rate, _ = _header(video)
        chosen = _chosen(total, rate, limits)
        outline = Outline(*_times(chosen, total, rate), (0, 0))
        loaded = [_sized(frame, limits.pixels) for frame in _decoded(video, chosen)]
    sizes = {image.size for image in loaded}
    if len(sizes) > 1:
        raise ImageError(f"its frames are of several sizes: {', '.join(f'{w} x {h}' for w, h in sorted(sizes))}")
    return Clip(tuple(loaded), outline.times, outline.interval)


def outline(video: Video, limits: VideoLimits) -> Outline:
    """What `load` gives but for the pixels: from headers and one frame; raises as `load` does for what these show."""
    if isinstance(video, Clip):
        return Outline(video.times, video.interval, video.frames[0].size)
    if isinstance(video, Frames):
        return _outline_of_frames(video, limits)
    total, rate, size = _header(video)
    return Outline(*_times(_chosen(total, rate, limits), total, rate), limits.pixels.size(*size))


def strip(clip: Clip, frames: int = 4) -> Image.Image:
    """The first frames of a clip side by side, as a picture for people."""
    shown = clip.frames[:frames]
    width, height = shown[0].size
    picture = Image.new("RGB", (width * len(shown) + GAP * (len(shown) - 1), height), "white")
    for number, frame in enumerate(shown):
        picture.paste(frame, (number * (width + GAP), 0))
    return picture


def name_of(video: Video) -> str:
    """What a message calls the video."""
    if isinstance(video, Frames | Clip):
        return f"{len(video.images if isinstance(video, Frames) else video.frames)} frames"
    return images.name_of(video)


def identity(video: Video) -> str:
    """What tells a video from others: of its frames, or of its file as `images.identity`."""
    if isinstance(video, Frames | Clip):
        parts = video.images if isinstance(video, Frames) else video.frames
        return hashlib.blake2b("\0".join(map(images.identity, parts)).encode(), digest_size=16).hexdigest()
    return images.identity(video)


def record(video: Video) -> dict[str, Any]:
    """A video as vogue's files hold it: all of its frames as PNG, and their rate."""
    if isinstance(video, Frames):
        frames, fps = [images.load(frame) for frame in video.images], video.fps
    else:
        clip = load(video, VideoLimits(fps=1e9))
        frames, fps = clip.frames, 1 / clip.interval
    return {"frames": [{"bytes": images.png(frame), "path": None} for frame in frames], "fps": fps}


def _chosen(total: int, rate: float, limits: VideoLimits) -> list[int]:
    """Numbers of the frames that are taken of `total` at `rate` a second."""
    if total < 1:
        raise ImageError("it has no frames")
    wanted = min(max(round(total * limits.fps / rate), 2), limits.max_frames, total)
    count = max(2, wanted - wanted % 2)
    return np.linspace(0, total - 1, count).round().astype(int).tolist()  # the only one of a single frame twice


def _of_list(video: Frames, limits: VideoLimits) -> list[int]:
    return _chosen(len(video.images), video.fps or limits.fps, limits)


def _times(chosen: Sequence[int], total: int, rate: float) -> tuple[tuple[float, ...], float]:
    return tuple(number / rate for number in chosen), total / rate / len(chosen)


def _outline_of_frames(video: Frames, limits: VideoLimits) -> Outline:
    chosen = _of_list(video, limits)
    times = _times(chosen, len(video.images), video.fps or limits.fps)
    return Outline(*times, images.size_of(video.images[chosen[0]], limits.pixels))


def _sized(image: Image.Image, limits: PixelLimits) -> Image.Image:
    size = limits.size(*image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _header(video: bytes | pa.Buffer | Path) -> tuple[int, float, tuple[int, int]]:
    """Number of frames, frames a second, and an upright frame's size, for which the first one is decoded."""
    with _opened(video) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise ImageError("its file says no rate of frames")
        first = next(container.decode(stream), None)
        if first is None:
            raise ImageError("it has no frames")
        total = stream.frames
        if not total:  # not all kinds of files say it
            container.seek(0)
            total = sum(packet.size > 0 for packet in container.demux(stream))
        return total, float(rate), _upright(first).size


def _decoded(video: bytes | pa.Buffer | Path, chosen: Sequence[int]) -> list[Image.Image]:
    """The chosen frames in order. A file may have fewer than it says: then the last one stands for those."""
    found: dict[int, Image.Image] = {}
    wanted, last = set(chosen), None
    with _opened(video) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                found[number] = last = _upright(frame)
            if number >= chosen[-1]:
                break
    if last is None:
        raise ImageError("it has no frames")
    missing = wanted - set(found)
    if len(missing) > 1:  # one may be missing by rounding of its length
        raise ImageError(f"its file says more frames than the {max(found) + 1} or so that it has")
    return [found.get(number, last) for number in chosen]


def _upright(frame: Any) -> Image.Image:
    image = frame.to_image()
    turned = getattr(frame, "rotation", 0) % 360  # degrees, counted against the clock, as phones write it
    return image.rotate(turned, expand=True) if turned else image


def _opened(video: bytes | pa.Buffer | Path) -> Any:
    try:
        import av
    except ImportError:
        raise ImportError(
            "decoding a video needs PyAV: pip install 'av>=14,<19', or store its frames as images"
        ) from None
    container = av.open(str(video) if isinstance(video, Path) else io.BytesIO(memoryview(video)))
    if not container.streams.video:
        container.close()
        raise ImageError("its file holds no video")
    return container
