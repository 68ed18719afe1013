"""One keep-alive connection to one endpoint, and the meaning of its replies."""

from __future__ import annotations

import http.client
import time
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import numpy as np

from redpp_serve.comparison.outputs import finite, read_outputs
from redpp_serve.errors import RedppError
from redpp_serve.handlers.wire import HANDLER_HEADER, read_seconds

TIMEOUT_S = 30.0
ERROR_CHARACTERS = 2000


@dataclass(frozen=True)
class Endpoint:
    """One version on a server: its name, the URL that answers predictions (POST), and extra request headers."""

    label: str
    url: str
    headers: dict[str, str]

    def connect(self) -> Wire:
        """Return a connection of its own, not open yet."""
        return Connection(self)


class Wire(Protocol):
    """One connection, used by one thread at a time."""

    def send(self, payload: Payload) -> Exchange:
        """Send one input and time it; a failed connection is an Exchange of status 0, never an exception."""

    def close(self) -> None:
        """Close the connection; the next ``send`` opens it again."""


@dataclass(frozen=True)
class Payload:
    """One input, or several, as they go over the wire.

    Attributes:
        body: of the request.
        content_type: of the body.
        label: its class, where it is known.
        sizes: the planned sizes that its own are nearest to, in words, where sizes vary.
        items: how many inputs it holds; outputs of several have a leading dimension.
    """

    body: bytes
    content_type: str
    label: int | None = None
    sizes: str = ""
    items: int = 1


@dataclass
class Reply:
    """The answer to one request.

    Attributes:
        arm: label of the endpoint.
        payload: index of the input.
        start_s: when the request was sent (open loop: was due), seconds since the run began.
        latency_s: from ``start_s`` to the last byte of the reply, seconds.
        handler_s: time the batch spent in the handler, seconds; None where the server does not say.
        status: HTTP status; 0 where no reply came.
        outputs: outputs of the network in order, float64; None where the reply failed.
        error: empty on success, else the text of the reply or of the connection's failure.
    """

    arm: str
    payload: int
    start_s: float
    latency_s: float
    handler_s: float | None
    status: int
    outputs: list[np.ndarray] | None
    error: str

    @property
    def ok(self) -> bool:
        """Whether the request was answered with outputs."""
        return self.status == 200 and not self.error


class Exchange(NamedTuple):
    """One request and its reply: bytes to decode, or arrays where the client library gives no less.

    ``start_s`` is on the clock of ``time.perf_counter``.
    """

    start_s: float
    latency_s: float
    handler_s: float | None
    status: int
    body: bytes | list[np.ndarray]
    error: str

    @property
    def ok(self) -> bool:
        """Whether the status is 200; the body is not looked at."""
        return self.status == 200


class Connection:
    """A `Wire` of HTTP.

    Decoding is kept apart (``decode``), so that parsing one reply never holds the interpreter lock while another
    thread's clock runs.
    """

    def __init__(self, endpoint: Endpoint, timeout_s: float = TIMEOUT_S) -> None:
        parts = urlsplit(endpoint.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RedppError(
                f"endpoint {endpoint.label!r} has the URL {endpoint.url!r}",
                "an absolute http:// or https:// URL",
                "pass the prediction URL, such as http://127.0.0.1:8080/predictions/model/1.0",
            )
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.endpoint = endpoint
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._http = kind(parts.hostname, parts.port, timeout=timeout_s)

    def send(self, payload: Payload) -> Exchange:
        """POST one input and time it."""
        start = time.perf_counter()
        try:
            status, handler_s, body = self._post(payload)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return Exchange(start, time.perf_counter() - start, None, 0, b"", f"{type(error).__name__}: {error}")
        return Exchange(start, time.perf_counter() - start, handler_s, status, body, "")

    def _post(self, payload: Payload) -> tuple[int, float | None, bytes]:
        reused = self._http.sock is not None
        try:
            return self._exchange(payload)
        except (ConnectionResetError, BrokenPipeError):
            # A server may close an idle connection at any moment. A fresh one that is dropped is a real failure.
            # (RemoteDisconnected is a ConnectionResetError.)
            if not reused:
                raise
        self.close()
        return self._exchange(payload)

    def _exchange(self, payload: Payload) -> tuple[int, float | None, bytes]:
        headers = {**self.endpoint.headers, "Content-Type": payload.content_type}
        self._http.request("POST", self._path, body=payload.body, headers=headers)
        response = self._http.getresponse()
        body = response.read()
        return response.status, read_seconds(response.getheader(HANDLER_HEADER)), body or response.reason.encode()

    def close(self) -> None:
        """Close the socket."""
        self._http.close()


class Decoder:
    """Turns exchanges into replies.

    A network mostly repeats itself on a repeated input, so the last body and arrays of each version and input are kept:
    a long run then neither parses nor stores the same numbers twice.

    Args:
        origin_s: the run's start on the clock of ``time.perf_counter``.
    """

    def __init__(self, origin_s: float) -> None:
        self.origin_s = origin_s
        self._last: dict[tuple[str, int], tuple[bytes | list[np.ndarray], list[np.ndarray]]] = {}

    def reply(self, arm: str, payload: int, exchange: Exchange) -> Reply:
        """Return the reply of ``arm`` to the input of index ``payload``; an unreadable body makes it a failure."""
        outputs, error = None, exchange.error
        if not error and not exchange.ok:
            error = as_text(exchange)
        if not error:
            try:
                outputs = self._outputs((arm, payload), exchange.body)
            except ValueError as problem:
                error = f"reply without readable outputs: {problem}"
        start = exchange.start_s - self.origin_s
        return Reply(arm, payload, start, exchange.latency_s, exchange.handler_s, exchange.status, outputs, error)

    def _outputs(self, key: tuple[str, int], body: bytes | list[np.ndarray]) -> list[np.ndarray]:
        known = self._last.get(key)
        if known and _equal(known[0], body):
            return known[1]
        outputs = read_outputs(body) if isinstance(body, bytes) else finite(body)
        self._last[key] = (body, outputs)
        return outputs


def _equal(a: bytes | list[np.ndarray], b: bytes | list[np.ndarray]) -> bool:
    if isinstance(a, bytes) or isinstance(b, bytes):
        return a is b or (isinstance(a, bytes) and a == b)
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def as_text(exchange: Exchange) -> str:
    """Return why an exchange failed, in the server's words or the connection's."""
    text = exchange.body.decode(errors="replace") if isinstance(exchange.body, bytes) else ""
    return exchange.error or text[:ERROR_CHARACTERS]
