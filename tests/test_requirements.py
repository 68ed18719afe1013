"""Requirements: their grammar, the judgement of values and intervals, and JUnit's XML."""

import argparse
from datetime import datetime, timezone
from xml.etree import ElementTree

import pytest

from redpp_serve.errors import GateFailed, RedppError
from redpp_serve.requirements import COMPARED, Figure, Outcome, Requirement, judge, junit, parse, require_met

MEASURED = {
    "speedup": Figure(1.25, 1.15, 1.35),
    "p99_ms": Figure(18.0, 15.0, 21.0),
    "agreement": Figure(0.995),
    "failed": Figure(0.0),
}


def outcome(text: str) -> Outcome:
    return judge(parse(text, COMPARED), MEASURED)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("speedup>=1.2", [("speedup", True, 1.2)]),
        (" p99_ms <= 2e1 , agreement>=0.99", [("p99_ms", False, 20.0), ("agreement", True, 0.99)]),
        ("accuracy_drop<=-0.5", [("accuracy_drop", False, -0.5)]),
    ],
)
def test_what_can_be_required(text: str, expected: list[tuple[str, bool, float]]) -> None:
    assert [(r.name, r.least, r.limit) for r in parse(text, COMPARED)] == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is not NAME>=NUMBER or NAME<=NUMBER, joined by commas"),
        ("speedup", "'speedup' is not NAME>=NUMBER"),
        ("speedup>1.2", "'speedup>1.2' is not"),
        ("speedup==1.2", "is not NAME>=NUMBER"),
        ("speedup>=1,2", "'2' is not NAME>=NUMBER"),
        ("speedup>=1.2,", "'' is not"),
        ("speedup>=fast", "is not"),
        ("speedup>=1.2.3", "is not"),
        ("speedup>=nan", "is not"),
        ("p99_ms<=1e999", "is not"),
        ("1.2<=speedup", "is not"),
        ("speedup>=1.2;p99_ms<=20", "is not"),
        ("p99_ms<=20ms", "is not"),
        ("p99\x1b[2J<=20", "is not"),
        ("speed>=1.2", "'speed' is no figure; there are speedup, handler_speedup, throughput_gain, p50_ms, "),
        ("agreement>=99", "'agreement>=99' limits a share, which is from 0 to 1"),
        ("original_rate_failed<=-0.1", "limits a share"),
    ],
)
def test_what_cannot_be_required(text: str, words: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refusal:
        parse(text, COMPARED)
    assert words in str(refusal.value) and "\x1b" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "met", "why"),
    [
        ("speedup>=1.15", True, ""),
        ("speedup>=1.2", False, "the value keeps it, its interval does not: measure longer"),
        ("speedup>=1.3", False, ""),
        ("speedup<=1.3", False, "the value keeps it, its interval does not: measure longer"),
        ("speedup<=1.35", True, ""),
        ("p99_ms<=21", True, ""),
        ("p99_ms<=20", False, "the value keeps it, its interval does not: measure longer"),
        ("p99_ms<=17", False, ""),
        ("agreement>=0.995", True, ""),
        ("agreement>=0.996", False, ""),
        ("failed<=0", True, ""),
    ],
)
def test_the_whole_interval_must_keep_a_requirement(text: str, met: bool, why: str) -> None:
    found = outcome(text)
    assert (found.met, found.why) == (met, why)


def test_lines_and_plain_data() -> None:
    assert outcome("speedup>=1.15").to_text() == "met     speedup>=1.15             1.25 (1.15 to 1.35)"
    missed = outcome("speedup>=1.2")
    assert missed.to_text().startswith("missed  speedup>=1.2 ") and missed.to_text().endswith("; " + missed.why)
    assert missed.to_json() == {"requirement": "speedup>=1.2", "value": 1.25, "low": 1.15, "high": 1.35, "met": False}
    at = Outcome(Requirement("agreement", True, 0.99), Figure(0.5), "concurrency 4")
    assert at.to_json() == {"requirement": "agreement>=0.99", "where": "concurrency 4", "value": 0.5, "met": False}
    assert at.to_text().endswith("0.5  concurrency 4")


def test_a_figure_that_was_not_measured_is_refused_with_those_that_were() -> None:
    with pytest.raises(RedppError, match="asks for accuracy, which is not measured. Expected: one of speedup") as error:
        judge(parse("accuracy>=0.5,speedup>=1", COMPARED), MEASURED)
    assert error.value.exit_code == 2


def test_missed_requirements_end_with_3() -> None:
    require_met([outcome("speedup>=1.1"), outcome("failed<=0")])
    with pytest.raises(GateFailed) as error:
        require_met([outcome("speedup>=1.2"), outcome("failed<=0"), outcome("agreement>=1")])
    text = str(error.value)
    assert error.value.exit_code == 3 and "2 of 3 requirements are missed: speedup is 1.25 (1.15 to 1.35)" in text
    assert "Expected: speedup>=1.2, agreement>=1." in text and "measure longer" in text


# What Jenkins, GitLab and GitHub's reporters agree on: elements, attributes that must and may be there, children.
SCHEMA = {
    "testsuites": ({"name", "tests", "failures", "errors", "time"}, {"testsuite"}),
    "testsuite": ({"name", "tests", "failures", "errors", "skipped", "time", "timestamp"}, {"testcase"}),
    "testcase": ({"name", "classname", "time"}, {"failure", "error", "system-out"}),
    "failure": ({"message", "type"}, set()),
    "error": ({"message", "type"}, set()),
    "system-out": (set(), set()),
}


def conforms(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    for element in root.iter():
        attributes, children = SCHEMA[element.tag]
        assert set(element.keys()) == attributes and {child.tag for child in element} <= children, element.tag
        for name in {"tests", "failures", "errors", "skipped"} & set(element.keys()):
            assert element.attrib[name].isdecimal()
    (suite,) = root
    assert suite.attrib["tests"] == str(len(suite)) == root.attrib["tests"]
    assert suite.attrib["failures"] == str(len(suite.findall("testcase/failure")))
    assert suite.attrib["errors"] == str(len(suite.findall("testcase/error")))
    assert datetime.fromisoformat(suite.attrib["timestamp"]) and float(suite.attrib["time"]) >= 0
    return suite


def test_junit_has_a_case_for_each_requirement() -> None:
    at = Outcome(Requirement("p99_ms", False, 1.0), Figure(2.0, 1.5, 2.5), "concurrency 4, batch 8")
    begun = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    text = junit("compare <a&b>\x00", [outcome("speedup>=1.15"), outcome("agreement>=1"), at], 61.5, begun)
    assert text.startswith("<?xml version='1.0' encoding='utf-8'?>\n")
    suite = conforms(text)
    assert suite.attrib["timestamp"] == "2026-01-02T03:04:05" and suite.attrib["time"] == "61.500"
    assert [(c.attrib["name"], [x.tag for x in c]) for c in suite] == [
        ("speedup>=1.15", ["system-out"]),
        ("agreement>=1", ["failure"]),
        ("p99_ms<=1", ["failure"]),
    ]
    assert suite[0].attrib["classname"] == "compare <a&b>\ufffd"
    assert suite[2].attrib["classname"].endswith(".concurrency 4, batch 8")
    assert suite[1][0].attrib["message"] == "agreement is 0.995"


def test_junit_of_a_comparison_that_failed_holds_an_error() -> None:
    suite = conforms(junit("compare", [], 1.0, datetime.now(timezone.utc), problem="no server\x1b"))
    assert (suite.attrib["errors"], suite[0].attrib["name"]) == ("1", "measurement")
    assert suite[0][0].attrib["message"] == "no server\ufffd"
