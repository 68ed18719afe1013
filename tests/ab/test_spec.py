"""The A/B test as the user asks for it: the traffic split, the header, and its way through a file."""

import pytest

from redpp_serve.ab.spec import parse_split
from redpp_serve.errors import RedppError


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
