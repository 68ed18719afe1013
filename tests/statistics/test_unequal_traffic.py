"""Two versions under unequal traffic: no false alarms from load, batch sizes or few requests, and honest silence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from benchmarks.verdict_simulation import SIZES, arm_stops, split_windows
from redpp_serve.errors import RedppError
from redpp_serve.statistics.sequences import MINIMUM_BLOCKS, long_run_variance, values_needed
from redpp_serve.statistics.unequal_traffic import ArmSequence, ArmWindow, comparable, influence
from redpp_serve.statistics.verdicts import Verdict, verdict


def simulated(seed: int, windows: int, **options: Any) -> list[ArmWindow]:
    (run,) = split_windows(np.random.default_rng(seed), 1, windows, **options)
    return [dict(zip(SIZES.tolist(), [tuple(row) for row in window.tolist()], strict=True)) for window in run]


def verdict_of(windows: list[ArmWindow]) -> Verdict:
    sequence = ArmSequence()
    sequence.update(windows)
    return verdict(sequence, measure="in the handler")


def false_alarms(runs: int, share: float, phi: float, outliers: float) -> float:
    options: dict[str, Any] = {"share": share, "rate": 100, "swings": True, "phi": phi, "outliers": outliers}
    rng = np.random.default_rng(3)
    stops = [arm_stops(split_windows(rng, 40, 1500, **options)) for _ in range(runs // 40)]
    return float(np.isfinite(stops).mean())


def test_false_alarms_under_continuous_peeking() -> None:
    assert false_alarms(80, 0.1, 0.8, 0.0) <= 0.05


@pytest.mark.exhaustive
def test_false_alarms_under_continuous_peeking_for_all_shares() -> None:
    for case in ((0.1, 0.8, 0.0), (0.1, 0.0, 0.01), (0.01, 0.5, 0.0), (0.5, 0.8, 0.0)):
        assert false_alarms(200, *case) <= 0.05, case


def test_the_ratio_is_that_of_batches_of_one_size_at_one_time() -> None:
    """The original's batches are larger and its traffic lies in slow hours: its plain mean would be 3 times as long."""
    fast = {1: (1, 0.010, 9, 0.090), 8: (0, 0.0, 0, 0.0)}
    slow = {1: (9, 0.180, 1, 0.020), 8: (40, 4.0, 10, 1.0)}
    result = verdict_of([fast, slow] * 100)
    assert result.mean == pytest.approx(1.0) and result.kind == "equivalent"
    halved = [{n: (a, x, b, y / 2) for n, (a, x, b, y) in window.items()} for window in (fast, slow)]
    result = verdict_of(halved * 100)
    assert result.kind == "faster" and result.mean == pytest.approx(2.0)
    assert "pruned is 2.00 times as fast as original in the handler (95 % confidence sequence" in result.text


def test_few_and_unequal_counts_do_not_bias_the_ratio() -> None:
    """Per window a log of skewed times would be off by a tenth: 30 batches against one."""
    rng = np.random.default_rng(0)
    many, one = rng.exponential(size=(5000, 30)).sum(axis=1), rng.exponential(size=5000)
    sequence = ArmSequence()
    sequence.update([{1: (30, a, 1, b)} for a, b in zip(many.tolist(), one.tolist(), strict=True)])
    assert abs(sequence.mean) < 0.05
    assert np.mean(np.log(many / 30) - np.log(one)) > 0.5


def test_a_difference_is_found_with_its_size() -> None:
    result = verdict_of(simulated(1, 1500, share=0.1, rate=100, effect=math.log(1.2), swings=True, phi=0.5))
    assert result.kind == "faster" and result.low < 1.2 < result.high and result.needed == 0
    slower = verdict_of(simulated(2, 1500, share=0.1, rate=100, effect=math.log(0.8), swings=True, phi=0.5))
    assert slower.kind == "slower" and slower.text.startswith("pruned takes 1.2")


def test_portions_give_the_same_interval_to_the_last_bit() -> None:
    windows = simulated(0, 500, share=0.1, rate=20, phi=0.5)
    whole, single = ArmSequence(), ArmSequence()
    whole.update(windows)
    for window in windows:
        single.update([window])
    assert whole.interval() == single.interval() and math.isfinite(whole.interval()[0])
    assert (whole.mean, whole.values, whole.basis) == (single.mean, single.values, single.basis)
    assert verdict(single, measure="in the handler") == verdict_of(windows)


def test_windows_with_one_silent_arm_change_nothing_but_their_count() -> None:
    windows = simulated(0, 400, share=0.1, rate=20)
    silent: ArmWindow = {1: (30, 0.3, 0, 0.0), 4: (0, 0.0, 2, 0.05)}
    with_gaps, without = ArmSequence(), ArmSequence()
    without.update(windows)
    with_gaps.update([x for window in windows for x in (window, silent, {})])
    assert with_gaps.interval() == without.interval()
    assert with_gaps.windows == 3 * without.windows == 1200
    assert "with a counterpart of" in with_gaps.basis and with_gaps.basis.endswith("in 1200 windows")


def test_what_is_missing_is_named() -> None:
    cases: list[tuple[ArmWindow, str]] = [
        ({}, "the original has no traffic"),
        ({1: (0, 0.0, 5, 0.1)}, "the original has no traffic"),
        ({1: (5, 0.1, 0, 0.0)}, "the pruned version has no traffic"),
        ({1: (5, 0.1, 0, 0.0), 2: (0, 0.0, 5, 0.1)}, "no batch size was seen in both versions within one window"),
        ({1: (5, 0.0, 5, 0.0)}, "no time was measured"),
        ({1: (5, 0.1, 5, 0.0)}, "no time was measured"),
    ]
    for window, reason in cases:
        result = verdict_of([window] * 100)
        assert result.kind == "undecided" and result.text.endswith(reason), reason
        assert (result.low, result.high, result.mean, result.needed) == (0.0, math.inf, None, None), reason


def test_few_windows_are_no_interval() -> None:
    result = verdict_of([{1: (5, 0.1, 5, 0.2)}] * 19)
    few = "95 and 95 batches in 19 windows, 19 of 20 windows with traffic on both versions"
    assert result.text.endswith(few)
    for count, known in ((MINIMUM_BLOCKS - 1, False), (MINIMUM_BLOCKS, True)):
        sequence = ArmSequence(target=MINIMUM_BLOCKS)
        sequence.update([{1: (5, 0.1, 5, 0.2)}] * count)
        assert math.isfinite(sequence.interval()[1]) == known and (sequence.missing == "") == known


def test_equal_windows_are_known_exactly() -> None:
    result = verdict_of([{1: (5, 0.1, 1, 0.01)}] * 100)
    assert result.kind == "faster" and (result.low, result.high) == pytest.approx((2.0, 2.0))


def test_the_forecast_counts_windows() -> None:
    windows = simulated(5, 300, share=0.1, rate=100, effect=math.log(1.03))
    result = verdict_of(windows)
    assert result.kind == "undecided" and result.unit == "windows"
    assert result.needed is not None and 300 < result.needed < 10_000
    sequence = ArmSequence()
    sequence.update(windows)
    sums = np.array([comparable(np.array(list(window.values()))) for window in windows])
    length = len(windows) // sequence.blocks
    sums = sums[: length * sequence.blocks].reshape(sequence.blocks, length, 3).sum(axis=1)
    spread = math.sqrt(long_run_variance(influence(sums)) * sequence.values / sequence.blocks)
    total = values_needed(sequence.mean, spread, 0.02, sequence.rho2, 0.05)
    assert total is not None
    assert result.needed == pytest.approx((total / sequence.values - 1) * 300, rel=0.05)
    gaps = verdict_of([x for window in windows for x in (window, {})])
    assert gaps.needed == pytest.approx(2 * result.needed, rel=0.01), "an empty window in two doubles the wait"


def test_a_window_is_weighed_by_the_batches_that_have_a_counterpart() -> None:
    """By the docstring's formula: sums of n_b s_a / n and n_a s_b / n, brought down to a weight of at most 1."""
    light = np.array([[1.0, 0.3, 3.0, 0.6], [7.0, 9.0, 0.0, 0.0]])
    assert comparable(light) == pytest.approx([3 * 0.3 / 4, 1 * 0.6 / 4, 3 / 4])
    heavy = np.array([[10.0, 0.3, 30.0, 0.6], [4.0, 1.0, 4.0, 2.0]])
    weight = 300 / 40 + 2
    expected = [(30 * 0.3 / 40 + 0.5) / weight, (10 * 0.6 / 40 + 1.0) / weight, 1.0]
    assert comparable(heavy) == pytest.approx(expected)


def test_influences_add_up_to_nothing_and_follow_the_ratio() -> None:
    sums = np.array([[1.0, 2.0, 1.0], [3.0, 2.0, 1.0], [2.0, 2.0, 1.0]])
    assert influence(sums) == pytest.approx([-0.5, 0.5, 0.0])


def test_counters_that_cannot_be_are_refused() -> None:
    for counters in (
        (1, math.nan, 1, 0.1),
        (1, 0.1, 1, math.inf),
        (-1, 0.0, 1, 0.1),
        (1, -0.1, 1, 0.1),
        (0, 0.1, 1, 0.1),
        (1, 0.1, 0, 0.1),
    ):
        with pytest.raises(RedppError, match="batches of 4 with the counters"):
            verdict_of([{4: counters}])
