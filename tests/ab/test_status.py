"""The running verdict from the files of an A/B test, and how it is shown and exported."""

import json
import time
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pytest
from prometheus_client import generate_latest

from redpp_serve.ab.counts import HandlerTimes
from redpp_serve.ab.evidence import Evidence, deciding, known_agreement
from redpp_serve.ab.exporter import registry
from redpp_serve.ab.gateway import divide, switch
from redpp_serve.ab.spec import Spec, Started, TrafficSplit
from redpp_serve.ab.state import (
    COUNTS,
    GATEWAY,
    PAIRS,
    RECORDER,
    SPEC,
    WINDOWS,
    Heartbeat,
    Lines,
    read_json,
    write_json,
)
from redpp_serve.ab.status import Status, read_status
from redpp_serve.options import Limits
from redpp_serve.statistics.guardrails import error_guardrail
from redpp_serve.statistics.sequences import RatioSequence
from redpp_serve.variants import NAMES

URLS = {"gateway": "http://127.0.0.1:1/predictions/m", "metrics": "http://127.0.0.1:2/metrics"}
BOUNDS = (0.005, 0.007, 0.01, 0.014, 0.02, 0.028, float("inf"))


class Experiment:
    """A state folder as an experiment writes it, with a known truth."""

    def __init__(self, state: Path, *, shadow: bool = True, split: str = "50:50", **limits: float) -> None:
        shares = [Decimal(part) for part in split.split(":")]
        self.state, self.rng = state, numpy.random.default_rng(0)
        folder = state / "package"
        folder.mkdir()
        write_json(folder / "report.json", {"verify": {"agreement": 1.0, "output_error": 0.05, "images": 500}})
        self.spec = Spec(folder, None, "torchserve", TrafficSplit(*shares), "X-User-Id", shadow, Limits(**limits))
        (state / GATEWAY).mkdir()
        self.test = Started(self.spec, "m", time.time() - 90)
        write_json(state / SPEC, self.test.to_json())
        divide(state / GATEWAY)
        self.users(500, 500)

    def pairs(self, count: int, pruned: float = 1.0, **changes: Any) -> None:
        """Pairs of about 10 ms, where the pruned version takes ``pruned`` times as long."""
        with (self.state / PAIRS).open("a") as file:
            for _ in range(count):
                a, b = 0.01 * numpy.exp(self.rng.normal(0, 0.05, 2))
                pair = {
                    "time": 0,
                    "request_id": "",
                    "first": "pruned",
                    "quiet": True,
                    "status": [200, 200],
                    "seconds": [a, pruned * b],
                    "handler": None,
                    "difference": 0.01,
                    "top1": True,
                    **changes,
                }
                file.write(json.dumps(pair) + "\n")

    def windows(self, count: int, pruned: float = 1.0) -> None:
        """Windows with 20 batches of an arm, of about 10 ms."""
        with (self.state / WINDOWS).open("a") as file:
            for _ in range(count):
                a, b = 0.01 * numpy.exp(self.rng.normal(0, 0.05, 2)) * 20
                file.write(json.dumps({"time": 0, "batches": {"1": [20, a, 20, pruned * b]}}) + "\n")

    def users(self, original: int, pruned: int, errors: int = 0, slow: int = 0) -> None:
        """Users' requests: ``errors`` of the pruned arm's failed, ``slow`` of its 1000 batches were slow."""
        times = HandlerTimes(
            {
                "original": dict(zip(BOUNDS, (0, 500, 1000, 1000, 1000, 1000, 1000), strict=True)),
                "pruned": dict(zip(BOUNDS, (0, 0, *3 * (1000 - slow,), 1000, 1000), strict=True)),
            }
        ).to_json()
        users = {
            "requests": {"original": original, "pruned": pruned},
            "errors": {"pruned": errors},
            "judged": {"original": original, "pruned": pruned},
            "faults": {"pruned": errors},
            "milliseconds": {"original": {"10": original}, "pruned": {"9": pruned}},
        }
        self.count(users, buckets=times, divided={str(self.spec.split): times}, log=[0, -1])

    def count(self, users: dict[str, Any], **others: Any) -> None:
        """Write counts of users who were divided all the time."""
        strata = {str(self.spec.split): {"judged": users["judged"], "faults": users.get("faults", {})}}
        before = read_json(self.state / COUNTS) or {}
        write_json(self.state / COUNTS, {**before, "users": {**users, "strata": strata}, **others})

    def status(self) -> Status:
        return read_status(self.state, self.test, URLS)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment(tmp_path)


@pytest.mark.parametrize(
    ("pruned", "kind", "advice"),
    [(0.8, "faster", "promote"), (1.25, "slower", "rollback"), (1.0, "equivalent", "promote")],
)
def test_the_truth_is_found_in_both_sources(tmp_path: Path, pruned: float, kind: str, advice: str) -> None:
    experiment = Experiment(tmp_path, margin=0.05, max_error_rate_gap=0.05)
    experiment.pairs(1500, pruned)
    experiment.windows(200, pruned)
    status = experiment.status()
    assert [(f.source, f.verdict.kind) for f in status.findings] == [("shadow", kind), ("split", kind)]
    assert status.findings[0].verdict.low < 1 / pruned < status.findings[0].verdict.high
    assert status.advice.kind == advice and deciding(status.findings).verdict.kind == kind


def test_nothing_is_known_at_first(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, split="100:0")
    (tmp_path / COUNTS).unlink()
    status = experiment.status()
    assert status.advice.kind == "wait" and [f.verdict.kind for f in status.findings] == ["undecided"]
    assert "-" in status.to_text() and json.dumps(status.to_json(), allow_nan=False)
    assert status.arms["pruned"].share is None and status.arms["pruned"].handler_ms == {"p50": None, "p99": None}


def test_errors_agreement_and_tail_advise_to_roll_back(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path)
    experiment.pairs(1500, 0.8)
    experiment.users(1000, 1000, errors=100)
    status = experiment.status()
    assert status.advice.kind == "rollback" and "errors" in status.advice.text  # faster, but it fails
    assert status.advice.reason == "errors beyond the limit"
    experiment.users(3000, 3000)
    experiment.pairs(500, 0.8, top1=False)
    status = experiment.status()
    assert status.advice.kind == "rollback" and "agreement" in status.advice.text
    assert status.shadow and status.shadow.agreement == 0.75


@pytest.mark.parametrize("split", ["100:0", "90:10"])
def test_a_server_that_was_down_is_no_fault_of_the_pruned_version(tmp_path: Path, split: str) -> None:
    """While it is down replays fail at once and become more frequent, which is no larger share of errors."""
    experiment = Experiment(tmp_path, split=split)
    experiment.pairs(1500, 0.8)
    experiment.pairs(1500, status=[0, 0], difference=None, top1=None)
    pruned = 0 if split == "100:0" else 500
    users = {
        "requests": {"original": 5000, "pruned": pruned + 1},
        "errors": {"original": 500, "pruned": pruned // 10},
        "by_header": {"pruned": 1},
        "judged": {"original": 5000, "pruned": pruned},
        "faults": {"original": 500, "pruned": pruned // 10},
    }
    experiment.count(users)
    status = experiment.status()
    rails = [rail for rail in status.guardrails if rail.name == "errors"]
    assert all(rail.ok is not False for rail in rails) and status.advice.kind != "rollback"
    assert [rail.text.split(":")[0] for rail in rails] == ["errors", "errors of replays"][split == "100:0" :]
    experiment.pairs(300, status=[200, 500], difference=None, top1=None)
    assert experiment.status().advice.kind == "rollback"


@pytest.mark.parametrize(
    ("report", "advice", "words"),
    [
        (
            {"verify": {"agreement": 0.06, "output_error": 1.35, "images": 32}},
            "wait",
            "when it was packaged 6.00% of 32 inputs agreed (0.3% to 27.6% is possible), 99.00% wanted",
        ),
        (
            {"agreement": {"top1": 0.06, "mean_relative_difference": 1.35, "inputs": 500}},
            "rollback",
            "in the last comparison 6.00% of 500",
        ),
        ({"agreement": {"top1": 0.06, "mean_relative_difference": 1.35, "inputs": 50}}, "wait", "6.00% of 50"),
        ({"verify": {"agreement": 0.97, "output_error": 0.2, "images": 32}}, "wait", "97.00% of 32 inputs agreed"),
        (
            {
                "verify": {"agreement": 0.06, "output_error": 1.35, "images": 32},
                "agreement": {"top1": 0.998, "mean_relative_difference": 0.09, "inputs": 500},
            },
            "promote",
            "in the last comparison 99.80% of 500",
        ),
        ({"verify": {"agreement": None, "output_error": 0.05, "images": 32}}, "promote", "100.00% of 32"),
        ({}, "wait", "the package's report says nothing of it"),
    ],
)
def test_a_split_compares_no_outputs_and_says_what_is_known_of_them(
    tmp_path: Path, report: dict[str, Any], advice: str, words: str
) -> None:
    experiment = Experiment(tmp_path, shadow=False)
    write_json(experiment.spec.folder / "report.json", report)
    experiment.windows(300, 0.8)
    experiment.users(3000, 3000)
    status = experiment.status()
    (rail,) = [rail for rail in status.guardrails if rail.name == "agreement"]
    assert "not compared under a split (add --shadow)" in rail.text and words.split(" of ")[0] in rail.text
    assert status.advice.kind == advice and "not compared under a split" in status.to_text()


def test_a_tolerance_is_held_against_the_outputs_not_the_class(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, tolerance=0.1)
    experiment.pairs(300, difference=0.2, top1=True)
    assert (
        experiment.status().shadow.agreement == 0.0 and "within 0.1 of the original's" in experiment.status().to_text()
    )


def test_users_who_get_no_answer_advise_to_roll_back(tmp_path: Path) -> None:
    """A version that hangs fails nobody whose patience ends before the gateway's."""
    experiment = Experiment(tmp_path, shadow=False)
    experiment.windows(200, 0.8)
    all_of_them = {"original": 1000, "pruned": 1000}
    users = {"requests": all_of_them, "judged": all_of_them, "refused": {"pruned": 100}, "abandoned": {"pruned": 0}}
    experiment.count(users)
    status = experiment.status()
    assert status.advice.kind == "promote" and "left unanswered" not in status.to_text()
    experiment.count({**users, "abandoned": {"pruned": 100}, "faults": {"pruned": 100}})
    status = experiment.status()
    assert status.advice.kind == "rollback" and "100 of 1000 against 0 of 1000" in status.advice.text
    assert status.arms["pruned"].abandoned == 100 and "left unanswered" in status.to_text()


def test_a_long_tail_advises_to_roll_back(tmp_path: Path) -> None:
    for shadow in (True, False):
        (tmp_path / str(shadow)).mkdir()
        experiment = Experiment(tmp_path / str(shadow), shadow=shadow)
        experiment.pairs(1500, 0.8)
        experiment.windows(200, 0.8)
        assert "p99" not in experiment.status().advice.text
        experiment.users(1000, 1000, slow=0 if shadow else 200)
        experiment.pairs(100, seconds=[0.01, 0.03])  # 6 %
        advice = experiment.status().advice
        assert advice.kind == "rollback" and "p99: at least" in advice.text, advice


def test_pairs_count_for_what_they_can_tell(experiment: Experiment) -> None:
    experiment.pairs(10)
    experiment.pairs(5, quiet=False, seconds=[1.0, 9.0])  # disturbed: outputs only
    experiment.pairs(4, status=[200, 500], difference=None, top1=None)
    experiment.pairs(3, status=[200, 0], difference=None, top1=None)
    experiment.pairs(2, status=[400, 400], difference=None, top1=None)  # the user's mistake
    experiment.pairs(1, status=[500, 200], difference=None, top1=None)
    experiment.pairs(6, top1=False, handler=[0.001, 0.002])
    write_json(experiment.state / RECORDER, {"received": 40, "dropped": 9, "pairs": 31})
    shadow = experiment.status().shadow
    assert shadow and asdict(shadow) == {
        "received": 40,
        "dropped": 9,
        "pairs": 31,
        "quiet_pairs": 16,
        "errors": {"original": 1, "pruned": 7},
        "compared_outputs": 28,
        "agreeing": 15,
        "agreement": 15 / 28,
        "top1": 15 / 21,
    }
    evidence = Evidence(experiment.state, experiment.spec)
    evidence.refresh()
    assert evidence.pairs.latency.values == 16 and evidence.pairs.handler.mean == pytest.approx(numpy.log(0.5))
    users, replays = (rail for rail in evidence.guardrails() if rail.name == "errors")
    assert "(0 of 500 against 0 of 500)" in users.text
    assert "errors of replays" in replays.text and "(7 of 31 against 1 of 31)" in replays.text


def test_evidence_that_grows_is_that_of_the_whole(experiment: Experiment) -> None:
    growing = Evidence(experiment.state, experiment.spec)
    for _ in range(5):
        experiment.pairs(37, 0.9)
        experiment.windows(11)
        growing.refresh()
    whole = Evidence(experiment.state, experiment.spec)
    whole.refresh()
    assert growing.findings() == whole.findings() and growing.guardrails() == whole.guardrails()
    assert growing.pairs.total == 185 and growing.arms.windows == 55


def test_without_shadow_mode_pairs_are_not_waited_for(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, shadow=False, split="90:10", margin=0.05, max_error_rate_gap=0.05)
    experiment.windows(200, 0.8)
    status = experiment.status()
    assert status.advice.kind == "promote" and status.shadow is None
    assert {rail.name for rail in status.guardrails} == {"errors", "p99", "agreement"}


def test_the_text(experiment: Experiment) -> None:
    experiment.pairs(300, 0.8)
    experiment.windows(200, 0.8)
    write_json(experiment.state / RECORDER, {"received": 400, "dropped": 100, "pairs": 300})
    text = experiment.status().to_text()
    assert text.splitlines()[:11] == [
        "m on torchserve: 50 % of users to original, 50 % to pruned, by X-User-Id",
        "http://127.0.0.1:1/predictions/m, shadow mode, running for 90 s",
        "",
        "                  original  pruned",
        "requests               500     500",
        "share                50.0%   50.0%",
        "failed (5xx)             0       0",
        "refused (4xx)            0       0",
        "failed/judged        0/500   0/500",
        "gateway p50 (ms)        10       9",
        "gateway p99 (ms)        10       9",
    ]
    for part in (
        "handler p99 (ms)",
        "The arms carry different loads",
        "300 pairs, 300 of them undisturbed",
        "want of time: 100 of 400 requests",
        "300 of 300 agree",
        "same class on 100.00%",
        "open    p99:",
        "shadow  pruned is 1.2",
        "split   pruned is 1.2",
    ):
        assert part in text, part
    assert text.splitlines()[-1] == experiment.status().advice.text


def test_problems_and_promotion_are_shown(experiment: Experiment) -> None:
    Heartbeat(ready=True, problems=("TorchServe has ended",)).write(experiment.state)
    switch(experiment.state / GATEWAY, "pruned")
    text = experiment.status().to_text()
    assert "PROBLEM: TorchServe has ended" in text and "m on torchserve: all users go to pruned" in text


def test_the_metrics(experiment: Experiment) -> None:
    experiment.pairs(1500, 0.8)
    experiment.windows(200, 0.8)
    write_json(experiment.state / RECORDER, {"received": 1600, "dropped": 100, "pairs": 1500})
    latest: list[Status | None] = [None]
    own = registry(lambda: latest[0])
    assert generate_latest(own) == b""
    latest[0] = experiment.status()
    samples = dict(
        line.rsplit(" ", 1) for line in generate_latest(own).decode().splitlines() if not line.startswith("#")
    )
    assert samples['redpp_ab_traffic_ratio{arm="pruned",model="m"}'] == "0.5"
    assert samples['redpp_ab_requests_total{arm="original",model="m"}'] == "500.0"
    assert (
        samples['redpp_ab_pairs_total{model="m"}'] == "1500.0"
        and samples['redpp_ab_dropped_total{model="m"}'] == "100.0"
    )
    assert samples['redpp_ab_agreement_ratio{model="m"}'] == "1.0"
    assert samples['redpp_ab_verdict{kind="faster",model="m"}'] == "1.0"
    assert sum(float(value) for name, value in samples.items() if "redpp_ab_verdict" in name) == 1
    assert sum(float(value) for name, value in samples.items() if "redpp_ab_advice{" in name) == 1
    assert samples[f'redpp_ab_advice_reason{{model="m",reason="{latest[0].advice.reason}"}}'] == "1.0"
    for source in ("shadow", "split"):
        low, mean, high = (
            float(samples[f'redpp_ab_speedup_ratio{{bound="{bound}",model="m",source="{source}"}}'])
            for bound in ("low", "mean", "high")
        )
        assert 1 < low < mean < high and low < 1.25 < high
    assert 'redpp_ab_settled{arm="original",model="m"} 0.0' in generate_latest(own).decode()
    switch(experiment.state / GATEWAY, "original")
    latest[0] = experiment.status()
    for name in ("traffic_ratio", "settled"):
        assert f'redpp_ab_{name}{{arm="original",model="m"}} 1.0' in generate_latest(own).decode()


@pytest.mark.parametrize(
    "split,shadow,settled",
    [
        ("100:0", False, {"original": 1, "pruned": 0}),
        ("0:100", False, {"original": 0, "pruned": 1}),
        ("100:0", True, {"original": 0, "pruned": 0}),
        ("99:1", False, {"original": 0, "pruned": 0}),
    ],
)
def test_a_split_that_leaves_nobody_to_one_version_settles_a_test(
    tmp_path: Path, split: str, shadow: bool, settled: dict[str, int]
) -> None:
    made = Experiment(tmp_path, split=split, shadow=shadow).status()
    lines = generate_latest(registry(lambda: made)).decode().splitlines()
    for arm, value in settled.items():
        assert f'redpp_ab_settled{{arm="{arm}",model="m"}} {value}.0' in lines


def test_a_finding_that_says_slower_goes_before_all_others(experiment: Experiment) -> None:
    experiment.pairs(1500, 0.8)
    experiment.windows(200, 1.25)
    status = experiment.status()
    assert [finding.verdict.kind for finding in status.findings] == ["faster", "slower"]
    assert deciding(status.findings).source == "split" and status.advice.kind == "rollback"


def test_all_comparisons_and_guardrails_share_one_chance_of_error(experiment: Experiment) -> None:
    """Any of three comparisons, and errors of users or of replays, may decide: each gets its part of 5 %."""
    experiment.pairs(300, 0.9)
    experiment.pairs(10, status=[500, 500], difference=None, top1=None)
    evidence = Evidence(experiment.state, experiment.spec)
    evidence.refresh()
    lines = list(Lines(experiment.state / PAIRS).new())
    alone = RatioSequence(0.05 / 3)
    alone.update([numpy.log(line["seconds"][0] / line["seconds"][1]) for line in lines if line["difference"]])
    assert evidence.pairs.latency.interval() == alone.interval()
    users, replays = (rail for rail in evidence.guardrails() if rail.name == "errors")
    planned = 0.9  # of the chance: the rest is for splits that come later
    for rail, counts, part in ((users, (0, 500, 0, 500), planned), (replays, (10, 310, 10, 310), 1)):
        expected = error_guardrail(*counts, 0.01, 0.05 / 2 * part)
        assert (rail.low, rail.high) == (expected.low, expected.high)
    write_json(experiment.state / COUNTS, {**read_json(experiment.state / COUNTS), "users": {}})
    evidence.refresh()
    (replays,) = (rail for rail in evidence.guardrails() if rail.name == "errors")
    assert replays.low == error_guardrail(10, 310, 10, 310, 0.01, 0.05).low  # users are not divided: it has all of it


def test_what_the_reports_say_of_agreement_follows_candidate_and_tolerance(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for folder, same, difference in ((own, 1.0, 0.3), (other, 0.5, 0.05)):
        folder.mkdir()
        verify = {"agreement": same, "output_error": difference, "images": 400}
        write_json(folder / "report.json", {"verify": verify})
    spec = Spec(own, None, "torchserve", TrafficSplit(Decimal(50), Decimal(50)), None, False)
    assert known_agreement(spec).ok is True and known_agreement(replace(spec, candidate=other)).ok is None
    assert known_agreement(replace(spec, limits=Limits(tolerance=0.2))).ok is None  # 0.3 apart, though the same class
    assert known_agreement(replace(spec, candidate=other, limits=Limits(tolerance=0.2))).ok is True


def test_percentiles_are_those_of_their_names(experiment: Experiment) -> None:
    counts = read_json(experiment.state / COUNTS)
    milliseconds = {"pruned": {"5": 950, "70": 35, "900": 15}}
    write_json(experiment.state / COUNTS, {**counts, "users": {**counts["users"], "milliseconds": milliseconds}})
    assert experiment.status().arms["pruned"].gateway_ms == {"p50": 5, "p99": 900}


def test_bounds_that_are_not_there_are_null_in_json(experiment: Experiment) -> None:
    document = experiment.status().to_json()
    assert document["verdicts"][0]["high"] is None and document["verdicts"][0]["low"] == 0.0
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_each_arms_numbers_stand_in_its_own_column(experiment: Experiment) -> None:
    counts = read_json(experiment.state / COUNTS)
    numbers = {
        "requests": (900, 800),
        "errors": (11, 12),
        "refused": (21, 22),
        "abandoned": (31, 32),
        "by_header": (41, 42),
        "failed_over": (51, 52),
    }
    users = {key: dict(zip(NAMES, pair, strict=True)) for key, pair in numbers.items()}
    write_json(experiment.state / COUNTS, {**counts, "users": users})
    rows = [line.split() for line in experiment.status().to_text().splitlines()]
    titles = {
        "requests": "requests",
        "failed": "errors",
        "refused": "refused",
        "left": "abandoned",
        "asked": "by_header",
        "answered": "failed_over",
    }
    seen = {titles[row[0]]: (int(row[-2]), int(row[-1])) for row in rows if row and row[0] in titles}
    assert seen == numbers


def compared(
    server: str, *shares: float | None, inputs: float | None = 500, difference: float = 0.01
) -> dict[str, Any]:
    """An entry of a report's history; several shares make a sweep."""
    cells = [
        {"inputs": inputs, "figures": {"agreement": {"value": share}, "difference": {"value": difference}}}
        for share in shares
    ]
    return {"server": server, "cells": cells}


@pytest.mark.parametrize(
    ("comparisons", "ok", "words"),
    [
        ([compared("torchserve", 1.0), compared("torchserve", 0.1)], True, "in the last comparison 100.00% of 500"),
        ([compared("triton", 0.1), compared("torchserve", 1.0)], True, "in the last comparison 100.00%"),
        ([compared("torchserve", 0.1), compared("triton", 1.0)], False, "in the last comparison 10.00%"),
        ([compared("triton", 0.1)], None, "in the last comparison, which was on triton, 10.00%"),  # no roll-back
        ([compared("torchserve", 1.0, 0.2, 1.0)], False, "20.00% of 500"),  # the worst cell of a sweep
        ([compared("torchserve", None, difference=0.3)], False, "0.00% of 500"),
        ([compared("torchserve", 7.0), compared("torchserve", 1.0)], True, "100.00% of 500"),  # damaged: the next
        (
            [compared("torchserve", 1.0, inputs=-3), {}, {"server": "torchserve"}],
            True,
            "when it was packaged 100.00% of",
        ),
        ([compared("torchserve", 1.0, inputs=1e300)], True, "when it was packaged"),
    ],
)
def test_the_newest_comparison_on_the_tests_own_server_tells_the_agreement(
    tmp_path: Path, comparisons: list[dict[str, Any]], ok: bool | None, words: str
) -> None:
    verify = {"agreement": 1.0, "output_error": 0.0, "images": 400}
    write_json(tmp_path / "report.json", {"verify": verify, "comparisons": comparisons})
    spec = Spec(tmp_path, None, "torchserve", TrafficSplit(Decimal(50), Decimal(50)), None, False)
    found = known_agreement(spec)
    assert found.ok is ok and words in found.text, found
