"""Intervals of counted shares are those of Clopper and Pearson."""

import pytest
from scipy.stats import beta

from redpp_serve.statistics.binomial import clopper_pearson


def test_all_of_sixteen_says_at_least_four_fifths():
    low, high = clopper_pearson(16, 16)
    assert low == pytest.approx(0.794, abs=5e-4) and high == 1.0
    assert clopper_pearson(0, 16) == pytest.approx((0.0, 1 - low), abs=1e-12)


def test_the_interval_is_the_exact_one():
    for trials in (1, 2, 7, 16, 48, 144, 1000):
        for hits in sorted(
            {0, 1, 2, trials // 3, trials // 2, trials - 2, trials - 1, trials} & set(range(trials + 1))
        ):
            for confidence in (0.5, 0.95, 0.999):
                half = (1 - confidence) / 2
                low = beta.ppf(half, hits, trials - hits + 1) if hits else 0.0
                high = beta.ppf(1 - half, hits + 1, trials - hits) if hits < trials else 1.0
                found = clopper_pearson(hits, trials, confidence)
                assert found == pytest.approx((low, high), abs=1e-9), (hits, trials, confidence)
                assert found[0] <= hits / trials <= found[1]


def test_more_trials_say_more():
    widths = [high - low for low, high in (clopper_pearson(9 * n, 10 * n) for n in (1, 4, 16, 64))]
    assert widths == sorted(widths, reverse=True) and widths[-1] < 0.06
