"""The id of a request, its W3C trace context, and OpenTelemetry spans where somebody asks for them.

The ids come from strangers: what does not look like one is as good as absent, and never written anywhere. Spans are
made where OpenTelemetry's variables name a collector and its packages are installed (``redpp-serve[otel]``); elsewhere
nothing of it is imported. A batch only notes when its phases began and ended; a thread makes spans of that later.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, TypeVar

from redpp_serve.handlers.metrics import ModelLabels

log = logging.getLogger(__name__)
Made = TypeVar("Made")

ID_HEADER, PARENT_HEADER, STATE_HEADER = "x-request-id", "traceparent", "tracestate"
TRACE_HEADERS = (ID_HEADER, PARENT_HEADER, STATE_HEADER)
PREPROCESS, INFERENCE, POSTPROCESS = "preprocess", "inference", "postprocess"
_ID = re.compile(r"[\w.:+/=-]{1,128}", re.ASCII)
_FIELDS = "-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_PARENT = re.compile(f"00{_FIELDS}|(?!00|ff)[0-9a-f]{{2}}{_FIELDS}(?:-[!-~]{{0,200}})?")  # later versions may say more
_STATE = re.compile(r"[ -~]{1,512}")
_UNTRACED = nullcontext()
_WRITE_EVERY_S, _MOST_NOTED = 0.2, 10_000
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def request_id(text: str | None) -> str:
    """Return a request's id; empty for a text that is none."""
    return text if text and _ID.fullmatch(text) else ""


def trace_parent(text: str | None) -> str:
    """Return a ``traceparent`` of W3C Trace Context; empty for a text that is none."""
    return text if text and _PARENT.fullmatch(text) else ""


def trace_state(text: str | None) -> str:
    """Return a ``tracestate``; empty for a text that is none. It counts beside a ``traceparent`` alone."""
    return text if text and _STATE.fullmatch(text) else ""


def named(name: str) -> str:
    """Begin a line of the log about a request."""
    return f"request {name}:" if name else "a request without an id:"


@dataclass
class Traced:
    """When the phases of one request began and ended.

    Attributes:
        id: its id; empty where it has none.
        parent: the `trace_parent` that it came with.
        state: the `trace_state`.
        phases: name, beginning and end of each, nanoseconds since 1970.
    """

    id: str
    parent: str
    state: str
    phases: list[tuple[str, int, int]] = field(default_factory=list)


class Traceable(Protocol):
    """A request that may be traced."""

    trace: Traced | None


def phase(name: str, requests: Sequence[Traceable]) -> AbstractContextManager[None]:
    """Note a phase of those requests that are traced while the body runs."""
    traces = [request.trace for request in requests if request.trace]
    return _noted(name, traces) if traces else _UNTRACED


@contextmanager
def _noted(name: str, traces: Sequence[Traced]) -> Iterator[None]:
    start = time.time_ns()
    try:
        yield
    finally:
        end = time.time_ns()
        for trace in traces:
            trace.phases.append((name, start, end))


@dataclass(frozen=True)
class _Batch:
    """What a handler notes of one batch: its bounds, nanoseconds since 1970, and outcome and trace of each request."""

    start: int
    end: int
    requests: Sequence[tuple[str, Traced]]


class Spans:
    """Makes a span of each request with a child for each phase.

    Args:
        labels: the model.
        provider: OpenTelemetry's tracer provider.
    """

    def __init__(self, labels: ModelLabels, provider: Any) -> None:
        self._provider, self._tracer = provider, provider.get_tracer("redpp_serve")
        self._labels = {f"redpp.{key}": value for key, value in vars(labels).items()}
        self._noted: deque[_Batch] = deque(maxlen=_MOST_NOTED)
        self._writing = threading.Lock()
        threading.Thread(target=self._write_on, name="spans", daemon=True).start()

    def begin(self, name: str, headers: Mapping[str, str]) -> Traced:
        """Begin to trace a request.

        Args:
            name: its id; empty where it has none.
            headers: its headers by names in lower case.
        """
        return Traced(name, trace_parent(headers.get(PARENT_HEADER)), trace_state(headers.get(STATE_HEADER)))

    def note(self, start: int, requests: Sequence[tuple[str, Traced | None]]) -> None:
        """Note a batch that ends now: its beginning, and the outcome of each request."""
        traced = [(outcome, trace) for outcome, trace in requests if trace]
        self._noted.append(_Batch(start, time.time_ns(), traced))

    def write(self) -> None:
        """Make spans of what was noted."""
        with self._writing:
            while self._noted:
                batch = self._noted.popleft()
                for outcome, trace in batch.requests:
                    self._write(batch, outcome, trace)

    def close(self) -> None:
        """Send all spans that are left."""
        self.write()
        self._provider.shutdown()

    def _write(self, batch: _Batch, outcome: str, trace: Traced) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        came_with = TraceContextTextMapPropagator().extract({PARENT_HEADER: trace.parent, STATE_HEADER: trace.state})
        about = {**self._labels, "redpp.batch_size": len(batch.requests), "redpp.outcome": outcome}
        if trace.id:
            about["redpp.request_id"] = trace.id
        kind = SpanKind.SERVER
        whole = self._tracer.start_span("handle", came_with, kind, attributes=about, start_time=batch.start)
        if outcome == "error":
            whole.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(whole)
        for name, start, end in trace.phases:
            self._tracer.start_span(name, inside, start_time=start).end(end)
        whole.end(batch.end)

    def _write_on(self) -> None:
        while True:
            time.sleep(_WRITE_EVERY_S)
            try:
                self.write()
            except Exception:  # the thread goes on
                log.exception("spans could not be made")


class DoorSpans:
    """Makes a span of each request that passes through a server in front of the handlers, whose spans are inside.

    Args:
        provider: OpenTelemetry's tracer provider.
    """

    def __init__(self, provider: Any) -> None:
        self._provider, self._tracer = provider, provider.get_tracer("redpp_serve")

    def begin(self, name: str, headers: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
        """Begin a span; return it, and the trace headers with which the request goes on.

        Args:
            name: of the span.
            headers: the request's id and trace headers, which are what they should be.
        """
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        propagator, onward = TraceContextTextMapPropagator(), dict[str, str]()
        about = {"redpp.request_id": headers[ID_HEADER]}
        span = self._tracer.start_span(name, propagator.extract(headers), SpanKind.SERVER, attributes=about)
        propagator.inject(onward, set_span_in_context(span))
        return span, onward

    def end(self, span: Any, status: int) -> None:
        """End a span with the status of the reply."""
        from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415

        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send all spans that are left."""
        self._provider.shutdown()


def open_spans(labels: ModelLabels) -> Spans | None:
    """Return what makes a handler's spans, see `opened`."""
    return opened(lambda provider: Spans(labels, provider))


def opened(make: Callable[[Any], Made]) -> Made | None:
    """Return what makes spans, or None where nobody asks for them, or (after a line in the log) it cannot.

    The standard variables decide: an endpoint of OTLP, or ``OTEL_TRACES_EXPORTER=otlp``, turns them on, unless
    ``OTEL_TRACES_EXPORTER=none`` or ``OTEL_SDK_DISABLED=true``. Sampler, batches, headers and resource have theirs.

    Args:
        make: makes it of OpenTelemetry's tracer provider.
    """
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "")
    asked = exporter == "otlp" or (not exporter and any(map(os.environ.get, _ENDPOINTS)))
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not asked:
        return None
    try:
        return make(_provider())
    except ImportError as error:
        log.warning("traces are off: %s; install redpp-serve[otel] where the server runs", error)
    except Exception as error:  # such as a wrong sampler; serving goes on
        log.warning("traces are off: %s", error)
    return None


def _provider() -> Any:
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    resource = Resource.create()
    if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        resource = resource.merge(Resource({"service.name": "redpp-serve"}))  # else it is called unknown_service
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(_exporter()))
    return provider


def _exporter() -> Any:
    protocol = next(filter(None, map(os.environ.get, _PROTOCOLS)), "http/protobuf")
    kind = "grpc" if protocol == "grpc" else "http"
    return import_module(f"opentelemetry.exporter.otlp.proto.{kind}.trace_exporter").OTLPSpanExporter()
