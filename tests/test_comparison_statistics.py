"""Intervals cover as often as they claim, also under peeking and autocorrelation; verdicts say what they mean."""

import math

import numpy
import pytest

from redpp_serve.comparison.statistics import (
    MINIMUM_BLOCKS,
    ConfidenceSequence,
    best_rho2,
    half_width,
    mean_interval,
    percentile_interval,
    ratio_interval,
    verdict,
)

NAMES = {"baseline": "original", "candidate": "redpp", "measure": "end to end"}


def autoregressive(rng: numpy.random.Generator, runs: int, steps: int, phi: float) -> numpy.ndarray:
    """Stationary AR(1) noise (runs, steps) of unit innovations."""
    noise = rng.standard_normal((runs, steps))
    noise[:, 0] /= math.sqrt(1 - phi**2)
    for step in range(1, steps):
        noise[:, step] += phi * noise[:, step - 1]
    return noise


def all_times(x: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(low, high), each (runs, steps): the sequence after every observation of ``x`` (runs, steps), vectorised."""
    t = numpy.arange(1, x.shape[1] + 1)
    mean = x.cumsum(1) / t
    before = numpy.pad(mean[:, :-1], ((0, 0), (1, 0)))
    squares = ((x - before) * (x - mean)).cumsum(1)
    products = numpy.pad((x[:, 1:] - mean[:, 1:]) * (x[:, :-1] - mean[:, 1:]), ((0, 0), (1, 0))).cumsum(1)
    variance = (squares + 2 * numpy.maximum(products, 0)) / numpy.maximum(t - 1, 1)
    half = half_width(t, variance, ConfidenceSequence().rho2, 0.05)
    half[:, : MINIMUM_BLOCKS - 1] = math.inf
    return mean - half, mean + half


def test_sequence_equals_the_vectorised_formula() -> None:
    x = autoregressive(numpy.random.default_rng(3), 1, 60, 0.5)
    low, high = all_times(x)
    sequence = ConfidenceSequence()
    for step, value in enumerate(x[0]):
        sequence.update([value])
        assert sequence.interval() == pytest.approx((low[0, step], high[0, step]), rel=1e-9)


@pytest.mark.parametrize("phi, block", [(0.0, 1), (0.0, 4), (0.5, 4)])
def test_false_alarms_under_continuous_peeking(phi: float, block: int) -> None:
    noise = autoregressive(numpy.random.default_rng(11), 1000, 400 * block, phi)
    low, high = all_times(noise.reshape(1000, 400, block).mean(2))
    assert ((low > 0) | (high < 0)).any(1).mean() <= 0.05


def test_peeking_at_a_plain_interval_would_raise_false_alarms() -> None:
    x = autoregressive(numpy.random.default_rng(11), 500, 400, 0.0)
    t = numpy.arange(1, 401)
    outside = numpy.abs(x.cumsum(1) / t) > 1.96 / numpy.sqrt(t)
    assert outside[:, MINIMUM_BLOCKS:].any(1).mean() > 0.2


def test_ten_percent_is_found_in_a_thousand_pairs() -> None:
    noise = 0.5 * numpy.random.default_rng(5).standard_normal((300, 1000))
    low, _ = all_times((math.log(1.1) + noise).reshape(300, 250, 4).mean(2))
    assert (low[:, -1] > 0).mean() > 0.95


def test_welford_and_waiting_block() -> None:
    values = numpy.random.default_rng(0).lognormal(size=123) + 1e6
    sequence = ConfidenceSequence(block=4)
    sequence.update(values[:50])
    sequence.update(values[50:])
    blocks = values[:120].reshape(30, 4).mean(1)
    assert (sequence.blocks, sequence.values) == (30, 120)
    assert sequence.mean == pytest.approx(blocks.mean(), rel=1e-12)
    assert sequence.variance >= blocks.var(ddof=1) * (1 - 1e-6)


def test_rho_makes_the_sequence_tightest_at_its_target() -> None:
    widths = [float(half_width(500, 1.0, best_rho2(target, 0.05), 0.05)) for target in (50, 500, 5000)]
    assert widths[1] == min(widths)


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
    values = numpy.exp(autoregressive(rng, 1, 2000, 0.9)[0])
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


def sequence_of(ratio: float, spread: float, pairs: int = 800) -> ConfidenceSequence:
    sequence = ConfidenceSequence(block=4)
    sequence.update(math.log(ratio) + spread * numpy.tile([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0], pairs // 8))
    return sequence


def test_verdict_faster() -> None:
    sequence = ConfidenceSequence(block=1)
    sequence.update(math.log(1.62) + numpy.tile([0.1, 0.1, -0.1, -0.1], 200))
    result = verdict(sequence, **NAMES)
    assert result.kind == "faster"
    assert result.text == (
        "redpp is 1.62 times as fast as original end to end (95 % confidence sequence 1.60 to 1.64 from 800 pairs)"
    )
    assert result.low == pytest.approx(1.6025, abs=0.005) and result.high == pytest.approx(1.6377, abs=0.005)


def test_verdict_slower_is_told_as_a_longer_time() -> None:
    result = verdict(sequence_of(0.8, 0.0), **NAMES)
    assert result.kind == "slower" and result.high < 1
    assert result.text.startswith("redpp takes 1.25 times as long as original end to end (95 % confidence sequence 1.2")


def test_verdict_equivalent_within_the_margin() -> None:
    assert verdict(sequence_of(1.005, 0.0), **NAMES).kind == "equivalent"
    assert verdict(sequence_of(1.005, 0.0), margin=0.001, **NAMES).kind == "faster"
    assert "within 2 % (95 % confidence sequence 1.005 to 1.005" in verdict(sequence_of(1.005, 0.0), **NAMES).text


def test_verdict_undecided() -> None:
    sequence = ConfidenceSequence()
    sequence.update(numpy.random.default_rng(0).standard_normal(100))
    result = verdict(sequence, **NAMES)
    assert result.kind == "undecided" and result.low < 1 < result.high and result.text.endswith("; measure longer")
    few = verdict(sequence_of(2.0, 0.1, pairs=40), **NAMES)
    assert few.kind == "undecided"
    assert few.text == "no decision end to end between redpp and original: 40 pairs, at least 80 needed"
