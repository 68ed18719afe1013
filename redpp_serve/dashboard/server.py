"""The page and its data over HTTP, on the loopback address, until told to stop."""

from __future__ import annotations

import base64
import errno
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from redpp_serve.dashboard.collector import WINDOWS, Collector
from redpp_serve.dashboard.scraping import check_parser, check_urls
from redpp_serve.errors import RedppError
from redpp_serve.loopback import ADDRESS
from redpp_serve.serving.running import find
from redpp_serve.serving.serve import model_name

_HERE = Path(__file__).parent
_CLIENT_TIMEOUT_S = 10.0


def dashboard(
    folder: Path, *, port: int | None = None, urls: Sequence[str] = (), say: Callable[[str], None] = print
) -> None:
    """Serve the page until Ctrl-C or a signal unwinds the call.

    Args:
        folder: written by `package`.
        port: where to listen; by default a free one.
        urls: where the metrics are; by default those of the server that runs for the folder.
        say: called with a line that holds the page's address.

    Raises:
        RedppError: not a packaged folder, no running server and no ``urls``, one that is none, or a port in use.
    """
    with serving(folder, port=port, urls=urls) as address:
        say(f"dashboard {address}")
        say("Ctrl-C stops it; the model server stays.")
        threading.Event().wait()


@contextmanager
def serving(folder: Path, *, port: int | None = None, urls: Sequence[str] = ()) -> Iterator[str]:
    """The page is served while the body runs; gives its address. See `dashboard`."""
    check_parser()
    given = list(check_urls(urls))
    collector = Collector(folder, model_name(folder), lambda: given or metrics_urls(folder))
    with _listening(port or 0, collector) as server:
        collector.start()
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="page", daemon=True)
        thread.start()
        try:
            yield f"http://{ADDRESS}:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()
            collector.stop()


def metrics_urls(folder: Path) -> list[str]:
    """Where the server that runs for the folder, and its A/B test, export metrics.

    Raises:
        RedppError: none runs.
    """
    running = find(folder)
    experiment = running.extra.get("ab_metrics")
    return list(check_urls([*running.metrics_urls, *([str(experiment)] if experiment else [])]))


def page() -> tuple[bytes, str]:
    """The whole page, and the policy that lets a browser run its own script and style and nothing else."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    document = (_HERE / "page.html").read_text(encoding="utf-8")
    document = document.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return document.encode(), policy


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True


@contextmanager
def _listening(port: int, collector: Collector) -> Iterator[_Server]:
    document, policy = page()
    try:
        server = _Server((ADDRESS, port), partial(_Handler, collector, document, policy))
    except (OSError, OverflowError) as error:
        taken = getattr(error, "errno", 0) == errno.EADDRINUSE
        why = "is in use" if taken else f"cannot be used: {getattr(error, 'strerror', None) or error}"
        raise RedppError(
            f"port {port} {why}", f"a free port on {ADDRESS}", "choose another with --port, or leave it out"
        ) from error
    with server:
        yield server


class _Handler(BaseHTTPRequestHandler):
    """``/``: the page; ``/data.json?window=SECONDS``: its numbers. All else is 404."""

    server_version, sys_version = "redpp-serve", ""
    timeout = _CLIENT_TIMEOUT_S

    def __init__(self, collector: Collector, document: bytes, policy: str, *arguments: Any) -> None:
        self._collector, self._document, self._policy = collector, document, policy
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer one request of a browser on this machine."""
        place = urlsplit(self.path)
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in (ADDRESS, "localhost"):
            self._reply(403, "text/plain", b"ask for it by its own address\n")  # else other sites could read it by DNS
        elif place.path == "/":
            self._reply(200, "text/html; charset=utf-8", self._document)
        elif place.path == "/data.json":
            window = parse_qs(place.query).get("window", ["60"])[0]
            if window not in map(str, WINDOWS):
                self._reply(400, "text/plain", f"window is one of {', '.join(map(str, WINDOWS))} seconds\n".encode())
                return
            data = json.dumps(self._collector.data(int(window)), allow_nan=False, separators=(",", ":"))
            self._reply(200, "application/json", data.encode())
        else:
            self._reply(404, "text/plain", b"there is / and /data.json\n")

    def _reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", self._policy),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a page that asks once a second would fill the terminal."""
