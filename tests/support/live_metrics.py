"""A stand-in for a server's metrics endpoint, written by the product's own `Metrics`; it can fall, rise and restart."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from redpp_serve.handlers.metrics import Family, Metrics, ModelLabels

KINDS = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
VERSIONS = {"original": "1.0", "pruned": "2.0"}


class OneProcess:
    """Instruments in a registry, without the files that several workers share."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry, self.made = registry, {}

    def instrument(self, family: Family, labels: Mapping[str, str]) -> Any:
        if family.name not in self.made:
            options = {"buckets": family.buckets} if family.kind == "histogram" else {}
            kind = KINDS[family.kind]
            self.made[family.name] = kind(family.name, family.help, tuple(labels), registry=self.registry, **options)
        return self.made[family.name].labels(**labels)


class Exporter:
    """``/metrics`` of one model on a port that stays the same; ``text`` replaces what the registry says."""

    def __init__(self, model: str = "small") -> None:
        self.model, self.port = model, 0
        self.text: bytes | None = None
        self.status = 200
        self.lock = threading.RLock()  # held: no scrape sees half of what is done
        self.fresh()

    def fresh(self) -> None:
        """Begin from zero, as a server that was started again does."""
        self.registry = CollectorRegistry()
        binding = OneProcess(self.registry)
        self.versions = {v: Metrics(ModelLabels(self.model, n, v), binding) for v, n in VERSIONS.items()}
        for metrics, cost in zip(self.versions.values(), (2000.0, 500.0), strict=True):
            metrics.describe(parameters=cost, macs=3 * cost, bytes=4 * cost)
            metrics.plan("redpp", "fp32", "0123456789ab", {1: {"dense": 2}, 8: {"dense": 1, "split": 1}})

    def batches(self, variant: str, size: int, seconds: float, times: int = 1, outcome: str = "ok") -> None:
        """Batches as the handler records them; the network takes 3/4 of the time."""
        metrics = self.versions[variant]
        for _ in range(times):
            metrics.batch(size, seconds)
            metrics.inference(0.75 * seconds)
            for _ in range(size):
                metrics.request(outcome)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """A gauge that others export, such as an A/B test."""
        family = Family("gauge", name, name)
        self.others = getattr(self, "others", None) or OneProcess(self.registry)
        self.others.instrument(family, {"model": self.model, **labels}).set(value)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/metrics"

    def up(self) -> None:
        """Listen, from the second time on at the same port."""
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with exporter.lock:
                    body = generate_latest(exporter.registry) if exporter.text is None else exporter.text
                self.send_response(exporter.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def down(self) -> None:
        """Stop to listen; the numbers stay."""
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def __enter__(self) -> "Exporter":
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        self.down()


@contextmanager
def while_down(exporter: Exporter) -> Iterator[None]:
    """It does not answer while the body runs."""
    exporter.down()
    try:
        yield
    finally:
        exporter.up()
