"""Outlines in the plane, and drawing them: everything that the tasks put on paper.

An outline is a list of points in pixels. Pictures are drawn twice as large and averaged down, so lines are smooth, and
no font is needed: letters and digits are squares on a 5 by 7 raster. The same outlines give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = str | int | tuple[int, int, int]
SIZE = 400
_FINER = 2  # drawn larger by this factor, then averaged

# corners of an outline of radius 1 around the origin, y downwards
_REGULAR = {"triangle": 3, "pentagon": 5, "hexagon": 6, "octagon": 8, "circle": 48}
_CORNERS: dict[str, list[Point]] = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "rectangle": [(-0.95, -0.5), (0.95, -0.5), (0.95, 0.5), (-0.95, 0.5)],
    "cross": [
        (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3), (0.3, 0.95), (-0.3, 0.95),
        (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3),
    ],
    "line": [(-0.9, 0.0), (0.9, 0.0)],
}  # fmt: skip
SHAPES = (*_REGULAR, *_CORNERS, "star", "capsule")


def corners(shape: str) -> list[Point]:
    """The corners of a shape of radius 1 around the origin, clockwise from the top or the left; a line has two."""
    if shape in _REGULAR:
        return _around(_REGULAR[shape], [1.0])
    if shape == "star":
        return _around(10, [1.0, 0.42])
    if shape == "capsule":
        half = [(math.cos(a), math.sin(a)) for a in (math.pi * (k / 12 - 0.5) for k in range(13))]
        right = [(0.5 + 0.5 * x, 0.5 * y) for x, y in half]
        return right + [(-x, -y) for x, y in right]
    return list(_CORNERS[shape])


def _around(count: int, radii: Sequence[float]) -> list[Point]:
    angles = [2 * math.pi * k / count - math.pi / 2 for k in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(list(radii) * count, angles, strict=False)]


def outline(shape: str, x: float, y: float, radius: float, turn: float = 0.0, aspect: float = 1.0) -> list[Point]:
    """A shape in pixels: stretched in height by `aspect`, turned clockwise by `turn` degrees, centred on (x, y)."""
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    stretched = [(radius * px, radius * aspect * py) for px, py in corners(shape)]
    return [(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in stretched]


class Paper:
    """A white picture of SIZE by SIZE pixels to draw on."""

    def __init__(self, background: Colour = "white") -> None:
        self._image = Image.new("RGB", (SIZE * _FINER, SIZE * _FINER), background)
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Sequence[Point], width: float = 2, colour: Colour = "black") -> None:
        """A line through points."""
        at = [(x * _FINER, y * _FINER) for x, y in points]
        self._draw.line(at, fill=colour, width=round(width * _FINER), joint="curve")

    def shape(
        self, points: Sequence[Point], fill: Colour | None = None, width: float = 2, colour: Colour = "black"
    ) -> None:
        """A closed outline, filled or not; two points are a line."""
        if fill is not None:
            self._draw.polygon([(x * _FINER, y * _FINER) for x, y in points], fill=fill)
        self.line([*points, points[0], points[1]] if len(points) > 2 else points, width, colour)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        """A filled rectangle, right and bottom not included."""
        last = [right * _FINER - 1, bottom * _FINER - 1]
        self._draw.rectangle([round(left * _FINER), round(top * _FINER), *map(round, last)], fill=fill)

    def text(self, text: str, x: float, y: float, dot: float = 2) -> None:
        """Letters and digits from (x, y) on, each six dots wide and seven high."""
        for place, sign in enumerate(text):
            for row, column in raster(sign):
                left, top = x + (6 * place + column) * dot, y + row * dot
                self.box(left, top, left + dot, top + dot, "black")

    def picture(self) -> Image.Image:
        """What was drawn, SIZE by SIZE."""
        return self._image.resize((SIZE, SIZE), Image.Resampling.BOX)


# rows of five bits each, top to bottom
_RASTERS = {
    "A": "0e 11 11 1f 11 11 11", "B": "1e 11 11 1e 11 11 1e", "C": "0e 11 10 10 10 11 0e", "D": "1e 11 11 11 11 11 1e",
    "E": "1f 10 10 1e 10 10 1f", "F": "1f 10 10 1e 10 10 10", "G": "0e 11 10 17 11 11 0e", "H": "11 11 11 1f 11 11 11",
    "I": "0e 04 04 04 04 04 0e", "J": "07 02 02 02 02 12 0c", "K": "11 12 14 18 14 12 11", "L": "10 10 10 10 10 10 1f",
    "M": "11 1b 15 15 11 11 11", "N": "11 19 15 13 11 11 11", "O": "0e 11 11 11 11 11 0e", "P": "1e 11 11 1e 10 10 10",
    "Q": "0e 11 11 11 15 12 0d", "R": "1e 11 11 1e 14 12 11", "S": "0f 10 10 0e 01 01 1e", "T": "1f 04 04 04 04 04 04",
    "U": "11 11 11 11 11 11 0e", "V": "11 11 11 11 11 0a 04", "W": "11 11 11 15 15 1b 11", "X": "11 11 0a 04 0a 11 11",
    "Y": "11 11 0a 04 04 04 04", "Z": "1f 01 02 04 08 10 1f", "1": "04 0c 04 04 04 04 0e", "2": "0e 11 01 02 04 08 1f",
    "3": "1f 02 04 02 01 11 0e", "4": "02 06 0a 12 1f 02 02", "5": "1f 10 1e 01 01 11 0e",
}  # fmt: skip
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def raster(sign: str) -> list[tuple[int, int]]:
    """(row, column) of the set squares of a letter or of a digit from 1 to 5, on 7 rows and 5 columns."""
    rows = [int(row, 16) for row in _RASTERS[sign].split()]
    return [(r, c) for r, bits in enumerate(rows) for c in range(5) if bits >> (4 - c) & 1]
