"""Send requests from many clients to a live pair of versions, good and bad ones mixed, and check each answer."""

from __future__ import annotations

import io
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch

from redpp_serve.comparison.client import Decoder, Exchange, Payload, Wire, as_text
from redpp_serve.comparison.folder import endpoint
from redpp_serve.comparison.payloads import folder_payloads
from redpp_serve.comparison.triton_client import TritonConnection, as_input
from redpp_serve.graph.artifact import load
from redpp_serve.graph.executor import Program
from redpp_serve.handlers.payload import parse
from redpp_serve.serving.server import LocalServer
from redpp_serve.variants import NAMES

BINARY = "application/octet-stream"
INPUTS = 16  # different good requests
UNVERSIONED = "default"


@dataclass(frozen=True)
class Sent:
    """One request and what became of it; times in seconds since the run began.

    Attributes:
        target: a variant, or `UNVERSIONED`.
        good: whether it could be served.
        status: HTTP status, 0 where no reply came.
        answered_by: variants whose outputs the reply holds; empty for a wrong answer or none.
    """

    target: str
    good: bool
    start_s: float
    end_s: float
    status: int
    answered_by: tuple[str, ...]
    error: str

    @property
    def lost(self) -> bool:
        """A good request without the right answer."""
        allowed = NAMES if self.target == UNVERSIONED else (self.target,)
        return self.good and not set(self.answered_by) & set(allowed)

    @property
    def misjudged(self) -> bool:
        """A bad request that got anything but a 4xx of its own."""
        return not self.good and not 400 <= self.status < 500


class Cases:
    """Good requests with the outputs that each version's graph gives for them, and bad requests of several kinds."""

    def __init__(self, folder: Path) -> None:
        self.good = folder_payloads(folder)[:INPUTS]
        self.expected: dict[str, list[np.ndarray]] = {}
        for variant in NAMES:
            with zipfile.ZipFile(folder / f"{variant}.mar") as file:
                artifact = load(file.read("model.redpp"))
            program = Program(artifact.graph)
            self.inputs = artifact.graph.inputs
            with torch.no_grad():
                parsed = [parse({"body": payload.body}, self.inputs, None) for payload in self.good]
                self.expected[variant] = [program(*(x[None] for x in tensors))[0][0].numpy() for tensors in parsed]
        spec = self.inputs[0]
        nan, other = (
            np.full(spec.shape, np.nan, np.float32),
            np.zeros((*spec.shape[:-1], spec.shape[-1] + 1), np.float32),
        )
        self.bad_arrays = [nan, other]
        self.bad = [Payload(_npy(array), BINARY) for array in self.bad_arrays]
        self.bad += [Payload(b"garbage", BINARY), Payload(b"[1, 2", "application/json")]

    def answered_by(self, index: int, outputs: np.ndarray) -> tuple[str, ...]:
        """The variants that these outputs can be of."""
        return tuple(
            variant
            for variant, known in self.expected.items()
            if known[index].shape == outputs.shape and _close(outputs, known[index])
        )

    def send_bad(self, wire: Wire, k: int) -> Exchange:
        """The ``k``-th kind of bad request. A client of Triton can only send tensors: NaN, and a wrong shape."""
        if isinstance(wire, TritonConnection):
            return wire.infer([as_input(self.inputs[0].name, self.bad_arrays[k % len(self.bad_arrays)][None])])
        return wire.send(self.bad[k % len(self.bad)])


@dataclass
class Run:
    """What one load brought.

    Attributes:
        sent: all requests in order of their end.
        memory: (seconds since the start, resident bytes of all the server's processes).
        events: name to seconds since the start at which it was done.
    """

    sent: list[Sent] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    events: dict[str, tuple[float, float]] = field(default_factory=dict)


Event = tuple[float, str, Callable[[], object]]
"""Seconds after the start, a name, and what to do then."""


def run_load(
    server: LocalServer,
    cases: Cases,
    *,
    clients: int,
    seconds: float,
    bad_share: float,
    targets: Sequence[str],
    events: Sequence[Event] = (),
) -> Run:
    """Run ``clients`` closed loops for ``seconds``, with random targets and requests; ``events`` happen meanwhile."""
    endpoints = {target: endpoint(server, target) for target in targets}  # each reads the archive
    run, lock, start = Run(), threading.Lock(), time.perf_counter()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        wires = {target: place.connect() for target, place in endpoints.items()}
        decoder, mine = Decoder(start), []
        while time.perf_counter() - start < seconds:
            mine.append(_one(wires, decoder, cases, rng, bad_share))
        for wire in wires.values():
            wire.close()
        with lock:
            run.sent.extend(mine)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(clients)]
    watcher = threading.Thread(target=_watch, args=(server, run, start, seconds))
    for thread in (*threads, watcher):
        thread.start()
    for at, name, act in sorted(events, key=lambda event: event[0]):
        time.sleep(max(0.0, start + at - time.perf_counter()))
        began = time.perf_counter() - start
        act()
        run.events[name] = (began, time.perf_counter() - start)
    for thread in (*threads, watcher):
        thread.join()
    run.sent.sort(key=lambda sent: sent.end_s)
    return run


def _one(wires: dict[str, Wire], decoder: Decoder, cases: Cases, rng: np.random.Generator, bad_share: float) -> Sent:
    target = list(wires)[rng.integers(len(wires))]
    good, index = rng.random() >= bad_share, int(rng.integers(len(cases.good)))
    exchange = wires[target].send(cases.good[index]) if good else cases.send_bad(wires[target], index)
    answered: tuple[str, ...] = ()
    error = as_text(exchange)
    if good and exchange.ok:
        reply = decoder.reply(target, index, exchange)
        error = reply.error
        if reply.outputs is not None:
            answered = cases.answered_by(index, reply.outputs[0])
            error = "" if answered else "wrong outputs"
    start = exchange.start_s - decoder.origin_s
    return Sent(target, good, start, start + exchange.latency_s, exchange.status, answered, error)


def _watch(server: LocalServer, run: Run, start: float, seconds: float) -> None:
    """Memory each half second, and what `redpp-serve serve` does each second: see that all processes are well."""
    while (now := time.perf_counter() - start) < seconds:
        run.memory.append((now, resident()))
        server.check_alive()
        time.sleep(0.5)


def resident() -> int:
    """Resident bytes of everything this process has started: the server, its workers, its exporter."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max(initial=0.0) <= 1e-3 * max(float(np.abs(b).max(initial=0.0)), 1e-6))
