"""The page and its data over HTTP, on the loopback address, until told to stop."""

from __future__ import annotations

import base64
import errno
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from redpp_serve.dashboard.collector import WINDOWS, Collector
from redpp_serve.errors import RedppError
from redpp_serve.loopback import ADDRESS
from redpp_serve.serving.running import find
from redpp_serve.serving.serve import model_name

_HERE = Path(__file__).parent
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def dashboard(
    folder: Path, *, port: int | None = None, urls: Sequence[str] = (), note: Callable[[str], None] = print
) -> None:
    """Serve the page until Ctrl-C or a signal unwinds the call.

    Args:
        folder: written by `package`.
        port: where to listen; by default a free one.
        urls: where the metrics are; by default those of the server that runs for the folder.
        note: called with the page's address and a hint.

    Raises:
        RedppError: the folder is no packaged model, no server runs for it and there are no ``urls``, one of them is no
            web address, or the port is in use.
    """
    with serving(folder, port=port, urls=urls) as address:
        note(f"dashboard {address}")
        note("Ctrl-C stops it; the model server stays.")
        threading.Event().wait()


@contextmanager
def serving(folder: Path, *, port: int | None = None, urls: Sequence[str] = (), every_s: float = 1.0) -> Iterator[str]:
    """Serve the page while the body runs, scrape every ``every_s`` seconds, and yield the address. See `dashboard`."""
    if find_spec("prometheus_client") is None:
        raise RedppError(
            "the package prometheus-client is not installed", "it, to read metrics", "pip install 'redpp-serve[serve]'"
        )
    given = check_urls(urls)
    collector = Collector(
        folder, model_name(folder), lambda: given or metrics_urls(folder), every_s, lambda: _server(folder)
    )
    document, policy = page()
    try:
        server = ThreadingHTTPServer((ADDRESS, port or 0), partial(_Handler, collector, document, policy))
    except (OSError, OverflowError) as error:
        taken = getattr(error, "errno", 0) == errno.EADDRINUSE
        why = "is in use" if taken else f"cannot be used: {getattr(error, 'strerror', None) or error}"
        raise RedppError(
            f"port {port} {why}", f"a free port on {ADDRESS}", "choose another with --port, or leave it out"
        ) from error
    with server:
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
    """Return where the server that runs for the folder, and its A/B test, export metrics.

    Raises:
        RedppError: none runs.
    """
    running = find(folder)
    experiment = running.extra.get("ab_metrics")
    return check_urls([*running.metrics_urls, *([str(experiment)] if experiment else [])])


def _server(folder: Path) -> str | None:
    try:
        return find(folder).kind
    except RedppError:
        return None


def check_urls(urls: Iterable[str]) -> list[str]:
    """Return the URLs, each once.

    Raises:
        RedppError: one of them cannot be a metrics URL.
    """
    found = list(dict.fromkeys(urls))
    for url in found:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port out of range, half an IPv6 address
            good = False
        if not good or not url.isprintable() or " " in url:
            raise RedppError(
                f"--metrics-url {url!r} is no web address",
                "such as http://127.0.0.1:9400/metrics",
                "correct it, or leave it out to find the server that runs for the folder",
            )
    return found


def page() -> tuple[bytes, str]:
    """Return the whole page, and the policy that lets a browser run its own script and style and nothing else."""
    document, style, script = ((_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    hashes = {
        kind: base64.b64encode(sha256(text.encode()).digest()).decode()
        for kind, text in (("script", script), ("style", style))
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return document.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script).encode(), policy


class _Handler(BaseHTTPRequestHandler):
    """Answers ``/`` with the page and ``/data.json?window=SECONDS`` with its numbers; all else is 404."""

    server_version, sys_version = "redpp-serve", ""
    timeout = 10.0

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
        elif place.path != "/data.json":
            self._reply(404, "text/plain", b"there is / and /data.json\n")
        elif (window := parse_qs(place.query).get("window", ["60"])[0]) not in map(str, WINDOWS):
            self._reply(400, "text/plain", f"window is one of {', '.join(map(str, WINDOWS))} seconds\n".encode())
        else:
            data = json.dumps(self._collector.data(int(window)), allow_nan=False, separators=(",", ":"))
            self._reply(200, "application/json", data.encode())

    def _reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        own = {"Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": self._policy}
        for name, value in {**own, **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: a page that asks once a second would fill the terminal."""
