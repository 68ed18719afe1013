"""The confidence sequence of pairs keeps its promise under peeking, many kinds of noise, and any order of feeding."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.verdict_simulation import PAIRED, paired_stops
from redpp_serve.errors import RedppError
from redpp_serve.statistics.sequences import (
    MAXIMUM_BLOCKS,
    MINIMUM_BLOCKS,
    TARGET,
    Blocks,
    RatioSequence,
    best_rho2,
    half_width,
    long_run_variance,
    values_needed,
)


def test_false_alarms_under_continuous_peeking() -> None:
    """Without the correction for correlation AR(1) is far above, without longer blocks correlation under noise."""
    for name, noise in PAIRED.items():
        stops = paired_stops(noise(np.random.default_rng(11), 200, 3000))
        assert np.isfinite(stops).mean() <= 0.05, name


def test_without_longer_blocks_a_slow_component_would_raise_false_alarms() -> None:
    values = PAIRED["independent over AR(1) 0.9"](np.random.default_rng(11), 200, 600)
    assert np.isfinite(paired_stops(values, most=math.inf)).mean() > 0.1


def test_peeking_at_a_plain_interval_would_raise_false_alarms() -> None:
    x = np.random.default_rng(11).standard_normal((500, 400))
    t = np.arange(1, 401)
    outside = np.abs(x.cumsum(1) / t) > 1.96 / np.sqrt(t)
    assert outside[:, MINIMUM_BLOCKS:].any(1).mean() > 0.2


def test_differences_are_found() -> None:
    for effect, pairs, share in ((0.02, 10_400, 0.75), (0.05, 2000, 0.8), (0.10, 800, 0.95)):
        noise = 0.5 * np.random.default_rng(5).standard_normal((100, pairs))
        assert np.isfinite(paired_stops(math.log1p(effect) + noise)).mean() > share, effect


def known_half(values: float, rho2: float, alpha: float = 0.05) -> float:
    """The normal mixture for a known variance of 1, written down from its source."""
    mixed = values * rho2 + 1
    return math.sqrt(2 * mixed / (values**2 * rho2) * math.log(math.sqrt(mixed) / alpha))


def test_little_width_is_lost_on_independent_values() -> None:
    rng = np.random.default_rng(2)
    for values in (1000, 3000, 10_000):
        halves = []
        for _ in range(20):
            sequence = RatioSequence()
            sequence.update(rng.standard_normal(values))
            low, high = sequence.interval()
            halves.append((high - low) / 2)
        assert 1.0 < np.median(halves) / known_half(values, sequence.rho2) < 1.15, values


def test_many_blocks_make_the_mixture_of_a_known_variance() -> None:
    x = np.random.default_rng(0).standard_normal(1_000_000)
    centred = (x - x.mean()) / x.std()
    rho2 = best_rho2(TARGET, 0.05)
    assert float(half_width(centred, x.size, rho2, 0.05)) == pytest.approx(known_half(x.size, rho2), rel=0.01)


def test_rho_makes_the_sequence_tightest_at_its_target() -> None:
    widths = [known_half(500, best_rho2(target, 0.05)) for target in (50, 500, 5000)]
    assert widths[1] == min(widths)


def test_the_width_is_the_formulas_to_the_last_digits() -> None:
    """Written down again from the docstring, with blocks that are correlated by a known amount."""
    x = np.array([1.0, 2.0, 4.0, 3.0] * 6)
    centred, k, rho2, alpha = x - x.mean(), 24, 0.004, 0.05
    r = (centred[1:] * centred[:-1]).sum() / (centred**2).sum()
    r = max(r + (1 + 3 * r) / k, 0.0)  # Kendall 1954: the estimate is too small by (1 + 3 r) / k
    assert 0.01 < r < 0.2
    f, clock = (1 + r) / (1 - r), 2400 * rho2
    a = ((1 + clock) / alpha**2) ** (f / k)
    expected = math.sqrt((centred**2).mean() * f * (a - 1) / (1 - a / (1 + clock)))
    assert float(half_width(centred, 2400, rho2, alpha)) == pytest.approx(expected, rel=1e-12)
    assert long_run_variance(x) == pytest.approx(x.var(ddof=1) * f, rel=1e-12)


def test_correlated_blocks_widen_the_interval_and_alternating_ones_do_not_narrow_it() -> None:
    x = np.random.default_rng(0).standard_normal(64)
    plain = float(half_width(x - x.mean(), 6400, 0.004, 0.05))
    grown = np.sort(x)
    assert float(half_width(grown - grown.mean(), 6400, 0.004, 0.05)) > 3 * plain
    alternating = np.array([1.0, -1.0] * 32)
    assert long_run_variance(alternating) == pytest.approx(64 / 63)


def test_blocks_double_and_their_number_stays_bounded() -> None:
    blocks = Blocks(1, block=4)
    values = np.random.default_rng(0).standard_normal((9999, 1))
    lengths = []
    for row in values.tolist():
        blocks.extend([row])
        assert len(blocks) < MAXIMUM_BLOCKS
        lengths.append(blocks.length)
    assert sorted(set(lengths)) == [4, 8, 16, 32, 64, 128] and len(blocks) >= MAXIMUM_BLOCKS // 2
    whole = len(blocks) * blocks.length
    expected = values[:whole].reshape(len(blocks), -1).sum(1)
    assert blocks.sums[:, 0] == pytest.approx(expected, abs=1e-9) and 9999 - whole < blocks.length


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=20), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_portions_give_the_same_interval_to_the_last_bit(cuts: list[int], block: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(900)
    whole, single, parts = (RatioSequence(block=block) for _ in range(3))
    whole.update(values)
    for value in values:
        single.update([value])
    for part in np.split(values, np.minimum(np.cumsum(cuts), 900)):
        parts.update(part)
    assert whole.interval() == single.interval() == parts.interval() and whole.mean == single.mean
    assert math.isfinite(whole.interval()[0]) and whole.values == single.values == parts.values


def test_large_values_keep_their_small_variance() -> None:
    noise = np.random.default_rng(0).standard_normal(6400)
    near, far = RatioSequence(), RatioSequence()
    near.update(noise)
    far.update(noise + 1e6)
    widths = [high - low for low, high in (near.interval(), far.interval())]
    assert widths[1] == pytest.approx(widths[0], rel=1e-6)


def test_constant_values_are_known_exactly() -> None:
    for constant in (0.0, math.log(0.8), -1e-3):
        sequence = RatioSequence()
        sequence.update([constant] * 333)
        assert sequence.interval() == pytest.approx((constant, constant), abs=1e-11)


def test_no_interval_before_enough_blocks() -> None:
    sequence = RatioSequence(block=4)
    assert (sequence.mean, sequence.values, sequence.needed(0.02)) == (0.0, 0, None)
    sequence.update(np.random.default_rng(0).standard_normal(79))
    assert sequence.blocks == MINIMUM_BLOCKS - 1 and sequence.missing == "at least 80 needed"
    assert sequence.interval() == (-math.inf, math.inf) and sequence.needed(0.02) is None
    sequence.update([0.1])
    assert sequence.blocks == MINIMUM_BLOCKS and sequence.missing != "at least 80 needed"
    assert sequence.needed(0.02) is not None
    sequence.update(np.random.default_rng(1).standard_normal(300))
    assert math.isfinite(sequence.interval()[1]) and sequence.missing == ""


def test_the_first_interval_comes_with_the_last_of_the_minimum_blocks() -> None:
    for count, known in ((MINIMUM_BLOCKS - 1, False), (MINIMUM_BLOCKS, True)):
        sequence = RatioSequence(target=MINIMUM_BLOCKS)
        sequence.update(np.random.default_rng(0).standard_normal(count))
        assert math.isfinite(sequence.interval()[1]) == known and (sequence.missing == "") == known


def test_what_is_no_number_is_refused_and_nothing_is_taken_in() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        sequence = RatioSequence()
        with pytest.raises(RedppError, match="log-ratio of"):
            sequence.update([0.0, bad])
        assert sequence.values == 0


def test_the_forecast_is_where_the_width_meets_the_effect() -> None:
    rho2 = best_rho2(TARGET, 0.05)
    for mean in (math.log(1.1), -math.log(1.1), 0.0, 0.001):
        distance = max(abs(mean), math.log1p(0.02) - abs(mean))
        total = values_needed(mean, 0.5, 0.02, rho2, 0.05)
        assert total is not None, mean
        assert 0.5 * known_half(total, rho2) < distance <= 0.5 * known_half(total - 2, rho2), mean


def test_the_forecast_knows_equivalence_and_its_own_end() -> None:
    rho2 = best_rho2(TARGET, 0.05)
    same = values_needed(0.0, 0.5, 0.02, rho2, 0.05)
    assert same == values_needed(math.log(1.02), 0.5, 0.001, rho2, 0.05), "as far from 1 as 1 from the margin"
    assert same is not None and 5000 < same < 20_000
    assert values_needed(1e-6, 0.5, 1e-9, rho2, 0.05) is None


def test_the_forecast_is_of_further_values() -> None:
    """The total is what a known mean and noise need; those that were seen are taken off."""
    sequence = RatioSequence()
    sequence.update(math.log(1.05) + 0.5 * np.random.default_rng(4).standard_normal(420))
    values, means = sequence.values, math.log(1.05) + 0.5 * np.random.default_rng(4).standard_normal(420)
    means = means[:values].reshape(sequence.blocks, -1).mean(axis=1)
    spread = math.sqrt(long_run_variance(means) * values / sequence.blocks)
    total = values_needed(sequence.mean, spread, 0.02, sequence.rho2, 0.05)
    assert total is not None and sequence.needed(0.02) == total - values


def test_the_forecast_comes_true() -> None:
    rng, hits = np.random.default_rng(4), 0
    for _ in range(20):
        sequence = RatioSequence()
        sequence.update(math.log(1.05) + 0.5 * rng.standard_normal(400))
        more = sequence.needed(0.02)
        assert more is not None
        sequence.update(math.log(1.05) + 0.5 * rng.standard_normal(3 * more))
        hits += sequence.interval()[0] > 0
    assert hits >= 14
