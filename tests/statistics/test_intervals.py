"""Intervals cover as often as they claim, and percentiles of histograms lie in the right bucket."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from redpp_serve.handlers.metrics import SECONDS_BUCKETS
from redpp_serve.statistics.intervals import (
    finite_quantile,
    mean_interval,
    percentile_interval,
    quantile,
    ratio_interval,
)


def autoregressive(rng: np.random.Generator, steps: int, phi: float) -> np.ndarray:
    """Stationary AR(1) noise (steps,) of unit innovations."""
    noise = rng.standard_normal(steps)
    noise[0] /= math.sqrt(1 - phi**2)
    for step in range(1, steps):
        noise[step] += phi * noise[step - 1]
    return noise


def test_percentile_interval_covers() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        estimate = percentile_interval(rng.exponential(size=200), 0.5, rng)
        assert estimate.low <= estimate.value <= estimate.high
        hits += estimate.low <= math.log(2) <= estimate.high
    assert 51 <= hits <= 60


def test_the_interval_has_the_width_that_theory_gives_the_median() -> None:
    """The median of n normal values has a standard deviation of sqrt(pi / 2 / n)."""
    rng = np.random.default_rng(3)
    widths = []
    for _ in range(20):
        found = percentile_interval(rng.standard_normal(400), 0.5, rng, block=1)
        widths.append(found.high - found.low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt(math.pi / 2 / 400), rel=0.1)
    assert percentile_interval([1.0, 2.0, 3.0, 10.0], 0.99, rng).value == pytest.approx(9.79)
    assert percentile_interval([3.0], 0.5, rng) == (3.0, 3.0, 3.0)


def test_pairs_narrow_the_ratio() -> None:
    rng = np.random.default_rng(2)
    load = rng.lognormal(sigma=0.5, size=400)
    a, b = 3.0 * load, 2.0 * load * rng.lognormal(sigma=0.02, size=400)
    paired, unpaired = ratio_interval(a, b, 0.5, rng), ratio_interval(a, rng.permutation(b), 0.5, rng)
    assert paired.low < 1.5 < paired.high and paired.value == np.quantile(a, 0.5) / np.quantile(b, 0.5)
    assert paired.high - paired.low < 0.6 * (unpaired.high - unpaired.low)


def test_blocks_widen_the_interval_of_autocorrelated_values() -> None:
    rng = np.random.default_rng(4)
    values = np.exp(autoregressive(rng, 2000, 0.9))
    single, default, blocks = (percentile_interval(values, 0.5, rng, block=block) for block in (1, None, 50))
    assert blocks.high - blocks.low > 2 * (single.high - single.low)
    assert default.high - default.low > 1.4 * (single.high - single.low), "the default is longer than one value"
    wide, narrow = (ratio_interval(values, values[::-1], 0.5, rng, block=block) for block in (50, 1))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_chunks_of_resamples_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal(50)
    whole = percentile_interval(values, 0.5, np.random.default_rng(1))
    monkeypatch.setattr("redpp_serve.statistics.intervals.CHUNK_VALUES", 50 * 300)
    chunked = percentile_interval(values, 0.5, np.random.default_rng(1))
    assert chunked == pytest.approx(whole, abs=0.05)


def test_mean_of_few_values_covers() -> None:
    rng = np.random.default_rng(6)
    intervals = [mean_interval(rng.standard_normal(6), rng) for _ in range(400)]
    assert 0.91 <= np.mean([x.low <= 0 <= x.high for x in intervals]) <= 0.99


@pytest.mark.parametrize("count", [5, 8])
def test_the_interval_of_a_mean_is_as_wide_as_students(count: int) -> None:
    """For normal values it is, but for the bootstrap's own distribution, which has no tails for few values."""
    rng = np.random.default_rng(7)
    shares = []
    for _ in range(200):
        values = rng.standard_normal(count)
        found = mean_interval(values, rng)
        student = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count)
        shares.append((found.high - found.low) / 2 / student)
    assert 0.95 <= np.mean(shares) <= 1.01


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("block", [None, 1, 7])
def test_the_first_and_the_last_value_are_resampled(place: int, block: int | None) -> None:
    values = np.zeros(30)
    values[place] = 1.0
    assert percentile_interval(values, 1.0, np.random.default_rng(8), block=block).high == 1.0


def test_unequal_pairs_and_no_values_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="3 and 2"):
        ratio_interval([1, 2, 3], [1, 2], 0.5, rng)
    with pytest.raises(ValueError, match="at least one value"):
        percentile_interval([], 0.5, rng)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-5, 10.0), min_size=1, max_size=80), st.sampled_from([0.5, 0.95, 0.99]))
def test_a_percentile_lies_in_the_bucket_of_the_true_one(samples: list[float], share: float) -> None:
    edges = [*SECONDS_BUCKETS, math.inf]
    found = quantile({edge: float(sum(x <= edge for x in samples)) for edge in edges}, share)
    true = np.quantile(samples, share, method="inverted_cdf")
    assert found is not None
    assert found.low <= found.value <= found.high
    assert found.low < true <= found.high or math.isclose(true, found.low)


def test_interpolation_is_linear_within_the_bucket() -> None:
    found = quantile({0.001: 10.0, 0.002: 30.0, 0.004: 40.0, math.inf: 40.0}, 0.5)
    assert found == pytest.approx((0.0015, 0.001, 0.002))
    assert quantile({0.001: 4.0, math.inf: 4.0}, 0.5) == pytest.approx((0.0005, 0.0, 0.001))
    assert quantile({0.001: 0.0, math.inf: 0.0}, 0.5) is None and quantile({}, 0.5) is None
    unknown, known = {0.001: 1.0, math.inf: 4.0}, {0.001: 4.0, math.inf: 4.0}
    assert quantile(unknown, 0.99) == (0.001, 0.001, math.inf) and finite_quantile(unknown, 0.99) is None
    assert finite_quantile(known, 0.5) == pytest.approx(0.0005) and finite_quantile({}, 0.5) is None
    torn = {0.001: 2.0, 0.002: 1.0, math.inf: 4.0}  # a scrape between two writes
    assert quantile({**torn, 0.004: 4.0}, 0.75) == pytest.approx((0.003, 0.002, 0.004)), "not between 1 and 4"
    assert quantile({0.001: 0.0, 0.002: 4.0, math.inf: 4.0}, 0.0) == (0.001, 0.001, 0.002)
    assert quantile(torn, 0.5) == (0.001, 0.0, 0.001) and quantile(torn, 0.75) == (0.002, 0.002, math.inf)
