"""Draw inputs without data that are no pictures: sounds, rows of tables, and sequences of tokens.

Each function takes a random generator and the length of one input and returns float32 (length,), sounds in about -1..1;
tokens and masks are int64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from redpp_serve.pruning.textures import Array, Random

Integers = NDArray[np.int64]

_RATE = 16000.0  # samples a second that are assumed; most networks on sound take 8,000 to 22,050


def tones(rng: Random, length: int) -> Array:
    """Return notes with overtones, vibrato and an attack that decays, one to four at a time."""
    time = np.arange(length) / _RATE
    total = np.zeros(length)
    for _ in range(rng.integers(1, 5)):
        pitch = np.exp(rng.uniform(np.log(60), np.log(1500)))
        vibrato = rng.uniform(0, 0.02) * np.sin(2 * np.pi * rng.uniform(3, 8) * time + rng.uniform(0, 6))
        phase = 2 * np.pi * np.cumsum(pitch * (1 + vibrato)) / _RATE + rng.uniform(0, 6)
        fall, start = rng.uniform(0.6, 2.5), rng.uniform(-0.5, 0.6) * length / _RATE
        envelope = np.where(time > start, np.exp(-(time - start) * rng.uniform(0, 4)), 0)
        envelope = envelope * np.clip((time - start) * rng.uniform(20, 400), 0, 1)
        for k in range(1, max(2, min(16, int(0.45 * _RATE / pitch)))):
            total += envelope * rng.uniform(0.3, 1) * k**-fall * np.sin(k * phase)
    return _levelled(rng, total)


def chirps(rng: Random, length: int) -> Array:
    """Return tones that glide up or down, clicks and a floor of noise."""
    place = np.linspace(0, 1, length)
    total = 0.02 * rng.standard_normal(length)
    for _ in range(rng.integers(1, 4)):
        first, last = np.exp(rng.uniform(np.log(80), np.log(6000), 2))
        pitch = first * (last / first) ** np.clip(place * rng.uniform(0.7, 3) % 1.0, 0, 1)
        window = np.exp(-0.5 * ((place - rng.random()) / rng.uniform(0.05, 0.6)) ** 2)
        total += window * np.sin(2 * np.pi * np.cumsum(pitch) / _RATE)
    for at in rng.integers(0, length, rng.integers(0, 6)):
        tail = np.arange(min(length - at, 200))
        total[at : at + len(tail)] += (
            rng.uniform(0.5, 2) * np.exp(-tail / rng.uniform(5, 60)) * np.cos(tail * rng.random())
        )
    return _levelled(rng, total)


def noises(rng: Random, length: int) -> Array:
    """Return noise of a random spectrum with bands, whose loudness comes and goes."""
    total = _shaped(rng, length, rng.uniform(-0.5, 2.5), rng.uniform(0, 3) * (rng.random(3) < 0.7))
    swell = np.exp(rng.uniform(0, 1.5) * _shaped(rng, length, 3.0, np.zeros(3)))
    return _levelled(rng, total * swell)


def speech(rng: Random, length: int) -> Array:
    """Return voiced and hissing bursts with formants and a gliding pitch, parted by pauses."""
    total = np.zeros(length)
    voice = np.exp(rng.normal(np.log(150), 0.35))
    at = int(rng.uniform(-0.1, 0.1) * _RATE)
    while at < length:
        span = int(rng.uniform(0.05, 0.3) * _RATE)
        low, high = max(at, 0), min(at + span, length)
        at += span + int((rng.uniform(0.02, 0.5) if rng.random() < 0.3 else rng.uniform(0, 0.04)) * _RATE)
        if high - low < 32:
            continue
        size = high - low
        if rng.random() < 0.75:
            pitch = voice * np.exp(rng.normal(0, 0.12) + rng.normal(0, 0.2) * np.linspace(0, 1, size))
            phase = np.cumsum(pitch) / _RATE
            source = 1 - 2 * (phase % 1.0) + 0.05 * rng.standard_normal(size)
            formants = (rng.uniform(250, 850), rng.uniform(850, 2400), rng.uniform(2300, 3300))
        else:
            source, formants = (
                0.5 * rng.standard_normal(size),
                (rng.uniform(2500, 5500), rng.uniform(5000, 7500), 7000.0),
            )
        frequency = np.fft.rfftfreq(size, 1 / _RATE)
        gain = sum(np.exp(-0.5 * ((frequency - f) / (60 + 0.08 * f)) ** 2) / (k + 1) for k, f in enumerate(formants))
        burst = np.fft.irfft(np.fft.rfft(source) * (gain + 0.01), n=size)
        total[low:high] += burst * np.hanning(size) ** 0.4 * rng.uniform(0.3, 1)
    return _levelled(rng, total + 0.003 * rng.standard_normal(length))


def _shaped(rng: Random, length: int, exponent: float, bands: NDArray[Any]) -> NDArray[Any]:
    """Return noise (length,) of variance 1 with a power law and bands of these heights at random places."""
    place = np.linspace(0, 1, length // 2 + 1)
    gain = np.maximum(place, 4 / length) ** (-exponent / 2)
    for height in bands:
        gain = gain * (1 + height * np.exp(-0.5 * ((place - rng.random() ** 2) / rng.uniform(0.005, 0.1)) ** 2))
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(length)) * gain, n=length)
    return np.asarray((noise - noise.mean()) / max(noise.std(), 1e-9))


def _levelled(rng: Random, sound: NDArray[Any]) -> Array:
    """Return a sound (length,) at a random level: its loudest sample is at 0.03 to 1."""
    peak = max(float(np.abs(sound).max()), 1e-9)
    return np.asarray((sound / peak * np.exp(rng.uniform(np.log(0.03), 0))), dtype=np.float32)


def correlated(rng: Random, table: Random, length: int) -> Array:
    """Return a row (length,) of few common factors; ``table`` is the generator of what all rows share."""
    factors = max(1, min(length, int(table.integers(1, 2 + length // 2))))
    loadings = table.standard_normal((length, factors)) / np.sqrt(factors)
    own = table.uniform(0.2, 0.8, length)
    row = loadings @ rng.standard_normal(factors) * np.sqrt(1 - own**2) + own * rng.standard_normal(length)
    return np.asarray(row, dtype=np.float32)


def heavy_tailed(rng: Random, table: Random, length: int) -> Array:
    """Return a row (length,) with outliers, some columns skewed and some seldom different from zero."""
    freedom = table.uniform(2.2, 6, length)
    row = rng.standard_t(freedom) / np.sqrt(freedom / (freedom - 2))
    row = row + 0.5 * rng.standard_normal() * table.standard_normal(length)
    kind = table.random(length)
    skewed = np.exp(0.8 * rng.standard_normal(length)) - np.exp(0.32)
    row = np.where(kind < 0.25, skewed, row)
    return np.where((kind > 0.85) & (rng.random(length) < 0.7), 0, np.clip(row, -12, 12)).astype(np.float32)


def clustered(rng: Random, table: Random, length: int) -> Array:
    """Return a row (length,) near one of a few centres, with some columns that take few values."""
    centres = table.standard_normal((int(table.integers(3, 12)), length)) * 1.2
    spread = table.uniform(0.1, 0.7, (len(centres), length))
    kind = rng.integers(len(centres))
    row = centres[kind] + spread[kind] * rng.standard_normal(length)
    return np.where(table.random(length) < 0.2, np.round(row), row).astype(np.float32)


def uniform_tokens(rng: Random, low: Integers, high: Integers) -> Integers:
    """Return tokens of low..high, both (length,), all equally likely."""
    return np.asarray(rng.integers(low, high, endpoint=True))


def frequent_tokens(rng: Random, low: Integers, high: Integers) -> Integers:
    """Return tokens of low..high, both (length,), whose frequencies fall with their rank, as words' do."""
    count = (high - low + 1).astype(np.float64)
    rank = np.floor((count + 1) ** rng.random(len(low))).astype(np.int64) - 1  # rank k: log((k + 2) / (k + 1))
    return np.asarray(np.minimum(low + np.maximum(rank, 0), high))


def repeated_tokens(rng: Random, low: Integers, high: Integers) -> Integers:
    """Return tokens of low..high, both (length,), in phrases that come back, with the lowest as padding at the end."""
    length = len(low)
    share = np.resize(rng.random(max(1, int(rng.integers(1, 2 + length // 2)))), length)
    share = np.where(rng.random(length) < 0.2, rng.random(length), share)
    tokens = np.minimum(low + np.floor(share * (high - low + 1.0)).astype(np.int64), high)
    end = int(length * rng.uniform(0.3, 1.0)) + 1
    tokens[end:] = low[end:]
    return tokens


def padded_mask(rng: Random, length: int) -> Integers:
    """Return a mask (length,) of ones, then zeros: more than half are ones, and at least one is a zero."""
    return _ones_first(length, rng.uniform(0.5, 1.0))


def short_mask(rng: Random, length: int) -> Integers:
    """Return a mask (length,) of ones, then zeros: at most half are ones, and at least one."""
    return _ones_first(length, rng.uniform(0.0, 0.5))


def scattered_mask(rng: Random, length: int) -> Integers:
    """Return a mask (length,) of ones and zeros in no order, at least one of each."""
    mask = rng.integers(0, 2, length)
    first, second = rng.permutation(length)[:2] if length > 1 else (0, 0)
    mask[first] = 1
    mask[second] = 0 if length > 1 else rng.integers(0, 2)
    return mask


def _ones_first(length: int, share: float) -> Integers:
    ones = min(max(1, round(share * length)), max(1, length - 1))
    return np.asarray(np.arange(length) < ones, dtype=np.int64)
