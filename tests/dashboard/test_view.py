"""Windows, speed-ups, and the words made of them, against samples that are known one by one."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redpp_serve.dashboard import window as window_module
from redpp_serve.dashboard.collector import Collector, Target
from redpp_serve.dashboard.view import Headline, Shown, headline, page_data
from redpp_serve.dashboard.window import History, Window, equal_batch_ratio, network_ratio, noise, percentile_ratio
from redpp_serve.metrics_reader import Key
from redpp_serve.report.data import Report
from redpp_serve.report.formats import DASH
from redpp_serve.variants import NAMES
from tests.support.live_metrics import Exporter, while_down

KEY = Key("redpp_requests_total", "original", "ok")


def test_a_window_holds_what_came_within_it() -> None:
    history = History()
    for second in range(101):
        history.add(float(second), {KEY: 0.0 if second == 0 else 5.0 if second <= 90 else 20.0})
    assert history.window(10).rate(*KEY) == pytest.approx(20.0) and history.window(10).span == 10.0
    assert history.window(60).total(*KEY) == 50 * 5 + 10 * 20
    uneven = History()
    for tick in range(100):
        uneven.add(1.03 * tick, {KEY: 1.0})
    assert uneven.window(60).span == pytest.approx(58 * 1.03)
    assert uneven.window(60.3).span == pytest.approx(59 * 1.03)
    early = History()
    early.add(0.0, {})
    assert early.window(60).rate(*KEY) is None
    early.add(4.0, {KEY: 8.0})
    assert early.window(60).span == 4.0 and early.window(60).rate(*KEY) == 2.0


def test_history_is_bounded_in_time_and_in_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "MAX_KEYS", 50)
    history = History()
    for second in range(2000):
        history.add(float(second), {Key("redpp_batches_total", "pruned", str(second)): 1.0, KEY: 1.0})
    kept = history.window(10_000)
    assert kept.span == window_module.KEPT_S and kept.total(*KEY) == 900
    assert len(kept.details("redpp_batches_total", "pruned")) == 0, "those that came within it found no room"
    assert kept.each([KEY]).shape == (900, 1)


def test_a_target_counts_from_its_first_scrape_on_and_through_outages() -> None:
    with Exporter() as exporter:
        exporter.batches("original", 2, 0.003, times=5)
        target = Target(exporter.url)
        assert target.scrape("small") == {} and target.up and target.serves
        exporter.batches("original", 2, 0.003, times=3)
        assert target.scrape("small")[KEY] == 6
        with while_down(exporter):
            assert target.scrape("small") == {} and "refused" in target.problem
        exporter.batches("original", 1, 0.002, times=7)
        assert target.scrape("small")[KEY] == 7 and target.up


def window(original: dict[int, tuple[int, float]], pruned: dict[int, tuple[int, float]]) -> Window:
    """The gains of a minute with so many batches of each size, each of which took so many seconds."""
    with Exporter() as exporter:
        target, history = Target(exporter.url), History()
        history.add(0.0, target.scrape("small"))
        for variant, batches in (("original", original), ("pruned", pruned)):
            for size, (times, seconds) in batches.items():
                exporter.batches(variant, size, seconds, times)
        history.add(60.0, target.scrape("small"))
        return history.window(60)


def test_speedups_of_known_times() -> None:
    found = window({1: (40, 0.003)}, {1: (10, 0.0015)})
    assert equal_batch_ratio(found) == pytest.approx((2.0, 0.003, 0.0015, None, None))
    assert network_ratio(found).value == pytest.approx(2.0)
    ratio = percentile_ratio(found, 0.5)  # both in the middle of their bucket
    assert (ratio.original, ratio.pruned) == pytest.approx(((0.00283 + 0.004) / 2, (0.00141 + 0.002) / 2))
    assert ratio.low <= 2.0 <= ratio.high


def test_unequal_batches_do_not_make_a_version_faster() -> None:
    """The pruned network takes half the time at each size, but gets the large batches."""
    found = window({1: (90, 0.001), 8: (10, 0.004)}, {1: (10, 0.0005), 8: (90, 0.002)})
    assert found.mean("redpp_handler_seconds", "original") < found.mean("redpp_handler_seconds", "pruned")
    assert equal_batch_ratio(found).value == pytest.approx(2.0)
    assert equal_batch_ratio(window({1: (5, 0.001)}, {2: (5, 0.001)})) is None


def words(found: Window, problem: str = "", serves: bool = True, down_s: float = 0.0) -> Headline:
    url = "http://127.0.0.1:1/metrics"
    serving = {url} if serves else set()
    return headline(Shown("small", found, problems={url: problem}, serving=serving, down_s=down_s))


def shown(found: Window, **more: Any) -> dict[str, Any]:
    return page_data(Shown("small", found, **more))


def rows(found: Window, *tables: str, **more: Any) -> dict[str, list[str]]:
    """First cell of each row -> the others."""
    data = shown(found, **more)
    return {row[0]: row[1:] for table in tables for row in data[table]}


def test_the_headline_says_what_the_numbers_say() -> None:
    faster = words(window({1: (40, 0.003)}, {1: (10, 0.0015)}))
    assert faster.text == "The pruned model answers 2.00 times as fast (p50, last 60 s)" and faster.state == "faster"
    assert "Within bucket precision the factor is 1.42 to 2.84. From 40 and 10 batches." in faster.detail
    slower = words(window({1: (40, 0.0015)}, {1: (10, 0.003)}))
    assert slower.text == "The pruned model answers 0.50 times as fast (p50, last 60 s)" and slower.state == "slower"


def test_where_a_bucket_hides_the_difference_the_mean_speaks() -> None:
    close = words(window({1: (40, 0.0027)}, {1: (40, 0.0022)}))
    assert close.text == "The pruned model answers 1.23 times as fast (mean at equal batch size, last 60 s)"
    assert "lie in one bucket, 2.00 to 2.83 ms, and cannot be told apart" in close.detail
    next_to_it = words(window({1: (40, 0.0030)}, {1: (40, 0.0026)}))  # of p50: 1.00 to 2.00 times
    assert next_to_it.text == "The pruned model answers 1.15 times as fast (mean at equal batch size, last 60 s)"
    assert "which tells neither" in next_to_it.detail
    even = words(window({1: (40, 0.0027)}, {1: (40, 0.00269)}))
    assert even.text == "Both versions answer equally fast (mean at equal batch size, last 60 s)"
    assert even.state == "even"


def test_a_difference_within_the_noise_is_not_called_one() -> None:
    """The same two times on average; once they swing from second to second by much more than they differ."""
    for swing, text in (
        (0.5, "No clear difference between the versions (last 32 s)"),
        (0.0, "The pruned model answers 1.10 times as fast (mean at equal batch size, last 32 s)"),
    ):
        history = History()
        history.add(0.0, {})
        for second in range(1, 33):
            gains: dict[Key, float] = {}
            for variant, seconds, period in (("original", 0.0022, 2), ("pruned", 0.0020, 4)):
                took = seconds * (1 + swing if second % period < period / 2 else 1 - swing)
                gains |= {
                    Key("redpp_batches_total", variant, "1"): 10.0,
                    Key("redpp_batch_seconds_total", variant, "1"): 10 * took,
                    Key("redpp_handler_seconds_count", variant): 10.0,
                    Key("redpp_handler_seconds_bucket", variant, "0.002"): 0.0,
                    Key("redpp_handler_seconds_bucket", variant, "0.004"): 10.0,
                    Key("redpp_handler_seconds_bucket", variant, "+Inf"): 10.0,
                }
            history.add(float(second), gains)
        found = words(history.window(60))
        assert found.text == text
        assert ("give or take" in found.detail) == (swing > 0)


def test_the_error_of_the_ratio_is_what_it_says() -> None:
    """Against the spread of the ratio over many runs."""
    random = np.random.default_rng(1)
    ratios, errors = [], []
    for _ in range(150):
        history = History()
        history.add(0.0, {})
        for second in range(1, 41):
            took = random.exponential(0.002, 2)
            gains = {Key("redpp_batches_total", variant, "2"): 5.0 for variant in ("original", "pruned")}
            times = zip(("original", "pruned"), took.tolist(), strict=True)
            gains |= {Key("redpp_batch_seconds_total", variant, "2"): 5 * each for variant, each in times}
            history.add(float(second), gains)
        window = history.window(60)
        ratios.append(math.log(equal_batch_ratio(window).value))
        errors.append(noise(window))
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.2)
    assert noise(Window({}, 0.0)) is None
    gains = {Key(n, v, "2"): 5.0 for n in ("redpp_batches_total", "redpp_batch_seconds_total") for v in NAMES}
    for scrapes, known in ((4, False), (5, True)):
        assert (noise(Window(gains, scrapes, np.ones((scrapes, 4)))) is not None) == known, scrapes


def test_what_is_not_there_is_said_in_words() -> None:
    silent = window({}, {})
    assert words(silent).text == "No traffic in the last 60 s" and words(silent).state == "waiting"
    assert words(Window({}, 0.0)).text == "No traffic yet"
    one = words(window({1: (40, 0.003)}, {}))
    assert one.text == "Only the original model had traffic (last 60 s)" and "0.7 /s answers" in one.detail
    down = words(silent, problem="Connection refused", down_s=12.0)
    assert down.text == "The server does not answer" and down.detail.startswith("For 12 s: Connection refused.")
    assert words(silent, serves=False).text == "No metrics of small so far"
    data = shown(silent)
    assert [tile["value"] for tile in data["speedups"]] == ["no traffic"] * 3
    assert all(row[1:3] == ["no traffic", "no traffic"] for row in data["latency"] + data["traffic"])
    assert all(row[3] == DASH for row in data["latency"])
    assert data["workers"][0] == ["CPU", "idle", "idle"]
    assert data["batches"]["labels"] == [] and data["experiment"] is None
    assert data["network"][0] == ["parameters", DASH, DASH, DASH]
    assert data["compare"]["text"].startswith("Not compared yet")


def test_every_row_has_its_unit() -> None:
    found = window({1: (30, 0.003), 3: (10, 0.005)}, {1: (10, 0.0015)})
    table = rows(found, "latency", "traffic")
    assert table["mean"] == ["3.50 ms", "1.50 ms", "2.33x"]
    assert table["p99"][0].endswith("\nbucket 4.00 to 5.66 ms")
    assert table["throughput, answered"] == ["1.0 /s", "0.2 /s"]
    assert table["mean batch size"] == ["1.50 requests", "1.00 requests"]
    assert table["errors (500)"] == ["0 of 60", "0 of 10"]
    assert shown(found)["batches"] == {"labels": ["1", "3 to 4"], "original": [75.0, 25.0], "pruned": [100.0, 0.0]}


def test_errors_are_counted_by_outcome() -> None:
    with Exporter() as exporter:
        target, history = Target(exporter.url), History()
        history.add(0.0, target.scrape("small"))
        exporter.batches("pruned", 1, 0.002, times=3, outcome="error")
        exporter.batches("pruned", 1, 0.002, times=1)
        history.add(60.0, target.scrape("small"))
    table = rows(history.window(60), "traffic")
    assert table["errors (500)"] == ["no traffic", "3 of 4\n75.00 % of requests"]
    assert table["bad requests (400)"] == ["no traffic", "0 of 4"]


def test_cpu_memory_and_network() -> None:
    history = History()
    history.add(0.0, {})
    history.add(60.0, {Key("redpp_worker_cpu_seconds_total", "pruned"): 15.0})
    values = {
        Key("redpp_worker_resident_bytes", "pruned"): 5e8,
        Key("redpp_device_memory_bytes", "pruned", "cuda:0"): 2e9,
        Key("redpp_device_memory_bytes", "pruned", "cpu"): 5e8,
        Key("redpp_model_macs", "original"): 4e6,
        Key("redpp_model_macs", "pruned"): 1e6,
    }
    report = Report.from_json({"original": {"parameters": 1000}, "pruned": {"parameters": 250}})
    data = shown(history.window(60), values=values, report=report)
    assert data["workers"] == [
        ["CPU", "idle", "25.0 % of a core"],
        ["resident memory", "unknown", "500.0 MB"],
        ["tensors on cuda:0", "unknown", "2.0 GB"],
    ]
    assert data["network"][0] == ["parameters", "1.00 k", "250", "25.0 % left"]
    assert data["network"][1] == ["MACs of one input", "4.00 M", "1.00 M", "25.0 % left"]
    assert data["left"] == {
        "labels": ["parameters", "MACs of one input"],
        "original": [100.0, 100.0],
        "pruned": [25.0, 25.0],
    }


def test_an_experiment_shows_verdict_advice_and_interval() -> None:
    bounds = {"low": 1.2, "mean": 1.4, "high": 1.6}
    gauges = {Key("redpp_ab_speedup_ratio", "", f"split {bound}"): value for bound, value in bounds.items()}
    gauges |= {
        Key("redpp_ab_traffic_ratio", "", "original"): 0.9,
        Key("redpp_ab_traffic_ratio", "", "pruned"): 0.1,
        Key("redpp_ab_verdict", "", "faster"): 1.0,
        Key("redpp_ab_verdict", "", "slower"): 0.0,
        Key("redpp_ab_advice", "", "promote"): 1.0,
        Key("redpp_ab_advice_reason", "", "pruned is faster"): 1.0,
        Key("redpp_ab_pairs_total", ""): 120.0,
        Key("redpp_ab_agreement_ratio", ""): 0.995,
    }
    sent = {Key("redpp_ab_requests_total", "", "original"): 88.0, Key("redpp_ab_requests_total", "", "pruned"): 12.0}
    card = shown(Window(sent, 60.0), values=gauges)["experiment"]
    assert card["verdict"] == "The pruned model is faster: 1.20 to 1.60 times as fast"
    assert card["advice"] == "Promote the pruned model: pruned is faster"
    assert card["intervals"] == [{"label": "split traffic", "text": "1.40x (1.20 to 1.60)", **bounds}]
    assert [share["text"] for share in card["shares"]] == ["original 90 %", "pruned 10 %"]
    assert card["rows"] == [
        ["share of the requests in this window", "original 88.0 % and pruned 12.0 %"],
        ["pairs compared", "120"],
        ["outputs that agree", "99.50 %"],
    ]


def test_a_verdict_is_shown_with_the_interval_that_it_can_rest_on() -> None:
    gauges = {
        Key("redpp_ab_speedup_ratio", "", f"{source} {bound}"): value
        for source, values in (("shadow", (0.9, 1.0, 1.2)), ("split", (0.5, 0.6, 0.7)))
        for bound, value in zip(("low", "mean", "high"), values, strict=True)
    }
    said = {
        kind: shown(Window({}, 0.0), values={**gauges, Key("redpp_ab_verdict", "", kind): 1.0})["experiment"]["verdict"]
        for kind in ("slower", "undecided", "faster")
    }
    assert said == {
        "slower": "The pruned model is slower: 0.50 to 0.70 times as fast",
        "undecided": "Undecided so far: 0.90 to 1.20 times as fast",
        "faster": "The pruned model is faster",
    }


def test_the_collector_goes_through_an_outage_and_a_restart_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"name": "small", "verdict": "as fast"}', encoding="utf-8")
    with Exporter() as second:
        with Exporter() as first:
            urls = [first.url]
            collector = Collector(tmp_path, "small", lambda: urls)
            collector.step(0.0)
            first.batches("original", 1, 0.003, times=10)
            first.batches("pruned", 1, 0.0015, times=10)
            collector.step(1.0)
            assert collector.data(10)["headline"]["state"] == "faster"
        collector.step(2.0)
        collector.step(5.0)
        data = collector.data(10)
        assert data["headline"]["text"] == "The server does not answer"
        assert data["headline"]["detail"].startswith("For 4 s: ")
        assert data["sources"][0] == {"url": first.url, "up": False, "text": "down: Connection refused"}
        urls[:] = [second.url]
        collector.step(6.0)  # finds the other address, and what it has counted before does not count
        second.batches("pruned", 1, 0.0015, times=4)
        collector.step(20.0)
        data = collector.data(10)
    assert data["headline"]["text"] == "Only the pruned model had traffic (last 14 s)"
    assert [source["url"] for source in data["sources"]] == [second.url]
    assert data["compare"]["text"] == "as fast"
    assert data["curves"]["seconds"] == [-20.0, -19.0, -18.0, -15.0, -14.0, 0.0]
    assert data["curves"]["throughput"]["pruned"] == [None, 10.0, None, None, 1.667, 0.2857]  # None: it did not answer


def test_curves_are_thinned_and_the_report_is_read_again(tmp_path: Path) -> None:
    with Exporter() as exporter:
        collector = Collector(tmp_path, "small", lambda: [exporter.url])
        exporter.text = b""  # fast to read
        for second in range(400):
            collector.step(float(second))
    data = collector.data(60)
    assert len(data["curves"]["seconds"]) == len(data["curves"]["p50"]["pruned"]) == 200
    assert data["compare"]["text"].startswith("Not compared yet")
    (tmp_path / "report.json").write_text('{"verdict": "faster by far"}', encoding="utf-8")
    assert collector.data(60)["compare"]["text"] == "faster by far"
    (tmp_path / "report.json").write_text("{", encoding="utf-8")
    assert collector.data(60)["compare"]["text"] == "faster by far"


def test_the_last_comparison_is_that_of_the_server_that_runs(tmp_path: Path) -> None:
    def entry(server: str, verdict: str, cells: int = 1) -> dict[str, object]:
        figures = {"speedup": {"value": 1.5, "low": 1.4, "high": 1.6}, "agreement": {"value": 0.99}}
        return {
            "server": server,
            "time": "2026-01-02 03:04:05",
            "cells": [{"verdict": verdict, "figures": figures}] * cells,
        }

    history = [entry("triton", "a sweep", 2), entry("triton", "newer"), entry("torchserve", "older")]
    (tmp_path / "report.json").write_text(json.dumps({"verdict": "newer", "comparisons": history}), encoding="utf-8")
    with Exporter() as exporter:
        kinds = ["torchserve"]
        collector = Collector(tmp_path, "small", lambda: [exporter.url], 1.0, lambda: kinds[0])
        found = collector.data(10)["compare"]
        assert found["text"] == "older" and found["note"] == "on torchserve, 2026-01-02 03:04:05 UTC"
        assert found["rows"] == [["end-to-end p50", "1.50x", "1.40 to 1.60"], ["same top-1 class", "99.00 %", DASH]]
    kinds[0] = "triton"
    collector.step(0.0)  # the server has gone, so it is looked for again
    assert collector.data(10)["compare"]["text"] == "newer"
    kinds[0] = "another"
    collector.step(1.0)
    assert collector.data(10)["compare"]["text"].startswith("Not compared on another yet")
