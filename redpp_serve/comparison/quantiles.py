"""Percentiles of a histogram's counts: as exact as its buckets are narrow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class Quantile(NamedTuple):
    """An interpolated percentile, and the edges of the bucket that it lies in; ``high`` is inf above the last edge."""

    value: float
    low: float
    high: float


def quantile(cumulative: Mapping[float, float], share: float) -> Quantile | None:
    """Interpolate linearly within the bucket that holds a share of the observations, as Prometheus does.

    Args:
        cumulative: upper edge of a bucket (inf for the last) -> observations up to it.
        share: 0 to 1.

    Returns:
        None without observations. Above the last finite edge, that edge.
    """
    edges = sorted(cumulative)
    total = cumulative[edges[-1]] if edges else 0.0
    if total <= 0:
        return None
    low = below = 0.0
    for edge in edges:
        upto = cumulative[edge]
        if upto >= share * total and upto > below:
            if math.isinf(edge):
                return Quantile(low, low, edge)
            return Quantile(low + (edge - low) * max(share * total - below, 0.0) / (upto - below), low, edge)
        low, below = edge, max(upto, below)
    return Quantile(low, low, math.inf)  # only where a scrape caught the buckets half-written


def measured(cumulative: Mapping[float, float], share: float) -> float | None:
    """The value of `quantile`; None also where it lies above the last finite edge, and so is not known."""
    found = quantile(cumulative, share)
    return None if found is None or math.isinf(found.high) else found.value
