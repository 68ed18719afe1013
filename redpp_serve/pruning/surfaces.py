"""Draw surfaces that repeat: walls of bricks and windows, honeycombs, grass, branches and wires, folded cloth.

Functions take a random generator, a height and a width, and return float32 (height, width, 3).
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from redpp_serve.pruning.textures import (
    Array,
    Random,
    fibres,
    grid,
    light,
    paint,
    palette,
    power_noise,
    relief,
    shrink,
    soften,
    unit,
    warp,
)


def surfaces(rng: Random, height: int, width: int) -> Array:
    """Return a wall, honeycomb, blades, wires or cloth that fills the picture."""
    draw = _SURFACES[rng.integers(len(_SURFACES))]
    return np.asarray(draw(rng, height, width) * light(rng, height, width), dtype=np.float32)


def _tilted(rng: Random, height: int, width: int, span: float) -> tuple[Array, Array]:
    """Return turned coordinates (height, width) of a plane that recedes into the distance."""
    x, y = grid(rng, height, width, 2.0)
    x, y = x - x.mean(), y - y.mean()
    far = 1 + np.float32(rng.uniform(0, 0.55)) * (x * np.cos(rng.uniform(0, 6)) + y * np.sin(rng.uniform(0, 6))) / 1.5
    scale = np.float32(span / 2) / np.clip(far, 0.15, None)
    return x * scale, y * scale


def _wall(rng: Random, height: int, width: int) -> Array:
    """Return bricks, tiles, windows, boards or checks, each with a colour and shading of its own."""
    rows = rng.uniform(3, 22)
    x, y = _tilted(rng, height, width, rows)
    x = x / np.float32(np.exp(rng.uniform(-0.7, 1.4)))
    row = np.floor(y)
    x = x + np.float32(rng.choice((0, 0.5, 0.37))) * row
    column = np.floor(x)
    a, b = x - column, y - row
    cell = (np.abs(column * 73 + row * 151) % 97).astype(np.int64)
    spread = np.float32(rng.uniform(0.02, 0.3))
    colours = (
        palette(rng, 1)[0] * (1 + spread * rng.standard_normal((97, 1))) if rng.random() < 0.6 else palette(rng, 97)
    )
    if rng.random() < 0.2:  # checks
        colours = palette(rng, 2)[(np.arange(97) % 2)]
        cell = ((column + row) % 2).astype(np.int64)
    picture = colours[cell].astype(np.float32)
    joint = np.float32(rng.uniform(0.02, 0.25))
    border = np.minimum(np.minimum(a, 1 - a), np.minimum(b, 1 - b))
    inner = np.clip((border - joint) * 12 + 0.5, 0, 1)[..., None]
    tilt = rng.normal(0, 0.4, 2)
    picture = picture * (1 + np.float32(tilt[0]) * (a - 0.5) + np.float32(tilt[1]) * (b - 0.5))[..., None]
    picture = palette(rng, 1)[0] * (1 - inner) + picture * inner
    return np.asarray(picture * (1 + np.float32(rng.gamma(1, 0.1)) * power_noise(rng, height, width, 1.6))[..., None])


def _honeycomb(rng: Random, height: int, width: int) -> Array:
    """Return round or pointed scales, cells, beads or shingles in staggered rows, lit from one side."""
    x, y = _tilted(rng, height, width, rng.uniform(4, 26))
    x, y = x + 0.15 * power_noise(rng, height, width, 3.4), y + 0.15 * power_noise(rng, height, width, 3.4)
    best = np.full((height, width), np.inf, dtype=np.float32)
    number = np.zeros((height, width), dtype=np.int64)
    for offset in (0.0, 0.5):  # two square lattices, one shifted by half a cell
        column, row = np.floor(x + offset), np.floor(y + offset)
        distance = np.hypot(x + offset - column - 0.5, y + offset - row - 0.5)
        number = np.where(
            distance < best, (np.abs(column * 37 + row * 11) % 61).astype(np.int64) + int(offset * 2) * 61, number
        )
        best = np.minimum(best, distance)
    heights = np.sqrt(np.clip(0.3 - best**2, 0, None))
    colours = palette(rng, 1)[0] * (1 + np.float32(rng.uniform(0, 0.3)) * rng.standard_normal((122, 1)))
    picture = colours.astype(np.float32)[number] * (0.35 + 1.3 * heights)[..., None]
    return np.asarray(np.clip(picture, 0, 2) * relief(rng, heights, rng.uniform(0.1, 0.6))[..., None])


def _blades(rng: Random, height: int, width: int) -> Array:
    """Return grass, leaves, needles, feathers or straw: long shapes of one colour over each other."""
    factor = 2 if min(height, width) <= 256 else 1
    image = Image.new("RGB", (width * factor, height * factor))
    draw = ImageDraw.Draw(image)
    size = min(height, width) * factor
    long, slim = size * np.exp(rng.uniform(np.log(0.06), np.log(0.5))), rng.uniform(0.04, 0.4)
    count = int(np.clip(3.5 * width * height * factor**2 / (long * long * slim), 60, 900))
    main, spread = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 1.6)
    base = palette(rng, 2)
    depth = np.linspace(0.25, 1.15, count)
    share = rng.beta(0.6, 0.6, (count, 1))
    tint = (base[0] * share + base[1] * (1 - share)) * (depth * np.exp(rng.normal(0, 0.18, count)))[:, None]
    tints = (np.clip(tint, 0, 1) * 255).astype(int)
    angles = main + spread * rng.standard_normal(count)
    lengths, centres = (
        long * np.exp(rng.normal(0, 0.3, count)),
        rng.uniform(-0.1, 1.1, (count, 2)) * (width, height) * factor,
    )
    curl = rng.normal(0, 0.25, count)
    along, across = np.array([0, 0.25, 0.6, 1, 0.6, 0.25]), np.array([0, 0.8, 0.8, 0, -0.8, -0.8]) * slim / 2
    for k in range(count):
        u, v = (along - 0.5) * lengths[k], (across + curl[k] * along * (1 - along)) * lengths[k]
        c, s = np.cos(angles[k]), np.sin(angles[k])
        outline = np.stack([centres[k, 0] + c * u - s * v, centres[k, 1] + s * u + c * v], axis=1)
        draw.polygon(outline.ravel().tolist(), fill=tuple(tints[k].tolist()))
        if k % 2:
            shine = tuple(np.clip(tints[k] * 1.35, 0, 255).astype(int).tolist())
            draw.line(
                [*outline[0].tolist(), *outline[3].tolist()], fill=shine, width=max(1, int(0.1 * slim * lengths[k]))
            )
    return shrink(np.asarray(image, dtype=np.float32) / 255, factor)


def _wires(rng: Random, height: int, width: int) -> Array:
    """Return branches, a web, fences, cables or scaffolds in front of something blurred."""
    back = soften(paint(rng, unit(power_noise(rng, height, width, 2.8)), 3), 2)
    factor = 2 if min(height, width) <= 256 else 1
    image = Image.new("L", (width * factor, height * factor), 0)
    draw = ImageDraw.Draw(image)
    w, h = width * factor, height * factor
    kind = rng.integers(4)
    if kind == 0:
        _branch(rng, draw, (rng.uniform(0.2, 0.8) * w, h * 1.05), (rng.normal(-1.57, 0.2), h * 0.3, h * 0.035), 6)
    elif kind == 1:
        cx, cy, spokes = rng.uniform(0.2, 0.8) * w, rng.uniform(0.2, 0.8) * h, int(rng.integers(5, 24))
        thick = int(rng.integers(1, 6))
        angles = np.sort(rng.uniform(0, 2 * np.pi, spokes))
        for a in angles:
            draw.line([cx, cy, cx + 2 * w * np.cos(a), cy + 2 * w * np.sin(a)], fill=255, width=thick)
        for r in np.arange(0.05, 1.2, rng.uniform(0.05, 0.2)) * w:
            ring = np.stack([cx + r * np.cos(angles), cy + r * np.sin(angles)], axis=1)
            draw.line([*ring.ravel().tolist(), *ring[0].tolist()], fill=255, width=thick)
    else:
        for _ in range(rng.integers(1, 4)):
            angle, gap, thin = rng.uniform(0, np.pi), w * rng.uniform(0.03, 0.3), w * rng.uniform(0.004, 0.03)
            c, s = np.cos(angle), np.sin(angle)
            for shift in np.arange(-1.5 * w, 1.5 * w, gap):
                x, y = w / 2 + shift * -s, h / 2 + shift * c
                sag = rng.normal(0, 0.02) * w if kind == 3 else 0.0
                points = [x - 2 * w * c, y - 2 * w * s, x, y + sag, x + 2 * w * c, y + 2 * w * s]
                draw.line(points, fill=255, width=max(1, int(thin)))
    mask = shrink(np.asarray(image, dtype=np.float32) / 255, factor)
    round_ = relief(rng, soften(mask, 1.5), 0.5)[..., None]
    shadow = np.roll(soften(mask, 2), (3, 3), (0, 1))[..., None]
    back = back * (1 - np.float32(rng.uniform(0, 0.5)) * shadow)
    return np.asarray(back * (1 - mask[..., None]) + palette(rng, 1)[0] * round_ * mask[..., None])


def _branch(
    rng: Random, draw: ImageDraw.ImageDraw, start: tuple[float, float], reach: tuple[float, float, float], depth: int
) -> None:
    """Draw a branch from ``start`` by (angle, length, thickness), and thinner ones at its end."""
    angle, length, thick = reach
    x, y = start[0] + length * np.cos(angle), start[1] + length * np.sin(angle)
    draw.line([*start, x, y], fill=255, width=max(1, int(thick)))
    for _ in range(rng.integers(2, 4) if depth > 1 else 0):
        turn, shorter = angle + rng.normal(0, 0.55), length * rng.uniform(0.55, 0.9)
        _branch(rng, draw, (x, y), (turn, shorter, thick * 0.65), depth - 1)


def _cloth(rng: Random, height: int, width: int) -> Array:
    """Return folded cloth, sand, water or paper: a smooth surface in strong light, plain or with a printed pattern."""
    heights = power_noise(rng, height, width, rng.uniform(3.2, 4.5))
    if rng.random() < 0.6:
        x, _ = grid(rng, height, width, rng.uniform(3, 30))
        heights = heights + np.float32(rng.uniform(0.1, 0.6)) * np.sin(x + 2 * power_noise(rng, height, width, 3.6))
    if rng.random() < 0.5:
        print_ = paint(rng, warp(rng, height, width), int(rng.integers(2, 5)))
    else:
        print_ = (
            np.broadcast_to(palette(rng, 1)[0], (height, width, 3)) * (1 + 0.06 * fibres(rng, height, width))[..., None]
        )
    return np.asarray(print_ * relief(rng, heights, rng.uniform(0.4, 0.85))[..., None], dtype=np.float32)


_SURFACES = (_wall, _honeycomb, _blades, _wires, _cloth, _wall, _blades)
