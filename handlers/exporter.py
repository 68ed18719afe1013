"""Serves the workers' metrics over HTTP: ``python -m redpp_serve.handlers.exporter --port 9400 --dir DIR``.

Runs from an installation or from the folder of an unpacked archive, until SIGTERM or Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from redpp_serve.handlers.prometheus import counted_files


class Workers:
    """All workers' metrics in one: sums over everything that was ever done, and over the memory of those that live.

    Args:
        folder: the workers' ``PROMETHEUS_MULTIPROC_DIR``; only read.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Any]:
        """For prometheus_client."""
        from prometheus_client.multiprocess import MultiProcessCollector

        return MultiProcessCollector.merge(counted_files(self._folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Serve ``/metrics``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="redpp_serve.handlers.exporter", description="Prometheus exporter.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--address", default="127.0.0.1", help="address to listen on (default: loopback only)")
    parser.add_argument("--dir", required=True, help="the workers' PROMETHEUS_MULTIPROC_DIR")
    options = parser.parse_args(argv)
    from prometheus_client import CollectorRegistry, start_http_server

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    os.makedirs(options.dir, exist_ok=True)
    registry = CollectorRegistry()
    registry.register(Workers(options.dir))
    server, thread = start_http_server(options.port, options.address, registry)
    stop.wait()
    server.shutdown()
    thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
