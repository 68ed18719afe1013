"""The shadow recorder: takes mirrored requests from nginx, and sends each to both versions when they have time.

``python -m redpp_serve.experiment.recorder --state DIR --port N --original URL --redpp URL`` runs until SIGTERM.
nginx gets its 204 before anything else happens, so neither a busy recorder nor a slow version reaches a user.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from redpp_serve.packaging.server_config import MAX_REQUEST_BYTES

from .files import PAIRS, RECORDER, read_json, write_json
from .inbox import Inbox, Mirrored
from .nginx import ADDRESS
from .replay import Replayer

# More tell nothing that these did not: a difference of 0.5 % is decided long before.
MAX_PAIRS = 200_000
_NOT_REPEATED = {
    "host", "connection", "content-length", "expect", "accept-encoding", "transfer-encoding", "x-request-id",
}  # fmt: skip
_REPLY = b"HTTP/1.1 204 No Content\r\n\r\n"
_COUNTS_EVERY_S = 0.5


class Recorder:
    """Listens, replays in a thread of its own, and appends pairs to the state folder.

    Args:
        state: the experiment's state folder.
        urls: where the original and the pruned version answer.
        inbox: the queue in between.
    """

    def __init__(self, state: Path, urls: Sequence[str], inbox: Inbox | None = None) -> None:
        self.inbox = inbox or Inbox()
        self._state, self._replayer = state, Replayer(urls, self.inbox)
        before: dict[str, int] = read_json(state / RECORDER) or {}  # of a recorder that was started anew
        self._before = {key: before.get(key, 0) for key in ("received", "dropped", "pairs")}
        self._pairs = 0
        self._stop = threading.Event()

    async def run(self, port: int) -> None:
        """Until cancelled.

        Raises:
            OSError: the port is taken.
        """
        thread = threading.Thread(target=self._replay_all, daemon=True)
        server = await asyncio.start_server(self._listen, ADDRESS, port, limit=1 << 20)
        thread.start()
        try:
            async with server:
                while True:
                    await asyncio.sleep(_COUNTS_EVERY_S)
                    self._write_counts()
                    if not thread.is_alive():  # the supervisor starts another recorder
                        raise RuntimeError("the replays have ended, see above")
        finally:
            self._stop.set()
            self._write_counts()

    def _write_counts(self) -> None:
        with suppress(OSError):  # a full disk: next time
            write_json(self._state / RECORDER, self.counts())

    def counts(self) -> dict[str, int]:
        """Mirrored requests received and dropped, and pairs recorded, over the whole experiment."""
        now = {"received": self.inbox.received, "dropped": self.inbox.dropped, "pairs": self._pairs}
        return {key: self._before[key] + value for key, value in now.items()}

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of nginx. Whatever is not a request of its kind ends the connection."""
        with suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, ConnectionError):
            while True:
                headers = _headers(await reader.readuntil(b"\r\n\r\n"))
                size = int(headers.get("content-length", 0))
                if not 0 <= size <= MAX_REQUEST_BYTES:
                    break
                body = await reader.readexactly(size)
                writer.write(_REPLY)
                await writer.drain()
                kept = {name: value for name, value in headers.items() if name not in _NOT_REPEATED}
                self.inbox.offer(Mirrored(headers.get("x-request-id", ""), kept, body))
        writer.close()

    def _replay_all(self) -> None:
        with (self._state / PAIRS).open("a", encoding="utf-8") as file:
            while not self._stop.is_set():
                request = self.inbox.take(0.1)
                if request and self.counts()["pairs"] < MAX_PAIRS:
                    pair = self._replayer.replay(request)
                    with suppress(OSError):  # a full disk: this pair is lost
                        _append(file, pair)
                        self._pairs += 1
        self._replayer.close()


def _append(file: TextIO, pair: dict[str, Any]) -> None:
    file.write(json.dumps(pair, separators=(",", ":")) + "\n")
    file.flush()


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code."""
    parser = argparse.ArgumentParser(prog="redpp_serve.experiment.recorder", description="Shadow recorder.")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--original", required=True, help="URL of the original version")
    parser.add_argument("--redpp", required=True, help="URL of the pruned version")
    options = parser.parse_args(arguments)

    async def run() -> None:
        task = asyncio.ensure_future(Recorder(options.state, (options.original, options.redpp)).run(options.port))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
