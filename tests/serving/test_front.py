"""The Open Inference Protocol in front of stand-ins for the servers: paths, tokens, kept connections, broken HTTP."""

import asyncio
import gc
import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tritonclient.http import InferenceServerClient

from redpp_serve.handlers.tracing import DoorSpans
from redpp_serve.serving.front import Front, TorchServe, Triton, Upstream

VERSIONS = {"1": "1.0", "1.0": "1.0", "2": "2.0", "2.0": "2.0"}
METADATA = {"name": "tiny", "versions": ["1.0"], "inputs": [], "outputs": []}
MOST = 1 << 20


class Server(BaseHTTPRequestHandler):
    """Echoes what it is asked; version 9.0 is broken."""

    protocol_version = "HTTP/1.1"
    healthy = True

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, document = 200, {"method": self.command, "path": self.path, "size": len(body)}
        document["token"] = self.headers.get("Authorization")
        document["headers"] = [[name.lower(), value] for name, value in self.headers.items()]
        if self.path == "/collect":
            gc.collect()
        if self.path in ("/ping", "/v2/health/ready"):
            status = 200 if self.healthy else 500
        elif self.headers.get("describe") == "True":
            document = METADATA
        elif self.headers.get("Authorization") == "Bearer wrong":
            status, document = 400, {"code": 400, "type": "InvalidKeyException", "message": "wrong token"}
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Redpp-Variant", "pruned")
        self.send_header("X-Request-Id", "the server's own")
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def running(rules: Any, spans: DoorSpans | None = None) -> Iterator[int]:
    """The port of a front in a thread of its own."""
    loop, ports = asyncio.new_event_loop(), []
    ready = threading.Event()

    async def serve() -> None:
        server = await asyncio.start_server(Front(rules, MOST, spans).serve, "127.0.0.1", 0, limit=65536)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()

    def run() -> None:
        loop.create_task(serve())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(Server, "healthy", True)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as made:
        made.daemon_threads = True
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made.server_address[1]
        made.shutdown()
        thread.join()


@pytest.fixture
def front(server: int, tmp_path: Path) -> Iterator[int]:
    (tmp_path / "keys.json").write_text(json.dumps({"inference": {"key": "secret"}}))
    with running(TorchServe(Upstream(server), "tiny", VERSIONS, tmp_path / "keys.json")) as port:
        yield port


def ask(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    document = json.loads(answer.read())
    connection.close()
    return answer.status, document


def raw(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        chunks = []
        while chunk := client.recv(65536):
            chunks.append(chunk)
    return b"".join(chunks)


def test_paths_of_the_protocol_lead_to_the_handler(front: int) -> None:
    for path, wanted in (
        ("/v2/models/tiny/infer", "/predictions/tiny"),
        ("/v2/models/tiny/versions/1/infer", "/predictions/tiny/1.0"),
        ("/v2/models/tiny/versions/2.0/infer?x=1", "/predictions/tiny/2.0"),
        ("/predictions/tiny/2.0", "/predictions/tiny/2.0"),
    ):
        status, document = ask(front, "POST", path, b"12345", Authorization="Bearer mine")
        assert (status, document["path"], document["size"]) == (200, wanted, 5)
        assert document["token"] == "Bearer mine"  # the front adds no token of its own to a client's question


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize("rules", ["torchserve", "triton"])
@pytest.mark.parametrize("given", ["mine-1", None, "two words", "x" * 200, "\x1b[2J"])
def test_client_server_and_reply_have_one_request_id(server: int, rules: str, given: str | None) -> None:
    upstream = Upstream(server)
    with running(TorchServe(upstream, "tiny", VERSIONS) if rules == "torchserve" else Triton(upstream, "tiny")) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("POST", "/v2/models/tiny/infer", b"x", {} if given is None else {"X-Request-Id": given})
        answer = connection.getresponse()
        seen = [value for key, value in json.loads(answer.read())["headers"] if key == "x-request-id"]
        connection.close()
    assert answer.headers.get_all("X-Request-Id") == seen and len(seen) == 1
    assert seen[0] == given if given == "mine-1" else re.fullmatch("[0-9a-f]{32}", seen[0])


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (
            [f"traceparent: {TRACE}", "tracestate: a=1", "tracestate: b=2"],
            {"traceparent": TRACE, "tracestate": "a=1, b=2"},
        ),
        ([f"traceparent: {TRACE}"], {"traceparent": TRACE}),
        ([f"traceparent: {TRACE}", f"traceparent: {TRACE}"], {}),
        ([f"traceparent: {TRACE}x", "tracestate: a=1"], {}),
        (["tracestate: a=1"], {}),
        ([f"traceparent: {TRACE}", "tracestate: a=\x01"], {"traceparent": TRACE}),
        (["traceparent: 00-\n-\x00"], {}),
    ],
)
def test_a_trace_is_passed_on_and_what_is_none_is_not(front: int, given: list[str], passed: dict[str, str]) -> None:
    request = "\r\n".join(["POST /predictions/tiny HTTP/1.1", "connection: close", "content-length: 0", *given, "", ""])
    head, body = raw(front, request.encode()).split(b"\r\n\r\n")
    assert {key: value for key, value in json.loads(body)["headers"] if key.startswith("trace")} == passed
    assert b"trace" not in head.lower(), "replies have none"


def test_a_client_of_triton_sees_a_live_server_and_its_model(front: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with InferenceServerClient(f"127.0.0.1:{front}") as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("tiny") and client.is_model_ready("tiny", "2")
        assert not client.is_model_ready("tiny", "3") and not client.is_model_ready("other")
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        assert client.get_model_metadata("tiny", "1") == {**METADATA, "versions": ["1.0", "2.0"]}
        monkeypatch.setattr(Server, "healthy", False)
        assert not client.is_server_ready()


def test_health_needs_no_token_and_follows_the_server(front: int, server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(Triton(Upstream(server), "tiny")) as triton:
        for port in (front, triton):
            monkeypatch.setattr(Server, "healthy", True)
            assert ask(port, "GET", "/healthz") == (200, {"status": "ready"})
            monkeypatch.setattr(Server, "healthy", False)
            assert ask(port, "GET", "/healthz")[0] == 503
        assert ask(triton, "POST", "/v2/models/tiny/infer", b"1")[1]["path"] == "/v2/models/tiny/infer"


def test_without_a_server_clients_get_an_answer(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with running(TorchServe(Upstream(taken.getsockname()[1]), "tiny", VERSIONS)) as port:
            assert ask(port, "POST", "/v2/models/tiny/infer", b"1")[0] == 502
            assert ask(port, "GET", "/healthz")[0] == ask(port, "GET", "/v2/models/tiny/ready")[0] == 503


def test_a_refusal_of_torchserve_has_the_form_of_the_protocol(front: int) -> None:
    found = ask(front, "POST", "/v2/models/tiny/infer", b"1", Authorization="Bearer wrong")
    assert found == (401, {"error": "wrong token"})
    assert ask(front, "POST", "/v2/models/other/infer", b"1")[0] == 404
    assert ask(front, "POST", "/v2/models/tiny/config", b"1")[0] == 404


def test_connections_are_kept_and_replaced_where_the_server_closed_them(server: int) -> None:
    upstream = Upstream(server)
    with running(TorchServe(upstream, "tiny", VERSIONS)) as port:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        for _ in range(3):
            client.request("POST", "/v2/models/tiny/infer", b"1")
            answer = client.getresponse()
            assert answer.status == 200 and answer.headers["X-Redpp-Variant"] == "pruned" and answer.read()
        assert len(upstream.idle) == 1
        upstream.idle[0][1].transport.abort()
        assert ask(port, "POST", "/v2/models/tiny/infer", b"1")[0] == 200
        client.close()


def test_bodies_in_chunks_and_after_a_word(front: int) -> None:
    chunked = (
        b"POST /v2/models/tiny/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"
    )
    assert b'"size": 5' in raw(front, chunked)
    waited = b"POST /v2/models/tiny/infer HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nab"
    assert raw(front, waited).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (b"400", b"nonsense\r\n\r\n"),
        (b"400", b"POST / HTTP/1.1\r\nno colon\r\n\r\n"),
        (b"400", b"POST / HTTP/1.1\r\nContent-Length : 1\r\n\r\na"),
        (b"400", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"),
        (b"400", b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
        (b"400", b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (b"400", b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n"),
        (b"400", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n"),
        (b"413", b"POST / HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n"),
        (b"413", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n"),
        (b"431", b"POST / HTTP/1.1\r\nA: " + b"a" * 200_000 + b"\r\n\r\n"),
        (b"405", b"HEAD / HTTP/1.1\r\n\r\n"),
    ],
)
def test_broken_requests_are_refused_in_words(front: int, status: bytes, request_: bytes) -> None:
    found = raw(front, request_)
    assert found.startswith(b"HTTP/1.1 " + status) and b'{"error": "' in found
    assert ask(front, "GET", "/healthz")[0] == 200


def test_a_client_that_has_closed_its_side_is_answered_also_when_memory_is_collected(front: int) -> None:
    """Nothing of asyncio's holds on to such a connection: the loop reads it no more."""
    head, _ = raw(front, b"GET /collect HTTP/1.1\r\nconnection: close\r\n\r\n").split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")


def test_a_client_that_sends_too_much_reads_why(front: int) -> None:
    status, document = ask(front, "POST", "/v2/models/tiny/infer", bytes(24 * MOST))
    assert status == 413 and f"at most {MOST}" in document["error"]


def in_memory() -> tuple[DoorSpans, Callable[[], tuple[Any, ...]]]:
    """Spans that stay in memory, and what returns them."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return DoorSpans(provider), exporter.get_finished_spans


def test_a_span_of_the_front_lies_between_its_sender_and_the_handler(server: int) -> None:
    """The server's span would be inside it; looks at health make none, and a trace that is not sampled none either."""
    trace, sender = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    spans, finished = in_memory()
    path = "/v2/models/tiny/infer"
    with running(TorchServe(Upstream(server), "tiny", VERSIONS), spans) as port:
        given = {"traceparent": f"00-{trace}-{sender}-01", "tracestate": "a=1", "X-Request-Id": "theirs"}
        headers = dict(ask(port, "POST", path, b"1", **given)[1]["headers"])
        assert ask(port, "GET", "/healthz")[0] == ask(port, "GET", "/v2/models/tiny")[0] == 200
        fresh = dict(ask(port, "POST", path, b"1")[1]["headers"])
        unsampled = dict(ask(port, "POST", path, b"1", traceparent=f"00-{trace}-{sender}-00")[1]["headers"])
    first, second = finished()
    assert (first.name, first.kind.name, first.parent.span_id) == ("front", "SERVER", int(sender, 16))
    assert headers["traceparent"] == f"00-{trace}-{first.context.span_id:016x}-01" and headers["tracestate"] == "a=1"
    assert dict(first.attributes) == {"redpp.request_id": "theirs", "http.response.status_code": 200}
    assert second.parent is None
    assert (
        fresh["traceparent"]
        == f"00-{second.context.trace_id:032x}-{second.context.span_id:016x}-{second.context.trace_flags:02x}"
    )
    assert unsampled["traceparent"].startswith(f"00-{trace}-") and unsampled["traceparent"].endswith("-00")


def test_a_server_that_does_not_answer_is_an_error_of_the_fronts_span(server: int) -> None:
    spans, finished = in_memory()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    with running(Triton(Upstream(nobody), "tiny"), spans) as port:
        assert ask(port, "POST", "/v2/models/tiny/infer", b"1")[0] == 502
    (span,) = finished()
    assert not span.status.is_ok and span.attributes["http.response.status_code"] == 502
