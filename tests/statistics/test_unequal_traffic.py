"""Two arms under unequal traffic: no false alarms from load, batch sizes or few requests, and honest silence."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.verdict_simulation import SIZES, arm_stops, split_windows
from redpp_serve.errors import RedppError
from redpp_serve.statistics.intervals import verdict
from redpp_serve.statistics.unequal_traffic import ArmSequence, ArmWindow, split_verdict


def simulated(seed: int, windows: int, **options: Any) -> list[ArmWindow]:
    (run,) = split_windows(numpy.random.default_rng(seed), 1, windows, **options)
    return [dict(zip(SIZES.tolist(), [tuple(row) for row in window.tolist()], strict=True)) for window in run]


@pytest.mark.parametrize(
    ("share", "phi", "outliers"), [(0.1, 0.8, 0.0), (0.1, 0.0, 0.01), (0.01, 0.5, 0.0), (0.5, 0.8, 0.0)]
)
def test_false_alarms_under_continuous_peeking(share: float, phi: float, outliers: float) -> None:
    options: dict[str, Any] = {"share": share, "rate": 100, "swings": True, "phi": phi, "outliers": outliers}
    rng = numpy.random.default_rng(3)
    stops = [arm_stops(split_windows(rng, 50, 1500, **options)) for _ in range(4)]
    assert numpy.isfinite(stops).mean() <= 0.05


def test_the_ratio_is_that_of_batches_of_one_size_at_one_time() -> None:
    """The original's batches are larger and its traffic lies in slow hours: its plain mean would be 3 times as long."""
    fast = {1: (1, 0.010, 9, 0.090), 8: (0, 0.0, 0, 0.0)}
    slow = {1: (9, 0.180, 1, 0.020), 8: (40, 4.0, 10, 1.0)}
    result = split_verdict([fast, slow] * 100)
    assert result.mean == pytest.approx(1.0) and result.kind == "equivalent"
    halved = [{n: (a, x, b, y / 2) for n, (a, x, b, y) in window.items()} for window in (fast, slow)]
    result = split_verdict(halved * 100)
    assert result.kind == "faster" and result.mean == pytest.approx(2.0)
    assert "pruned is 2.00 times as fast as original in the handler (95 % confidence sequence" in result.text


def test_few_and_unequal_counts_do_not_bias_the_ratio() -> None:
    """Per window a log of skewed times would be off by a tenth: 30 batches against one."""
    rng = numpy.random.default_rng(0)
    many, one = rng.exponential(size=(20_000, 30)).sum(axis=1), rng.exponential(size=20_000)
    sequence = ArmSequence()
    sequence.update([{1: (30, a, 1, b)} for a, b in zip(many.tolist(), one.tolist(), strict=True)])
    assert abs(sequence.mean) < 0.03
    assert numpy.mean(numpy.log(many / 30) - numpy.log(one)) > 0.5


def test_a_difference_is_found_with_its_size() -> None:
    result = split_verdict(simulated(1, 1500, share=0.1, rate=100, effect=math.log(1.2), swings=True, phi=0.5))
    assert result.kind == "faster" and result.low < 1.2 < result.high and result.needed == 0
    slower = split_verdict(simulated(2, 1500, share=0.1, rate=100, effect=math.log(0.8), swings=True, phi=0.5))
    assert slower.kind == "slower" and slower.text.startswith("pruned takes 1.2")


def test_portions_give_the_same_interval_to_the_last_bit() -> None:
    windows = simulated(0, 500, share=0.1, rate=20, phi=0.5)
    whole, single = ArmSequence(), ArmSequence()
    whole.update(windows)
    for window in windows:
        single.update([window])
    assert whole.interval() == single.interval() and math.isfinite(whole.interval()[0])
    assert (whole.mean, whole.values, whole.basis) == (single.mean, single.values, single.basis)
    names = {"baseline": "original", "candidate": "pruned", "measure": "in the handler"}
    assert verdict(single, **names) == split_verdict(windows)


def test_windows_with_one_silent_arm_change_nothing_but_their_count() -> None:
    windows = simulated(0, 400, share=0.1, rate=20)
    silent: ArmWindow = {1: (30, 0.3, 0, 0.0), 4: (0, 0.0, 2, 0.05)}
    with_gaps, without = ArmSequence(), ArmSequence()
    without.update(windows)
    with_gaps.update([x for window in windows for x in (window, silent, {})])
    assert with_gaps.interval() == without.interval()
    assert with_gaps.windows == 3 * without.windows == 1200
    assert "with a counterpart of" in with_gaps.basis and with_gaps.basis.endswith("in 1200 windows")


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        ({}, "the original has no traffic"),
        ({1: (0, 0.0, 5, 0.1)}, "the original has no traffic"),
        ({1: (5, 0.1, 0, 0.0)}, "the pruned network has no traffic"),
        ({1: (5, 0.1, 0, 0.0), 2: (0, 0.0, 5, 0.1)}, "no batch size was seen in both arms within one window"),
        ({1: (5, 0.0, 5, 0.0)}, "no time was measured"),
    ],
)
def test_what_is_missing_is_named(window: ArmWindow, reason: str) -> None:
    result = split_verdict([window] * 100)
    assert result.kind == "undecided" and result.text.endswith(reason)
    assert (result.low, result.high, result.mean, result.needed) == (0.0, math.inf, None, None)


def test_few_windows_are_no_interval() -> None:
    result = split_verdict([{1: (5, 0.1, 5, 0.2)}] * 19)
    assert result.text.endswith("95 and 95 batches in 19 windows, at least 20 windows with traffic on both arms needed")


def test_equal_windows_are_known_exactly() -> None:
    result = split_verdict([{1: (5, 0.1, 1, 0.01)}] * 100)
    assert result.kind == "faster" and (result.low, result.high) == pytest.approx((2.0, 2.0))


def test_the_forecast_counts_windows() -> None:
    windows = simulated(5, 300, share=0.1, rate=100, effect=math.log(1.03))
    result = split_verdict(windows)
    assert result.kind == "undecided" and result.unit == "windows"
    assert result.needed is not None and 300 < result.needed < 10_000
    gaps = split_verdict([x for window in windows for x in (window, {})])
    assert gaps.needed == pytest.approx(2 * result.needed, rel=0.01), "an empty window in two doubles the wait"


@pytest.mark.parametrize(
    "counters",
    [
        (1, math.nan, 1, 0.1),
        (1, 0.1, 1, math.inf),
        (-1, 0.0, 1, 0.1),
        (1, -0.1, 1, 0.1),
        (0, 0.1, 1, 0.1),
        (1, 0.1, 0, 0.1),
    ],
)
def test_counters_that_cannot_be_are_refused(counters: tuple[float, float, float, float]) -> None:
    with pytest.raises(RedppError, match="batches of 4 with the counters"):
        split_verdict([{4: counters}])
