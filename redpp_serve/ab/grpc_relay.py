"""The way from the gateway to Triton's two versions over gRPC: a request names its version where no nginx can write.

``python -m redpp_serve.ab.grpc_relay --help`` lists what it has to know; it runs until SIGTERM. nginx chooses the arm,
and passes the request to that arm's socket; here the version is added to the message. Protocol Buffers take the last
value of a field, so that it goes behind the message as it came. A request that its arm fails, or keeps waiting since it
has died, is asked of the other one, where the gateway allows it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from redpp_serve.archives import varint
from redpp_serve.variants import NAMES

_SERVICE, _METHOD = "inference.GRPCInferenceService", "ModelInfer"
_VERSION_FIELD = b"\x12"  # number 2 of a ModelInferRequest, with its length before it
# Metadata of value 1: from the gateway, and back to it where an arm was asked at all, and where the other one was.
MAY_CHANGE, ASKED, CHANGED = "x-redpp-may-change", "x-redpp-asked", "x-redpp-changed"
_DROPPED = ("user-agent", "te", "content-type", "host", MAY_CHANGE)
_FAILED = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE})
_RECEIVES, _SENDS = "grpc.max_receive_message_length", ("grpc.max_send_message_length", -1)
_MOST_FIELDS = 10_000  # of a request; a network has fewer inputs and parameters
_GRACE_S = 1.0  # for requests in flight
_LOOK_S = 0.1  # between two looks for a dead arm


def of_version(request: bytes, version: str) -> bytes:
    """Return a serialized ModelInferRequest for a version, whichever it named.

    Raises:
        ValueError: it is empty, or its last field does not end with it and would swallow the version.
    """
    _check_fields(request)
    return request + _VERSION_FIELD + bytes([len(version)]) + version.encode()


def _check_fields(message: bytes) -> None:
    """Raise a ValueError where a message's fields do not end with it, or are more than any request has."""
    place = count = 0
    while place < len(message):
        count += 1
        key, place = _number(message, place)
        kind = key & 7
        if kind not in (0, 1, 2, 5) or count > _MOST_FIELDS:
            raise ValueError
        if kind == 0:
            _, place = _number(message, place)
        elif kind == 2:
            length, place = _number(message, place)
            place += length
        else:
            place += 8 if kind == 1 else 4
    if place != len(message) or not message:
        raise ValueError


def _number(message: bytes, place: int) -> tuple[int, int]:
    found = varint(message, place)
    if found is None:
        raise ValueError
    return found


def arm(channel: Any, version: str, other: str, dead: Callable[[], bool]) -> Any:
    """Return what answers questions for predictions as one version of the model does, by a channel to the server.

    Args:
        channel: to the server.
        version: the version.
        other: the one that is asked after it has failed.
        dead: tells whether it has no worker left, and the other one has.
    """
    infer = channel.unary_unary(f"/{_SERVICE}/{_METHOD}")

    async def ask(request: bytes, number: str, metadata: Sequence[tuple[str, Any]], context: Any) -> bytes:
        sent = [(key, value) for key, value in metadata if key not in _DROPPED]
        reply: bytes = await infer(of_version(request, number), metadata=sent, timeout=context.time_remaining())
        return reply

    async def answer(requests: AsyncIterator[bytes], context: Any) -> bytes:
        metadata = context.invocation_metadata() or ()
        told = [(ASKED, "1")]
        try:
            request = await anext(requests, b"")
            if (MAY_CHANGE, "1") not in metadata:
                return await ask(request, version, metadata, context)
            asked = asyncio.ensure_future(ask(request, version, metadata, context))
            try:
                while not (await asyncio.wait({asked}, timeout=_LOOK_S))[0] and not dead():
                    pass
                if asked.done():
                    return asked.result()
            except grpc.aio.AioRpcError as error:
                if error.code() not in _FAILED:
                    raise
            finally:
                asked.cancel()
            told.append((CHANGED, "1"))
            reply = await ask(request, other, metadata, context)
            await context.send_initial_metadata(told)
            return reply
        except grpc.aio.AioRpcError as error:
            await context.send_initial_metadata(told)
            await context.abort(error.code(), error.details() or "")
            raise
        except ValueError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no ModelInferRequest")
            raise

    # As a stream: where one message is waited for and none comes, the library would never answer.
    handler = grpc.stream_unary_rpc_method_handler(answer)
    return grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler})


async def run(
    server: str, arms: Sequence[tuple[Path, str, Path]], most_bytes: int, stop: Callable[[], Awaitable[Any]]
) -> None:
    """Serve both arms until ``stop`` returns.

    Args:
        server: host and port of the server's gRPC.
        arms: for each a socket, a version and the file that is there while it is dead.
        most_bytes: that a message may have, also one that was compressed.
        stop: waits for the end.
    """
    async with grpc.aio.insecure_channel(server, options=[(_RECEIVES, -1), _SENDS]) as channel:
        relays = []
        for (path, version, file), (_, other, others) in zip(arms, reversed(arms), strict=True):
            path.unlink(missing_ok=True)
            relays.append(grpc.aio.server(options=[(_RECEIVES, most_bytes), _SENDS]))
            relays[-1].add_generic_rpc_handlers((arm(channel, version, other, partial(_is_dead, file, others)),))
            relays[-1].add_insecure_port(f"unix:{path}")
            await relays[-1].start()
            path.chmod(0o666)  # nginx's worker may be another user; the folder is closed to others
        await stop()
        await asyncio.gather(*(relay.stop(_GRACE_S) for relay in relays))


def _is_dead(arm: Path, other: Path) -> bool:
    return arm.exists() and not other.exists()


def command(
    server: str, original: Path, pruned: Path, versions: Sequence[str], dead: Path, most_bytes: int
) -> list[str]:
    """Return the command that runs it, see the module."""
    words = ["--server", server, "--original", str(original), "--pruned", str(pruned), "--versions", *versions]
    words += ["--dead", str(dead), "--most", str(most_bytes)]
    return [sys.executable, "-m", "redpp_serve.ab.grpc_relay", *words]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; return the exit code."""
    parser = argparse.ArgumentParser(prog="redpp_serve.ab.grpc_relay", description="The versions over gRPC.")
    parser.add_argument("--server", required=True, help="host and port of Triton's gRPC")
    parser.add_argument("--original", type=Path, required=True, help="socket to open for the original version")
    parser.add_argument("--pruned", type=Path, required=True, help="socket to open for the pruned version")
    parser.add_argument("--versions", nargs=2, required=True, help="their numbers")
    parser.add_argument("--dead", type=Path, required=True, help="folder with a file for each arm that is dead")
    parser.add_argument("--most", type=int, required=True, help="bytes that a message may have")
    options = parser.parse_args(arguments)

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        dead = (options.dead / name for name in NAMES)
        arms = list(zip((options.original, options.pruned), options.versions, dead, strict=True))
        await run(options.server, arms, options.most, stop.wait)

    with suppress(asyncio.CancelledError):
        asyncio.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
