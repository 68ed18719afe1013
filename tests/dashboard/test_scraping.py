"""Reading metrics: what counters gained, through restarts and outages, and what is refused."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from redpp_serve.dashboard import scraping
from redpp_serve.dashboard.scraping import Key, Target, Unreadable, check_urls, merged, parse
from redpp_serve.errors import RedppError
from tests.support.live_metrics import Exporter, while_down

REQUESTS = "redpp_requests_total"


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    with Exporter() as made:
        yield made


def test_only_what_happens_after_the_first_scrape_counts(exporter: Exporter) -> None:
    exporter.batches("original", 2, 0.003, times=5)
    target = Target(exporter.url)
    assert target.scrape("small") == {} and target.problem == ""
    exporter.batches("original", 2, 0.003, times=3)
    exporter.batches("pruned", 4, 0.0015)  # a batch size that was not there before
    gained = target.scrape("small")
    assert gained[Key(REQUESTS, "original", "ok")] == 6
    assert gained[Key(REQUESTS, "pruned", "ok")] == 4
    assert gained[Key("redpp_batches_total", "pruned", "4")] == 1
    assert gained[Key("redpp_batch_seconds_total", "original", "2")] == pytest.approx(0.009)
    assert gained[Key("redpp_handler_seconds_count", "original")] == 3
    assert gained[Key("redpp_handler_seconds_bucket", "original", "0.00283")] == 0
    assert gained[Key("redpp_handler_seconds_bucket", "original", "0.004")] == 3
    assert target.gauges[Key("redpp_model_parameters", "pruned")] == 500


def test_a_counter_that_fell_began_again_from_zero(exporter: Exporter) -> None:
    exporter.batches("original", 1, 0.003, times=10)
    target = Target(exporter.url)
    target.scrape("small")
    exporter.fresh()
    exporter.batches("original", 1, 0.003, times=4)
    assert target.scrape("small")[Key(REQUESTS, "original", "ok")] == 4
    exporter.batches("original", 1, 0.003, times=2)
    assert target.scrape("small")[Key(REQUESTS, "original", "ok")] == 2


def test_a_histogram_restarts_with_all_its_series(exporter: Exporter) -> None:
    """The bucket up to 1 ms has more than before, the count less: one by one, their gains would contradict."""
    exporter.batches("original", 1, 0.001, times=2)
    exporter.batches("original", 1, 0.1, times=10)
    target = Target(exporter.url)
    target.scrape("small")
    exporter.fresh()
    exporter.batches("original", 1, 0.001, times=5)
    gained = target.scrape("small")
    assert gained[Key("redpp_handler_seconds_bucket", "original", "0.001")] == 5
    assert gained[Key("redpp_handler_seconds_count", "original")] == 5
    assert gained[Key("redpp_handler_seconds_bucket", "original", "+Inf")] == 5


def test_an_outage_without_a_restart_loses_nothing(exporter: Exporter) -> None:
    target = Target(exporter.url)
    target.scrape("small")
    with while_down(exporter):
        assert target.scrape("small") == {}
        assert "refused" in target.problem and target.gauges == {}
    exporter.batches("pruned", 1, 0.002, times=7)
    assert target.scrape("small")[Key(REQUESTS, "pruned", "ok")] == 7
    assert target.problem == "" and target.serves


def test_workers_are_summed_and_the_network_is_not() -> None:
    lines = [
        f'{name}{{model="m",version="1",variant="pruned",pid="{pid}"}} {value}'
        for name, pid, value in (
            ("redpp_worker_cpu_seconds_total", 1, 2),
            ("redpp_worker_cpu_seconds_total", 2, 3),
            ("redpp_worker_resident_bytes", 1, 10),
            ("redpp_worker_resident_bytes", 2, 20),
            ("redpp_model_bytes", 1, 40),
            ("redpp_model_bytes", 2, 40),
        )
    ]
    samples, _ = parse("\n".join(lines) + "\n", "m")
    gauges = merged({s.key: s.value} for s in samples)
    assert gauges[Key("redpp_worker_resident_bytes", "pruned")] == 30
    assert gauges[Key("redpp_model_bytes", "pruned")] == 40


def test_samples_of_other_models_and_other_programs_are_left_out() -> None:
    text = (
        'redpp_requests_total{model="a",variant="original",outcome="ok"} 1\n'
        'redpp_requests_total{model="b",variant="original",outcome="ok"} 2\n'
        'redpp_requests_total{model="a",variant="third",outcome="ok"} 3\n'
        'redpp_handler_seconds_bucket{model="a",variant="original",le="wide"} 4\n'
        'redpp_model_bytes{model="a",variant="original"} NaN\n'
        'nv_inference_count{model="a"} 5\nredpp_unheard_of{model="a",variant="original"} 6\n'
    )
    samples, others = parse(text, "a")
    assert [(s.key, s.value) for s in samples] == [(Key(REQUESTS, "original", "ok"), 1.0)]
    assert others == {"b"}


@pytest.mark.parametrize("text", ["<html><body>{not metrics}</body></html>", 'redpp_x{model="a" 1', "redpp_x one\n"])
def test_what_is_no_metrics_is_named_so(text: str) -> None:
    with pytest.raises(Unreadable, match="text format"):
        parse(text, "a")


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "1e308", "-1e300"])
def test_numbers_that_would_poison_the_totals_are_left_out(value: str) -> None:
    labels = 'model="small",variant="original",outcome="ok"'
    samples, _ = parse(f'{REQUESTS}{{{labels},worker="1"}} {value}\n{REQUESTS}{{{labels},worker="2"}} 7\n', "small")
    assert [sample.value for sample in samples] == [7]


def test_an_answer_in_drops_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each drop comes in time; all of them would take for ever."""
    monkeypatch.setattr(scraping, "TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                for _ in range(600):
                    connection.sendall(b"#")
                    time.sleep(0.05)

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        target, begun = Target(f"http://127.0.0.1:{listener.getsockname()[1]}/"), time.monotonic()
        target.scrape("small")
        assert target.problem == "timed out" and time.monotonic() - begun < 10
        thread.join(10)


def test_answers_that_cannot_be_read_become_the_targets_problem(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(exporter.url)
    exporter.status = 503
    target.scrape("small")
    assert target.problem == "HTTP status 503"
    exporter.status, exporter.text = 200, b"\xff\xfe"
    target.scrape("small")
    assert target.problem == "not text"
    exporter.text = b"# " + b"x" * 5000
    monkeypatch.setattr(scraping, "MAX_BYTES", 5000)
    target.scrape("small")
    assert target.problem == "more than 5000 bytes"
    monkeypatch.setattr(scraping, "MAX_BYTES", 5_000_000)
    monkeypatch.setattr(scraping, "MAX_SERIES", 3)
    exporter.text = None
    target.scrape("small")
    assert target.problem == "more than 3 series of this project"
    monkeypatch.setattr(scraping, "MAX_SERIES", 4096)
    target.scrape("small")
    assert target.problem == ""


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:9400",
        "file:///etc/passwd",
        "http://",
        "http://a b/",
        "http://a\n/",
        "http://[/",
        "http://a:70000/",
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(RedppError, match="--metrics-url"):
        list(check_urls([url]))


def test_an_address_counts_once() -> None:
    assert list(check_urls(["http://a/m", "http://b/m", "http://a/m"])) == ["http://a/m", "http://b/m"]
