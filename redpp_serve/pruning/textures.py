"""Draw the raw material of synthetic pictures: noise of a given spectrum, palettes, warps, relief, blur.

Arrays are float32 of shape (height, width), or (height, width, 3) with colours in 0..1, where nothing else is said.
Photographs have a power spectrum that falls with about the square of the frequency, colour channels with correlations
above 0.9, and sharp edges (Ruderman 1994; Lee, Mumford and Huang 2001); the defaults here aim at these.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]  # float32 where a function does not say otherwise
Random: TypeAlias = np.random.Generator

# Directions of colour in photographs, nearly those of a principal component analysis: light, blue to yellow, green to
# magenta; and how much colours vary along the last two.
_AXES = np.array([[1, 1, 1], [1, 0.1, -1.1], [0.6, -1.0, 0.4]], dtype=np.float32)
_CHROMA = (0.058, 0.03)
_CONTRAST = 0.29  # the standard deviation within a picture before clipping


def power_noise(rng: Random, height: int, width: int, exponent: float = 2.0) -> Array:
    """Return noise (height, width) of mean 0 and variance 1 whose power falls with frequency to the ``exponent``."""
    rows, columns = _round(height), _round(width)  # a crop of a larger field does not wrap around at its borders
    amplitude = np.exp(np.float32(-exponent / 2) * _log_frequency(rows, columns))
    amplitude[0, 0] = 0
    spectrum = np.empty(amplitude.shape, dtype=np.complex64)
    spectrum.real = amplitude * rng.standard_normal(amplitude.shape, np.float32)
    spectrum.imag = amplitude * rng.standard_normal(amplitude.shape, np.float32)
    return standard(np.fft.irfft2(spectrum, s=(rows, columns))[:height, :width])


@lru_cache(maxsize=64)
def _log_frequency(rows: int, columns: int) -> Array:
    """Return the logarithms of the frequencies of a real two-dimensional Fourier transform; read-only."""
    frequency = np.hypot(np.fft.fftfreq(rows)[:, None] * (rows / columns), np.fft.rfftfreq(columns)[None, :])
    frequency[0, 0] = 1
    logarithm = np.log(frequency).astype(np.float32)
    logarithm.flags.writeable = False
    return np.asarray(logarithm)


def _round(size: int) -> int:
    """Return a size about an eighth larger that the Fourier transform is fast at."""
    return -(-(size + size // 8 + 2) // 16) * 16


def standard(field: NDArray[Any]) -> Array:
    """Return a field shifted and scaled to mean 0 and variance 1; a constant one becomes 0."""
    centred = np.asarray(field - field.mean(), dtype=np.float32)
    return centred / max(float(centred.std()), 1e-6)


def unit(field: NDArray[Any]) -> Array:
    """Return a field scaled to 0..1."""
    low, high = float(field.min()), float(field.max())
    return ((field - low) / max(high - low, 1e-6)).astype(np.float32)


def grid(rng: Random, height: int, width: int, span: float) -> tuple[Array, Array]:
    """Return turned coordinates x, y (height, width) in which the shorter side is ``span`` long."""
    y, x = np.mgrid[:height, :width].astype(np.float32) * np.float32(span / min(height, width))
    angle = rng.uniform(0, 2 * np.pi)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x - sine * y, sine * x + cosine * y


def palette(rng: Random, count: int) -> Array:
    """Return colours (count, 3) of one picture: light varies most, and hues keep to one or two directions."""
    vivid = np.exp(rng.normal(-0.1, 0.6))
    middle, contrast = rng.uniform(0.3, 0.62), rng.uniform(0.14, 0.32)
    light = middle + contrast * rng.standard_normal(count)
    own = rng.standard_t(4, (count, 2)) * _CHROMA * vivid
    common = rng.standard_normal(2) * _CHROMA * vivid
    axes = np.concatenate([light[:, None], own + common], axis=1).astype(np.float32)
    return np.asarray(np.clip(axes @ _AXES, 0.01, 0.99), dtype=np.float32)


def paint(rng: Random, field: Array, stops: int) -> Array:
    """Return a field of values in 0..1 painted through a palette of ``stops`` colours, as (height, width, 3)."""
    colours = palette(rng, stops)
    if rng.random() < 0.6:  # ordered by light: relief rather than contour lines
        colours = colours[np.argsort(colours.sum(axis=1))]
    places = np.linspace(0, 1, 256)
    table = np.stack([np.interp(places, np.linspace(0, 1, stops), colours[:, c]) for c in range(3)], axis=1)
    return table.astype(np.float32)[(np.clip(field, 0, 1) * 255).astype(np.int32)]


def relief(rng: Random, heights: Array, strength: float) -> Array:
    """Return the light (height, width), around 1, on a surface of these heights under a lamp from one side."""
    down, right = np.gradient(heights)
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * right + np.sin(angle) * down
    slope = slope / max(float(np.abs(slope).mean()), 1e-6)
    return np.asarray((1 + strength * np.tanh(0.6 * slope)), dtype=np.float32)


def warp(rng: Random, height: int, width: int) -> Array:
    """Return a field (height, width) in 0..1: waves, rings, checks or steps in bent coordinates."""
    x, y = grid(rng, height, width, rng.uniform(2, 9))
    for _ in range(rng.integers(1, 5)):
        frequency = rng.uniform(0.4, 2.2, 2)
        amount = rng.uniform(0.1, 0.9, 2) / frequency
        phase = rng.uniform(0, 2 * np.pi, 2)
        x = x + np.float32(amount[0]) * np.sin(np.float32(frequency[0]) * y + np.float32(phase[0]))
        y = y + np.float32(amount[1]) * np.sin(np.float32(frequency[1]) * x + np.float32(phase[1]))
    if rng.random() < 0.5:
        bend = power_noise(rng, height, width, rng.uniform(2.5, 4)) * np.float32(rng.uniform(0.1, 0.8))
        x, y = x + bend, y - bend
    kind = rng.integers(6)
    if kind == 0:
        field = np.sin(x) + np.sin(np.float32(rng.uniform(0.5, 2)) * y)
    elif kind == 1:
        field = np.abs(np.sin(x)) + np.abs(np.cos(y))
    elif kind == 2:
        field = np.sin(np.hypot(x - x.mean(), y - y.mean()) * np.float32(rng.uniform(1, 3)))
    elif kind == 3:
        field = np.tanh(6 * np.sin(x) * np.sin(y))
    elif kind == 4:
        field = np.mod(x, np.float32(rng.uniform(0.8, 3)))
    else:
        field = np.sin(x * y * np.float32(rng.uniform(0.1, 0.5)))
    field = unit(field)
    if rng.random() < 0.35:
        steps = rng.integers(2, 8)
        field = np.floor(field * steps * 0.999) / max(steps - 1, 1)
    return np.asarray(field, dtype=np.float32)


def soften(picture: Array, deviation: float) -> Array:
    """Return a picture (height, width, ...) blurred by about a Gaussian with this standard deviation in pixels."""
    if deviation < 0.2:
        return picture
    if deviation > 1.6:  # three running means cost the same at every width
        radius = max(1, round((np.sqrt(4 * deviation**2 + 1) - 1) / 2))
        weights, passes = np.full(2 * radius + 1, 1 / (2 * radius + 1), dtype=np.float32), 3
    else:
        radius, passes = max(1, int(2.5 * deviation + 0.5)), 1
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2).astype(np.float32)
        weights = weights / weights.sum()
    for axis in (0, 1):
        for _ in range(passes):
            picture = _filtered(picture, weights, axis)
    return picture


def _filtered(picture: Array, weights: Array, axis: int) -> Array:
    """Return a picture filtered along an axis with an odd number of weights; its border is repeated outwards."""
    radius, length = len(weights) // 2, picture.shape[axis]
    places = np.clip(np.arange(-radius, length + radius), 0, length - 1)
    padded = np.moveaxis(picture.take(places, axis=axis), axis, 0)
    if radius > 1 and weights[0] == weights[radius]:
        sums = np.cumsum(padded, axis=0, dtype=np.float32)
        total = sums[2 * radius :].copy()
        total[1:] -= sums[: length - 1]
        total *= weights[0]
    else:
        total = weights[0] * padded[:length]
        for k in range(1, len(weights)):
            total += weights[k] * padded[k : k + length]
    return np.moveaxis(total, 0, axis)


def shrink(picture: Array, factor: int) -> Array:
    """Return a picture (height, width, ...) reduced by a whole factor: means of its blocks."""
    if factor == 1:
        return picture
    height, width = picture.shape[0] // factor, picture.shape[1] // factor
    blocks = picture[: height * factor, : width * factor].reshape(height, factor, width, factor, *picture.shape[2:])
    return np.asarray(blocks.mean(axis=(1, 3)), dtype=np.float32)


def light(rng: Random, height: int, width: int) -> Array:
    """Return the light (height, width, 1) on a whole scene: a smooth fall-off to one side or into a corner."""
    x, y = grid(rng, height, width, 2.0)
    x, y = x - x.mean() + np.float32(rng.uniform(-0.7, 0.7)), y - y.mean()
    fall = np.tanh(x) if rng.random() < 0.6 else np.exp(-0.5 * (x**2 + y**2))
    return np.asarray((1 + np.float32(rng.uniform(0, 0.45)) * (fall - fall.mean()))[..., None], dtype=np.float32)


def develop(rng: Random, picture: Array) -> Array:
    """Return a picture as a camera would give it: white balance, exposure, contrast, blur and grain, in 0..1."""
    balance = np.exp(rng.normal(0, 0.03, 3)).astype(np.float32)
    picture = np.clip(picture, 0, None) * balance
    middle, contrast = picture.mean(), max(float(picture.std()), 1e-3)
    wanted = _CONTRAST * np.exp(rng.normal(0, 0.28))
    gain = np.clip((wanted / contrast) ** 0.8, 0.4, 3.5)  # most of the way: a plain picture stays plainer
    grey = picture.mean(axis=2, keepdims=True)
    colour = (picture - grey) * np.float32(min(gain, 1.1))  # stretched with the light, colours would glow
    picture = np.clip(np.float32(rng.normal(0.46, 0.13)) + np.float32(gain) * (grey - middle) + colour, 0, 1)
    picture = soften(picture, max(0.0, rng.normal(0.4, 0.3)))
    grain = np.float32(abs(rng.normal(0, 0.012)))
    picture = picture + grain * rng.standard_normal((*picture.shape[:2], 1), np.float32)
    return np.asarray(np.clip(picture, 0, 1), dtype=np.float32)


def texture(rng: Random, height: int, width: int) -> Array:
    """Return a texture (height, width) of variance 1: noise, veins, stripes, or a warp with noise."""
    kind = rng.random()
    if kind < 0.45:
        return power_noise(rng, height, width, rng.uniform(0.6, 2.6))
    if kind < 0.65:
        return standard(-np.abs(power_noise(rng, height, width, rng.uniform(1.5, 3))))
    if kind < 0.85:
        x, _ = grid(rng, height, width, rng.uniform(20, 160))
        wave = np.sin(x + power_noise(rng, height, width, 2.5) * np.float32(rng.uniform(0, 2)))
        return standard(np.tanh(np.float32(rng.uniform(0.5, 4)) * wave))
    return standard(standard(warp(rng, height, width)) + 0.4 * power_noise(rng, height, width, 1.5))


def fibres(rng: Random, height: int, width: int) -> Array:
    """Return fur, hair or brushed grain (height, width) of variance 1: noise drawn out in slowly turning directions."""
    noise = rng.standard_normal((height, width), np.float32)
    angle = rng.uniform(0, 2 * np.pi) + np.float32(rng.uniform(0.2, 1.0)) * power_noise(rng, height, width, 3.6)
    step = np.float32(rng.uniform(0.8, 1.6))
    right, down = step * np.cos(angle), step * np.sin(angle)
    v, u = np.mgrid[:height, :width].astype(np.float32)
    total = noise.copy()
    for k in range(1, 7):
        total += noise[(v + k * down).astype(np.int32) % height, (u + k * right).astype(np.int32) % width]
    return standard(total)
