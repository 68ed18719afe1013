"""Data-free scalar hashing: each weight of a layer is replaced by the value of its cell.

``kde`` (RED++, arXiv 2110.01397): cells between the minima of the weights' kernel density, values at its maxima;
``kmeans`` (Lloyd-Max) and ``uniform`` codebooks stand beside it. The bandwidth, or the number of cells, is found by
bisection to a target error or number of values. Borders lie on the density grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .density import Array, Grid, build_grid, cell_costs, cells_of, density, entropy

METHODS = ("kde", "kmeans", "uniform")
_FEW = 256  # a weight with no more distinct values than this is a codebook already
_MOST_CELLS = 4096


@dataclass(frozen=True)
class Target:
    """What the bisection aims at: a relative RMS ``error`` of a layer's weights, or a number of ``values``."""

    error: float | None = None
    values: int | None = None

    def __str__(self) -> str:
        return f"relative RMS {self.error:g}" if self.error is not None else f"at most {self.values} values"


@dataclass(frozen=True)
class Codebook:
    """Cells and their values. ``error`` is the weights' RMS error over their RMS, ``entropy`` in bits a weight;
    ``frequencies`` (K,) sums to 1; ``bandwidth`` is that of the density, for ``kde``."""

    method: str
    borders: NDArray[np.int64]
    values: Array
    frequencies: Array
    error: float
    entropy: float
    bandwidth: float | None = None

    @property
    def size(self) -> int:
        return int((self.frequencies > 0).sum())


@dataclass(frozen=True)
class Hashed:
    """A hashed weight, its codebook, and the other methods' codebooks at the same entropy."""

    weight: Tensor
    codebook: Codebook
    alternatives: dict[str, Codebook]
    grid: Grid


def hash_weight(weight: Tensor, method: str, target: Target) -> Hashed:
    """Hash one layer's weight of any shape.

    A weight that has at most 256 distinct values and meets the target's number is left as it is, so hashing is
    idempotent and keeps quantised networks.
    """
    grid = build_grid(weight)
    existing = _existing_codebook(weight, target)
    if existing is not None:
        return Hashed(weight, existing, {}, grid)
    codebook = fit_codebook(grid, method, target)
    table = torch.from_numpy(codebook.values).to(weight.dtype)
    cell_of_bin = torch.from_numpy(np.searchsorted(codebook.borders, np.arange(grid.bins), side="right"))
    value_of_bin = table[cell_of_bin]
    flat = weight.reshape(-1)
    hashed = torch.cat([value_of_bin[grid.bin_of(chunk)] for chunk in flat.split(1 << 20)])
    others = {m: at_entropy(grid, m, codebook.entropy) for m in METHODS if m != method}
    return Hashed(hashed.view(weight.shape), codebook, {method: codebook, **others}, grid)


def fit_codebook(grid: Grid, method: str, target: Target) -> Codebook:
    """The coarsest codebook of that method that meets an error target, or the finest that meets a number of values."""
    family = _FAMILIES[method](grid)
    if target.error is not None:
        return family.finest_while(lambda book: book.error > target.error, accept_first_false=True)
    assert target.values is not None
    return family.finest_while(lambda book: book.size <= target.values)


def at_entropy(grid: Grid, method: str, bits: float) -> Codebook:
    """The finest codebook of that method whose entropy does not exceed ``bits``."""
    return _FAMILIES[method](grid).finest_while(lambda book: book.entropy <= bits + 1e-6)


@dataclass(frozen=True)
class _Family:
    """Codebooks of one method, ordered from coarse (0) to fine (1)."""

    make: Callable[[float], Codebook]
    rounds: int

    def finest_while(self, holds: Callable[[Codebook], bool], accept_first_false: bool = False) -> Codebook:
        """Bisect for the finest codebook for which ``holds``, or for the first for which it no longer does."""
        low, high = 0.0, 1.0
        best_low, best_high = self.make(low), self.make(high)
        if holds(best_high):
            return best_high
        for _ in range(self.rounds):
            middle = (low + high) / 2
            book = self.make(middle)
            if holds(book):
                low, best_low = middle, book
            else:
                high, best_high = middle, book
        return best_high if accept_first_false else best_low


def _kde_family(grid: Grid) -> _Family:
    coarse, fine = 2.0 * grid.rms, max(1e-4 * grid.rms, 1.5 * grid.step)

    def make(fineness: float) -> Codebook:
        bandwidth = coarse * (fine / coarse) ** fineness
        borders, modes = cells_of(density(grid, bandwidth))
        values = grid.low + grid.step * modes
        zero = np.searchsorted(grid.low + grid.step * borders, 0.0, side="right")
        if abs(values[zero]) <= bandwidth:
            values[zero] = 0.0  # weights at zero stay there: their kernels cost nothing
        return _codebook("kde", grid, borders, values, bandwidth)

    return _Family(make, 24)


def _uniform_family(grid: Grid) -> _Family:
    coarse, fine = grid.bins * grid.step, 2.0 * grid.step

    def make(fineness: float) -> Codebook:
        step = coarse * (fine / coarse) ** fineness
        first, last = np.floor(grid.low / step), np.ceil((grid.low + grid.bins * grid.step) / step)
        levels = step * np.arange(first, last + 1)
        borders = np.clip(np.round((levels[:-1] + step / 2 - grid.low) / grid.step), 0, grid.bins).astype(np.int64)
        return _codebook("uniform", grid, borders, levels)

    return _Family(make, 24)


def _kmeans_family(grid: Grid) -> _Family:
    most = _MOST_CELLS

    def make(fineness: float) -> Codebook:
        return _lloyd_max(grid, int(round(2 * (most / 2) ** fineness)))

    return _Family(make, 12)


_FAMILIES: dict[str, Callable[[Grid], _Family]] = {
    "kde": _kde_family, "kmeans": _kmeans_family, "uniform": _uniform_family,
}  # fmt: skip


def _lloyd_max(grid: Grid, cells: int, rounds: int = 60) -> Codebook:
    """Lloyd's algorithm on the grid: borders half-way between values, values at their cells' means."""
    cube = np.cumsum(np.cbrt(np.diff(grid.count)))  # the optimal density of levels is the cube root (Panter-Dite)
    borders = np.searchsorted(cube, cube[-1] * np.arange(1, cells) / cells).astype(np.int64)
    for _ in range(rounds):
        edges = np.concatenate([[0], borders, [grid.bins]])
        count, total = np.diff(grid.count[edges]), np.diff(grid.total[edges])
        middle = grid.low + grid.step * (edges[:-1] + edges[1:]) / 2
        values = np.where(count > 0, total / np.maximum(count, 1), middle)
        moved = np.round(((values[:-1] + values[1:]) / 2 - grid.low) / grid.step).astype(np.int64)
        if np.array_equal(moved, borders):
            break
        borders = np.clip(moved, 0, grid.bins)
    return _codebook("kmeans", grid, borders, values)


def _codebook(method: str, grid: Grid, borders: NDArray[np.int64], values: Array, bandwidth: float | None = None) -> Codebook:
    count, error = cell_costs(grid, borders, values)
    return Codebook(method, borders, values, count / count.sum(), error, entropy(count), bandwidth)


def _existing_codebook(weight: Tensor, target: Target) -> Codebook | None:
    flat = weight.detach().reshape(-1)
    most = min(_FEW, target.values or _FEW)
    sample = flat[:: max(1, len(flat) // 8192)]
    if len(torch.unique(sample)) > most or len(flat) <= most:
        return None
    values, count = torch.unique(flat, return_counts=True)
    if len(values) > most:
        return None
    frequencies = (count.double() / len(flat)).numpy()
    return Codebook("unchanged", np.empty(0, np.int64), values.double().numpy(), frequencies, 0.0, entropy(frequencies))
