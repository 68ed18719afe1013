"""Guardrails answer yes, no or not yet, and hardly ever wrongly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.verdict_guardrails import BOUNDS, agreement_stops, error_stops, p99_stops
from redpp_serve.errors import RedppError
from redpp_serve.statistics.guardrails import agreement_guardrail, error_guardrail, p99_guardrail, share_bounds


def test_bounds_are_where_the_mixed_likelihood_is_20_times_the_point_s() -> None:
    for hits, trials in ((0, 1), (0, 700), (3, 700), (350, 700), (700, 700), (99_990, 100_000)):
        low, high = share_bounds(hits, trials, 0.05)
        assert low <= hits / trials <= high and (low == 0.0) == (hits == 0) and (high == 1.0) == (hits == trials)
        mixed = math.lgamma(hits + 0.5) + math.lgamma(trials - hits + 0.5) - math.lgamma(trials + 1) - math.log(math.pi)
        for p in (low, high):
            if 0 < p < 1:
                log_likelihood = hits * math.log(p) + (trials - hits) * math.log1p(-p)
                assert mixed - log_likelihood == pytest.approx(math.log(20), abs=1e-6), (hits, trials)


def test_bounds_mirror_and_narrow() -> None:
    low, high = share_bounds(30, 1000, 0.05)
    assert share_bounds(970, 1000, 0.05) == pytest.approx((1 - high, 1 - low))
    wide = share_bounds(3, 100, 0.05)
    assert wide[0] < low and high < wide[1] and share_bounds(0, 0, 0.05) == (0.0, 1.0)


def test_bounds_hold_at_all_times() -> None:
    hits = np.random.default_rng(0).binomial(1, 0.2, (50, 150)).cumsum(axis=1)
    missed = [
        any(not low <= 0.2 <= high for low, high in (share_bounds(int(k), n, 0.05) for n, k in enumerate(run, 1)))
        for run in hits
    ]
    assert np.mean(missed) <= 0.06


def test_limits_that_are_just_kept_are_hardly_ever_called_broken() -> None:
    rng = np.random.default_rng(1)
    for wrong, _ in (
        error_stops(rng, 60, 300, 0.01, 0.01),
        agreement_stops(rng, 60, 600, 0.99),
        p99_stops(rng, 60, 800, 1.5, 0.8),
    ):
        assert np.isfinite(wrong).mean() <= 0.05


def test_errors() -> None:
    kept = error_guardrail(3, 9000, 0, 1000)
    assert (kept.name, kept.ok, kept.limit) == ("errors", True, 0.01) and kept.value == pytest.approx(-3 / 9000)
    broken = error_guardrail(3, 9000, 40, 1000)
    assert broken.ok is False and 0.01 < broken.low < broken.value < broken.high
    counts = "(40 of 1000 against 3 of 9000)"
    assert broken.text == f"errors: at least 1.87 points more than the original's, above 1 points {counts}"
    assert error_guardrail(3, 9000, 40, 1000, max_gap=0.05).ok is None
    assert error_guardrail(400, 9000, 45, 1000).ok is None, "both versions fail alike"
    assert error_guardrail(0, 90, 0, 10).ok is None
    assert error_guardrail(0, 90, 0, 0).text == "errors: no requests yet to both versions"


def histogram(times: np.ndarray) -> list[int]:
    return [int((times <= bound).sum()) for bound in BOUNDS] + [times.size]


def test_tails() -> None:
    rng = np.random.default_rng(0)
    original, pruned = (0.01 * rng.lognormal(0, 0.4, count) for count in (90_000, 10_000))
    base, bounds = histogram(original), BOUNDS.tolist()
    kept = p99_guardrail(bounds, base, histogram(pruned))
    assert kept.ok is True and kept.value == pytest.approx(1.0, abs=0.15) and kept.low <= kept.value <= kept.high
    broken = p99_guardrail(bounds, base, histogram(4 * pruned))
    assert broken.ok is False and 1.5 < broken.low <= 4 <= broken.high and broken.text.startswith("p99: at least 2")
    assert p99_guardrail(bounds, base, histogram(4 * pruned), max_ratio=6).ok is True
    undecided = p99_guardrail(bounds, base, histogram(pruned[:150]))
    assert undecided.ok is None and undecided.low < 1 < undecided.high and "not yet decided" in undecided.text
    few = p99_guardrail(bounds, base, histogram(4 * pruned[:99]))
    assert few.ok is None and few.text == "p99: 90000 and 99 times, at least 100 of each version needed"
    assert p99_guardrail(bounds, base, histogram(1000 * pruned)).value is None, "beyond the last bucket"


def test_the_vectorised_guardrails_are_the_product_s() -> None:
    """The first 500 requests of a run, one after the other."""
    steps = 500
    rolled, kept = p99_stops(np.random.default_rng(3), 1, steps, 4.0)
    rng = np.random.default_rng(3)
    shared = rng.standard_normal((steps, 1))[:, 0] * math.sqrt(0.5)
    arms = []
    for scale, count in ((1.0, 9), (4.0, 1)):
        own = rng.standard_normal((1, steps, count))[0] * math.sqrt(0.5)
        arms.append(0.01 * scale * np.exp(0.4 * (own + shared[:, None])))
    answers = []
    for n in range(1, steps + 1):
        counts = [histogram(times[:n].ravel()) for times in arms]
        answers.append(p99_guardrail(BOUNDS.tolist(), *counts).ok)
    assert math.isfinite(rolled[0]) and answers.index(False) + 1 == rolled[0]
    assert (True in answers) == math.isfinite(kept[0])


def test_histograms_that_cannot_be_are_refused() -> None:
    for bounds, counts in (
        ([], [5]),
        ([0.1, 0.1], [1, 2, 3]),
        ([0.1, math.inf], [1, 2, 3]),
        ([0.2, 0.1], [1, 2, 3]),
        ([0.1], [3, 2]),
        ([0.1], [1, 2, 3]),
        ([0.1], [-1, 2]),
        ([math.nan, 0.1], [1, 2, 3]),
        ([math.nan], [1, 2]),
        ([0.0], [1, 2]),
    ):
        with pytest.raises(RedppError, match="a histogram with bounds"):
            p99_guardrail(bounds, counts, counts)


def test_counts_that_cannot_be_are_refused() -> None:
    for hits, trials in ((-1, 3), (4, 3), (0, -1)):
        with pytest.raises(RedppError, match=f"{hits} of {trials}"):
            share_bounds(hits, trials, 0.05)


def test_agreement() -> None:
    kept, broken, unknown = (agreement_guardrail(k, 1000) for k in (1000, 900, 990))
    assert (kept.ok, broken.ok, unknown.ok) == (True, False, None)
    share = "at least 99.30% of outputs agree, as required"
    assert kept.text == f"agreement: {share} (99.00%; 1000 of 1000 pairs)"
    assert agreement_guardrail(0, 0).text == "agreement: no pairs yet" and agreement_guardrail(0, 0).value is None
    assert agreement_guardrail(990, 1000, limit=0.95).ok is True


def test_limits_are_judged_by_the_bounds_and_not_by_the_measured_value() -> None:
    """Each limit is put just inside and just outside of a bound of the same counts."""
    gap = error_guardrail(30, 1000, 60, 1000)
    assert [error_guardrail(30, 1000, 60, 1000, max_gap=x).ok for x in (gap.low - 1e-9, gap.low, gap.high)] == [
        False,
        None,
        True,
    ]
    assert error_guardrail(30, 1000, 60, 1000, max_gap=gap.high - 1e-9).ok is None
    (low_a, high_a), (low_b, high_b) = share_bounds(30, 1000, 0.025), share_bounds(60, 1000, 0.025)
    assert (gap.low, gap.high) == (low_b - high_a, high_b - low_a), "each version's rate is bounded at alpha / 2"
    share = agreement_guardrail(950, 1000)
    limits = (share.low, share.low + 1e-9, share.high, share.high + 1e-9)
    assert [agreement_guardrail(950, 1000, limit=x).ok for x in limits] == [True, None, None, False]
    tail = p99_guardrail([0.1, 0.2, 0.4], [9000, 9000, 9000, 9000], [0, 9000, 9000, 9000])
    assert (tail.low, tail.high) == (1.0, math.inf) and tail.ok is None
    tail = p99_guardrail([0.1, 0.2, 0.4], [0, 9000, 9000, 9000], [0, 0, 9000, 9000])
    assert (tail.low, tail.high) == (1.0, 4.0)
    ok = [p99_guardrail([0.1, 0.2, 0.4], [0, 9000, 9000, 9000], [0, 0, 9000, 9000], max_ratio=x).ok for x in (0.9, 1.0)]
    assert ok == [False, None], "as long as the limit is not longer than it"
    ok = [p99_guardrail([0.1, 0.2, 0.4], [0, 9000, 9000, 9000], [0, 0, 9000, 9000], max_ratio=x).ok for x in (1.9, 2)]
    assert ok == [None, True], "twice the limit, for a bucket is twice as wide as the one below it"


def test_a_tail_is_judged_from_100_times_of_each_version() -> None:
    for original, pruned, known in ((100, 99, False), (99, 100, False), (100, 100, True)):
        rail = p99_guardrail([0.1, 0.2], [original] * 3, [0, pruned, pruned])
        assert ("needed" not in rail.text) == known, (original, pruned)


def test_what_is_not_known_of_a_tail_is_not_put_in_numbers() -> None:
    beyond = p99_guardrail([0.1, 0.2], [0, 0, 300], [0, 0, 300])  # nobody knows how long
    assert beyond.ok is None and beyond.text.startswith("p99: not yet decided (limit 1.5")
    half = p99_guardrail([0.1, 0.2], [0, 3000, 3000], [0, 0, 300])
    assert half.ok is None and half.text.startswith("p99: at least 1 times the original's, not yet decided")
    assert p99_guardrail([0.1, 0.2], [0, 0, 300], [3000, 3000, 3000]).ok is True  # one end is enough
