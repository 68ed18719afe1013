"""Windows of both versions' counters from the server's metrics, and what users got from the access log."""

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redpp_serve.ab.counts import Counting, HandlerTimes, Traffic, Windows, scrape
from redpp_serve.ab.gateway import divide, mark_dead, set_split, switch
from redpp_serve.ab.spec import parse_split
from redpp_serve.ab.state import COUNTS, GATEWAY, WINDOWS, Lines, read_json
from redpp_serve.metrics_reader import Reading, Unreadable, parse
from redpp_serve.statistics.guardrails import error_guardrail
from redpp_serve.variants import NAMES
from tests.support.live_metrics import Exporter


def text(batches: dict[str, dict[int, tuple[float, float]]], model: str = "m") -> str:
    """Metrics as a server exports them: arm -> batch size -> (batches, seconds); all within 0.1 s each."""
    lines = ["# HELP redpp_batches_total x", "# TYPE redpp_batches_total counter", 'nv_inference_count{model="m"} 3']
    for arm, sizes in batches.items():
        labels = f'model="{model}",version="1.0",variant="{arm}"'
        for size, (count, seconds) in sizes.items():
            lines.append(f'redpp_batches_total{{{labels},batch="{size}"}} {count}')
            lines.append(f'redpp_batch_seconds_total{{{labels},batch="{size}"}} {seconds}')
        total = sum(count for count, _ in sizes.values())
        lines += [
            f'redpp_handler_seconds_bucket{{{labels},le="{le}"}} {n}' for le, n in (("0.1", total), ("+Inf", total))
        ]
    return "\n".join(lines) + "\n"


def test_histograms_go_through_json() -> None:
    windows = Windows(counted({}, {}))
    windows.cut(counted({1: (5, 0.5), 4: (1, 0.2)}, {1: (2, 0.1)}))
    assert windows.since.histogram() == ([0.1], [6, 6], [2, 2])
    assert HandlerTimes.from_json(json.loads(json.dumps(windows.since.to_json()))) == windows.since
    assert HandlerTimes().histogram() == ([], [], [])


def test_only_what_is_counted_can_be_restarted() -> None:
    """The worker's CPU time begins anew with each worker; that is no reason to leave a window out."""
    with Exporter() as exporter:
        exporter.batches("original", 2, 0.004, 3)
        windows = Windows(scrape(exporter.url, "small"))
        assert windows.cut(scrape(exporter.url, "other")) == {}
        windows = Windows(scrape(exporter.url, "small"))
        exporter.batches("original", 2, 0.004, 2)
        reading = scrape(exporter.url, "small")
        assert {sample.family.name for sample in reading.samples} == {
            "redpp_batches_total",
            "redpp_batch_seconds_total",
            "redpp_handler_seconds",
        }
        assert windows.cut(reading) == {2: [2, pytest.approx(0.008), 0, 0]}


def counted(original: dict[int, tuple[float, float]], pruned: dict[int, tuple[float, float]]) -> Reading:
    return parse(text({"original": original, "pruned": pruned}), "m")


def test_a_window_holds_what_happened_in_it() -> None:
    windows = Windows(counted({1: (100, 9.0)}, {}))
    assert windows.cut(counted({1: (100, 9.0)}, {})) == {}
    window = windows.cut(counted({1: (110, 10.0), 2: (1, 0.5)}, {1: (3, 0.25)}))
    assert window == {1: [10, 1.0, 3, 0.25], 2: [1, 0.5, 0, 0]}
    assert windows.since.histogram() == ([0.1], [11, 11], [3, 3])


def test_times_while_all_users_have_one_version_are_no_part_of_the_tails_compared(tmp_path: Path) -> None:
    (gateway := tmp_path / GATEWAY).mkdir()
    divide(gateway)
    set_split(gateway, parse_split("90:10"))
    readings = [counted({1: (10 * k, 1.0 * k)}, {1: (k, 0.1 * k)}) for k in range(6)]
    counting = Counting(tmp_path, gateway / "access.log", lambda: readings.pop(0))
    divided = []
    for step in range(6):
        if step == 2:
            switch(gateway, "pruned")
        if step == 4:
            divide(gateway)
        assert counting.count() == []
        counts = read_json(tmp_path / COUNTS)
        times = counts["divided"].get("90:10")
        divided.append(times and HandlerTimes.from_json(times).histogram()[1:])
    assert HandlerTimes.from_json(counts["buckets"]).histogram()[1:] == ([50, 50], [5, 5])
    one, two = ([10, 10], [1, 1]), ([20, 20], [2, 2])
    assert divided == [None, one, one, one, one, two]  # a window in which it changed is left out too


def test_seconds_that_were_read_before_their_batch_wait() -> None:
    windows = Windows(counted({1: (10, 1.0)}, {1: (10, 1.0)}))
    assert windows.cut(counted({1: (10, 1.5)}, {1: (11, 1.1)})) == {1: [0, 0, 1, pytest.approx(0.1)]}
    assert windows.cut(counted({1: (11, 1.5)}, {1: (11, 1.1)})) == {1: [1, 0.5, 0, 0]}


def test_seconds_that_wait_are_forgotten_with_the_server_that_spent_them() -> None:
    windows = Windows(counted({1: (10, 1.0)}, {}))
    assert windows.cut(counted({1: (10, 1.5)}, {})) == {}
    assert windows.cut(counted({1: (1, 0.1)}, {})) == {}
    assert windows.cut(counted({1: (2, 0.2)}, {})) == {1: [1, pytest.approx(0.1), 0, 0]}


def test_a_server_that_was_started_anew_counts_from_there() -> None:
    windows = Windows(counted({1: (100, 9.0)}, {1: (50, 5.0), 2: (1, 0.9)}))
    # the pruned version has passed its totals again: what lies between is no difference of one server's
    assert windows.cut(counted({1: (3, 0.3)}, {1: (60, 5.1), 2: (2, 1.0)})) == {}
    assert windows.cut(counted({1: (5, 0.5)}, {1: (61, 5.2), 2: (2, 1.0)})) == {
        1: [2, pytest.approx(0.2), 1, pytest.approx(0.1)]
    }
    assert windows.since.histogram()[1:] == ([2, 2], [1, 1])


def test_ranges_of_times_that_shrink_are_another_servers() -> None:
    """Totals that grew, of which the batches of a range did not: differences would be no histogram."""

    def counters(counts: tuple[int, ...]) -> Reading:
        lines = [
            f'redpp_handler_seconds_bucket{{model="m",variant="{name}",le="{edge}"}} {count}\n'
            for name in ("original", "pruned")
            for edge, count in zip(("0.1", "0.2", "+Inf"), counts, strict=True)
        ]
        return parse("".join(lines), "m")

    for before, after in (((0, 5, 10), (9, 9, 11)), ((0, 5, 10), (3, 4, 12))):
        windows = Windows(counters(before))
        assert windows.cut(counters(after)) == {} and windows.since.buckets["pruned"] == {}, after
        windows.cut(counters(tuple(count + 1 for count in after)))
        assert windows.since.histogram() == ([0.1, 0.2], [1, 1, 1], [1, 1, 1]), after


def line(arm: str, status: int = 200, seconds: float | None = 0.01, by: str = "split") -> dict[str, Any]:
    return {
        "arm": arm,
        "answered_by": arm,
        "admitted": True,
        "status": status,
        "upstream_time": seconds,
        "chosen_by": by,
        "step": "0",
    }


def test_users_are_counted_by_arm() -> None:
    traffic = Traffic()
    assert traffic.share("pruned") is None and traffic.percentile_ms("pruned", 0.5) is None
    traffic.take(
        [
            *[line("original", seconds=k / 1000) for k in range(1, 101)],
            line("pruned", 500),
            line("pruned", 404),
            line("pruned", 502, None),
            line("pruned", by="header"),
            line("", 404, None),
            line("original", 499, None),
        ]
    )
    again = Traffic(json.loads(json.dumps(traffic.to_json())))
    for each in (traffic, again):
        assert (each.requests["original"], each.requests["pruned"]) == (101, 4)
        assert (each.errors["pruned"], each.refused["pruned"], each.by_header["pruned"]) == (2, 1, 1)
        assert (each.errors["original"], each.refused["original"], each.abandoned["original"]) == (0, 0, 1)
        assert each.share("pruned") == 4 / 105
        assert [each.percentile_ms("original", q) for q in (0.5, 0.99)] == [50, 99]
        assert each.percentile_ms("pruned", 0.5) == 10
    traffic.take([line("pruned", seconds=12.3456)] * 9)
    assert traffic.percentile_ms("pruned", 0.99) == 12300  # three digits


def judged(*lines: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(judged, faults) of both arms."""
    traffic = Traffic()
    traffic.take(lines)
    again = Traffic(json.loads(json.dumps(traffic.to_json())))
    counts = [[getattr(each, name)[arm] for arm in NAMES] for each in (traffic, again) for name in ("judged", "faults")]
    assert counts[:2] == counts[2:]
    return counts[0], counts[1]


GOOD = [line(arm, seconds=0.010) for arm in NAMES for _ in range(30)]


@pytest.mark.parametrize(
    ("lines", "extra", "faults"),
    [
        ([line("pruned", 500)], 1, 1),
        ([line("pruned", 400)], 1, 0),
        ([line("pruned", 500, by="header")] * 9, 0, 0),
        ([line("pruned", 499, by="header", seconds=5.0)] * 9, 0, 0),
        ([{**line("pruned", 499, seconds=5.0), "admitted": False}] * 9, 0, 0),
        ([{**line("pruned", 403), "admitted": False}] * 9, 0, 0),
        ([line("pruned", 499, seconds=0.0)] * 9, 9, 0),  # gone before a healthy arm could have answered
        ([line("pruned", 499, seconds=0.009)] * 9, 9, 0),
        ([line("pruned", 499, seconds=None)] * 9, 9, 0),  # gone while sending its body: no arm was asked
        ([line("pruned", 499, seconds=2.0)], 1, 1),  # an arm that hangs
        ([line("pruned", 504, seconds=120.0)], 1, 1),
        ([{**line("pruned", seconds=None), "answered_by": "original"}] * 2, 2, 2),  # its user was served, not by it
        ([{**line("pruned", 400, seconds=None), "answered_by": "original"}], 1, 1),
        ([{**line("pruned", 500), "answered_by": "original"}] * 9, 0, 0),  # neither version can answer it
        ([{**line("pruned", 502, None), "answered_by": "original"}] * 9, 0, 0),  # the server is gone
    ],
)
def test_only_those_whom_an_arm_failed_speak_against_it(lines: list[dict[str, Any]], extra: int, faults: int) -> None:
    assert judged(*GOOD, *lines) == ([30, 30 + extra], [0, faults])


def test_before_the_first_answers_only_the_very_patient_are_believed() -> None:
    assert judged(line("pruned", 499, seconds=0.9), line("pruned", 499, seconds=1.1)) == ([0, 2], [0, 1])


def test_an_arm_that_answers_for_the_other_is_not_judged_by_it() -> None:
    traffic = Traffic()
    traffic.take([*GOOD, *[{**line("original", seconds=9.0), "answered_by": "pruned"}] * 5])
    assert (traffic.failed_over["original"], traffic.failed_over["pruned"]) == (5, 0)
    assert (traffic.requests["original"], traffic.requests["pruned"], traffic.judged["pruned"]) == (35, 30, 30)
    assert traffic.percentile_ms("original", 0.99) == traffic.percentile_ms("pruned", 0.99) == 10
    assert traffic.errors.total() == 0 and +traffic.faults == {"original": 5}


def test_counting_goes_on_where_a_killed_process_has_ended(tmp_path: Path) -> None:
    """Nothing is counted twice; while an arm answers for the other, tails are not compared."""
    (gateway := tmp_path / GATEWAY).mkdir()
    divide(gateway)
    set_split(gateway, parse_split("90:10"))
    log, done = gateway / "access.log", 0

    def more(count: int) -> Counting:
        nonlocal done
        counting = Counting(tmp_path, log, lambda: counted({1: (10 * done, 1.0 * done)}, {1: (done, 0.1 * done)}))
        for _ in range(count):
            done += 1
            with log.open("a") as file:
                file.write(json.dumps(line("pruned")) + "\n")
            assert counting.count() == []
        return counting

    more(3)
    again = more(3)
    totals = again.totals()
    assert totals and totals.traffic.requests["pruned"] == 6 and len(again.new_windows()) == 4
    # whether users were divided all the time in between nobody knows
    assert totals.times.histogram()[1:] == ([40, 40], [4, 4]) and totals.divided["90:10"].histogram()[1:] == (
        [30, 30],
        [3, 3],
    )
    mark_dead(gateway, ["pruned"])
    totals = more(3).totals()
    assert totals and totals.times.histogram()[1:] == ([60, 60], [6, 6])
    assert totals.divided["90:10"].histogram()[1:] == ([30, 30], [3, 3])


def test_counting_survives_an_outage_and_a_log_that_is_put_aside(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    now: list[Reading | None] = [counted({1: (1, 1.0)}, {})]

    def counters() -> Reading:
        if now[0] is None:
            raise Unreadable("refused")
        return now[0]

    def write(path: Path, arm: str) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line(arm)) + "\n")

    counting = Counting(tmp_path, log, counters)
    write(log, "original")
    assert counting.count() == []
    now[0] = None
    assert counting.count() == ["the server's metrics cannot be read: refused"]
    now[0] = counted({1: (3, 1.5)}, {1: (1, 0.2)})
    log.replace(log.with_suffix(".log.1"))
    counting.put_aside()
    write(log.with_suffix(".log.1"), "pruned")  # nginx had not opened the new one yet
    write(log, "pruned")
    assert counting.count() == []
    counts = read_json(tmp_path / COUNTS)
    assert counts["users"]["requests"] == {"original": 1, "pruned": 2}
    assert [w["batches"] for w in Lines(tmp_path / WINDOWS).new()] == [{"1": [2, 0.5, 1, 0.2]}]
    assert HandlerTimes.from_json(counts["buckets"]).buckets["pruned"] == {0.1: 1, math.inf: 1}


def sent(arm: str, at_s: float, user: str, status: int = 200) -> dict[str, Any]:
    """A user's line of the log, so many seconds after a full hour."""
    when = datetime(2026, 3, 1, 12, tzinfo=UTC) + timedelta(seconds=int(at_s))
    return {**line(arm, status), "time": when.isoformat(), "user": user}


def test_what_a_user_sends_soon_after_a_failure_says_nothing() -> None:
    """Neither the retries nor what then succeeds, of this user and on this arm alone."""
    lines = [sent("pruned", at, "1", 500) for at in (0, 0, 1, 9)]
    lines += [sent("pruned", 9, "1"), sent("pruned", 9, "2", 500), sent("original", 9, "1", 500)]
    lines += [sent("pruned", 10, "1", 500), sent("pruned", 19, "1"), sent("pruned", 20, "1")]
    assert judged(*lines) == ([1, 4], [1, 3])
    assert judged(*[sent("pruned", 0, "", 500)] * 3) == ([0, 3], [0, 3]), "requests without a user"
    both = [{**sent("pruned", at, "1", 500), "answered_by": "original"} for at in (0, 1)]
    assert judged(*both, sent("pruned", 2, "1")) == ([0, 1], [0, 0]), "the version has not failed this user"


@pytest.mark.parametrize("seed", range(5))
def test_one_users_retries_leave_the_verdict_alone(seed: int) -> None:
    """One whose input always fails asks ten times a second beside 400 others; without a limit that is a roll-back."""
    draw = np.random.default_rng(seed)
    lines = [
        sent("original" if user % 2 else "pruned", at, f"{user}") for at in range(300) for user in draw.choice(400, 40)
    ]
    angry = [sent("pruned", at / 10, "angry", 500) for at in range(3000)]
    mixed = sorted([*lines, *angry], key=lambda each: each["time"])
    (original, pruned), (faults_original, faults_pruned) = judged(*mixed)
    assert faults_pruned == 30 and error_guardrail(faults_original, original, faults_pruned, pruned).ok is not False
    without = [{**each, "user": ""} for each in mixed]
    (original, pruned), (faults_original, faults_pruned) = judged(*without)
    assert error_guardrail(faults_original, original, faults_pruned, pruned).ok is False
    broken = [{**each, "status": 500 if each["arm"] == "pruned" else 200} for each in lines]
    (original, pruned), (faults_original, faults_pruned) = judged(*broken)
    assert error_guardrail(faults_original, original, faults_pruned, pruned).ok is False, "an arm that fails all"


def test_the_limit_moves_no_rate_where_the_arms_carry_different_loads() -> None:
    """One request in twenty fails on either arm, which few quick users and many slow ones have."""
    draw = np.random.default_rng(0)
    lines = [
        sent(arm, at, f"{arm}{user}", 500 if draw.random() < 0.05 else 200)
        for at in range(2000)
        for arm, users in (("original", 45), ("pruned", 5))
        for user in range(users)
        if draw.random() < (0.8 if user % 5 == 0 else 0.1)
    ]
    (original, pruned), (faults_original, faults_pruned) = judged(*lines)
    assert pruned < original < 0.9 * len(lines), "nothing was left out"
    assert faults_original / original == pytest.approx(0.05, abs=0.006)
    assert faults_pruned / pruned == pytest.approx(0.05, abs=0.015)
