"""Measure what ids and traces add to a request, in microseconds, each beside the same without it, in turns.

Run ``python -m benchmarks.tracing dist/model``. The handler runs in this process; nginx stands in front of a server
that answers at once, with the gateway's configuration and with the same one whose lines about traces are taken out.
First everything has to be right: the same answers, the ids and traces where they belong, as many spans as requests.
"""

from __future__ import annotations

import argparse
import http.client
import http.server
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.handler import Arm
from redpp_serve.ab import gateway as gateways
from redpp_serve.ab.gateway import Gateway, NginxProcess, divide, gateway_config, worker_account
from redpp_serve.ab.relay import Relay
from redpp_serve.ab.spec import parse_split
from redpp_serve.comparison.client import Payload
from redpp_serve.comparison.payloads import folder_payloads
from redpp_serve.handlers.metrics import ModelLabels
from redpp_serve.handlers.tracing import Spans, phase
from redpp_serve.loopback import GatewayPorts, free_ports
from redpp_serve.machine import describe_machine
from redpp_serve.serving.front import Message
from redpp_serve.state_folders import private_folder
from redpp_serve.statistics.intervals import percentile_interval
from redpp_serve.variants import NAMES

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
HEADERS = {"X-Request-Id": "b" * 32, "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "tracestate": "a=1"}
BATCHES = (1, 8)


class Counting:
    """An exporter that only counts: the network is not measured."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.traces: set[int] = set()

    def export(self, spans: Sequence[Any]) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        self.names += [span.name for span in spans]
        self.traces |= {span.context.trace_id for span in spans}
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None: ...

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True


def added(arms: Sequence[Callable[[], Any]], rounds: int, rng: np.random.Generator) -> list[float]:
    """Median of the paired differences in microseconds of the second arm over the first, and its 95 % interval."""
    seconds = np.zeros((rounds, 2))
    for k in range(rounds):
        for arm in rng.permutation(2):
            start = time.perf_counter()
            arms[arm]()
            seconds[k, arm] = time.perf_counter() - start
    return [round(x, 2) for x in percentile_interval(1e6 * (seconds[:, 1] - seconds[:, 0]), 0.5, rng)]


def handler_rows(folder: Path, rounds: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Ids alone over neither, and spans over neither; by batch size, for the whole batch."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    payloads, exporter, rows = folder_payloads(folder)[: max(BATCHES)], Counting(), []
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=100_000))
    spans = Spans(ModelLabels("benchmark", "1.0", "original"), provider)
    with tempfile.TemporaryDirectory() as scratch:
        arm = Arm(folder / "original.mar", Path(scratch), 1)

        def answer(some: list[Payload], headers: dict[str, str], made: Spans | None) -> list[bytes]:
            arm.context.get_all_request_header = lambda index: headers
            arm.handler.spans = made
            return arm.answer(some)

        arm.check(payloads)
        if answer(payloads, {}, None) != answer(payloads, HEADERS, spans):
            raise SystemExit("a traced request has another answer")
        asked = len(payloads)
        for batch in BATCHES:
            some = payloads[:batch]
            plain, named, traced = (
                partial(answer, some, *given) for given in (({}, None), (HEADERS, None), (HEADERS, spans))
            )
            row = {"ids_us": added([plain, named], rounds, rng), "spans_us": added([plain, traced], rounds, rng)}
            asked += rounds * batch
            rows.append({"what": "handler", "batch": batch, **row, "rounds": rounds})
        spans.write()
        lower = {name.lower(): value for name, value in HEADERS.items()}
        start = time.perf_counter()
        for _ in range(rounds):  # what the thread does later for each request
            trace = spans.begin("b" * 32, lower)
            for name in ("preprocess", "inference", "postprocess"):
                with phase(name, [SimpleNamespace(trace=trace)]):
                    pass
            spans.note(time.time_ns(), [("ok", trace)])
        spans.write()
        rows.append({"what": "thread", "spans_us": round(1e6 * (time.perf_counter() - start) / rounds, 2)})
        asked += rounds
        spans.close()
    if exporter.names.count("handle") != asked or exporter.traces != {int(TRACE, 16)}:
        raise SystemExit(
            f"{exporter.names.count('handle')} spans of {asked} requests, in {len(exporter.traces)} traces"
        )
    return rows


def front_row(rounds: int, rng: np.random.Generator) -> dict[str, Any]:
    """What `front` does to the headers of a request and its reply, over handing them on."""
    given = tuple((name.lower(), value) for name, value in HEADERS.items())
    request = Message(
        ("POST", "/v2/models/m/infer", "HTTP/1.1"), (("host", "a"), ("content-length", "4"), *given), b"1234"
    )
    reply = Message(("HTTP/1.1", "200", "OK"), (("content-type", "a/b"), ("x-request-id", "server")), b"1234")
    if request.traced().get("traceparent") != HEADERS["traceparent"]:
        raise SystemExit("the front loses a trace")

    def on() -> None:
        asked = request.traced()
        asked.encoded()
        reply.with_id(asked.get("x-request-id")).encoded()

    def off() -> None:
        request.encoded()
        reply.encoded()

    return {"what": "front", "ids_us": added([off, on], 20 * rounds, rng), "rounds": 20 * rounds}


class _AtOnce(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.last = dict(self.headers.items())  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None: ...


def gateway_row(rounds: int, rng: np.random.Generator) -> dict[str, Any]:
    """nginx with the lines about traces over nginx without them, from one client."""
    whole = gateway_config

    def without(gateway: Gateway) -> str:
        text = re.sub(r"map \$http_traceparent [^}]*\n(?:.*\n)*?\}\n", "", whole(gateway))
        kept = [line for line in text.splitlines() if "trace" not in line]
        return "\n".join(kept)

    with ExitStack() as stack:
        server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), _AtOnce))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        calls = []
        for text in (without, whole):
            held = private_folder("redpp-test-", for_others=True)
            stack.callback(held.release)
            made = Gateway(
                held.path / "gateway",
                free_ports(GatewayPorts).gateway,
                server.server_port,
                "/m",
                ("/m/1", "/m/2"),
                parse_split("50:50"),
                "X-User-Id",
                "salt",
                account=worker_account(),
            )
            nginx = NginxProcess(made)
            nginx.make_folder()
            divide(made.folder)
            gateways.gateway_config = text
            nginx.start()
            gateways.gateway_config = whole
            stack.callback(nginx.stop)
            for arm in NAMES:
                relay = Relay(made, arm)
                relay.start()
                stack.callback(relay.stop)
            connection = http.client.HTTPConnection("127.0.0.1", made.port)

            def call(connection: http.client.HTTPConnection = connection) -> None:
                connection.request("POST", "/m", b"1234", HEADERS)
                connection.getresponse().read()

            call()
            seen = {name.lower(): value for name, value in server.last.items()}  # type: ignore[attr-defined]
            if seen.get("traceparent") != HEADERS["traceparent"] or len(seen["x-request-id"]) != 32:
                raise SystemExit("the gateway loses a trace or an id")
            calls.append(call)
        for call in calls * 50:
            call()
        return {"what": "gateway", "traces_us": added(calls, 10 * rounds, rng), "rounds": 10 * rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = [*handler_rows(options.folder, options.rounds, rng), front_row(options.rounds, rng)]
    rows.append(gateway_row(options.rounds, rng))
    for row in rows:
        print(json.dumps(row))
    if options.out:
        options.out.write_text(json.dumps({"environment": describe_machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
