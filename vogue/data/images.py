"""How an image of a data set is found, opened and made upright RGB, and its size told from its header alone.

Of several frames (animated GIF, WebP and PNG, MPO, TIFF) the first is taken. 16-bit grey becomes 8-bit by its high
byte, as 16-bit colour does. Modes whose range no file states (32-bit integers, floats) are refused.
"""

import base64
import binascii
import hashlib
import io
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

FORMS = "encoded bytes, {bytes, path}, a file's path, a data: URI, or base64"
SHOWN = 60  # characters of a value in a message
END = 64  # bytes of a file that tell it from others of its length
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
RANGELESS = ("I", "F")
ORIENTATION = 0x0112  # of EXIF
ON_ITS_SIDE = (5, 6, 7, 8)  # orientations that exchange width and height
TAIL = 1 << 16  # bytes at a PNG's end
BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")  # longer than a path without dots is

Reference = bytes | pa.Buffer | Path | Image.Image


class PixelLimits(NamedTuple):
    """Least and most pixels of an image, None for no limit; one outside is resized to them, its ratio kept."""

    least: int | None = None
    most: int | None = None

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height within the limits, but for rounding; at least one pixel each."""
        pixels, wanted = width * height, width * height
        if self.most is not None:
            wanted = min(wanted, self.most)
        if self.least is not None:
            wanted = max(wanted, self.least)
        if wanted == pixels:
            return width, height
        scale = (wanted / pixels) ** 0.5
        rounded = int if wanted < pixels else _up  # never past the limit that is being kept
        return max(1, rounded(width * scale)), max(1, rounded(height * scale))


NO_LIMITS = PixelLimits()


class ImageError(ValueError):
    """What is wrong with an image, without its place."""


def reference(cell, folder: Path) -> Reference:
    """What a cell refers to: encoded bytes, or a path resolved against `folder`; raises `ImageError` for neither."""
    content = cell
    if isinstance(cell, dict):
        name = next((name for name in ("bytes", "path", "url", "image") if cell.get(name)), None)
        content = cell[name] if name else cell
        if name == "bytes" and isinstance(content, str):
            return _decoded(content.partition(",")[2] if content.startswith("data:") else content, content)
    if isinstance(content, bytes | pa.Buffer | Image.Image):
        return content
    if not isinstance(content, str) or not content.strip():
        raise ImageError(f"an image must be {FORMS}, but is {short(cell)}")
    scheme = content.partition(":")[0].lower()
    if scheme in ("http", "https", "s3", "gs", "hf"):
        raise ImageError(f"{short(content)} is not fetched: store the image beside the data, as {FORMS}")
    if scheme == "file":
        return Path(unquote(urlsplit(content).path))
    if scheme == "data":
        return _decoded(content.partition(",")[2], content)
    # A long name of letters and slashes may be a path as well: then its file is there.
    if BASE64.fullmatch(content) and not _is_file(folder / content):
        return _decoded(content, content)
    return folder / content


def load(found: Reference, limits: PixelLimits = NO_LIMITS) -> Image.Image:
    """The image, decoded, upright, in RGB and within `limits`; raises what Pillow does, and `ImageError`."""
    image = _open(found)
    image.load()
    # An image without the tag stays the same object: transposing would copy it.
    image = ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
    image = _rgb(image)
    size = limits.size(*image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def size_of(found: Reference, limits: PixelLimits = NO_LIMITS) -> tuple[int, int]:
    """Width and height that `load` would give, from the header alone; raises as `load` does for what a header shows."""
    image = _open(found)
    if image.mode in RANGELESS:
        _rgb(image)
    width, height = image.size
    if _orientation(image) in ON_ITS_SIDE:
        width, height = height, width
    return limits.size(width, height)


def name_of(found: Reference | str) -> str:
    """What a message calls the image."""
    size = len(found) if isinstance(found, bytes) else getattr(found, "size", None)
    return f"{size} bytes" if isinstance(found, bytes | pa.Buffer) else str(found)


def identity(found: Reference | str) -> str:
    """What tells an image from others, not all of it read: the end of its path, its length and its end, or its pixels.

    The end of a file of an image is compressed pixels, and in PNG's case their checksum: files of one length are told
    apart by it.
    """
    if isinstance(found, Image.Image):
        return hashlib.blake2b(found.tobytes(), digest_size=16).hexdigest()
    if isinstance(found, str | Path):
        return "/".join(Path(found).parts[-2:])
    return f"{len(found)} {bytes(memoryview(found)[-END:]).hex()}"


def short(value) -> str:
    """`value` as Python writes it, cut."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def png(image: Image.Image) -> bytes:
    """The image's pixels in the form of a PNG file, without its metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=b"")
    return buffer.getvalue()


def _open(found: Reference) -> Image.Image:
    if isinstance(found, Image.Image):
        return found
    if isinstance(found, pa.Buffer):
        return Image.open(pa.BufferReader(found))  # pyright: ignore[reportArgumentType]
    return Image.open(io.BytesIO(found) if isinstance(found, bytes) else found)


def _orientation(image: Image.Image) -> int | None:
    """Read the tag without decoding; a PNG's may stand behind its pixels, which Pillow decodes to get there."""
    if isinstance(image, PngImageFile) and "exif" not in image.info and not _ends_with_metadata(image):
        return Image.Image.getexif(image).get(ORIENTATION)
    return image.getexif().get(ORIENTATION)


def _ends_with_metadata(image: PngImageFile) -> bool:
    """Whether the file's last bytes name metadata; right but where those are behind the pixels and very long."""
    file = image.fp
    if file is None:  # decoded already
        return True
    here = file.tell()
    file.seek(0, io.SEEK_END)
    file.seek(max(0, file.tell() - TAIL))
    end = file.read()
    file.seek(here)
    return any(name in end for name in (b"eXIf", b"com.adobe.xmp", b"Raw profile type"))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in RANGELESS:
        raise ImageError(
            f"its pixels are of Pillow's mode {image.mode}, whose range isn't known: store 8 or 16 bits a channel"
        )
    if image.mode in SIXTEEN_BITS:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Plain conversion shows what lies under transparent pixels, as a rule black: the colour of a diagram's lines.
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _decoded(text: str, whole: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ImageError(f"{short(whole)} is no base64: {error}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long for a file
        return False


def _up(value: float) -> int:
    return int(-(-value // 1))
