"""Intervals cover as often as they claim; verdicts say what they mean."""

import math

import numpy
import pytest

from redpp_serve.statistics.intervals import mean_interval, percentile_interval, ratio_interval, rounded, verdict
from redpp_serve.statistics.sequences import RatioSequence

NAMES = {"baseline": "original", "candidate": "pruned", "measure": "end to end"}


def autoregressive(rng: numpy.random.Generator, steps: int, phi: float) -> numpy.ndarray:
    """Stationary AR(1) noise (steps,) of unit innovations."""
    noise = rng.standard_normal(steps)
    noise[0] /= math.sqrt(1 - phi**2)
    for step in range(1, steps):
        noise[step] += phi * noise[step - 1]
    return noise


def test_percentile_interval_covers() -> None:
    rng = numpy.random.default_rng(1)
    hits = 0
    for _ in range(60):
        estimate = percentile_interval(rng.exponential(size=200), 0.5, rng)
        assert estimate.low <= estimate.value <= estimate.high
        hits += estimate.low <= math.log(2) <= estimate.high
    assert hits >= 51


def test_pairs_narrow_the_ratio() -> None:
    rng = numpy.random.default_rng(2)
    load = rng.lognormal(sigma=0.5, size=400)
    a, b = 3.0 * load, 2.0 * load * rng.lognormal(sigma=0.02, size=400)
    paired, free = ratio_interval(a, b, 0.5, rng), ratio_interval(a, b, 0.5, rng, pairs=False)
    assert paired.low < 1.5 < paired.high
    assert paired.high - paired.low < 0.6 * (free.high - free.low)


def test_blocks_widen_the_interval_of_autocorrelated_values() -> None:
    rng = numpy.random.default_rng(4)
    values = numpy.exp(autoregressive(rng, 2000, 0.9))
    single, blocks = percentile_interval(values, 0.5, rng, block=1), percentile_interval(values, 0.5, rng, block=50)
    assert blocks.high - blocks.low > 2 * (single.high - single.low)


def test_mean_of_few_values_covers() -> None:
    rng = numpy.random.default_rng(6)
    intervals = [mean_interval(rng.standard_normal(6), rng) for _ in range(400)]
    assert 0.91 <= numpy.mean([x.low <= 0 <= x.high for x in intervals]) <= 0.99


def test_unequal_pairs_and_no_values_are_refused() -> None:
    rng = numpy.random.default_rng(0)
    with pytest.raises(ValueError, match="3 and 2"):
        ratio_interval([1, 2, 3], [1, 2], 0.5, rng)
    with pytest.raises(ValueError, match="at least one value"):
        percentile_interval([], 0.5, rng)


def sequence_of(ratio: float, spread: float, pairs: int = 800) -> RatioSequence:
    """Independent noise, scaled so that the mean is ``log(ratio)`` to the last pair."""
    noise = numpy.random.default_rng(0).standard_normal(pairs)
    sequence = RatioSequence(block=4)
    sequence.update(math.log(ratio) + spread * (noise - noise.mean()))
    return sequence


def test_verdict_faster() -> None:
    result = verdict(sequence_of(1.62, 0.1), **NAMES)
    assert result.kind == "faster"
    assert result.text == (
        "pruned is 1.62 times as fast as original end to end (95 % confidence sequence 1.60 to 1.64 from 800 pairs)"
    )
    assert (result.mean, result.needed) == (pytest.approx(1.62), 0)
    assert result.low == pytest.approx(1.60, abs=0.005) and result.high == pytest.approx(1.64, abs=0.005)


def test_verdict_slower_is_told_as_a_longer_time() -> None:
    result = verdict(sequence_of(0.8, 0.0), **NAMES)
    assert result.kind == "slower" and result.high < 1
    assert result.text.startswith(
        "pruned takes 1.25 times as long as original end to end (95 % confidence sequence 1.2"
    )


def test_verdict_equivalent_within_the_margin() -> None:
    assert verdict(sequence_of(1.005, 0.0), **NAMES).kind == "equivalent"
    assert verdict(sequence_of(1.005, 0.0), margin=0.001, **NAMES).kind == "faster"
    assert "within 2 % (95 % confidence sequence 1.005 to 1.005" in verdict(sequence_of(1.005, 0.0), **NAMES).text


def test_verdict_undecided() -> None:
    result = verdict(sequence_of(1.05, 1.0), **NAMES)
    assert result.kind == "undecided" and result.low < 1 < result.high
    assert result.needed is not None and result.needed > 1000
    more = f"about {rounded(result.needed)} more pairs are likely needed"
    assert result.text.endswith(f"from 800 pairs); measure longer: {more}")
    few = verdict(sequence_of(2.0, 0.1, pairs=40), **NAMES)
    assert (few.kind, few.low, few.high, few.mean, few.needed) == ("undecided", 0.0, math.inf, None, None)
    assert few.text == "no decision end to end between pruned and original: 40 pairs, at least 80 needed"


def test_a_forecast_has_two_digits() -> None:
    assert [rounded(count) for count in (7, 42, 123, 123456)] == ["7", "42", "120", "120,000"]
