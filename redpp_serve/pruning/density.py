"""Kernel density of a layer's weights by linear binning and FFT, and what any set of cells over it costs.

One pass over the weights fills a fine grid with counts, sums and sums of squares; from then on every bandwidth,
codebook and error is computed on the grid, exactly for cells whose borders are grid points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 1 << 20

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """Weights in bins.

    Attributes:
        low: the first grid point.
        step: width of a bin.
        count: prefix sums of the number of weights, (bins + 1,).
        total: prefix sums of the weights, (bins + 1,).
        square: prefix sums of their squares, (bins + 1,).
        linear: the weights' mass at each grid point by linear binning, (bins + 1,).
        zeros: number of weights that are exactly zero.
        dtype: type of the weights.
    """

    low: float
    step: float
    count: Array
    total: Array
    square: Array
    linear: Array
    zeros: int
    dtype: torch.dtype

    @property
    def bins(self) -> int:
        """Number of bins."""
        return len(self.linear) - 1

    @property
    def weights(self) -> float:
        """Number of weights."""
        return float(self.count[-1])

    @property
    def rms(self) -> float:
        """Root mean square of the weights."""
        return float(np.sqrt(self.square[-1] / self.weights))

    def points(self) -> Array:
        """Return the grid points (bins + 1,), which are the bins' borders."""
        return self.low + self.step * np.arange(self.bins + 1, dtype=np.float64)

    def bin_of(self, values: Tensor) -> Tensor:
        """Return the bin (int64) of each value."""
        return _bin_index(values, self.low, self.step)


def build_grid(weight: Tensor) -> Grid:
    """Bin a weight tensor of any shape; about 0.1 s for 10^7 values.

    The step is at most 1 / 2000 of the RMS weight, and finer for many weights, unless outliers stretch the grid.
    """
    flat = weight.detach().reshape(-1)
    low, high = float(flat.min()), float(flat.max())
    span = max(high - low, 1e-6 * abs(high), 1e-290)
    rms = float(torch.linalg.vector_norm(flat, dtype=torch.float64)) / len(flat) ** 0.5
    wanted = span / max(rms, 1e-290) * (2000 if len(flat) < 1 << 20 else 8000)
    bins = 1 << min(max(math.ceil(math.log2(wanted)), 14), 18)
    step = span / (bins * (1 - 1e-6))
    count, total, square = (np.zeros(bins) for _ in range(3))
    for chunk in torch.split(flat, _CHUNK):
        values = chunk.double().numpy()
        index = _bin_index(chunk, low, step).numpy()
        count += np.bincount(index, minlength=bins)
        total += np.bincount(index, values, bins)
        square += np.bincount(index, values * values, bins)
    above = (total - (low + step * np.arange(bins)) * count) / step  # how far the bins' weights lean to the next point
    linear = np.zeros(bins + 1)
    linear[:-1] += count - above
    linear[1:] += above
    zeros = int((flat == 0).sum())
    return Grid(low, step, _prefix_sums(count), _prefix_sums(total), _prefix_sums(square), linear, zeros, flat.dtype)


def _prefix_sums(values: Array) -> Array:
    return np.concatenate([np.zeros(1), np.cumsum(values)])


def _bin_index(values: Tensor, low: float, step: float) -> Tensor:
    return ((values.double() - low) / step).long()


def density(grid: Grid, bandwidth: float) -> Array:
    """Compute the Gaussian kernel density at the grid points (bins + 1,) by FFT.

    The bandwidth is at most the grid's width.
    """
    reach = int(min(5 * grid.bins, np.ceil(5 * bandwidth / grid.step) + 1))
    length = 1 << int(np.ceil(np.log2(grid.bins + 1 + reach)))
    frequency = 2 * np.pi * np.fft.rfftfreq(length)
    smooth = np.exp(-0.5 * (frequency * bandwidth / grid.step) ** 2)
    spread = np.fft.irfft(np.fft.rfft(grid.linear, length) * smooth, length)[: grid.bins + 1]
    return np.maximum(spread, 0.0) / (grid.weights * grid.step)


def cells_of(curve: Array) -> tuple[Indices, Indices]:
    """Find borders (cells - 1,) at a density's minima and modes (cells,) at its maxima, as grid point indices."""
    floor = 1e-12 * curve.max()
    slope = np.sign(np.where(np.abs(np.diff(curve)) > floor, np.diff(curve), 0))
    moving = np.flatnonzero(slope)
    if not len(moving):  # so wide a kernel that the density is flat over all weights
        return np.empty(0, np.int64), np.array([len(curve) // 2])
    turns = np.flatnonzero(np.diff(slope[moving]))
    places = (moving[turns] + 1 + moving[turns + 1]) // 2  # the middle of a flat stretch
    falls_after = slope[moving[turns]] > 0
    modes, borders = places[falls_after], places[~falls_after]
    if slope[moving[0]] < 0:  # the highest point is the first one
        modes = np.concatenate([[0], modes])
    if slope[moving[-1]] > 0:
        modes = np.concatenate([modes, [len(curve) - 1]])
    return borders, modes


def cell_costs(grid: Grid, borders: Indices, values: Array) -> tuple[Array, float]:
    """Count the weights in each cell (cells,), and find the relative RMS error of giving each its cell's value."""
    edges = np.concatenate([[0], borders, [grid.bins]])
    count, total, square = (np.diff(prefix[edges]) for prefix in (grid.count, grid.total, grid.square))
    error = float((square - 2 * values * total + values**2 * count).sum())
    return count, float(np.sqrt(max(error, 0.0) / max(grid.square[-1], 1e-300)))


def entropy(count: Array) -> float:
    """Return the bits a weight that an index into cells with that many weights takes."""
    p = count[count > 0] / count.sum()
    return float(-(p * np.log2(p)).sum())
