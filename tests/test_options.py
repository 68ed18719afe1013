"""Options refuse what makes no sense and name the flag."""

import json

import pytest

from redpp_serve.errors import RedppError
from redpp_serve.options import DEFAULT_MAX_ERROR, FLOOR_AGREEMENT, FLOOR_ERROR, Options

NAN = float("nan")
BAD = [
    ("hash", "median"),
    ("method", "all"),
    ("hash_error", 0.0),
    ("hash_error", 1.5),
    ("hash_error", -0.1),
    ("hash_error", NAN),
    ("hash_values", 1),
    ("keep", 0.0),
    ("keep", 1.01),
    ("keep", NAN),
    ("max_error", -1.0),
    ("max_error", NAN),
    ("min_agreement", 1.1),
    ("min_agreement", -0.1),
    ("max_accuracy_drop", 101.0),
    ("round_to", 0),
    ("time_budget", 0.5),
    ("time_budget", NAN),
    ("distil", -1.0),
    ("distil", NAN),
    ("distil", 2e6),
    ("keep_point", 0),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_with_its_flag(name, value):
    with pytest.raises(RedppError) as refusal:
        Options(**{name: value})
    flag = "--" + name.replace("_", "-")
    assert flag in refusal.value.found and str(value) in refusal.value.found and flag in refusal.value.do


@pytest.mark.parametrize(
    "values",
    [
        {"hash_error": 1e-4},
        {"hash_error": 1.0},
        {"keep": 1e-9},
        {"keep": 1.0},
        {"max_error": 0.0},
        {"min_agreement": 1.0},
        {"min_agreement": 0.0},
        {"hash_values": 2},
        {"round_to": 1},
        {"time_budget": 1},
        {"method": "red++", "max_error": 0.1},
        {"distil": 0.0},
        {"target_macs": 1.0},
        {"target_latency": 1e-9},
        {"target_macs": 0.5, "max_error": 0.1},
    ],
)
def test_the_limits_themselves_are_allowed(values):
    options = Options(**values)
    assert {name: getattr(options, name) for name in values} == values


def test_options_that_contradict_each_other():
    with pytest.raises(RedppError, match="--hash-error or --hash-values"):
        Options(hash_error=0.1, hash_values=4)
    with pytest.raises(RedppError, match="--keep is 0.5.*--method red\\+\\+"):
        Options(method="red++", keep=0.5)
    with pytest.raises(RedppError, match="--target latency=0.5.*--method red\\+\\+"):
        Options(method="red++", target_latency=0.5)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"target_macs": 0.0}, "--target macs=0.0. Expected: a number above 0"),
        ({"target_latency": 1.5}, "--target latency=1.5. Expected:"),
        ({"target_macs": NAN}, "--target macs=nan"),
        ({"keep": 0.5, "target_macs": 0.5}, "--target macs=0.5. Expected: not together with --keep"),
        (
            {"target_macs": 0.5, "target_latency": 0.6},
            "--target latency=0.6. Expected: not together with --target macs",
        ),
    ],
)
def test_one_target_at_a_time_and_in_range(values, text):
    with pytest.raises(RedppError) as refusal:
        Options(**values)
    assert text in str(refusal.value)


def test_the_hash_target():
    assert (
        str(Options().hash_target) == "relative RMS 0.02"
        and str(Options(hash_values=9).hash_target) == "at most 9 values"
    )
    assert Options(hash_error=0.1).hash_target.error == 0.1 and Options(hash_values=9).hash_target.error is None


@pytest.mark.parametrize(
    ("values", "budget"),
    [
        ({}, DEFAULT_MAX_ERROR),
        ({"max_error": 0.0}, 0.0),
        ({"max_error": 0.3}, 0.3),
        ({"keep": 0.5, "max_error": 0.3}, None),
        ({"target_macs": 0.5, "max_error": 0.3}, None),
        ({"target_latency": 0.5}, None),
        ({"method": "red++", "max_error": 0.3}, None),
        ({"keep_point": 2}, None),
    ],
)
def test_only_the_search_for_widths_has_a_budget(values, budget):
    assert Options(**values).error_budget == budget


@pytest.mark.parametrize(
    ("values", "error", "agreement"),
    [
        ({}, DEFAULT_MAX_ERROR, FLOOR_AGREEMENT),
        ({"keep": 0.5}, FLOOR_ERROR, FLOOR_AGREEMENT),
        ({"target_macs": 0.5}, FLOOR_ERROR, FLOOR_AGREEMENT),
        ({"target_latency": 0.5}, FLOOR_ERROR, FLOOR_AGREEMENT),
        ({"keep_point": 2}, FLOOR_ERROR, FLOOR_AGREEMENT),
        ({"keep": 0.5, "max_error": 3.0}, 3.0, 0.0),  # who says how far the outputs may go has decided
        ({"keep": 0.5, "min_agreement": 0.0}, FLOOR_ERROR, 0.0),
        ({"max_error": 0.2, "min_agreement": 0.9}, 0.2, 0.9),
        ({"method": "red++"}, None, 0.0),
        ({"method": "red++", "max_error": 0.01}, 0.01, 0.0),
        ({"method": "red++", "min_agreement": 0.5}, None, 0.5),
    ],
)
def test_there_is_a_floor_where_nothing_was_said(values, error, agreement):
    options = Options(**values)
    assert (options.floor_error, options.floor_agreement) == (error, agreement)


def test_a_point_of_the_frontier_is_an_answer_of_its_own():
    for other, flag in (("keep", "--keep"), ("target_macs", "--target macs"), ("target_latency", "--target latency")):
        with pytest.raises(RedppError, match=f"--keep-point is 2.*not together with {flag}"):
            Options(**{other: 0.5, "keep_point": 2})
    with pytest.raises(RedppError, match=r"--keep-point.*--method red\+\+"):
        Options(method="red++", keep_point=1)


def test_json_round_trip():
    options = Options(exclude=("head", "stem.*"), keep=0.5)
    document = json.loads(json.dumps(options.to_json()))
    assert Options(**{**document, "exclude": tuple(document["exclude"])}) == options
