"""Serve the workers' metrics over HTTP: ``python -m redpp_serve.handlers.exporter --port 9400 --dir DIR``.

It runs from an installation or from the folder of an unpacked archive, until SIGTERM or Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from redpp_serve.handlers.prometheus import counted_files


class Workers:
    """All workers' metrics in one: sums over everything that was ever done, and over the memory of living workers.

    Args:
        folder: the workers' ``PROMETHEUS_MULTIPROC_DIR``; only read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Any]:
        """Return the families for prometheus_client."""
        from prometheus_client.multiprocess import MultiProcessCollector  # noqa: PLC0415

        merged: Iterable[Any] = MultiProcessCollector.merge(counted_files(self._folder))  # type: ignore[no-untyped-call]
        return merged


def main(argv: Sequence[str] | None = None) -> int:
    """Serve ``/metrics``, and return the exit code."""
    parser = argparse.ArgumentParser(prog="redpp_serve.handlers.exporter", description="Prometheus exporter.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--address", default="127.0.0.1", help="address to listen on (default: loopback only)")
    parser.add_argument("--dir", type=Path, required=True, help="the workers' PROMETHEUS_MULTIPROC_DIR")
    options = parser.parse_args(argv)
    from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415

    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # in every thread: only `sigwait` takes them
    options.dir.mkdir(parents=True, exist_ok=True)
    registry = CollectorRegistry()
    registry.register(Workers(options.dir))
    server, thread = start_http_server(options.port, options.address, registry)
    signal.sigwait(stops)
    server.shutdown()
    thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
