"""Windows of both versions' counters from the server's metrics, and what users got from the access log."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from redpp_serve.ab.counts import Counting, HandlerTimes, Traffic, Windows, scrape
from redpp_serve.ab.gateway import switch
from redpp_serve.ab.state import COUNTS, GATEWAY, WINDOWS, Lines, read_json
from redpp_serve.metrics_reader import Reading, Unreadable, parse
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
    readings = [counted({1: (10 * k, 1.0 * k)}, {1: (k, 0.1 * k)}) for k in range(6)]
    counting = Counting(tmp_path, gateway / "access.log", lambda: readings.pop(0))
    divided = []
    for step in range(6):
        if step == 2:
            switch(gateway, "pruned")
        if step == 4:
            (gateway / "promoted").unlink()
        assert counting.count() == []
        counts = read_json(tmp_path / COUNTS)
        divided.append(
            HandlerTimes.from_json(counts["divided"]).histogram()[1:] if counts["divided"]["pruned"] else None
        )
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
    return {"arm": arm, "status": status, "upstream_time": seconds, "chosen_by": by}


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
