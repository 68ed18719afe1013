"""Draw whole pictures without data: dead leaves, warps, fractals, scenes, and mixtures of them with writing.

Each function takes a random generator, a height and a width of at least 48 pixels, and returns float32 (height, width,
3), roughly in 0..1. Dead leaves are after Lee, Mumford and Huang (2001) and Baradad et al. (arXiv 2106.05963), which
also shows that shader-like pictures of many kinds teach networks more than any single kind.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from redpp_serve.pruning.glyphs import writing
from redpp_serve.pruning.objects import place_things, things
from redpp_serve.pruning.surfaces import surfaces
from redpp_serve.pruning.textures import (
    Array,
    Random,
    develop,
    grid,
    light,
    paint,
    palette,
    power_noise,
    relief,
    shrink,
    soften,
    texture,
    unit,
    warp,
)

_MOST_LEAVES = 900
_OUTLINE = 20  # corners of a smooth shape


def leaves(rng: Random, height: int, width: int) -> Array:
    """Return occluding shapes with sizes of a power law, each with a colour, a shading and a texture of its own."""
    factor = 2 if min(height, width) <= 256 else 1  # for smooth edges
    rows, columns = height * factor, width * factor
    ids, centres, radii = _leaf_map(rng, rows, columns)
    count = len(radii)
    textures = np.stack([texture(rng, height, width) for _ in range(4)]).reshape(4, -1)
    which = rng.integers(4, size=count)
    strength = (rng.gamma(1.0, 0.13, count) * (rng.random(count) < 0.7)).astype(np.float32)
    tilt = (rng.normal(0, 0.22, (count, 2)) * (rng.random((count, 1)) < 0.7)).astype(np.float32)
    picture = shrink(palette(rng, count)[ids], factor)
    flat = ids[::factor, ::factor].reshape(-1)  # shading is smooth: one place for each pixel will do
    y, x = np.divmod(np.arange(flat.size, dtype=np.int32), np.int32(width))
    tilt /= radii[:, None]
    right, down = tilt[:, 0][flat], tilt[:, 1][flat]
    offset = (tilt * centres).sum(axis=1)[flat]
    shade = 1 + factor * (right * x + down * y).astype(np.float32) - offset
    shade += strength[flat] * textures[which[flat], np.arange(flat.size)]
    return np.asarray(picture * np.clip(shade, 0.15, 2.0).reshape(height, width, 1) * light(rng, height, width))


def _leaf_map(rng: Random, rows: int, columns: int) -> tuple[NDArray[Any], Array, Array]:
    """Return the number of the shape at each pixel (rows, columns), the shapes' centres (n, 2) and radii (n,)."""
    size = min(rows, columns)
    slope, low, high = rng.uniform(0.9, 2.6), np.exp(rng.uniform(np.log(0.008), np.log(0.15))), rng.uniform(0.25, 0.7)
    share = rng.random(_MOST_LEAVES)
    radii = size * (low**-slope - share * (low**-slope - high**-slope)) ** (-1 / slope)
    covered = np.cumsum(np.pi * radii[::-1] ** 2)[::-1] / (rows * columns)
    radii = radii[covered < 9].astype(np.float32)  # what lies deeper is never seen
    count = len(radii)
    centres = (rng.uniform(-0.1, 1.1, (count, 2)) * (columns, rows)).astype(np.float32)
    ids = Image.new("I", (columns, rows), 0)
    draw = ImageDraw.Draw(ids)
    corners = rng.integers(3, 9, count)
    round_share, smooth_share = rng.uniform(0, 0.7), rng.uniform(0.2, 0.8)
    kinds, angles = rng.random(count), rng.uniform(0, 2 * np.pi, count)
    stretch = np.exp(rng.normal(0, 0.35, count))
    smooth = kinds < round_share + (1 - round_share) * smooth_share  # blobs with lobes and stars, else polygons
    points = np.where(smooth, _OUTLINE, corners)
    turn = 2 * np.pi * np.arange(_OUTLINE) / points[:, None]
    lobes = 0.35 * np.sin(corners[:, None] * turn + angles[:, None]) * (kinds * 7 % 1)[:, None]
    reach = radii[:, None] * np.where(smooth[:, None], 1 + lobes, 1.15)
    u, v = reach * np.cos(turn) * stretch[:, None], reach * np.sin(turn) / stretch[:, None]
    c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
    outlines = np.stack([centres[:, :1] + c * u - s * v, centres[:, 1:] + s * u + c * v], axis=2).reshape(count, -1)
    half = radii[:, None] * np.stack([stretch, 1 / stretch], axis=1)
    boxes = np.concatenate([centres - half, centres + half], axis=1).tolist()
    for k, outline in enumerate(outlines.tolist()):
        if kinds[k] < round_share:
            draw.ellipse(boxes[k], fill=k)
        else:
            draw.polygon(outline[: 2 * points[k]], fill=k)
    return np.asarray(ids, dtype=np.int32), centres, radii


def warps(rng: Random, height: int, width: int) -> Array:
    """Return one or two bent wave fields in random colours, lit as a relief, as a shader would draw them."""
    field = warp(rng, height, width)
    picture = paint(rng, field, int(rng.integers(2, 7)))
    if rng.random() < 0.6:
        cut = warp(rng, height, width)
        edge = np.float32(min(height, width) * 0.05)
        mask = 1 / (1 + np.exp(np.clip(-(cut - np.median(cut)) * edge * 12, -30, 30)))
        picture = picture * (1 - mask[..., None]) + paint(rng, warp(rng, height, width), 4) * mask[..., None]
    if rng.random() < 0.6:
        picture = picture * relief(rng, field, rng.uniform(0.1, 0.5))[..., None]
    grain = power_noise(rng, height, width, rng.uniform(0.8, 2.2)) * np.float32(rng.gamma(1.0, 0.07))
    return np.asarray(picture * (1 + grain[..., None]) * light(rng, height, width), dtype=np.float32)


def fractals(rng: Random, height: int, width: int) -> Array:
    """Return clouds, lit ridges, an attractor of random maps, or the escape times of a Julia set."""
    kind = rng.random()
    if kind < 0.3:
        picture = paint(rng, unit(power_noise(rng, height, width, rng.uniform(1.4, 3.2))), int(rng.integers(3, 7)))
        picture = picture * (1 + 0.15 * power_noise(rng, height, width, rng.uniform(1, 2)))[..., None]
    elif kind < 0.6:
        heights = power_noise(rng, height, width, rng.uniform(2.0, 3.2))
        if rng.random() < 0.6:
            heights = -np.abs(heights) + 0.3 * power_noise(rng, height, width, 2.0)
        picture = paint(rng, unit(heights), int(rng.integers(2, 6)))
        picture = picture * relief(rng, heights, rng.uniform(0.3, 0.8))[..., None]
    elif kind < 0.85:
        picture = _flame(rng, height, width)
    else:
        picture = _julia(rng, height, width)
    return np.asarray(picture * light(rng, height, width), dtype=np.float32)


def _flame(rng: Random, height: int, width: int) -> Array:
    """Return the density of points under random affine maps with a bend, over a soft background."""
    count = rng.integers(2, 5)
    maps = rng.uniform(-1, 1, (count, 2, 3)) * (0.75, 0.75, 0.9)
    bends = rng.integers(0, 3, count)
    points = rng.uniform(-1, 1, (4000, 2))
    colour = rng.random(4000)
    shades = rng.random(count)
    density = np.zeros((height, width))
    total = np.zeros((height, width))
    for k in range(36):
        chosen = rng.integers(count, size=len(points))
        points = np.einsum("nij,nj->ni", maps[chosen][:, :, :2], points) + maps[chosen][:, :, 2]
        bend = bends[chosen][:, None]
        points = np.where(bend == 0, points, np.where(bend == 1, np.sin(1.6 * points), points / (0.3 + points**2)))
        points = np.clip(points, -3, 3)
        colour = (colour + shades[chosen]) / 2
        if k < 4:
            continue
        if k == 4:
            centre, reach = np.median(points, axis=0), np.quantile(np.abs(points - np.median(points, axis=0)), 0.97)
        x, y = (((points - centre) / max(reach, 1e-3) * 0.55 + 0.5) * (width, height)).astype(np.int64).T
        seen = (x >= 0) & (y >= 0) & (x < width) & (y < height)
        place = y[seen] * width + x[seen]
        density += np.bincount(place, minlength=height * width).reshape(height, width)
        total += np.bincount(place, colour[seen], minlength=height * width).reshape(height, width)
    shade = soften((total / np.maximum(density, 1)).astype(np.float32), 0.6)
    amount = np.log1p(density).astype(np.float32)
    amount = soften(amount / max(float(amount.max()), 1e-6), 0.6) ** np.float32(rng.uniform(0.4, 0.8))
    back = paint(rng, unit(power_noise(rng, height, width, 3.0)), 2) * np.float32(rng.uniform(0.1, 1.0))
    return back * (1 - amount[..., None]) + paint(rng, shade, 5) * amount[..., None]


def _julia(rng: Random, height: int, width: int) -> Array:
    """Return smooth escape times of z -> z^2 + c near the boundary of the Mandelbrot set, painted."""
    angle = rng.uniform(0, 2 * np.pi)
    c = np.complex64((0.5 * np.exp(1j * angle) - 0.25 * np.exp(2j * angle)) * rng.uniform(0.98, 1.06))
    x, y = grid(rng, height, width, rng.uniform(0.8, 2.6))
    z = (x - x.mean() + rng.uniform(-0.3, 0.3) + 1j * (y - y.mean() + rng.uniform(-0.3, 0.3))).astype(np.complex64)
    times = np.zeros((height, width), dtype=np.float32)
    for _ in range(28):
        z = z * z + c
        size = np.abs(z)
        times += np.exp(-np.minimum(size, 20))
        z = np.where(size > 1e3, np.complex64(1e3), z)
    return paint(rng, unit(np.sqrt(times)), int(rng.integers(3, 8)))


def scenes(rng: Random, height: int, width: int) -> Array:
    """Return a horizon with ground and sky or a wall, and lit solids with shadows on it."""
    rows = np.arange(height, dtype=np.float32)[:, None]
    horizon = height * rng.uniform(0.15, 0.75)
    depth = np.clip((rows - horizon) / max(height - horizon, 1), 0.02, 1)
    ground = _ground(rng, height, width, depth)
    sky = _sky(rng, height, width)
    below = (rows >= horizon).astype(np.float32)[..., None]
    picture = ground * below + sky * (1 - below)
    if rng.random() < 0.5:
        picture = _hills(rng, picture, horizon)
    haze = np.exp(-depth * rng.uniform(2, 20))[..., None] * below * np.float32(rng.uniform(0, 0.8))
    picture = picture * (1 - haze) + palette(rng, 1)[0] * haze
    lamp = np.array([rng.uniform(-1, 1), rng.uniform(-1.2, -0.2), rng.uniform(0.3, 1)])
    lamp = (lamp / np.linalg.norm(lamp)).astype(np.float32)
    count = rng.integers(2, 14)
    nearness = np.sort(rng.uniform(0.05, 1, count) ** 1.5)
    for near in nearness:
        base = horizon + near * (height - horizon) * 1.05
        size = min(height, width) * (0.06 + 0.4 * near) * np.exp(rng.normal(0, 0.35))
        _solid(rng, picture, (rng.uniform(-0.05, 1.05) * width, base, size), lamp)
    if rng.random() < 0.5:
        picture = place_things(rng, picture)
    return np.asarray(picture * light(rng, height, width), dtype=np.float32)


def _ground(rng: Random, height: int, width: int, depth: Array) -> Array:
    """Return a textured plane (height, width, 3) in perspective, or a plain wall."""
    if rng.random() < 0.3:
        return paint(rng, unit(texture(rng, height, width)), 3)
    cover = texture(rng, 256, 256)
    columns = np.arange(width, dtype=np.float32)[None, :] - width * np.float32(rng.uniform(0.2, 0.8))
    scale = rng.uniform(20, 90)
    u = (columns / width / depth * scale).astype(np.int32) % 256
    v = np.broadcast_to((scale / depth).astype(np.int32) % 256, u.shape)
    near = np.clip(depth * 3, 0, 1)  # far away the texture is finer than a pixel, and only its mean is seen
    return np.asarray(
        palette(rng, 1)[0] * (1 + np.float32(rng.uniform(0.05, 0.35)) * cover[v, u] * near)[..., None], dtype=np.float32
    )


def _sky(rng: Random, height: int, width: int) -> Array:
    """Return a vertical gradient (height, width, 3) with or without clouds."""
    top, low = palette(rng, 2)
    grade = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    sky = np.broadcast_to(top * (1 - grade) + low * grade, (height, width, 3))
    if rng.random() < 0.6:
        cloud = 1 / (1 + np.exp(-3 * (power_noise(rng, height, width, rng.uniform(2.4, 3.4)) - rng.normal(0.3, 0.6))))
        sky = sky * (1 - cloud[..., None]) + palette(rng, 1)[0] * cloud[..., None]
    return np.asarray(sky, dtype=np.float32)


def _hills(rng: Random, picture: Array, horizon: float) -> Array:
    """Return a picture with one to four rows of hills, houses or trees before the horizon."""
    height, width = picture.shape[:2]
    rows = np.arange(height, dtype=np.float32)[:, None]
    for _ in range(rng.integers(1, 5)):
        line = power_noise(rng, 4, width, rng.uniform(1.6, 3.2))[0]
        if rng.random() < 0.4:  # roofs
            line = np.repeat(line[:: max(2, width // 24)], max(2, width // 24))[:width]
        line = horizon - height * np.float32(rng.uniform(0.02, 0.12)) * (1.2 + line)
        mask = ((rows > line) & (rows < horizon + height * rng.uniform(0, 0.06)))[..., None]
        fill = palette(rng, 1)[0] * (1 + np.float32(0.2) * texture(rng, height, width))[..., None]
        picture = np.where(mask, fill, picture)
    return np.asarray(picture, dtype=np.float32)


def _solid(rng: Random, picture: Array, where: tuple[float, float, float], lamp: NDArray[Any]) -> None:
    """Draw a lit ball, box, cylinder or crown with its shadow into a picture; ``where`` is (x, foot, size)."""
    height, width = picture.shape[:2]
    x, foot, size = where
    tall, wide = size * np.exp(rng.normal(0, 0.3)), size * np.exp(rng.normal(0, 0.3))
    left, right = max(0, int(x - 1.6 * wide)), min(width, int(x + 1.6 * wide) + 1)
    top, bottom = max(0, int(foot - 1.2 * tall)), min(height, int(foot + 0.5 * tall) + 1)
    if right - left < 3 or bottom - top < 3:
        return
    part = picture[top:bottom, left:right]
    v, u = np.mgrid[top:bottom, left:right].astype(np.float32)
    spread = np.float32(wide * 0.6)
    shadow = ((u - x + lamp[0] * wide * 0.6) / spread) ** 2 + ((v - foot) / (spread * 0.3)) ** 2
    part *= (1 - np.float32(rng.uniform(0.2, 0.7)) * np.exp(-(np.minimum(shadow, 30) ** 2)))[..., None]
    a, b = (u - x) / (wide / 2), (v - foot + tall / 2) / (tall / 2)
    kind = rng.integers(5)
    if kind == 0:  # a ball
        mask = a**2 + b**2 < 1
        normal = (a, b, np.sqrt(np.clip(1 - a**2 - b**2, 0, 1)))
    elif kind == 1:  # a cylinder
        mask = (np.abs(a) < 1) & (np.abs(b) < 1)
        normal = (a, 0 * b, np.sqrt(np.clip(1 - a**2, 0, 1)))
    elif kind == 2:  # a box with two faces
        edge = rng.uniform(-0.7, 0.7)
        mask = (np.abs(a) < 1) & (np.abs(b) < 1 - 0.15 * np.abs(a - edge))
        normal = (np.where(a < edge, -0.8, 0.6), 0 * b, np.where(a < edge, 0.6, 0.8))
    elif kind == 3:  # a cone or roof
        mask = (np.abs(b) < 1) & (np.abs(a) < (b + 1) / 2)
        normal = (np.clip(2 * a / (b + 1.01), -1, 1), 0 * b - 0.4, np.full_like(b, 0.6))
    else:  # a rough crown
        rough = power_noise(rng, part.shape[0], part.shape[1], 2.4)
        mask = a**2 + b**2 + 0.3 * rough < 0.9
        normal = (a + 0.5 * rough, b, np.full_like(b, 0.5))
    shade = 0.35 + 0.75 * np.clip(sum(n * p for n, p in zip(normal, lamp, strict=True)), 0, 1)
    if rng.random() < 0.6:
        shade = shade * (1 + np.float32(rng.uniform(0.03, 0.3)) * texture(rng, *part.shape[:2]))
    colour = palette(rng, 1)[0] * shade[..., None]
    if rng.random() < 0.3:
        colour = colour + 0.6 * (np.clip(shade - 0.95, 0, 1) * 6)[..., None] ** 2  # a highlight
    part[...] = np.where(mask[..., None], colour, part)


_PLAIN = (leaves, warps, fractals, scenes, writing, things, surfaces)
_BEHIND = (0.1, 0.1, 0.1, 0.3, 0.05, 0.2, 0.15)  # how often each is drawn
_BEFORE = (0.1, 0.15, 0.1, 0.2, 0.15, 0.15, 0.15)


def mixed(rng: Random, height: int, width: int) -> Array:
    """Return cut-outs of some families over another, with soft shadows, then seen through a camera."""
    picture = _crop(rng, _PLAIN[rng.choice(len(_PLAIN), p=_BEHIND)](rng, height, width))
    for _ in range(rng.integers(0, 3)):
        other = _crop(rng, _PLAIN[rng.choice(len(_PLAIN), p=_BEFORE)](rng, height, width))
        mask = _cutout(rng, height, width)
        if rng.random() < 0.6:
            shift = max(1, round(min(height, width) * rng.uniform(0.005, 0.03)))
            shadow = np.roll(soften(mask, shift), (shift, shift), (0, 1))
            picture = picture * (1 - np.float32(rng.uniform(0.2, 0.7)) * shadow)[..., None]
        picture = picture * (1 - mask[..., None]) + other * mask[..., None]
    if rng.random() < 0.75:
        picture = place_things(rng, soften(picture, rng.uniform(0, 2.5)) if rng.random() < 0.5 else picture)
    picture = develop(rng, picture)
    return _recoded(rng, picture) if rng.random() < 0.5 else picture


def _crop(rng: Random, picture: Array) -> Array:
    """Return a part of a picture at its former size, mirrored at random."""
    height, width = picture.shape[:2]
    share = rng.uniform(0.6, 1.0) if rng.random() < 0.5 else 1.0
    top, left = rng.uniform(0, 1 - share) * height, rng.uniform(0, 1 - share) * width
    if share < 1:
        box = (left, top, left + share * width, top + share * height)
        bands = [Image.fromarray(np.ascontiguousarray(picture[..., c])) for c in range(3)]
        parts = [band.resize((width, height), Image.Resampling.BILINEAR, box=box) for band in bands]
        picture = np.stack([np.asarray(part) for part in parts], axis=2)
    return picture[:, ::-1] if rng.random() < 0.5 else picture


def _cutout(rng: Random, height: int, width: int) -> Array:
    """Return a mask (height, width) in 0..1 of one object: a blob, a polygon, a halved picture, or a band."""
    kind = rng.random()
    x, y = grid(rng, height, width, 2.0)
    x, y = x - x.mean() + np.float32(rng.normal(0, 0.4)), y - y.mean() + np.float32(rng.normal(0, 0.4))
    rough = power_noise(rng, height, width, rng.uniform(2.4, 3.6)) * np.float32(rng.uniform(0, 0.25))
    size, stretch = rng.uniform(0.2, 0.8), np.exp(rng.normal(0, 0.3))
    distance: NDArray[Any]
    if kind < 0.5:
        distance = np.hypot(x * stretch, y / stretch) - size + rough
    elif kind < 0.75:
        distance = np.maximum(np.abs(x) * stretch, np.abs(y) / stretch) - size + rough * 0.3
    elif kind < 0.9:
        distance = x + rough
    else:
        distance = np.abs(np.mod(x, 0.5) - 0.25) - 0.12 + 0.2 * rough
    edge = min(height, width) / 2 / max(0.5, rng.normal(1.0, 0.8))
    return np.asarray(1 / (1 + np.exp(np.clip(distance * edge * 2, -30, 30))), dtype=np.float32)


def _recoded(rng: Random, picture: Array) -> Array:
    """Return a picture after JPEG compression of random quality."""
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(35, 95)))
    with Image.open(buffer) as decoded:
        return np.asarray(decoded.convert("RGB"), dtype=np.float32) / 255
