"""A square picture in coordinates from 0 (left, top) to 1, the same at every resolution."""

from collections.abc import Callable, Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

SMOOTH = 3  # pictures are drawn this many times larger and then reduced, since Pillow draws hard edges
MARGIN = 0.03  # white border around a board

BLACK, GREY, LIGHT = "#222222", "#8a8a8a", "#e4e4e4"
RED, GREEN, BLUE, ORANGE, PURPLE, TEAL = "#d7342c", "#2a9d4a", "#2b6fc2", "#e08a1e", "#8e4fb0", "#159a9c"

Box = tuple[float, float, float, float]  # left, top, right, bottom
Point = tuple[float, float]


class Canvas:
    """A white picture of `size` × `size` px to draw on."""

    def __init__(self, size: int):
        self._scale = size * SMOOTH
        self._image = Image.new("RGB", (self._scale, self._scale), "white")
        self._draw = ImageDraw.Draw(self._image)

    def image(self) -> Image.Image:
        """The picture so far, in RGB."""
        return self._image.reduce(SMOOTH)

    def box(self, box: Box, fill: str | None = None, line: str | None = None, width: float = 0.0, radius: float = 0.0):
        scaled = [self._px(value) for value in box]
        self._draw.rounded_rectangle(scaled, self._px(radius), fill, line, self._px(width))

    def circle(self, center: Point, radius: float, fill: str | None = None, line: str | None = None, width: float = 0):
        x, y = center
        scaled = [self._px(value) for value in (x - radius, y - radius, x + radius, y + radius)]
        self._draw.ellipse(scaled, fill, line, self._px(width))

    def polygon(self, points: Sequence[Point], fill: str):
        self._draw.polygon([(self._px(x), self._px(y)) for x, y in points], fill)

    def line(self, start: Point, end: Point, color: str, width: float):
        """Draw a line with round ends."""
        self._draw.line([tuple(map(self._px, start)), tuple(map(self._px, end))], color, self._px(width))
        for point in (start, end):
            self.circle(point, width / 2, color)

    def text(self, center: Point, text: str, height: float, color: str = BLACK):
        """Draw `text` around `center`; `height` is the font's size."""
        x, y = center
        self._draw.text((self._px(x), self._px(y)), text, color, _font(self._px(height)), anchor="mm")

    def _px(self, value: float) -> int:
        return round(value * self._scale)


def board(rows: int, columns: int) -> Callable[[int, int], Box]:
    """A function of (row, column), counted from 0, that says where this square of a centred board lies."""
    side = (1 - 2 * MARGIN) / max(rows, columns)
    left, top = (1 - columns * side) / 2, (1 - rows * side) / 2

    def square(row: int, column: int) -> Box:
        x, y = left + column * side, top + row * side
        return x, y, x + side, y + side

    return square


def center(box: Box) -> Point:
    left, top, right, bottom = box
    return (left + right) / 2, (top + bottom) / 2


def inset(box: Box, share: float) -> Box:
    """Shrink `box` by a border, a share of its width."""
    left, top, right, bottom = box
    border = share * (right - left)
    return left + border, top + border, right - border, bottom - border


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # comes with Pillow: pictures are the same on every machine
