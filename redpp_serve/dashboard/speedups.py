"""How much faster the pruned network answers, from what both versions' handlers observed in a window."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from redpp_serve.dashboard.history import Window
from redpp_serve.dashboard.scraping import VARIANTS, Key
from redpp_serve.statistics.intervals import Quantile
from redpp_serve.statistics.unequal_traffic import comparable, influence

HANDLER, NETWORK, BATCH = "redpp_handler_seconds", "redpp_inference_seconds", "redpp_batch_size"

_LEAST = 5


class Ratio(NamedTuple):
    """``value`` = time of the original / time of the pruned network, above 1 where the latter is faster; times in
    seconds. ``low`` and ``high``: what the width of the buckets leaves open; None where nothing is left open.
    """

    value: float
    original: float
    pruned: float
    low: float | None = None
    high: float | None = None


def percentile_ratio(window: Window, share: float) -> Ratio | None:
    """Of a percentile of the handler's time; None where a version had no traffic."""
    found = [window.quantile(HANDLER, variant, share) for variant in VARIANTS]
    if any(each is None or each.value <= 0 for each in found):
        return None
    original, pruned = found
    high = original.high / pruned.low if pruned.low > 0 else math.inf
    return Ratio(original.value / pruned.value, original.value, pruned.value, original.low / pruned.high, high)


def same_bucket(window: Window, share: float) -> Quantile | None:
    """The original's percentile, where both versions' lie in one bucket: their ratio then says nothing."""
    original, pruned = (window.quantile(HANDLER, variant, share) for variant in VARIANTS)
    return original if original and pruned and original.low == pruned.low else None


def noise(window: Window) -> float | None:
    """Standard error of log(`equal_batch_ratio`) from its spread over the scrapes, taken as independent; None where
    fewer than `_LEAST` of them hold both versions.
    """
    sizes = list(window.details("redpp_batches_total", "original"))
    names = ("redpp_batches_total", "redpp_batch_seconds_total")
    keys = [Key(name, variant, size) for size in sizes for variant in VARIANTS for name in names]
    gains = window.each(keys)
    sums = comparable(gains.reshape(len(gains), len(sizes), 4))
    sums = sums[(sums[:, :2] > 0).all(axis=1)]
    if len(sums) < _LEAST:
        return None
    return float(influence(sums).std(ddof=1)) / math.sqrt(len(sums))


def equal_batch_ratio(window: Window) -> Ratio | None:
    """Of the mean handler time at equal batch size, weighted as in an A/B test; None where no size was seen in both
    versions.
    """
    strata = np.array([_stratum(window, size) for size in window.details("redpp_batches_total", "original")])
    if not strata.size:
        return None
    original, pruned = comparable(strata).tolist()[:2]
    weight = float(comparable(strata[:, [0, 0, 2, 2]])[0])  # as many "seconds" as batches: their weighted number
    return Ratio(original / pruned, original / weight, pruned / weight) if original > 0 and pruned > 0 else None


def _stratum(window: Window, size: str) -> list[float]:
    names = ("redpp_batches_total", "redpp_batch_seconds_total")
    return [window.total(name, variant, size) for variant in VARIANTS for name in names]


def network_ratio(window: Window) -> Ratio | None:
    """Of the mean time of one run of the network, batch sizes as they came."""
    original, pruned = (window.mean(NETWORK, variant) for variant in VARIANTS)
    return Ratio(original / pruned, original, pruned) if original and pruned else None
