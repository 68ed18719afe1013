"""The A/B test as the user asks for it: the traffic split, the header, and its way through a file."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from redpp_serve.ab.spec import Spec, TrafficSplit, parse_split
from redpp_serve.errors import RedppError
from redpp_serve.options import Limits
from redpp_serve.serving.observing import Observing


def test_splits_that_are_accepted() -> None:
    for text, shown, ratio in (
        ("90:10", "90:10", 0.1),
        ("50/50", "50:50", 0.5),
        (" 100:0 ", "100:0", 0.0),
        ("0:100", "0:100", 1.0),
        ("99.5:0.5", "99.5:0.5", 0.005),
        ("99.99/0.01", "99.99:0.01", 0.0001),
        ("090:10", "90:10", 0.1),
    ):
        split = parse_split(text)
        assert str(split) == shown and split.ratio("pruned") == pytest.approx(ratio), text
        assert split.ratio("original") + split.ratio("pruned") == pytest.approx(1), text
        assert parse_split(str(split)) == split, text


def test_splits_that_are_refused() -> None:
    for text, message in (
        ("90:20", "adds up to 110"),
        ("90:9.99", "adds up to 99.99"),
        ("0:0", "adds up to 0"),
        ("90", "--split '90'"),
        ("", "--split ''"),
        ("a:b", "per cent"),
        ("-10:110", "per cent"),
        ("90:10:0", "per cent"),
        ("99.999:0.001", "two decimals"),
        ("1e2:0", "per cent"),
        ("200:-100", "per cent"),
        ("999:1", "adds up to 1000"),
    ):
        with pytest.raises(RedppError, match=message) as error:
            parse_split(text)
        parse_split(error.value.do.split("--split ")[1])  # the example in the message is itself accepted


def test_the_spec_goes_through_json() -> None:
    spec = Spec(
        Path("/a"),
        Path("/b"),
        "triton",
        TrafficSplit(Decimal("99.5"), Decimal("0.5")),
        None,
        False,
        Limits(0.2),
        3,
        8000,
        False,
        Observing(10, Path("/c")),
    )
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_header_that_is_not_a_name_is_refused() -> None:
    for header in ("", "X User", "X_User", "X-User;", "1-User", "X-User\n"):
        with pytest.raises(RedppError, match="--sticky-header"):
            Spec(Path("/a"), None, "triton", TrafficSplit(Decimal(50), Decimal(50)), header, False)
