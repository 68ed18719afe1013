"""Data-free scalar hashing: each weight of a layer is replaced by the value of its cell.

Method ``kde`` (RED++, arXiv 2110.01397) puts the borders of cells at the minima of the weights' kernel density and
their values at its maxima; ``kmeans`` (Lloyd-Max) and ``uniform`` codebooks are there to compare with. The bandwidth,
or the number of cells, is found by bisection to a target error or number of values. Borders lie on the density grid.

A uniform codebook of at most 255 values has them within 127 steps of zero: kernels of eight bits compute with these and
round nothing more (`graph.quantization`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from redpp_serve.graph.quantization import WEIGHT_LIMIT
from redpp_serve.options import HASHES, HashTarget
from redpp_serve.pruning.density import Array, Grid, Indices, build_grid, cell_costs, cells_of, density, entropy

_FEW = 256  # a weight with no more distinct values than this is a codebook already
_MOST_CELLS = 8192
_SMOOTHING = 0.5  # bandwidth, in units of RMS / weights^0.2, of the density that k-means starts from
_LLOYD_ROUNDS = 60


@dataclass(frozen=True)
class Codebook:
    """Cells and their values; some cells may be empty or share a value.

    Attributes:
        method: the method that made it, or ``unchanged`` for the values that a weight came with.
        borders: grid points between the cells, (cells - 1,).
        values: (cells,), representable in the weight's dtype.
        frequencies: share of the weights in each cell, (cells,).
        error: the weights' RMS error over their RMS.
        entropy: bits a weight.
        bandwidth: bandwidth of the density, for ``kde``.
    """

    method: str
    borders: Indices
    values: Array
    frequencies: Array
    error: float
    entropy: float
    bandwidth: float | None = None

    @property
    def size(self) -> int:
        """Number of distinct values in use."""
        return len(np.unique(self.values[self.frequencies > 0]))


@dataclass(frozen=True)
class Hashed:
    """A hashed weight, its codebook, and the other methods' codebooks at the same entropy."""

    weight: Tensor
    codebook: Codebook
    alternatives: dict[str, Codebook]
    grid: Grid


def hash_weight(weight: Tensor, method: str, target: HashTarget) -> Hashed:
    """Hash one layer's weight of any shape.

    Two kinds of weights are left as they are. One has at most 256 distinct values, some of them repeated, and meets
    the target's number of values: quantised networks stay, and hashing again changes nothing where the codebook has at
    most 256 values. No codebook of the method brings the other within the target's error, or each of its values would
    keep its own. Exact zeros stay zero.
    """
    grid = build_grid(weight)
    existing = _existing_codebook(weight, target)
    if existing is not None:
        return Hashed(weight, existing, {}, grid)
    codebook = fit_codebook(grid, method, target)
    if codebook.size == weight.numel() or (target.error is not None and codebook.error > target.error):
        return Hashed(weight, _own_values(weight), {}, grid)
    others = {m: at_entropy(grid, m, codebook.entropy) for m in HASHES if m != method}
    return Hashed(quantise(weight, grid, codebook), codebook, {method: codebook, **others}, grid)


def quantise(weight: Tensor, grid: Grid, codebook: Codebook) -> Tensor:
    """Replace each value of the weight by that of its cell."""
    table = torch.from_numpy(codebook.values).to(weight.dtype)
    cell_of_bin = torch.from_numpy(np.searchsorted(codebook.borders, np.arange(grid.bins), side="right"))
    value_of_bin = table[cell_of_bin]
    hashed = torch.cat([value_of_bin[grid.bin_of(chunk)] for chunk in torch.split(weight.reshape(-1), 1 << 20)])
    return hashed.view(weight.shape)


def retuned(hashed: Hashed, weight: Tensor) -> Hashed:
    """Give the same cells other values: those of ``weight``, which has one wherever the hashed weight has one."""
    old, place = np.unique(hashed.weight.flatten().double().numpy(), return_index=True)
    new = weight.flatten().double().numpy()[place]
    book = hashed.codebook
    at = np.searchsorted(old, book.values).clip(max=len(old) - 1)
    values = np.where(old[at] == book.values, new[at], book.values)
    return replace(hashed, weight=weight, codebook=replace(book, values=values))


def fit_codebook(grid: Grid, method: str, target: HashTarget) -> Codebook:
    """Find the codebook of a method that meets a target.

    This is the coarsest that meets an error (the finest, if none does), or the finest that meets a number of values
    (the coarsest, if none does).
    """
    family = _FAMILIES[method](grid)
    if target.values is None:
        error = target.error or 0.0
        return family.finest_while(lambda book: book.error > error, accept_first_false=True)
    values = target.values
    if method == "kmeans":
        return _lloyd_max(grid, values - bool(grid.zeros))  # zeros have a value of their own
    if method == "uniform" and values <= 2 * WEIGHT_LIMIT + 1:
        return family.finest_while(lambda book: book.size <= values and _farthest_level(book) <= WEIGHT_LIMIT)
    return family.finest_while(lambda book: book.size <= values)


def at_entropy(grid: Grid, method: str, bits: float) -> Codebook:
    """Find the finest codebook of a method whose entropy does not exceed ``bits``."""
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
    fine = max(1e-4 * grid.rms, 1.5 * grid.step)
    coarse = max(min(2.0 * grid.rms, grid.bins * grid.step), fine)

    def make(fineness: float) -> Codebook:
        bandwidth = coarse * (fine / coarse) ** fineness
        borders, modes = cells_of(density(grid, bandwidth))
        values = grid.low + grid.step * modes.astype(np.float64)
        zero = np.searchsorted(grid.low + grid.step * borders, 0.0, side="right")
        if abs(values[zero]) <= bandwidth:
            values[zero] = 0.0  # weights at zero stay there: their kernels cost nothing
        return _codebook("kde", grid, borders, values, bandwidth)

    return _Family(make, 24)


def _uniform_family(grid: Grid) -> _Family:
    high = grid.low + grid.bins * grid.step
    coarse, fine = 4.0 * max(abs(grid.low), abs(high)), 2.0 * grid.step  # all at zero; two bins

    def make(fineness: float) -> Codebook:
        step = coarse * (fine / coarse) ** fineness
        first, last = np.floor(grid.low / step), np.ceil(high / step)
        levels = step * np.arange(first, last + 1)
        borders = np.clip(np.round((levels[:-1] + step / 2 - grid.low) / grid.step), 0, grid.bins).astype(np.int64)
        return _codebook("uniform", grid, borders, levels)

    return _Family(make, 24)


def _farthest_level(book: Codebook) -> int:
    """Return how many steps of a uniform codebook its farthest value in use lies from zero."""
    return round(float(np.abs(book.values[book.frequencies > 0]).max() / np.diff(book.values).max()))


def _kmeans_family(grid: Grid) -> _Family:
    return _Family(lambda fineness: _lloyd_max(grid, round(_MOST_CELLS**fineness)), 12)


_FAMILIES: dict[str, Callable[[Grid], _Family]] = {
    "kde": _kde_family,
    "kmeans": _kmeans_family,
    "uniform": _uniform_family,
}


def _lloyd_max(grid: Grid, cells: int) -> Codebook:
    """Run Lloyd's algorithm on the grid: borders half-way between values, values at their cells' means."""
    # The optimal density of levels is the cube root of the weights' (Panter-Dite). It must be smooth: with single
    # counts the many bins of the tails, most of them with one weight or none, would get far too many levels.
    width = max(_SMOOTHING * grid.rms * grid.weights**-0.2, 2 * grid.step)
    cube = np.cumsum(np.cbrt(np.maximum(density(grid, width), 0.0)))
    borders = np.searchsorted(cube, cube[-1] * np.arange(1, cells) / cells).astype(np.int64)
    for _ in range(_LLOYD_ROUNDS):
        edges = np.concatenate([[0], borders, [grid.bins]])
        count, total = np.diff(grid.count[edges]), np.diff(grid.total[edges])
        middle = grid.low + grid.step * (edges[:-1] + edges[1:]) / 2
        values = np.where(count > 0, total / np.maximum(count, 1), middle)
        moved = np.round(((values[:-1] + values[1:]) / 2 - grid.low) / grid.step).astype(np.int64)
        if np.array_equal(moved, borders):
            break
        borders = np.clip(moved, 0, grid.bins)
    return _codebook("kmeans", grid, borders, values)


def _codebook(method: str, grid: Grid, borders: Indices, values: Array, bandwidth: float | None = None) -> Codebook:
    if grid.zeros:
        borders, values = _keep_zero(grid, borders, values)
    values = torch.from_numpy(values).to(grid.dtype).double().numpy()
    count, error = cell_costs(grid, borders, values)
    by_value = np.bincount(np.unique(values, return_inverse=True)[1].reshape(-1), count).astype(np.float64)
    return Codebook(method, borders, values, count / count.sum(), error, entropy(by_value), bandwidth)


def _keep_zero(grid: Grid, borders: Indices, values: Array) -> tuple[Indices, Array]:
    """Give zeros, which cost nothing and must stay, a cell of one bin if the cell around them has another value."""
    place = int(grid.bin_of(torch.zeros(1, dtype=torch.float64)))
    cell = int(np.searchsorted(borders, place, side="right"))
    if values[cell] == 0.0:
        return borders, values
    return np.insert(borders, cell, [place, place + 1]), np.insert(values, cell + 1, [0.0, values[cell]])


def _existing_codebook(weight: Tensor, target: HashTarget) -> Codebook | None:
    flat = weight.detach().reshape(-1)
    most = min(_FEW, target.values or _FEW)
    if len(torch.unique(flat[:: max(1, len(flat) // 8192)])) > most:
        return None
    book = _own_values(flat)
    repeated = book.size == 1 or book.size < len(flat)
    return book if book.size <= most and repeated else None


def _own_values(weight: Tensor) -> Codebook:
    values, count = torch.unique(weight.detach(), return_counts=True)
    frequencies = (count.double() / weight.numel()).numpy()
    return Codebook("unchanged", np.empty(0, np.int64), values.double().numpy(), frequencies, 0.0, entropy(frequencies))
