"""Draw marks with strokes: digits and letters as by hand, and lines of text.

Each mark is a skeleton of strokes on a grid of 9 by 9, written as pairs of digits (column, row) from the top left. A
stroke that begins with ``-`` is a polygon's line, any other is a smooth curve through its points.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from redpp_serve.pruning.textures import Array, Random, light, paint, palette, power_noise, shrink, soften, unit, warp

_DIGITS = (
    "40 21 14 27 48 67 74 61 40", "-40 48", "-22 40 48", "-22 40 48/-28 68",
    "12 30 61 63 35 18/-18 78", "12 21 50 72 63 35 17 38 26 47 78", "11 40 71 62 34/34 74 76 48 17",
    "-11 71 43/43 74 76 48 17", "-50 15 75/-50 58", "-20 15 75/-60 58", "-70 20 14/14 43 75 67 38 17",
    "61 32 15 27 58 76 54 25 16", "-10 70 38", "-12 10 70 38/-24 64", "71 40 12 14 45 72 71/-71 68",
    "71 40 12 14 45 72 71/71 75 58 28", "62 40 21 22 44 66 67 48 27 26 44 62",
)  # fmt: skip
_LETTERS = (
    "-18 40 78/-25 65", "-10 18/10 60 72 54 14/14 64 76 68 18", "72 40 12 16 48 76", "-10 18/10 50 73 75 58 18",
    "-70 10 18 78/-14 54", "-70 10 18/-14 54", "72 40 12 16 48 77/-77 75 45", "-10 18/-70 78/-14 74",
    "-40 48/-20 60/-28 68",
    "60 66 48 17", "-10 18/-70 14 78", "-10 18 78", "-18 10 45 70 78", "-18 10 78 70", "-18 10/10 60 72 54 14",
    "40 21 14 27 48 67 74 61 40/-56 88", "-18 10/10 60 72 54 14/-44 78", "72 40 12 34 65 67 38 16", "-10 70/-40 48",
    "10 15 38 58 75 70", "-10 48 70", "-10 28 43 58 70", "-10 78/-70 18", "-10 44 70/-44 48", "-10 70 18 78",
    "65 43 14 16 48 66/-63 68", "-20 28/24 53 75 67 48 27", "73 43 14 17 48 77", "-60 68/64 33 15 27 48 66",
    "15 74 53 33 15 27 48 77", "71 50 32 38/-14 64", "-20 28/25 43 64 68", "-43 48/-41 41",
)  # fmt: skip
_COUNT = len(_DIGITS) + len(_LETTERS)


def _skeleton(text: str) -> list[NDArray[Any]]:
    """Return the strokes of a mark as points (n, 2) in 0..1, curves sampled densely."""
    strokes = []
    for stroke in text.split("/"):
        points = np.array([(int(p[0]), int(p[1])) for p in stroke.lstrip("-").split()], dtype=np.float64) / 8
        strokes.append(points if stroke.startswith("-") else _curve(points))
    return strokes


def _curve(points: NDArray[Any]) -> NDArray[Any]:
    """Return a Catmull-Rom curve through points (n, 2), eight samples for each piece."""
    closed = bool(np.allclose(points[0], points[-1]))
    before, after = (points[-2], points[1]) if closed else (2 * points[0] - points[1], 2 * points[-1] - points[-2])
    p = np.concatenate([before[None], points, after[None]])
    t = np.linspace(0, 1, 8, endpoint=False)[:, None, None]
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    pieces = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return np.concatenate([pieces.transpose(1, 0, 2).reshape(-1, 2), points[-1:]])


_SKELETONS = tuple(_skeleton(text) for text in (*_DIGITS, *_LETTERS))


class Hand:
    """A way of writing: slant, proportions, how much each mark differs, and the pen.

    Args:
        rng: where the hand is drawn from.
        pen: the width of a stroke as a share of a mark's height.
    """

    def __init__(self, rng: Random, pen: float) -> None:
        self.rng, self.pen = rng, pen
        self.slant, self.narrow = rng.normal(0, 0.18), rng.uniform(0.55, 1.0)
        self.wobble = abs(rng.normal(0, 0.025))
        self.pressure = abs(rng.normal(0, 0.25))

    def write(self, draw: ImageDraw.ImageDraw, mark: int, box: tuple[float, float, float], ink: int) -> None:
        """Draw mark number ``mark`` into a box (left, top, height) in pixels with an ink of 0..255."""
        rng, (left, top, height) = self.rng, box
        slant, turn = self.slant + rng.normal(0, 0.06), rng.normal(0, 0.08)
        narrow = self.narrow * np.exp(rng.normal(0, 0.08))
        bend = rng.normal(0, 1, (2, 4)) * self.wobble
        for points in _SKELETONS[mark]:
            x, y = points[:, 0] - 0.5, points[:, 1] - 0.5
            x = x + bend[0, 0] * np.sin(5 * y + bend[0, 1]) + bend[0, 2] * x * y + bend[0, 3]
            y = y + bend[1, 0] * np.sin(5 * x + bend[1, 1]) + bend[1, 2] * x * y + bend[1, 3]
            x = narrow * x - slant * y
            x, y = x - turn * y, y + turn * x
            self._line(draw, left + height * (x + 0.5), top + height * (y + 0.5), height, ink)

    def _line(self, draw: ImageDraw.ImageDraw, x: NDArray[Any], y: NDArray[Any], height: float, ink: int) -> None:
        width = max(1.0, self.pen * height)
        flat = np.stack([x, y], axis=1)
        if width < 4 or self.pressure < 0.05:
            draw.line(flat.ravel().tolist(), fill=ink, width=round(width), joint="curve")
            ends = flat[[0, -1]]
            widths = np.full(2, width)
        else:  # a pen whose pressure changes along the stroke: circles close to each other
            along = np.concatenate([[0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
            count = max(2, int(along[-1] / (0.25 * width)) + 1)
            places = np.linspace(0, along[-1], count)
            ends = np.stack([np.interp(places, along, x), np.interp(places, along, y)], axis=1)
            phase = self.rng.uniform(0, 6)
            widths = width * (1 + self.pressure * np.sin(phase + 3 * places / height))
        corners = np.concatenate([ends - widths[:, None] / 2, ends + widths[:, None] / 2], axis=1)
        for corner in corners.tolist():
            draw.ellipse(corner, fill=ink)


def single(rng: Random, height: int, width: int) -> Array:
    """Return a mask (height, width) in 0..1 of one digit or letter in the middle, like the marks of digit networks."""
    factor = 2 if min(height, width) < 160 else 1
    size = min(height, width) * factor
    image = Image.new("L", (width * factor, height * factor), 0)
    hand = Hand(rng, rng.uniform(0.07, 0.17))
    tall = size * rng.uniform(0.6, 0.8)
    left = (width * factor - tall) / 2 + size * rng.normal(0, 0.03)
    top = (height * factor - tall) / 2 + size * rng.normal(0, 0.03)
    mark = rng.integers(len(_DIGITS)) if rng.random() < 0.75 else rng.integers(_COUNT)
    hand.write(ImageDraw.Draw(image), int(mark), (left, top, tall), 255)
    return shrink(np.asarray(image, dtype=np.float32) / 255, factor)


def text(rng: Random, height: int, width: int, lines: float) -> Array:
    """Return a mask (height, width) in 0..1 of writing; ``lines`` is how many lines fill the height."""
    factor = 2 if min(height, width) < 400 else 1
    image = Image.new("L", (width * factor, height * factor), 0)
    draw, hand = ImageDraw.Draw(image), Hand(rng, rng.uniform(0.05, 0.2))
    tall = height * factor / lines
    pace, size = rng.uniform(0.6, 0.95), rng.uniform(0.5, 0.8)
    y, margin = rng.uniform(-0.5, 0.2) * tall, rng.uniform(-0.1, 0.15) * width * factor
    while y < height * factor:
        x, end = margin, width * factor * (rng.uniform(0.3, 1.1) if rng.random() < 0.3 else 1.0)
        while x < end:
            if rng.random() > 0.15:
                hand.write(draw, int(rng.integers(_COUNT)), (x, y, tall * size), 255)
            x += tall * size * pace
        y += tall * rng.uniform(0.9, 1.1)
    return shrink(np.asarray(image, dtype=np.float32) / 255, factor)


def handwriting(rng: Random, height: int, width: int) -> Array:
    """Return a picture (height, width, 3) of one mark on plain paper, as a rule light on dark."""
    mask = soften(single(rng, height, width), rng.uniform(0, 0.02) * min(height, width))
    paper, ink = (rng.uniform(0, 0.08), rng.uniform(0.8, 1)) if rng.random() < 0.8 else (0.0, 1.0)
    picture = paper + (ink - paper) * np.clip(mask, 0, 1)
    if rng.random() < 0.1:
        picture = 1 - picture
    return np.repeat(picture[..., None], 3, axis=2).astype(np.float32)


def writing(rng: Random, height: int, width: int) -> Array:
    """Return a picture (height, width, 3) of marks in one or more sizes over paper, gradients or textures."""
    kind = rng.random()
    if kind < 0.3:
        paper = np.broadcast_to(palette(rng, 1), (height, width, 3)).copy()
    elif kind < 0.6:
        paper = paint(rng, unit(power_noise(rng, height, width, rng.uniform(2.5, 4))), 3)
    else:
        paper = paint(rng, warp(rng, height, width), int(rng.integers(2, 5)))
    paper = paper * light(rng, height, width)
    for _ in range(rng.integers(1, 4)):
        many = rng.random() < 0.5
        mask = text(rng, height, width, rng.uniform(3, 14)) if many else single(rng, height, width)
        mask = mask * _window(rng, height, width)
        if rng.random() < 0.3:  # the shadow of raised marks
            shift = max(1, min(height, width) // 60)
            paper = paper * (1 - 0.5 * np.roll(soften(mask, shift), (shift, shift), (0, 1)))[..., None]
        ink = palette(rng, 2)
        grade = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
        mask = mask[..., None]
        paper = paper * (1 - mask) + mask * (ink[0] * (1 - grade) + ink[1] * grade)
    return np.asarray(paper, dtype=np.float32)


def _window(rng: Random, height: int, width: int) -> Array:
    """Return a mask (height, width) of 1 within a rectangle, in half of the cases of all."""
    mask = np.ones((height, width), dtype=np.float32)
    if rng.random() < 0.5:
        mask[:] = 0
        top, left = int(rng.uniform(0, 0.6) * height), int(rng.uniform(0, 0.6) * width)
        mask[top : top + int(rng.uniform(0.3, 0.8) * height), left : left + int(rng.uniform(0.3, 0.8) * width)] = 1
    return mask
