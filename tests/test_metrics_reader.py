"""Reading metrics: what counters gained, through restarts and outages, and what is refused."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from redpp_serve.metrics_reader import Key, Limits, Reading, Unreadable, fetch, merged, parse, read
from tests.support.live_metrics import Exporter

REQUESTS = "redpp_requests_total"


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    with Exporter() as made:
        yield made


def test_gains_are_what_came_between_two_readings(exporter: Exporter) -> None:
    exporter.batches("original", 2, 0.003, times=5)
    first = read(exporter.url, "small")
    exporter.batches("original", 2, 0.003, times=3)
    exporter.batches("pruned", 4, 0.0015)  # a batch size that was not there before
    second = read(exporter.url, "small")
    gained, restarted = second.since(first)
    assert not restarted
    assert gained[Key(REQUESTS, "original", "ok")] == 6
    assert gained[Key(REQUESTS, "pruned", "ok")] == 4
    assert gained[Key("redpp_batches_total", "pruned", "4")] == 1
    assert gained[Key("redpp_batch_seconds_total", "original", "2")] == pytest.approx(0.009)
    assert gained[Key("redpp_handler_seconds_count", "original")] == 3
    assert gained[Key("redpp_handler_seconds_bucket", "original", "0.00283")] == 0
    assert gained[Key("redpp_handler_seconds_bucket", "original", "0.004")] == 3
    assert second.values[Key("redpp_model_parameters", "pruned")] == 500
    assert not {key.name for key in gained} & {"redpp_model_parameters", "redpp_plan_layers"}, "no gauges"


def test_a_counter_that_fell_began_again_from_zero(exporter: Exporter) -> None:
    exporter.batches("original", 1, 0.003, times=10)
    first = read(exporter.url, "small")
    exporter.fresh()
    exporter.batches("original", 1, 0.003, times=4)
    second = read(exporter.url, "small")
    assert second.since(first).gained[Key(REQUESTS, "original", "ok")] == 4 and second.since(first).restarted
    exporter.batches("original", 1, 0.003, times=2)
    third = read(exporter.url, "small")
    assert third.since(second).gained[Key(REQUESTS, "original", "ok")] == 2 and not third.since(second).restarted


def counters(value: float, *, seconds: float = 1.0, buckets: tuple[int, ...] = (1, 2, 3)) -> Reading:
    labels = 'model="m",variant="pruned"'
    lines = [
        f'{REQUESTS}{{{labels},outcome="ok"}} {value}',
        f'redpp_batch_seconds_total{{{labels},batch="1"}} {seconds!r}',
        *(
            f'redpp_handler_seconds_bucket{{{labels},le="{edge}"}} {count}'
            for edge, count in zip(("0.1", "0.2", "+Inf"), buckets, strict=True)
        ),
    ]
    return parse("\n".join(lines) + "\n", "m")


def test_a_histogram_restarts_with_all_its_series(exporter: Exporter) -> None:
    """The bucket up to 1 ms has more than before, the count less: one by one, their gains would contradict."""
    exporter.batches("original", 1, 0.001, times=2)
    exporter.batches("original", 1, 0.1, times=10)
    first = read(exporter.url, "small")
    exporter.fresh()
    exporter.batches("original", 1, 0.001, times=5)
    gained, restarted = read(exporter.url, "small").since(first)
    assert restarted
    for edge in ("0.001", "+Inf"):
        assert gained[Key("redpp_handler_seconds_bucket", "original", edge)] == 5
    assert gained[Key("redpp_handler_seconds_count", "original")] == 5


def test_ranges_of_times_that_shrink_are_another_servers() -> None:
    """Every bucket has grown, the number of times between two edges has not: the gains would be no histogram."""
    gained, restarted = counters(1, buckets=(9, 9, 11)).since(counters(1, buckets=(0, 5, 10)))
    assert restarted and gained[Key("redpp_handler_seconds_bucket", "pruned", "+Inf")] == 11
    gained, restarted = counters(1, buckets=(1, 6, 11)).since(counters(1, buckets=(0, 5, 10)))
    assert not restarted and gained[Key("redpp_handler_seconds_bucket", "pruned", "+Inf")] == 1


def test_rounding_is_no_restart_and_a_series_that_is_gone_is_one() -> None:
    """Seconds are summed over the workers in any order: the last digit may fall."""
    gained, restarted = counters(1, seconds=123.45678900000001).since(counters(1, seconds=123.456789000001))
    assert not restarted and gained[Key("redpp_batch_seconds_total", "pruned", "1")] == 0
    assert counters(1, seconds=123.45).since(counters(1, seconds=123.46)).restarted
    assert Reading().since(counters(1)).restarted and not counters(1).since(Reading()).restarted


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
    reading = parse("\n".join(lines) + "\n", "m")
    for found, servers in ((reading.values, 1), (merged([reading, reading]), 2)):
        assert found[Key("redpp_worker_resident_bytes", "pruned")] == 30 * servers
        assert found[Key("redpp_worker_cpu_seconds_total", "pruned")] == 5 * servers
        assert found[Key("redpp_model_bytes", "pruned")] == 40
    assert reading.since(Reading()).gained == {Key("redpp_worker_cpu_seconds_total", "pruned"): 5}


def test_samples_of_other_models_and_other_programs_are_left_out() -> None:
    text = (
        'redpp_requests_total{model="a",variant="original",outcome="ok"} 1\n'
        'redpp_requests_total{model="b",variant="original",outcome="ok"} 2\n'
        'redpp_requests_total{model="a",variant="third",outcome="ok"} 3\n'
        'redpp_requests_total{model="a",variant="redpp",outcome="ok"} 4\n'
        'redpp_handler_seconds_bucket{model="a",variant="original",le="wide"} 4\n'
        'redpp_batches_total{model="a",variant="original",batch="x"} 4\n'
        'redpp_model_bytes{model="a",variant="original"} NaN\n'
        'nv_inference_count{model="a"} 5\nredpp_unheard_of{model="a",variant="original"} 6\n'
        'nv_broken{model="a" 1\n'
    )
    reading = parse(text, "a")
    assert reading.values == {Key(REQUESTS, "original", "ok"): 1.0, Key(REQUESTS, "pruned", "ok"): 4.0}
    assert reading.others == {"b"}
    assert parse("", "a") == Reading() == parse('# HELP x y\nnv_inference_count{model="a"} 5\n', "a")


def test_what_is_no_metrics_is_named_so() -> None:
    for text in ("<html><body>{not metrics}</body></html>", 'redpp_x{model="a" 1', "redpp_x one\n"):
        with pytest.raises(Unreadable, match="text format"):
            parse(text, "a")


def test_numbers_that_would_poison_the_totals_are_left_out() -> None:
    labels = 'model="small",variant="original",outcome="ok"'
    for value in ("NaN", "+Inf", "-Inf", "1e308", "-1e300"):
        text = f'{REQUESTS}{{{labels},worker="1"}} {value}\n{REQUESTS}{{{labels},worker="2"}} 7\n'
        assert [sample.value for sample in parse(text, "small").samples] == [7], value


def test_an_answer_in_drops_is_given_up() -> None:
    """Each drop comes in time; all of them would take for ever."""
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
        begun = time.monotonic()
        with pytest.raises(Unreadable, match="timed out"):
            fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/", Limits(seconds=0.3))
        assert time.monotonic() - begun < 10
        thread.join(10)


def test_answers_that_cannot_be_read_are_named(exporter: Exporter) -> None:
    def problem(**limits: int) -> str:
        with pytest.raises(Unreadable) as caught:
            read(exporter.url, "small", limits=Limits(**limits))
        return str(caught.value)

    exporter.status = 503
    assert problem() == "HTTP status 503"
    exporter.status, exporter.text = 200, b"\xff\xfe"
    assert problem() == "not text"
    exporter.text = b"# " + b"x" * 5000
    assert problem(bytes=5000) == "more than 5000 bytes"
    exporter.text = None
    assert problem(series=3) == "more than 3 series of this project"
    exporter.down()
    assert problem() == "Connection refused"
    exporter.up()
    assert read(exporter.url, "small").samples


def test_no_proxy_is_asked(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert read(exporter.url, "small").samples
