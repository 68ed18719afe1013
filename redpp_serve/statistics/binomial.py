"""Intervals for a share that was counted."""

from __future__ import annotations

import math
from collections.abc import Callable


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact two-sided interval (Clopper and Pearson 1934) for the share behind ``hits`` of ``trials``.

    With all or none of the trials a hit, the interval is one-sided at half the error, as the method has it: 16 of 16
    gives 0.794 to 1.
    """
    half = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _solve(lambda p: _at_least(hits, trials, p), half)
    high = 1.0 if hits == trials else 1.0 - _solve(lambda p: _at_least(trials - hits, trials, p), half)
    return low, high


def _at_least(hits: int, trials: int, share: float) -> float:
    """Return the probability of at least ``hits`` in ``trials``."""
    if share <= 0.0 or share >= 1.0:
        return float(share >= 1.0)
    logs = [
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(share)
        + (trials - k) * math.log1p(-share)
        for k in range(hits, trials + 1)
    ]
    return math.fsum(math.exp(x) for x in logs)


def _solve(rising: Callable[[float], float], level: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2
