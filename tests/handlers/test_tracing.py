"""Request ids and trace contexts of strangers, and the spans that handlers make where OpenTelemetry is asked for."""

import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redpp_serve.handlers.metrics import ModelLabels
from redpp_serve.handlers.torchserve import RedppHandler
from redpp_serve.handlers.tracing import Spans, Traced, open_spans, phase, request_id, trace_parent, trace_state
from tests.support.served import SHAPE, Context, artifact, npy

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
LABELS = ModelLabels("tiny", "1.0", "original")
VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")


@pytest.fixture(autouse=True)
def _nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def test_a_trace_header_of_the_standard_is_taken() -> None:
    later = f"01-{TRACE}-{SPAN}-00"
    for text in (PARENT, f"00-{TRACE}-{SPAN}-00", later, f"{later}-more", f"cc-{TRACE}-{SPAN}-ff-"):
        assert trace_parent(text) == text


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "not a trace",
        PARENT.upper(),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"{PARENT}-more",
        f"01-{TRACE}-{SPAN}-01x",
        PARENT[:-1],
        f" {PARENT}",
        f"{PARENT}\n",
        f"{PARENT}\r\nX-Evil: 1",
        f"01-{TRACE}-{SPAN}-01-\x1b[2J",
        f"01-{TRACE}-{SPAN}-01-{'x' * 5000}",
        PARENT.replace("4", "٤"),
    ],
)
def test_what_is_no_trace_header_is_none(text: str | None) -> None:
    assert trace_parent(text) == ""


def test_ids_and_states_are_short_printable_texts() -> None:
    for text in ("a", "4bf92f35-77b3", "Root=1-67891233-abcdef012345678912345678", "x" * 128):
        assert request_id(text) == text
    for text in (None, "", "x" * 129, "a b", "a\nb", "a\n", "\x1b[31m", "é", '"', "a;b"):
        assert request_id(text) == ""
    assert trace_state("a=1,b=2") == "a=1,b=2"
    assert trace_state(None) == trace_state("a=\n") == trace_state("x" * 513) == trace_state("é") == ""


def memory_spans() -> tuple[Spans, Callable[[], list[Any]]]:
    """Spans that stay in memory, and what returns them."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = Spans(LABELS, provider)

    def finished() -> list[Any]:
        spans.write()
        return list(exporter.get_finished_spans())

    return spans, finished


def handler(folder: Path) -> tuple[RedppHandler, Context]:
    (folder / "model.redpp").write_bytes(artifact())
    made, given = RedppHandler(), Context(folder)
    made.initialize(given)
    return made, given


def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)


def test_each_request_of_a_batch_is_a_span_with_its_phases(tmp_path: Path) -> None:
    served, context = handler(tmp_path)
    served.spans, finished = memory_spans()
    before = time.time_ns()
    context.asked = {0: {"Traceparent": PARENT, "Tracestate": "a=1", "X-Request-Id": "theirs"}, 1: {"traceparent": "x"}}
    served.handle([{"body": npy(values())}, {"body": npy(values())}, {"body": b"?"}], context)
    after, spans = time.time_ns(), finished()
    wholes = [span for span in spans if span.name == "handle"]
    assert len(wholes) == 3
    first, second, refused = wholes
    assert first.context.trace_id == int(TRACE, 16) and first.parent.span_id == int(SPAN, 16)
    assert first.context.trace_state.get("a") == "1"
    assert second.parent is None and second.context.trace_id not in (0, first.context.trace_id)
    common = {"redpp.model": "tiny", "redpp.version": "1.0", "redpp.variant": "original", "redpp.batch_size": 3}
    assert dict(first.attributes) == common | {"redpp.outcome": "ok", "redpp.request_id": "theirs"}
    assert dict(refused.attributes) == common | {"redpp.outcome": "bad_request", "redpp.request_id": "00000002-server"}
    for whole, phases in ((first, ["preprocess", "inference", "postprocess"]), (refused, ["preprocess"])):
        inside = [span for span in spans if span.parent and span.parent.span_id == whole.context.span_id]
        assert [span.name for span in inside] == phases
        bounds = [time_ for span in inside for time_ in (span.start_time, span.end_time)]
        assert bounds == sorted(bounds) and before <= whole.start_time <= bounds[0]
        assert bounds[-1] <= whole.end_time <= after
    assert all(span.status.is_unset for span in wholes), "a refused request is no error of the server"


def test_a_trace_that_nobody_samples_is_not_recorded(tmp_path: Path) -> None:
    served, context = handler(tmp_path)
    served.spans, finished = memory_spans()
    context.asked = {0: {"traceparent": PARENT[:-1] + "0"}}
    served.handle([{"body": npy(values())}], context)
    assert finished() == []


def test_a_request_that_the_network_fails_is_an_error_and_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, context = handler(tmp_path)
    served.spans, finished = memory_spans()
    bad = values()
    bad[0, 0, 0] = 77.0
    model = served.model

    def breaks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if (x == 77).any():
            raise RuntimeError("no such number")
        return model(x)

    monkeypatch.setattr("redpp_serve.handlers.torchserve.run_network", lambda _, inputs, *rest: breaks(*inputs))
    context.asked = {0: {"X-Request-Id": "good-one"}, 1: {"X-Request-Id": "bad-one"}}
    bodies = [{"body": npy(x)} for x in (values(), bad, bad)]
    with caplog.at_level(logging.ERROR):
        served.handle(bodies, context)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert told == [
        "the network failed on a batch of 3",
        "request bad-one: the network failed on it",
        "request 00000002-server: the network failed on it",
    ]
    wholes = [span for span in finished() if span.name == "handle"]
    assert [span.status.is_ok or span.status.is_unset for span in wholes] == [True, False, False]


def test_hostile_ids_are_written_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served, context = handler(tmp_path)
    served.spans, finished = memory_spans()
    evil = "\x1b[2Jid\nTraceback"
    context.asked = {0: {"X-Request-Id": evil, "traceparent": evil, "tracestate": evil}}
    served.model = None  # type: ignore[assignment]
    served.handle([{"body": npy(values())}], context)
    assert "request 00000000-server: it could not be parsed" in caplog.text and "\x1b" not in caplog.text
    (whole,) = [span for span in finished() if span.name == "handle"]
    assert whole.attributes["redpp.request_id"] == "00000000-server" and whole.parent is None
    assert evil not in str(context.headers)


def test_phases_are_noted_also_where_the_body_fails() -> None:
    class Request:
        trace: Traced | None = Traced("", "", "")

    with pytest.raises(ValueError), phase("inference", [Request()]):
        raise ValueError
    assert Request.trace and [name for name, *_ in Request.trace.phases] == ["inference"]


@pytest.mark.parametrize(
    ("variables", "on"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, False),
        ({"OTEL_SDK_DISABLED": "TRUE", "OTEL_TRACES_EXPORTER": "otlp"}, False),
    ],
)
def test_the_standard_variables_turn_spans_on(
    variables: dict[str, str], on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spans = open_spans(LABELS)
    assert (spans is not None) == on
    if spans:
        assert spans._provider.resource.attributes["service.name"] == "redpp-serve"
        spans.close()


def test_without_the_packages_serving_goes_on_with_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    assert open_spans(LABELS) is None
    assert "traces are off" in caplog.text and "install redpp-serve[otel]" in caplog.text


def test_nothing_of_opentelemetry_is_imported_where_nobody_asks() -> None:
    code = (
        "import sys, redpp_serve.handlers.torchserve as t; from redpp_serve.handlers.metrics import ModelLabels;"
        "assert t.open_spans(ModelLabels('a', '1', 'original')) is None;"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
