"""Images as people have them: sideways, 16-bit, in base64; expected pixels by hand."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from vogue.data import DataError, Sample, load_samples, write_parquet
from vogue.data.images import PixelLimits

# Two pixels wide, one high: red, then blue.
PAIR = Image.new("RGB", (2, 1))
PAIR.putdata([(255, 0, 0), (0, 0, 255)])
BLOCKS = Image.fromarray(np.kron(np.asarray(PAIR), np.ones((16, 16, 1), np.uint8)))  # survives JPEG
# What a viewer shows of BLOCKS' left (red) and right (blue) half, by the EXIF orientation: (size, where red is).
SHOWN = {
    1: ((32, 16), "left"),
    2: ((32, 16), "right"),
    3: ((32, 16), "right"),
    4: ((32, 16), "left"),
    5: ((16, 32), "top"),
    6: ((16, 32), "top"),
    7: ((16, 32), "bottom"),
    8: ((16, 32), "bottom"),
}
CORNERS = {"left": (4, 8), "right": (28, 8), "top": (8, 4), "bottom": (8, 28)}


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(BLOCKS, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def is_red(pixel):
    return pixel[0] > 200 and pixel[2] < 60


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_an_image_is_upright_as_a_viewer_shows_it(tmp_path, kind, orientation):
    content = oriented(kind, orientation)
    (tmp_path / "photo").write_bytes(content)
    size, where = SHOWN[orientation]
    for stored in (content, tmp_path / "photo", str(tmp_path / "photo"), Image.open(io.BytesIO(content))):
        sample = Sample("What?", "red", (stored,))
        assert sample.image_sizes() == [size]
        (image,) = sample.load_images()
        assert image.size == size
        assert [is_red(image.getpixel(CORNERS[name])) for name in CORNERS if name in _sides(size)] == [
            name == where for name in CORNERS if name in _sides(size)
        ]


def _sides(size):
    return ("left", "right") if size[0] > size[1] else ("top", "bottom")


def test_a_written_file_holds_upright_images_without_the_tag(tmp_path):
    write_parquet([Sample("What?", "red", (oriented("JPEG", 6),))], tmp_path / "a.parquet")
    (image,) = load_samples(tmp_path / "a.parquet")[0].load_images()
    assert image.size == (16, 32)
    assert is_red(image.getpixel(CORNERS["top"]))


def test_a_png_whose_tag_stands_behind_its_pixels_is_upright():
    content = oriented("PNG", 6)
    at = content.index(b"eXIf") - 4
    length = int.from_bytes(content[at : at + 4], "big") + 12
    end = content.index(b"IEND") - 4
    moved = content[:at] + content[at + length : end] + content[at : at + length] + content[end:]
    sample = Sample("What?", "red", (moved,))
    assert sample.image_sizes() == [(16, 32)] == [image.size for image in sample.load_images()]


def test_images_without_a_tag_stay_bit_for_bit():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    (image,) = Sample("What?", "noise", (encoded(noise, "PNG"),)).load_images()
    assert image.tobytes() == noise.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF"])
def test_sixteen_bits_of_grey_keep_all_their_levels(kind):
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    grey = Image.fromarray(levels)
    if kind == "big-endian TIFF":
        grey = Image.frombytes("I;16B", (16, 16), levels.astype(">u2").tobytes())
    (image,) = Sample("What?", "grey", (encoded(grey, kind[-4:].strip()),)).load_images()
    assert np.asarray(image)[..., 0].ravel().tolist() == list(range(256))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_no_stated_range_are_refused_with_their_mode(mode):
    sample = Sample("What?", "grey", (encoded(Image.new(mode, (4, 4)), "TIFF"),), place="a.parquet, row 3")
    for look in (sample.load_images, sample.image_sizes):
        with pytest.raises(DataError, match=rf"a.parquet, row 3: image 1 of 1 .*mode {mode}, whose range isn't known"):
            look()


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        (image,) = Sample("What?", "red", (content,)).load_images()
        assert is_red(image.getpixel((1, 1)))


def test_images_in_text_are_decoded_and_nothing_is_fetched(tmp_path):
    png = encoded(PAIR, "PNG")
    text = base64.b64encode(encoded(BLOCKS, "PNG")).decode()
    forms = [
        (f"data:image/png;base64,{text}", (32, 16)),
        ({"bytes": text, "path": None}, (32, 16)),
        ({"bytes": base64.b64encode(png).decode()}, (2, 1)),
        (text, (32, 16)),
    ]
    (tmp_path / "a photo.png").write_bytes(png)
    forms.append((f"file://{tmp_path}/a%20photo.png", (2, 1)))
    forms.append(("a photo.png", (2, 1)))
    rows = [{"problem": "What?", "answer": "red", "images": [cell]} for cell, _ in forms]
    path = write_json(tmp_path, rows)
    for sample, (_, size) in zip(load_samples(path), forms, strict=True):
        assert [image.size for image in sample.load_images()] == [size]


def write_json(folder, rows):
    import json

    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("url", ["https://a.b/c.png", "http://a.b/c.png", "s3://a/b.png"])
def test_a_url_is_refused_in_one_short_sentence(tmp_path, url):
    samples = load_samples(write_json(tmp_path, [{"problem": "What?", "answer": "red", "images": [url]}]))
    with pytest.raises(DataError, match=rf"row 0: '{url}' is not fetched: store the image beside the data"):
        samples[0]


def test_messages_are_short_however_long_a_value_is(tmp_path):
    long = "data:image/png;base64," + "!" * 200_000
    samples = load_samples(write_json(tmp_path, [{"problem": "What?", "answer": "red", "images": [long]}]))
    with pytest.raises(DataError, match=r"is no base64") as told:
        samples[0]
    assert len(str(told.value)) < 300


@pytest.mark.parametrize(
    ("limits", "size", "expected"),
    [
        (PixelLimits(None, 100), (20, 20), (10, 10)),
        (PixelLimits(None, 100), (40, 10), (20, 5)),
        (PixelLimits(400, None), (10, 10), (20, 20)),
        (PixelLimits(10, 1000), (20, 20), (20, 20)),
        (PixelLimits(None, 10), (1000, 1), (100, 1)),
    ],
)
def test_an_image_is_resized_to_the_limits_with_its_ratio_kept(limits, size, expected):
    sample = Sample("What?", "red", (Image.new("RGB", size),))
    assert sample.image_sizes(limits) == [expected]
    assert [image.size for image in sample.load_images(limits)] == [expected]
