"""A deployment as a watcher sees it: counters of servers as Prometheus has scraped them, and a route's API server."""

import json
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy
import yaml

from redpp_serve.ab.prometheus import Prometheus
from redpp_serve.handlers.metrics import OUTCOMES, SECONDS_BUCKETS
from redpp_serve.metrics_reader import Unreadable
from redpp_serve.variants import VARIANTS

SECONDS = {"original": 0.01, "pruned": 0.008}  # of a batch
_LOOKBACK_S = 300.0


class Pod:
    """The counters of one version's server; ``text`` is its metrics page."""

    def __init__(self, variant: str, instance: str, seed: int = 0, slower: float = 1.0) -> None:
        version = next(v.version for v in VARIANTS if v.name == variant)
        self.labels = {"model": "m", "version": version, "variant": variant}
        self.instance, self.rng, self.slower = instance, numpy.random.default_rng(seed), slower
        self.counted = dict.fromkeys(OUTCOMES, 0)  # over all restarts
        self.restart()

    def restart(self) -> None:
        self.requests = dict.fromkeys(OUTCOMES, 0)
        self.batches: dict[int, list[float]] = {}
        self.times = numpy.zeros(len(SECONDS_BUCKETS) + 1, dtype=int)
        self.seconds = 0.0

    def serve(self, batches: int, outcome: str = "ok", size: int = 1) -> None:
        if not batches:
            return
        seconds = self.slower * SECONDS[self.labels["variant"]] * numpy.exp(self.rng.normal(0, 0.05, batches))
        row = self.batches.setdefault(size, [0, 0.0])
        row[0], row[1] = row[0] + batches, row[1] + seconds.sum()
        self.times += numpy.bincount(numpy.searchsorted(SECONDS_BUCKETS, seconds), minlength=self.times.size)
        self.seconds += seconds.sum()
        self.requests[outcome] += batches * size
        self.counted[outcome] += batches * size

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        for outcome, count in self.requests.items():
            yield "redpp_requests_total", {"outcome": outcome}, count
        for size, (count, seconds) in self.batches.items():
            yield "redpp_batches_total", {"batch": str(size)}, count
            yield "redpp_batch_seconds_total", {"batch": str(size)}, seconds
        for bound, count in zip((*SECONDS_BUCKETS, numpy.inf), numpy.cumsum(self.times), strict=True):
            yield "redpp_handler_seconds_bucket", {"le": "+Inf" if numpy.isinf(bound) else repr(bound)}, int(count)
        yield "redpp_handler_seconds_sum", {}, self.seconds
        yield "redpp_handler_seconds_count", {}, int(self.times.sum())

    @property
    def text(self) -> str:
        lines = []
        for name, labels, value in self.samples():
            inside = ",".join(f'{key}="{text}"' for key, text in {**self.labels, **labels}.items())
            lines.append(f"{name}{{{inside}}} {value}")
        return "\n".join([*lines, ""])


class Scraped(Prometheus):
    """A Prometheus without a process: it has what `scrape` gave it, and its clock stands where it was set."""

    def __init__(self, now: float = 1000.0) -> None:
        super().__init__("http://prometheus:9090")
        self.time, self.away, self.asked = now, False, 0
        self.series: dict[tuple[tuple[str, str], ...], tuple[list[float], list[float]]] = {}

    def scrape(self, *pods: Pod, **labels: str) -> None:
        """Take in what the pods' pages say now; a series that a page no longer has becomes stale."""
        for pod in pods:
            target, found = {"instance": pod.instance, **pod.labels, **labels}, {}
            for name, own, value in pod.samples():
                found[tuple(sorted({"__name__": name, **target, **own}.items()))] = value
            gone = [key for key in self.series if target.items() <= dict(key).items() and key not in found]
            for key, value in {**found, **dict.fromkeys(gone, numpy.nan)}.items():
                times, values = self.series.setdefault(key, ([], []))
                times.append(self.time)
                values.append(value)

    def now(self, expression: str) -> list[tuple[dict[str, str], float, float]]:
        if self.away:
            raise Unreadable("http://prometheus:9090 does not answer: Connection refused")
        if expression == "vector(time())":
            return [({}, self.time, self.time)]
        by = re.match(r"\w+ by \((\w+)\)", expression)[1]
        model = re.search(r'model="(\w+)"', expression)
        best: dict[str, float] = {}
        for key, (times, _) in self.series.items():
            labels = dict(key)
            if labels["__name__"] != "redpp_requests_total" or (model and labels["model"] != model[1]):
                continue
            if self.time - times[-1] < _LOOKBACK_S:
                best[labels[by]] = max(best.get(labels[by], 0.0), times[-1])
        return [({by: text}, self.time, value) for text, value in best.items()]

    def over(
        self, selector: str, start: float, end: float, step: float
    ) -> Iterator[tuple[dict[str, str], float, float]]:
        self.asked += 1
        for key, (times, values) in self.series.items():
            for k in range(round((end - start) / step) + 1):
                at = start + k * step
                place = bisect_right(times, at) - 1
                if place >= 0 and at - times[place] < _LOOKBACK_S and not numpy.isnan(values[place]):
                    yield dict(key), at, values[place]


class ApiServer(ThreadingHTTPServer):
    """Speaks the REST of one HTTPRoute as kube-apiserver does: a PUT with an old ``resourceVersion`` gets 409."""

    daemon_threads = True

    def __init__(self, weights: tuple[int, int] = (100, 0)) -> None:
        backends = [
            {"name": f"model-{arm.name}", "port": 80, "weight": weight}
            for arm, weight in zip(VARIANTS, weights, strict=True)
        ]
        self.route: dict[str, Any] = {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": "model", "namespace": "a", "resourceVersion": "1", "labels": {"kept": "yes"}},
            "spec": {
                "rules": [{"backendRefs": backends[:1]}, {"backendRefs": backends[1:]}, {"backendRefs": backends}]
            },
        }
        self.writes: list[tuple[int, ...]] = []
        self.refusal: int | None = None
        self.refuse_writes = False
        super().__init__(("127.0.0.1", 0), _Route)

    @property
    def weights(self) -> tuple[int, ...]:
        return tuple(backend["weight"] for backend in self.route["spec"]["rules"][-1]["backendRefs"])

    def change(self, *weights: int) -> None:
        """Change the weights as somebody else would."""
        for backend, weight in zip(self.route["spec"]["rules"][-1]["backendRefs"], weights, strict=True):
            backend["weight"] = weight
        self.bump()

    def bump(self) -> None:
        self.route["metadata"]["resourceVersion"] = str(int(self.route["metadata"]["resourceVersion"]) + 1)

    def kubeconfig(self, path: Path) -> Path:
        url = f"http://127.0.0.1:{self.server_address[1]}"
        cluster = {"name": "c", "cluster": {"server": url}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [cluster],
            "contexts": [context],
            "users": [{"name": "u", "user": {"token": "secret"}}],
            "current-context": "c",
        }
        path.write_text(yaml.safe_dump(document))
        return path


class _Route(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ApiServer

    def do_GET(self) -> None:
        server, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = "/apis/gateway.networking.k8s.io/v1/namespaces/a/httproutes/model"
        if self.path != path or self.headers["Authorization"] != "Bearer secret":
            return self._answer(404 if self.path != path else 401, {"kind": "Status"})
        if self.command == "PUT" and server.refuse_writes:
            return self._answer(403, {"kind": "Status"})
        if server.refusal:
            return self._answer(server.refusal, {"kind": "Status", "message": "refused"})
        if self.command == "PUT":
            new = json.loads(body)
            if new["metadata"]["resourceVersion"] != server.route["metadata"]["resourceVersion"]:
                return self._answer(409, {"kind": "Status", "reason": "Conflict"})
            server.route = new
            server.bump()
            server.writes.append(server.weights)
        self._answer(200, server.route)

    do_PUT = do_GET

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
