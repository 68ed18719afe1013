"""Draw single things on a background that is out of focus: what most photographs show.

Things are unions of lit ellipsoids: animals seen from the side, faces and insects with a mirror's symmetry, flowers and
wheels, bottles and pillars, heaps. Functions take a random generator, and return float32 (height, width, 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from redpp_serve.pruning.surfaces import surfaces
from redpp_serve.pruning.textures import (
    Array,
    Random,
    fibres,
    light,
    paint,
    palette,
    power_noise,
    soften,
    texture,
    unit,
)


def things(rng: Random, height: int, width: int) -> Array:
    """Return one to three things of one or more sorts, in front of a background that is out of focus."""
    picture = place_things(rng, backdrop(rng, height, width))
    if rng.random() < 0.2:  # something near the camera, out of focus as well
        mask = soften((power_noise(rng, height, width, 3.5) > rng.uniform(1.2, 2.0)).astype(np.float32), 3)[..., None]
        picture = picture * (1 - mask) + palette(rng, 1)[0] * mask
    return np.asarray(picture * light(rng, height, width), dtype=np.float32)


def place_things(rng: Random, picture: Array) -> Array:
    """Return a picture (height, width, 3) with one to three things in front of it."""
    layout, colours = _LAYOUTS[rng.integers(len(_LAYOUTS))], palette(rng, 4)
    count = 1 if rng.random() < 0.65 else int(rng.integers(2, 4))
    for _ in range(count):
        if count > 1 and rng.random() < 0.3:
            layout, colours = _LAYOUTS[rng.integers(len(_LAYOUTS))], palette(rng, 4)
        size = rng.uniform(0.65, 1.7) if count == 1 else rng.uniform(0.4, 0.9)
        place = rng.normal(0, 0.18 if count == 1 else 0.5, 2)
        picture = _thing(rng, picture, layout(rng), colours, (size, *place))
    return picture


def backdrop(rng: Random, height: int, width: int) -> Array:
    """Return a background (height, width, 3): plain, a wall and a table, spots of light, or a blurred surface."""
    kind = rng.random()
    top, low = palette(rng, 2)
    grade = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    plain = np.broadcast_to(top * (1 - grade) + low * grade, (height, width, 3)).astype(np.float32)
    if kind < 0.2:
        return plain * (1 + 0.03 * power_noise(rng, height, width, 2.0))[..., None]
    if kind < 0.4:
        edge = int(height * rng.uniform(0.4, 0.9))
        wall = np.where(np.arange(height)[:, None, None] < edge, top, low) * np.float32(1)
        rough = texture(rng, height, width) * np.float32(rng.uniform(0, 0.2))
        return soften(np.asarray(wall * (1 + rough[..., None])), rng.uniform(0.5, 3))
    if kind < 0.75:
        fine = paint(rng, unit(power_noise(rng, height, width, rng.uniform(1.6, 3.0))), int(rng.integers(2, 6)))
        return soften(fine, np.exp(rng.uniform(-0.5, 1.8)))
    return soften(surfaces(rng, height, width), np.exp(rng.uniform(-1.5, 1.5)))


def _thing(rng: Random, picture: Array, parts: Array, colours: Array, where: tuple[float, float, float]) -> Array:
    """Return a picture with one thing made of ``parts`` drawn at (size, x, y), with its shadow, eyes and coat."""
    height, width = picture.shape[:2]
    v, u = np.mgrid[:height, :width].astype(np.float32)
    short = np.float32(min(height, width) / 2)
    size, right, down = where
    angle = rng.normal(0, 0.25)
    x, y = (u - width / 2) / short - np.float32(right), (v - height / 2) / short - np.float32(down)
    c, s = np.float32(np.cos(angle) / size), np.float32(np.sin(angle) / size)
    x, y = c * x + s * y, c * y - s * x
    bend = np.float32(rng.normal(0, 0.25))
    y = y + bend * x * x
    heights = np.full((height, width), -1.0, dtype=np.float32)
    group = np.zeros((height, width), dtype=np.int64)
    for cx, cy, rx, ry, turn, lift, kind in parts.tolist():
        reach = max(rx, ry)
        a, b = x - cx, y - cy
        near = np.flatnonzero((np.abs(a) < reach) & (np.abs(b) < reach))
        a, b = a.ravel()[near], b.ravel()[near]
        p, q = np.cos(turn) * a + np.sin(turn) * b, np.cos(turn) * b - np.sin(turn) * a
        inside = 1 - (p / rx) ** 2 - (q / ry) ** 2
        tall = np.where(inside > 0, lift + min(rx, ry) * np.sqrt(np.maximum(inside, 0)), -1)
        higher = tall > heights.ravel()[near]
        heights.ravel()[near[higher]] = tall[higher]
        group.ravel()[near[higher]] = int(kind)
    mask = (heights > -1).astype(np.float32)
    tops = np.maximum(heights, -0.05)
    slope_y, slope_x = np.gradient(soften(tops, max(0.5, float(short) * size * 0.012)) * np.float32(size * short))
    lamp = np.array([rng.uniform(-1, 1), rng.uniform(-1.2, 0), rng.uniform(0.4, 1)])
    lamp = (lamp / np.linalg.norm(lamp)).astype(np.float32)
    steep = np.sqrt(1 + slope_x**2 + slope_y**2)
    lit = np.clip((lamp[2] - lamp[0] * slope_x - lamp[1] * slope_y) / steep, 0, 1)
    shade = np.float32(rng.uniform(0.2, 0.5)) + np.float32(0.85) * lit
    coat = colours[np.minimum(group, 3)] * _coat(rng, x, y, colours)
    coat = np.where((group == 3)[..., None], colours[3] * 0.12, coat) * shade[..., None]
    if rng.random() < 0.5:
        coat = coat + np.float32(rng.uniform(0.2, 0.9)) * (lit[..., None] ** float(rng.integers(8, 40)))
    shift = (max(1, int(0.08 * short * size)), int(-lamp[0] * 0.12 * short * size))
    shadow = np.roll(soften(mask, max(0.5, float(short) * size * 0.05)), shift, (0, 1))
    picture = picture * (1 - np.float32(rng.uniform(0, 0.6)) * shadow)[..., None]
    edge = soften(mask, 0.6)[..., None]
    return np.asarray(picture * (1 - edge) + coat * edge, dtype=np.float32)


def _coat(rng: Random, x: Array, y: Array, colours: Array) -> Array:
    """Return factors (height, width, 3) for the colour of a thing: plain, fur, spots, stripes, patches or bands."""
    height, width = x.shape
    kind = rng.integers(6)
    if kind == 0:
        field = 0.05 * power_noise(rng, height, width, 2.0)
    elif kind == 1:
        field = 0.22 * fibres(rng, height, width)
    elif kind == 2:
        spots = power_noise(rng, height, width, 2.6) - soften(power_noise(rng, height, width, 3.2), 1)
        field = np.float32(rng.uniform(-0.7, 0.7)) * np.tanh(4 * spots)
    elif kind == 3:
        wave = rng.uniform(8, 30) * (x if rng.random() < 0.6 else y) + 1.5 * power_noise(rng, height, width, 3.2)
        field = np.float32(rng.uniform(0.1, 0.6)) * np.tanh(3 * np.sin(wave))
    elif kind == 4:
        field = np.float32(rng.uniform(0.2, 0.7)) * np.tanh(8 * power_noise(rng, height, width, 3.4))
    else:
        field = np.float32(rng.uniform(0.1, 0.4)) * texture(rng, height, width)
    return np.asarray(np.clip(1 + field, 0.1, 2)[..., None] * np.ones(3, dtype=np.float32))


def _parts(rows: Sequence[tuple[float, ...]]) -> Array:
    """Return parts (n, 7): centre x, y, radii x, y, turn, lift, and which of the thing's colours, 3 for near black."""
    return np.asarray(rows, dtype=np.float64)


def _animal(rng: Random) -> Array:
    """Return the parts of a beast or bird from the side, looking to the right."""
    long, tall = rng.uniform(0.3, 0.6), rng.uniform(0.16, 0.36)
    rows = [(0.0, 0.0, long, tall, rng.normal(0, 0.15), 0.1, 0.0)]
    head = (long * rng.uniform(0.7, 1.1), -tall * rng.uniform(0.3, 2.6))
    radius = rng.uniform(0.12, 0.24)
    turn = np.arctan2(head[1], head[0] - 0.4 * long)
    reach = np.hypot(head[0] - 0.4 * long, head[1])
    rows.append(((head[0] + 0.4 * long) / 2, head[1] / 2, reach / 2 + 0.08, 0.6 * radius, turn, 0.05, 0.0))
    rows.append((*head, radius * 1.1, radius * 0.9, rng.normal(0.2, 0.3), 0.15, 0.0))
    snout = rng.uniform(0.5, 1.5)
    rows.append((head[0] + radius * snout, head[1] + 0.25 * radius, radius * 0.7, radius * 0.4, 0.2, 0.12, 1.0))
    rows.append((head[0] + radius * (snout + 0.55), head[1] + 0.2 * radius, 0.035, 0.03, 0, 0.3, 3.0))
    rows.append((head[0] + radius * 0.35, head[1] - radius * 0.2, 0.035, 0.035, 0, 0.4, 3.0))
    ear = rng.uniform(0.4, 1.3) * radius
    for side in (-0.5, 0.15):
        rows.append((head[0] + side * radius, head[1] - radius, 0.35 * ear, ear, side + rng.normal(0, 0.2), 0.1, 1.0))
    legs = rng.uniform(0.2, 0.5)
    for place in (-0.75, -0.55, 0.5, 0.75):
        lean = rng.normal(0, 0.25)
        rows.append((place * long, tall * 0.6 + legs * 0.7, 0.055, legs, lean, 0.0, float(rng.integers(2))))
    tail = rng.uniform(0.15, 0.5)
    rows.append(
        (-long - 0.4 * tail, -rng.uniform(-0.2, 0.3), tail, rng.uniform(0.03, 0.12), rng.normal(0.3, 0.5), 0, 1.0)
    )
    parts = _parts(rows)
    if rng.random() < 0.5:
        parts[:, [0, 4]] *= -1
    return parts


def _mirrored(rng: Random) -> Array:
    """Return the parts of a face, mask, insect or machine, the same on both sides."""
    rows = [(0.0, 0.0, rng.uniform(0.25, 0.55), rng.uniform(0.3, 0.65), 0.0, 0.1, 0.0)]
    for _ in range(rng.integers(2, 7)):
        x, y = rng.uniform(0.1, 0.7), rng.uniform(-0.7, 0.7)
        radii = np.exp(rng.uniform(np.log(0.05), np.log(0.35), 2))
        turn, lift, colour = rng.uniform(0, np.pi), rng.uniform(-0.2, 0.2), float(rng.integers(3))
        rows += [(x, y, *radii, turn, lift, colour), (-x, y, *radii, -turn, lift, colour)]
    if rng.random() < 0.75:
        apart, up, eye = rng.uniform(0.1, 0.3), rng.uniform(-0.35, 0.05), rng.uniform(0.04, 0.11)
        for side in (-apart, apart):
            rows.append((side, up, 1.7 * eye, 1.3 * eye, 0, 0.5, 2.0))
            rows.append((side, up, eye, eye, 0, 0.62, 3.0))
        rows.append((0.0, up + rng.uniform(0.15, 0.4), eye, 0.8 * eye, 0, 0.75, 3.0 if rng.random() < 0.5 else 1.0))
        if rng.random() < 0.5:
            rows.append((0.0, up + rng.uniform(0.4, 0.55), rng.uniform(0.05, 0.2), 0.03, 0, 0.7, 3.0))
    return _parts(rows)


def _radial(rng: Random) -> Array:
    """Return the parts of a flower, a star, a shell or a wheel."""
    rows: list[tuple[float, ...]] = []
    rings = rng.integers(1, 4)
    for ring in range(rings):
        count = int(rng.integers(3, 22))
        reach = 0.8 * (1 - ring / (rings + 0.5))
        wide = rng.uniform(0.35, 1.1) * reach * np.pi / count
        phase, colour = rng.uniform(0, 6), float(rng.integers(2))
        for k in range(count):
            angle = phase + 2 * np.pi * k / count
            x, y = 0.5 * reach * np.cos(angle), 0.5 * reach * np.sin(angle)
            rows.append((x, y, 0.5 * reach, max(wide, 0.02), angle, 0.1 * ring + 0.002 * k, colour))
    core = rng.uniform(0.05, 0.3)
    rows.append((0.0, 0.0, core, core, 0, 0.3, float(rng.integers(2, 4))))
    if rng.random() < 0.4:
        rows.append((rng.normal(0, 0.05), 0.8, 0.03, 0.8, 0, -0.5, 2.0))
    return _parts(rows)


def _turned(rng: Random) -> Array:
    """Return the parts of a bottle, vase, lamp, mushroom or figure: round pieces on top of each other."""
    rows, y = [], 0.75
    for _ in range(rng.integers(2, 7)):
        wide, tall = np.exp(rng.uniform(np.log(0.08), np.log(0.45))), rng.uniform(0.06, 0.4)
        y -= tall * 0.8
        rows.append((0.0, y, wide, tall, rng.normal(0, 0.03), rng.uniform(-0.05, 0.1), float(rng.integers(3))))
        y -= tall * 0.5
    if rng.random() < 0.3:
        rows.append((rng.choice((-0.4, 0.4)), 0.2, 0.2, 0.3, 0, -0.3, 0.0))
    return _parts(rows)


def _heap(rng: Random) -> Array:
    """Return the parts of a heap, a bunch or a row of alike round things."""
    count, size = int(rng.integers(4, 26)), rng.uniform(0.1, 0.3)
    row = rng.random() < 0.3
    rows = []
    for k in range(count):
        x, y = (2.4 * (k / count) - 1.1, rng.normal(0, 0.05)) if row else rng.normal(0, 0.4, 2)
        r = size * np.exp(rng.normal(0, 0.12, 2))
        rows.append((x, y, *r, rng.uniform(0, 3), 0.4 * y + rng.normal(0, 0.1), float(rng.integers(2))))
    return _parts(rows)


_LAYOUTS = (_animal, _mirrored, _radial, _turned, _heap, _animal)
