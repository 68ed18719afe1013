"""Solve ridge least squares from streamed second moments, in float64.

The strength of the ridge is the one that predicts inputs best to which it was not fitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # for features scaled to unit variance
_FEWER_RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)
_EXACT = 512  # features up to which sums are exact to float64; of more, products are summed by chunks in float32
_RIDGE = 1e-4  # where nothing tells a better one
_WIDE = 1500  # unknowns per output, beyond which fewer ridges are tried
_LEAST_SPREAD = 1e-5  # relative to a feature's mean; below, a variance from sums of squares is mostly rounding error


@dataclass
class Sums:
    """Uncentred sums over samples of features u (d,) and targets y (n_out,).

    Attributes:
        uu: sum of u u^T, (d, d).
        uy: sum of u y^T, (d, n_out).
        u: sum of the features, (d,).
        y: sum of the targets, (n_out,).
        yy: sum of the squared targets, (n_out,).
        count: number of samples.
    """

    uu: Tensor
    uy: Tensor
    u: Tensor
    y: Tensor
    yy: Tensor
    count: int

    @classmethod
    def of(cls, u: Tensor, y: Tensor) -> Sums:
        """Sum over the rows of u (samples, d) and y (samples, n_out)."""
        if u.shape[1] > _EXACT:
            (few, unit), (few_y, unit_y), y = _in_units(u), _in_units(y), y.double()
            uu, uy = (few.T @ few).double() * unit**2, (few.T @ few_y).double() * (unit * unit_y)
            return cls(uu, uy, u.double().sum(0), y.sum(0), y.square().sum(0), len(u))
        u, y = u.double(), y.double()
        return cls(u.T @ u, u.T @ y, u.sum(0), y.sum(0), y.square().sum(0), len(u))

    def add(self, other: Sums) -> None:
        """Add the sums over other samples, in place."""
        for name in ("uu", "uy", "u", "y", "yy"):
            getattr(self, name).add_(getattr(other, name))
        self.count += other.count


def _in_units(x: Tensor) -> tuple[Tensor, float]:
    """Return values as float32 in units of a power of two, in which no square overflows or vanishes; and the unit."""
    largest = float(x.abs().max())
    unit = 2.0 ** math.floor(math.log2(largest)) if 0 < largest < math.inf else 1.0
    return (x / unit).float(), unit


@dataclass(frozen=True)
class Moments:
    """Means, and second moments about them, of features u and targets y.

    Attributes:
        uu: covariance of the features, (d, d).
        uy: covariance of features and targets, (d, n_out).
        u: mean of the features, (d,).
        y: mean of the targets, (n_out,).
        yy: variance of the targets, summed.
    """

    uu: Tensor
    uy: Tensor
    u: Tensor
    y: Tensor
    yy: float

    def lost(self, weight: Tensor) -> float:
        """Return the variance of y that is left after u @ weight, for a weight (d, n_out)."""
        return self.yy - float((weight * (2 * self.uy - self.uu @ weight)).sum())


def moments(parts: Sequence[Sums]) -> Moments:
    """Return the moments of the samples of all parts together."""
    count = sum(part.count for part in parts)
    uu, uy, u, y, yy = (sum(getattr(part, name) for part in parts) / count for name in ("uu", "uy", "u", "y", "yy"))
    return Moments(uu - torch.outer(u, u), uy - torch.outer(u, y), u, y, float((yy - y.square()).sum().clamp_min(0)))


def solve(fit: Sums, start: Tensor, check: Sums | None = None) -> tuple[Tensor, Tensor, float]:
    """Return the least-squares weights from u to y, drawn towards ``start`` where the samples say little.

    Args:
        fit: sums over the samples to fit to.
        start: weights (d, n_out).
        check: sums over samples of another kind; the ridge is the one that predicts them best, and the weights stay at
            ``start`` where none does. Without, the ridge is a small one.

    Returns:
        weights (d, n_out), constant (n_out,), and the share of y's variance that is left.
    """
    whole = moments([fit])
    scale = whole.uu.diagonal().clamp_min(0).sqrt()
    varies = (scale > 1e-7 * scale.max()) & (scale > _LEAST_SPREAD * whole.u.abs())  # a constant feature says nothing
    scale = torch.where(varies, 1 / scale.clamp_min(1e-300), 0.0)
    ridges = _RIDGES if len(whole.uu) <= _WIDE else _FEWER_RIDGES
    if check is None:
        (weight,) = _towards(whole, start, scale, (_RIDGE,))
    else:
        other = moments([check])
        found = [start, *_towards(whole, start, scale, ridges)]
        losses = [other.lost(each) for each in found]
        weight = found[losses.index(min(losses))]
    return weight, whole.y - weight.T @ whole.u, max(whole.lost(weight), 0.0) / max(whole.yy, 1e-300)


def _towards(m: Moments, start: Tensor, scale: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    gram = m.uu * scale * scale[:, None]
    missing = scale[:, None] * (m.uy - m.uu @ start)
    factors = (factor(gram, ridge) for ridge in ridges)
    return [start + scale[:, None] * torch.cholesky_solve(missing, lower) for lower in factors]


def factor(gram: Tensor, ridge: float) -> Tensor:
    """Return the Cholesky factor of gram + ridge, with a larger ridge where that is not positive definite.

    The moments of features that hardly vary beside their mean have rounding errors, which can leave ``gram`` indefinite
    by more than a small ridge.
    """
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    while True:
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(gram + ridge * unit)
        if not failed or ridge > len(gram):  # only NaN can fail with such a ridge
            return lower
        ridge *= 10
