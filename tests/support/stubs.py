"""Stand-ins for a model server behind the gateway: they answer at once, after a delay, or never."""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, bytes, dict[str, str]], tuple[int, Any] | tuple[int, Any, dict[str, str]]]


class StubServer(ThreadingHTTPServer):
    """Answers POST with (status, JSON[, headers]), as ``answer(path, body, headers)`` says; counts by path."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Answer | None = None) -> None:
        self.answer: Answer = answer or (lambda path, body, headers: (200, {"path": path, "bytes": len(body)}))
        self.seen: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: StubServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen[self.path] += 1
        self.server.headers = [*self.server.headers[-50:], headers]
        status, document, *more = self.server.answer(self.path, body, headers)
        reply = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.send_header("X-Request-Id", "the server's own")
        for name, value in more[0].items() if more else ():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply)

    do_PUT = do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def stub(answer: Answer | None = None) -> Iterator[StubServer]:
    """A running `StubServer`."""
    server = StubServer(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def arms(seconds: dict[str, float], outputs: dict[str, list[float]], status: dict[str, int] | None = None) -> Answer:
    """TorchServe's two versions: each takes its time and gives its outputs, by the version that ends the path."""

    def answer(path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        version = path.rsplit("/", 1)[-1]
        time.sleep(seconds[version])
        code = (status or {}).get(version, 200)
        return code, {"outputs": [outputs[version]]} if code == 200 else {"error": "as told"}

    return answer


def ask(
    port: int,
    path: str,
    body: bytes = b"x",
    headers: dict[str, str] | None = None,
    method: str = "POST",
    connection: http.client.HTTPConnection | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body; over ``connection`` where one is given."""
    used = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    used.request(method, path, body, headers or {})
    response = used.getresponse()
    content = response.read()
    if connection is None:
        used.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, content
