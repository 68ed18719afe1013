"""Verdicts and advice mean what they say."""

import math

import numpy as np
import pytest

from redpp_serve.statistics.guardrails import Guardrail
from redpp_serve.statistics.sequences import RatioSequence
from redpp_serve.statistics.verdicts import KINDS, Verdict, advice, two_digits, verdict


def sequence_of(ratio: float, spread: float, pairs: int = 800) -> RatioSequence:
    """Independent noise, scaled so that the mean is ``log(ratio)`` to the last pair."""
    noise = np.random.default_rng(0).standard_normal(pairs)
    sequence = RatioSequence(block=4)
    sequence.update(math.log(ratio) + spread * (noise - noise.mean()))
    return sequence


class Known(RatioSequence):
    """A sequence whose interval of the ratio is given."""

    def __init__(self, low: float, high: float, alpha: float = 0.05) -> None:
        super().__init__(alpha)
        self.bounds = math.log(low), math.log(high)

    @property
    def mean(self) -> float:
        return sum(self.bounds) / 2

    def interval(self) -> tuple[float, float]:
        return self.bounds


def test_faster() -> None:
    result = verdict(sequence_of(1.62, 0.1), measure="end to end")
    assert result.kind == "faster" and result.text == (
        "pruned is 1.62 times as fast as original end to end (95 % confidence sequence 1.60 to 1.64 from 800 pairs)"
    )
    assert (result.mean, result.needed) == (pytest.approx(1.62), 0)
    assert result.low == pytest.approx(1.60, abs=0.005) and result.high == pytest.approx(1.64, abs=0.005)


def test_slower_is_told_as_a_longer_time() -> None:
    result = verdict(sequence_of(0.8, 0.0), measure="end to end")
    assert result.kind == "slower" and result.high < 1
    assert result.text.startswith(
        "pruned takes 1.25 times as long as original end to end (95 % confidence sequence 1.2"
    )
    assert "from 1.11 to 1.43" not in result.text
    ordered = verdict(Known(0.7, 0.9), measure="end to end").text
    assert "1.11 to 1.43" in ordered, "the bounds of the longer time ascend"


def test_equivalent_within_the_margin() -> None:
    close = sequence_of(1.005, 0.0)
    assert verdict(close, measure="m").kind == "equivalent"
    assert verdict(close, margin=0.001, measure="m").kind == "faster"
    assert "within 2 % (95 % confidence sequence 1.005 to 1.005" in verdict(close, measure="m").text


def test_each_kind_has_its_intervals() -> None:
    """At a margin of 2 % equivalence means 1/1.02 to 1.02 and nothing beyond."""
    expected = {
        (0.985, 1.05): "undecided",
        (0.95, 1.015): "undecided",
        (0.99, 1.019): "equivalent",
        (0.981, 1.01): "equivalent",
        (0.9801, 1.01): "undecided",
        (0.99, 1.0201): "undecided",
        (1.0, 1.05): "undecided",
        (0.9, 1.0): "undecided",
        (1.001, 1.05): "faster",
        (0.9, 0.999): "slower",
        (1.001, 1.015): "equivalent",
        (0.985, 0.999): "equivalent",
    }
    found = {bounds: verdict(Known(*bounds), 0.02, measure="m").kind for bounds in expected}
    assert found == expected and set(expected.values()) == set(KINDS)
    assert "(97.5 % confidence sequence 2.00 to 3.00" in verdict(Known(2.0, 3.0, alpha=0.025), measure="m").text


def test_undecided() -> None:
    result = verdict(sequence_of(1.05, 1.0), measure="end to end")
    assert result.kind == "undecided" and result.low < 1 < result.high
    assert result.needed is not None and result.needed > 1000
    more = f"about {two_digits(result.needed)} more pairs are likely needed"
    assert result.text.endswith(f"from 800 pairs); measure longer: {more}")
    few = verdict(sequence_of(2.0, 0.1, pairs=40), measure="end to end")
    assert (few.kind, few.low, few.high, few.mean, few.needed) == ("undecided", 0.0, math.inf, None, None)
    assert few.text == "no decision end to end between pruned and original: 40 pairs, at least 80 needed"
    rough = verdict(sequence_of(1.05, 6.0), measure="end to end")
    assert rough.high > 2 * rough.low and rough.needed is None and rough.text.endswith("measure longer")


def test_a_forecast_has_two_digits() -> None:
    assert [two_digits(count) for count in (7, 42, 123, 123456)] == ["7", "42", "120", "120,000"]


def test_advice() -> None:
    for kind, oks, expected, text in (
        ("faster", [True, True], "promote", "Promote: F, and every limit is kept."),
        ("faster", [], "promote", "Promote: F."),
        ("equivalent", [True], "promote", "Promote: F, and every limit is kept: it costs no speed and wins none."),
        ("faster", [True, None], "wait", "Wait: F, but errors: None."),
        ("undecided", [True], "wait", "Wait: F."),
        ("undecided", [None, False], "rollback", "Roll back: errors: False."),
        ("faster", [False, True], "rollback", "Roll back: errors: False."),
        ("slower", [True], "rollback", "Roll back: F."),
        ("slower", [None], "rollback", "Roll back: F."),
    ):
        rails = [Guardrail("errors", ok, f"errors: {ok}", 0.0, 0.0, 0.0, 0.01) for ok in oks]
        result = advice(Verdict(kind, "F", 0.5, 2.0), rails)
        assert (result.kind, result.text) == (expected, text), (kind, oks)
