"""One HTTP address that speaks the Open Inference Protocol in front of either server, and ``/healthz`` without a token.

``python -m redpp_serve.serving.front KIND --port PORT --server PORT --name NAME`` serves on the loopback address until
SIGTERM. TorchServe's own version 2 of the protocol calls every model ready, knows no metadata, and refuses versions;
here its paths lead to the handler, which reads and writes the protocol's bodies (`handlers.open_inference`). What is
no path of the protocol goes to the server as it came.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path

from redpp_serve.handlers.tracing import (
    ID_HEADER,
    PARENT_HEADER,
    STATE_HEADER,
    TRACE_HEADERS,
    DoorSpans,
    opened,
    request_id,
    trace_parent,
    trace_state,
)
from redpp_serve.loopback import ADDRESS

_HEAD_BYTES = 64 << 10
_LOOK_S = 5.0  # for a version to show that it answers
_LINGER_S, _DISCARDED_BYTES = 1.0, 1 << 30  # how long, and how much, a refused client may go on sending
_IDLE_S = 75.0  # until a silent client's connection is closed
_DROPPED = ("connection", "keep-alive", "transfer-encoding", "content-length", "expect")
_METHODS = ("GET", "POST", "PUT", "OPTIONS", "DELETE")
_EXTENSIONS = ["binary_tensor_data", "classification"]


@dataclass(frozen=True)
class Message:
    """A request or a reply: its first line's words, headers by name in lower case, and body."""

    words: tuple[str, str, str]
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def get(self, name: str) -> str:
        """Return the value of a header; empty where there is none."""
        return next((value for key, value in self.headers if key == name), "")

    def with_id(self, name: str) -> Message:
        """Return it as the message of a request's id, whatever it was called."""
        return replace(self, headers=(*((k, v) for k, v in self.headers if k != ID_HEADER), (ID_HEADER, name)))

    def traced(self) -> Message:
        """Return a request with an id, its own or a new one, and with W3C's trace headers only where they are that."""
        given: dict[str, list[str]] = {name: [] for name in TRACE_HEADERS}
        for key, value in self.headers:
            if key in given:
                given[key].append(value)
        one = {key: values[0] if len(values) == 1 else "" for key, values in given.items()}
        parent = trace_parent(one[PARENT_HEADER])
        state = trace_state(", ".join(given[STATE_HEADER])) if parent else ""  # it may come in several
        kept = [(key, value) for key, value in self.headers if key not in given]
        kept += [(key, value) for key, value in ((PARENT_HEADER, parent), (STATE_HEADER, state)) if value]
        kept.append((ID_HEADER, request_id(one[ID_HEADER]) or secrets.token_hex(16)))
        return replace(self, headers=tuple(kept))

    @property
    def closes(self) -> bool:
        """Whether its sender closes the connection after it."""
        version = next((word for word in self.words if word.startswith("HTTP/")), "")
        return "close" in self.get("connection").lower() or version == "HTTP/1.0"

    def encoded(self) -> bytes:
        """Return the bytes that go over the wire."""
        kept = [f"{key}: {value}\r\n" for key, value in self.headers if key not in _DROPPED]
        head = f"{' '.join(self.words)}\r\n{''.join(kept)}content-length: {len(self.body)}\r\n\r\n"
        return head.encode("latin-1") + self.body


class Malformed(ValueError):
    """A message breaks HTTP, or is larger than this server takes. ``status`` is how it is refused."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


def reply(status: int, document: object) -> Message:
    """Return a reply of JSON."""
    words = ("HTTP/1.1", str(status), HTTPStatus(status).phrase)
    return Message(words, (("content-type", "application/json"),), json.dumps(document).encode() + b"\n")


async def read_message(reader: asyncio.StreamReader, most: int, *, is_reply: bool = False) -> Message | None:
    """Read one message; None where the connection ends before it.

    Args:
        reader: the connection.
        most: bytes that its body may have.
        is_reply: replies without a length end with the connection.

    Raises:
        Malformed: it breaks HTTP, or its body is too large.
        OSError, asyncio.IncompleteReadError: the connection ends within it.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise
    except asyncio.LimitOverrunError:
        raise Malformed("headers of more than 64 KB, expected fewer", 431) from None
    first, *lines = head.decode("latin-1")[:-4].split("\r\n")
    words = tuple(first.split(" ", 2))
    pairs = [line.partition(":") for line in lines]
    if len(words) != 3 or any(not name.strip() or not colon or name[-1:].isspace() for name, colon, _ in pairs):
        raise Malformed("a malformed request, expected HTTP/1.1")
    message = Message(words, tuple((name.lower(), value.strip()) for name, _, value in pairs))
    return Message(message.words, message.headers, await _read_body(reader, message, most, is_reply))


async def _read_body(reader: asyncio.StreamReader, message: Message, most: int, is_reply: bool) -> bytes:
    length = message.get("content-length")
    if message.get("transfer-encoding"):
        return await _read_chunks(reader, message, most)
    if not length:
        return await reader.read() if is_reply and message.words[1] not in ("204", "304") else b""
    if (
        not (length.isascii() and length.isdecimal())
        or len({v for k, v in message.headers if k == "content-length"}) > 1
    ):
        raise Malformed("a wrong Content-Length, expected the body's")
    if int(length[:20]) > most:
        raise Malformed(f"a body of {length[:20]} bytes, expected at most {most}", 413)
    return await reader.readexactly(int(length))


async def _read_chunks(reader: asyncio.StreamReader, message: Message, most: int) -> bytes:
    if message.get("transfer-encoding").lower() != "chunked" or message.get("content-length"):
        raise Malformed("an unknown Transfer-Encoding, expected chunked or a Content-Length")
    chunks: list[bytes] = []
    total = 0
    while True:
        text = (await reader.readuntil(b"\r\n")).split(b";")[0].strip()
        try:
            size = int(text, 16) if text[:1].isalnum() else -1
        except ValueError:
            size = -1
        total += size
        if size < 0:
            raise Malformed("a wrong chunk, expected its size in hexadecimal digits")
        if total > most:
            raise Malformed(f"a body of more than {most} bytes, expected fewer", 413)
        if not size:
            while (await reader.readuntil(b"\r\n")) != b"\r\n":  # trailers
                pass
            return b"".join(chunks)
        chunks.append(await reader.readexactly(size))
        await reader.readexactly(2)


@dataclass
class Upstream:
    """Kept connections to the model server.

    Attributes:
        port: its port on the loopback address.
        idle: connections that wait for their next request.
    """

    port: int
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def ask(self, request: Message) -> Message:
        """Send a request, and return its reply; once more where the server has closed a kept connection.

        Raises:
            OSError, asyncio.IncompleteReadError, Malformed: there is no reply.
        """
        sent = request.encoded()
        while self.idle:
            connection = self.idle.pop()
            with suppress(OSError, asyncio.IncompleteReadError):
                if found := await self._exchange(*connection, sent):
                    return found
        found = await self._exchange(*await asyncio.open_connection(ADDRESS, self.port, limit=_HEAD_BYTES), sent)
        if found is None:
            raise ConnectionResetError("the server closed the connection")
        return found

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: bytes
    ) -> Message | None:
        keep = False
        try:
            writer.write(sent)
            await writer.drain()
            found = await read_message(reader, sys.maxsize, is_reply=True)
            keep = found is not None and not found.closes and bool(found.get("content-length"))
            return found
        finally:
            if keep:
                self.idle.append((reader, writer))
            else:
                writer.close()


@dataclass
class Triton:
    """Triton speaks the protocol itself; only ``/healthz`` is added."""

    upstream: Upstream
    name: str

    async def answer(self, request: Message) -> Message:
        """Return the reply to a request."""
        if request.words[1] == "/healthz":
            return await healthz(lambda: self.upstream.ask(_get("/v2/health/ready")))
        return await self.upstream.ask(request)


@dataclass
class TorchServe:
    """The protocol's paths on TorchServe.

    Attributes:
        upstream: TorchServe's inference address.
        name: the model's name.
        versions: what clients may call each version -> what TorchServe calls it.
        keys: the file with TorchServe's tokens; None where it wants none.
    """

    upstream: Upstream
    name: str
    versions: Mapping[str, str]
    keys: Path | None = None

    async def answer(self, request: Message) -> Message:
        """Return the reply to a request."""
        method, target, _ = request.words
        parts = target.partition("?")[0].strip("/").split("/")
        if parts == ["healthz"]:
            return await healthz(lambda: self.upstream.ask(_get("/ping", self._token())))
        if parts[0] != "v2":
            return await self.upstream.ask(request)
        if parts == ["v2"]:
            return reply(200, {"name": "torchserve", "version": "0.12.0", "extensions": _EXTENSIONS})
        if parts[1:] in (["health", "live"], ["health", "ready"]):
            found = await healthz(lambda: self.upstream.ask(_get("/ping", self._token())))
            return (
                found if parts[2] == "ready" or found.words[1] == "200" else reply(503, {"error": "it does not answer"})
            )
        version, action = self._model(parts[1:])
        if version is None:
            return reply(404, {"error": f"nothing is served here, expected /v2/models/{self.name}"})
        path = f"/predictions/{self.name}/{version}".rstrip("/")
        if action == ["infer"] and method == "POST":
            asked = Message((method, path, "HTTP/1.1"), request.headers, request.body)
            return _explained(await self.upstream.ask(asked))
        if action in ([], ["ready"]) and method == "GET":
            return await self._described(path, ready=bool(action))
        return reply(404, {"error": "expected POST .../infer, or GET of a model or its /ready"})

    def _model(self, parts: Sequence[str]) -> tuple[str | None, list[str]]:
        """Return the version that a path names, empty for the default, and what is asked of it; None for no model."""
        if list(parts[:2]) != ["models", self.name]:
            return None, []
        if parts[2:3] == ["versions"] and len(parts) > 3:
            return self.versions.get(parts[3]), list(parts[4:])
        return "", list(parts[2:])

    async def _described(self, path: str, ready: bool) -> Message:
        """Ask a version to describe itself, which shows that it answers."""
        try:
            asked = _get(path, {**self._token(), "describe": "True"})
            found = await asyncio.wait_for(self.upstream.ask(asked), _LOOK_S)
        except (*_NO_REPLY, asyncio.TimeoutError):
            return reply(503, {"error": "the model does not answer"})
        if found.words[1] != "200":
            return reply(503, {"error": "the model does not answer"})
        if ready:
            return reply(200, {"name": self.name, "ready": True})
        return reply(200, {**json.loads(found.body), "versions": sorted(set(self.versions.values()))})

    def _token(self) -> dict[str, str]:
        if self.keys is None:
            return {}
        with suppress(OSError, ValueError, KeyError):  # TorchServe writes it while it starts
            return {"authorization": f"Bearer {json.loads(self.keys.read_text())['inference']['key']}"}
        return {}


def _explained(answer: Message) -> Message:
    """Give TorchServe's own refusals the form of the protocol's, and a wrong token its status."""
    status = int(answer.words[1])
    with suppress(ValueError, KeyError, TypeError):
        if status >= 400:
            document = json.loads(answer.body)
            refused = document["type"] == "InvalidKeyException"
            return reply(401 if refused else status, {"error": str(document["message"])})
    return answer


_NO_REPLY = (OSError, asyncio.IncompleteReadError, Malformed)


async def healthz(look: Callable[[], Awaitable[Message]]) -> Message:
    """Return 200 while the server calls itself ready, else 503; it needs no token and tells nothing else."""
    try:
        found = await asyncio.wait_for(look(), _LOOK_S)
    except (*_NO_REPLY, asyncio.TimeoutError):
        return reply(503, {"status": "the model server does not answer"})
    ready = found.words[1] == "200"
    return reply(200 if ready else 503, {"status": "ready" if ready else "the model server is not ready"})


def _get(path: str, headers: Mapping[str, str] | None = None) -> Message:
    return Message(("GET", path, "HTTP/1.1"), (("host", ADDRESS), *(headers or {}).items()))


@dataclass
class Front:
    """Answers clients, one request of a connection after the other.

    Attributes:
        rules: what is done with a request.
        most: bytes that a body may have.
        spans: makes a span of each POST; None where nobody asks for them.
    """

    rules: Triton | TorchServe
    most: int
    spans: DoorSpans | None = None
    _serving: set[asyncio.Task[None] | None] = field(default_factory=set)  # the loop holds on to no task itself

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until its client closes it."""
        task = asyncio.current_task()
        self._serving.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
                while await self._next(reader, writer):
                    pass
        finally:
            self._serving.discard(task)
            writer.close()

    async def _next(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            request = await asyncio.wait_for(self._request(reader, writer), _IDLE_S)
        except Malformed as error:
            writer.write(reply(error.status, {"error": str(error)}).encoded())
            await writer.drain()
            await _discard(reader)
            return False
        if request is None:
            return False
        request = request.traced()
        answer = await self._answer(request)
        writer.write(answer.with_id(request.get(ID_HEADER)).encoded())
        await writer.drain()
        return not request.closes

    async def _answer(self, request: Message) -> Message:
        if self.spans and request.words[0] == "POST":
            span, onward = self.spans.begin("front", dict(request.headers))
            kept = tuple((key, value) for key, value in request.headers if key not in onward)
            answer = await self._asked(replace(request, headers=(*kept, *onward.items())))
            self.spans.end(span, int(answer.words[1]))
            return answer
        return await self._asked(request)

    async def _asked(self, request: Message) -> Message:
        if request.words[0] not in _METHODS:
            return reply(405, {"error": f"expected {', '.join(_METHODS)}"})
        try:
            return await self.rules.answer(request)
        except _NO_REPLY:
            return reply(502, {"error": "the model server does not answer"})

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Message | None:
        """Read a request. Clients of large bodies may wait for a word before they send them."""
        writer_of_continue = _Continue(reader, writer)
        return await read_message(writer_of_continue, self.most)  # type: ignore[arg-type]


async def _discard(reader: asyncio.StreamReader) -> None:
    """Read what a refused client still sends: it looks for its answer only after that, and a reset would lose it."""
    for _ in range(_DISCARDED_BYTES // _HEAD_BYTES):
        if not await asyncio.wait_for(reader.read(_HEAD_BYTES), _LINGER_S):
            break


class _Continue:
    """A reader that tells the client to go on where its headers ask for that."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def readuntil(self, separator: bytes) -> bytes:
        """Read as `asyncio.StreamReader` does."""
        found = await self._reader.readuntil(separator)
        if separator == b"\r\n\r\n" and b"\r\nexpect: 100-continue" in found.lower():
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return found

    async def readexactly(self, size: int) -> bytes:
        """Read as `asyncio.StreamReader` does."""
        return await self._reader.readexactly(size)


async def _main(options: argparse.Namespace) -> None:
    upstream = Upstream(options.server)
    pairs = dict(word.split("=") for word in options.version)
    rules: Triton | TorchServe = Triton(upstream, options.name)
    if options.kind == "torchserve":
        rules = TorchServe(upstream, options.name, pairs, options.keys)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    front = Front(rules, options.most, opened(DoorSpans))
    server = await asyncio.start_server(front.serve, ADDRESS, options.port, limit=_HEAD_BYTES)
    await stop.wait()
    server.close()
    if front.spans:
        front.spans.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, and return the exit code."""
    parser = argparse.ArgumentParser(prog="redpp_serve.serving.front", description="Open Inference Protocol.")
    parser.add_argument("kind", choices=("torchserve", "triton"))
    parser.add_argument("--port", type=int, required=True, help="where to listen, on the loopback address")
    parser.add_argument("--server", type=int, required=True, help="the model server's HTTP port")
    parser.add_argument("--name", required=True, help="the model's name")
    parser.add_argument("--most", type=int, required=True, help="bytes that a request's body may have")
    parser.add_argument("--version", action="append", default=[], help="NAME=VERSION, repeated")
    parser.add_argument("--keys", type=Path, help="the file with TorchServe's tokens")
    asyncio.run(_main(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
