"""Limits that the pruned version must keep: errors, tail and agreement, with bounds that hold at all times at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from redpp_serve.errors import RedppError
from redpp_serve.statistics.intervals import finite_quantile

BISECTIONS = 60
QUANTILE = 0.99
# Times per version before its tail is judged: the first after a start are slow for reasons of their own.
MINIMUM_TIMES = 100


@dataclass(frozen=True)
class Guardrail:
    """The answer to the question whether a limit is kept.

    Attributes:
        name: "errors", "p99" or "agreement".
        ok: True if it is kept, False if it is broken, None while the evidence allows neither.
        text: one sentence without its full stop.
        value: the quantity as measured; None while there is nothing to measure.
        low: lower bound of the true quantity, valid at all times at once.
        high: upper bound.
        limit: the bound that ``value`` must keep.
    """

    name: str
    ok: bool | None
    text: str
    value: float | None
    low: float
    high: float
    limit: float


@lru_cache(4096)  # counts of earlier splits no longer change, and are judged again every second
def share_bounds(hits: int, trials: int, alpha: float) -> tuple[float, float]:
    """Bound a probability so that the bounds hold after every trial at once, with chance 1 - ``alpha``.

    They enclose all p at which the likelihood, mixed over p with Beta(1/2, 1/2), stays below 1/alpha times that of p
    (Robbins 1970), provided that trials are independent.

    Raises:
        RedppError: the counts are negative or there are more hits than trials.
    """
    if not 0 <= hits <= trials:
        raise RedppError(f"{hits} of {trials}", "counts with 0 <= hits <= trials", "pass totals of one counter each")
    if not trials:
        return 0.0, 1.0
    misses = trials - hits
    mixed = math.lgamma(hits + 0.5) + math.lgamma(misses + 0.5) - math.lgamma(trials + 1) - math.log(math.pi)

    def outside(p: float) -> bool:
        likelihood = (hits * math.log(p) if hits else 0.0) + (misses * math.log1p(-p) if misses else 0.0)
        return mixed - likelihood >= -math.log(alpha)

    def edge(outer: float) -> float:
        inner = hits / trials
        for _ in range(BISECTIONS):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if outside(middle) else (middle, outer)
        return outer

    return (edge(0.0) if hits else 0.0), (edge(1.0) if misses else 1.0)


def error_guardrail(
    errors_original: int,
    requests_original: int,
    errors_pruned: int,
    requests_pruned: int,
    max_gap: float = 0.01,
    alpha: float = 0.05,
) -> Guardrail:
    """Judge whether the pruned version's rate of server errors exceeds the original's by more than ``max_gap`` (0..1).

    Each version's rate has bounds at half of ``alpha``; the gap's bounds are the worst of both.
    """
    low_a, high_a = share_bounds(errors_original, requests_original, alpha / 2)
    low_b, high_b = share_bounds(errors_pruned, requests_pruned, alpha / 2)
    low, high = low_b - high_a, high_b - low_a
    if not requests_original or not requests_pruned:
        return Guardrail("errors", None, "errors: no requests yet to both versions", None, low, high, max_gap)
    ok = False if low > max_gap else True if high <= max_gap else None
    counts = f"({errors_pruned} of {requests_pruned} against {errors_original} of {requests_original})"
    text = {
        True: f"at most {_points(max(high, 0))} more than the original's, within {_points(max_gap)}",
        False: f"at least {_points(low)} more than the original's, above {_points(max_gap)}",
        None: f"not yet known whether the gap stays within {_points(max_gap)}",
    }[ok]
    value = errors_pruned / requests_pruned - errors_original / requests_original
    return Guardrail("errors", ok, f"errors: {text} {counts}", value, low, high, max_gap)


def _points(share: float) -> str:
    return f"{100 * share:.3g} points"


def p99_guardrail(
    bounds: Sequence[float], original: Sequence[int], pruned: Sequence[int], max_ratio: float = 1.5, alpha: float = 0.05
) -> Guardrail:
    """Judge whether the pruned version's 99th percentile of time exceeds ``max_ratio`` times the original's.

    The percentile lies above a bucket's bound where more than 1 % of all times surely do; one binomial bound per side
    and version is enough for all buckets, as counts beyond a bound only fall with it. A percentile is known to its
    bucket at best, so a tail counts as too long only where the distance between buckets shows it, and as kept where
    the ratio is at most ``max_ratio`` times one bucket's factor.

    Args:
        bounds: (b,) upper bounds of the buckets in seconds, ascending, without infinity.
        original: (b + 1,) counts of times up to each bound since the experiment began, the last of all times
            (cumulative, as in Prometheus). Both versions' shares of the traffic must not have changed meanwhile.
        pruned: the same for the pruned version.
        max_ratio: the limit.
        alpha: chance, over the whole run, of any wrong answer.

    Raises:
        RedppError: bounds do not ascend, or counts do not fit them.
    """
    _check_histogram(bounds, original)
    _check_histogram(bounds, pruned)
    edges = [0.0, *bounds, math.inf]
    low_a, high_a = _percentile_bucket(edges, original, alpha / 2)
    low_b, high_b = _percentile_bucket(edges, pruned, alpha / 2)
    low = low_b / high_a if math.isfinite(high_a) else 0.0
    high = high_b / low_a if low_a and math.isfinite(high_b) else math.inf
    step = max((b / a for a, b in pairwise(bounds)), default=1.0)
    a, b = (finite_quantile(dict(zip(edges[1:], counts, strict=True)), QUANTILE) for counts in (original, pruned))
    value = b / a if a and b else None
    if min(original[-1], pruned[-1]) < MINIMUM_TIMES:
        text = f"p99: {original[-1]} and {pruned[-1]} times, at least {MINIMUM_TIMES} of each version needed"
        return Guardrail("p99", None, text, value, low, high, max_ratio)
    ok = False if low > max_ratio else True if high <= max_ratio * step * (1 + 1e-9) else None
    text = {
        True: f"at most {high:.3g} times the original's",
        False: f"at least {low:.3g} times the original's",
        None: f"{_range(low, high)}not yet decided",
    }[ok]
    limit = f"(limit {max_ratio:g}, buckets a factor {step:.2g} wide)"
    return Guardrail("p99", ok, f"p99: {text} {limit}", value, low, high, max_ratio)


def _range(low: float, high: float) -> str:
    """Say what is known so far, with a comma; empty if nothing is."""
    if math.isinf(high):
        return f"at least {low:.3g} times the original's, " if low else ""
    return f"{low:.3g} to {high:.3g} times the original's, " if low else f"at most {high:.3g} times the original's, "


def _percentile_bucket(edges: Sequence[float], cumulative: Sequence[int], alpha: float) -> tuple[float, float]:
    """Return the (low, high) edges between which the percentile surely lies."""
    total, low, high = cumulative[-1], 0.0, math.inf
    for edge, below in zip(edges[1:], cumulative, strict=True):
        least, most = share_bounds(total - below, total, alpha)
        if least > 1 - QUANTILE:
            low = edge
        if most < 1 - QUANTILE and edge < high:
            high = edge
    return low, high


def _check_histogram(bounds: Sequence[float], cumulative: Sequence[int]) -> None:
    ascending = all(a < b for a, b in zip([0.0, *bounds], [*bounds, math.inf], strict=True))
    growing = all(0 <= a <= b for a, b in pairwise(cumulative))
    if not bounds or not ascending or not growing or len(cumulative) != len(bounds) + 1:
        raise RedppError(
            f"a histogram with bounds {list(bounds)} and counts {list(cumulative)}",
            "ascending finite bounds and cumulative counts, one more than bounds",
            "pass the bucket counts as the server exports them, +Inf last",
        )


def agreement_guardrail(agreeing: int, pairs: int, limit: float = 0.99, alpha: float = 0.05) -> Guardrail:
    """Judge whether the share of pairs whose outputs agree is at least ``limit`` (0..1)."""
    low, high = share_bounds(agreeing, pairs, alpha)
    if not pairs:
        return Guardrail("agreement", None, "agreement: no pairs yet", None, low, high, limit)
    ok = True if low >= limit else False if high < limit else None
    counts = f"{agreeing} of {pairs} pairs"
    text = {
        True: f"at least {low:.2%} of outputs agree, as required ({limit:.2%}; {counts})",
        False: f"at most {high:.2%} of outputs agree, below {limit:.2%} ({counts})",
        None: f"not yet known whether {limit:.2%} of outputs agree ({counts})",
    }[ok]
    return Guardrail("agreement", ok, f"agreement: {text}", agreeing / pairs, low, high, limit)
