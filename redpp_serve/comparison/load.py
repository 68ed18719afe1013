"""Requests to both versions: paired rounds, closed-loop throughput, and an open loop on a schedule."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from redpp_serve.comparison.client import Decoder, Endpoint, Exchange, Payload, Reply, Wire, as_text
from redpp_serve.errors import RedppError
from redpp_serve.statistics.intervals import Estimate, mean_interval, percentile_interval
from redpp_serve.variants import NAMES

Progress = Callable[[float], None]
"""Called with the share of the run that is done, 0..1."""

WARMUP_REQUESTS = 3
PREFLIGHT_INPUTS = 4
# A throughput block holds many requests per worker, and there are enough blocks for an interval.
BLOCK_LATENCIES, SHORTEST_BLOCK_S, MOST_BLOCKS, FEWEST_BLOCKS = 20, 0.25, 16, 4
PERCENTILES = (50, 95, 99)
CONNECTIONS = 32
THERE_AND_BACK = (0, 1, 1, 0)  # order of the versions that cancels a linear drift


@dataclass(frozen=True)
class Load:
    """The requests of one measurement.

    Attributes:
        original: the original version.
        pruned: the pruned version.
        payloads: inputs, each sent to both.
        concurrency: requests in flight at a time.
        seed: of the random order.
    """

    original: Endpoint
    pruned: Endpoint
    payloads: Sequence[Payload]
    concurrency: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.payloads, self.concurrency)

    @property
    def endpoints(self) -> tuple[Endpoint, Endpoint]:
        """Both versions, the original first."""
        return self.original, self.pruned

    @contextmanager
    def warm(self) -> Iterator[tuple[ThreadPoolExecutor, list[list[Wire]]]]:
        """Yield a pool of workers and, for each version, a warm connection per worker."""
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(self.concurrency))
            versions = [stack.enter_context(_connections(each, self.concurrency)) for each in self.endpoints]
            for connections in versions:
                _warm_up(pool, connections, self.payloads)
            yield pool, versions


@dataclass(frozen=True)
class Throughput:
    """A closed loop's count.

    Attributes:
        completed: requests answered with status 200.
        failed: the rest.
        seconds: until the last answer.
        error: the first failure's text.
    """

    completed: int
    failed: int
    seconds: float
    error: str = ""

    @property
    def rps(self) -> float:
        """Completed requests per second."""
        return self.completed / self.seconds


@dataclass(frozen=True)
class BlockThroughput:
    """Throughput of both versions over alternating blocks; ``ratio`` is pruned / original, None without answers."""

    original: Throughput
    pruned: Throughput
    ratio: Estimate | None


def run_paired(
    load: Load, pairs: int | None, seconds: float | None, progress: Progress = lambda share: None
) -> list[tuple[Reply, Reply]]:
    """Send the same inputs to both versions until ``pairs`` or ``seconds`` are reached, whichever comes first.

    In each round every worker takes an input (shuffled passes over all of them) and all send it to one version, then
    all to the other, in random order. Were the workers to run freely, most of them would stand in the queue of the
    slower version: it would be measured under more load than the faster one, and the ratio would come out too large.
    Here both see bursts of ``concurrency`` requests, alone on the machine; a round is one independent observation.

    Returns:
        (reply of the original, of the pruned version) per pair, in order of time; failed replies keep their text.
    """
    if not (pairs or seconds) or min(pairs or 1, seconds or 1) < 0:
        raise RedppError(
            f"paired load of {pairs} pairs in {seconds} seconds",
            "a number of pairs above 0, a time above 0, or both",
            "pass pairs or seconds",
        )
    rng = np.random.default_rng(load.seed)
    inputs = _shuffled(len(load.payloads), rng)
    results: list[tuple[Reply, Reply]] = []
    with load.warm() as (pool, versions):
        origin = time.perf_counter()
        decoder = Decoder(origin)
        done = 0.0
        while done < 1:
            size = load.concurrency if pairs is None else min(load.concurrency, pairs - len(results))
            chosen = [next(inputs) for _ in range(size)]
            sent = [load.payloads[index] for index in chosen]
            exchanges: list[list[Exchange]] = [[], []]
            for version in rng.permutation(2):
                exchanges[version] = list(pool.map(_send, versions[version], sent))
            for index, first, second in zip(chosen, *exchanges, strict=True):
                original = decoder.reply(load.original.label, index, first)
                results.append((original, decoder.reply(load.pruned.label, index, second)))
            by_count = len(results) / pairs if pairs else 0.0
            done = max(by_count, (time.perf_counter() - origin) / seconds if seconds else 0.0)
            progress(min(done, 1.0))
    return results


def run_blocks(
    load: Load, block_seconds: float, blocks: int, progress: Progress = lambda share: None
) -> BlockThroughput:
    """Measure the closed-loop throughput of both versions in alternating blocks, A B B A ..., which cancels a drift.

    In a closed loop each worker sends its next request as soon as the last one is answered. The ratio is that of the
    totals; its interval comes from the log-ratios of neighbouring blocks. ``blocks`` is even, at least 4.
    """
    if blocks < FEWEST_BLOCKS or blocks % 2:
        raise RedppError(
            f"{blocks} throughput blocks", f"an even number, at least {FEWEST_BLOCKS}", "pass another number of blocks"
        )
    rng = np.random.default_rng(load.seed)
    counts: tuple[list[Throughput], list[Throughput]] = ([], [])
    with load.warm() as (pool, versions):
        for block in range(blocks):
            version = THERE_AND_BACK[block % 4]
            counts[version].append(_closed_loop(pool, versions[version], load.payloads, block_seconds, rng))
            progress((block + 1) / blocks)
    return block_throughput(counts, rng)


def block_throughput(counts: tuple[list[Throughput], list[Throughput]], rng: np.random.Generator) -> BlockThroughput:
    """Return the throughput of both versions from their alternating blocks, neighbours at the same place."""
    logs = [np.log(y.rps / x.rps) for x, y in zip(*counts, strict=True) if x.completed and y.completed]
    original, pruned = map(_total, counts)
    if len(logs) < 2:
        return BlockThroughput(original, pruned, None)
    _, low, high = np.exp(mean_interval(logs, rng)).tolist()
    ratio = pruned.rps / original.rps
    return BlockThroughput(original, pruned, Estimate(ratio, min(low, ratio), max(high, ratio)))


def plan_blocks(seconds: float, latency_s: float) -> tuple[float, int]:
    """Return (seconds per block, number of blocks), an even number that fits into ``seconds``."""
    shortest = max(SHORTEST_BLOCK_S, BLOCK_LATENCIES * latency_s)
    blocks = min(MOST_BLOCKS, max(FEWEST_BLOCKS, int(seconds / shortest) // 2 * 2))
    return seconds / blocks, blocks


@dataclass(frozen=True)
class OpenLoop:
    """The answers of both versions at ``rate_rps`` requests per second, whatever they take.

    Attributes:
        rate_rps: requests per second.
        latency_ms: percentiles ("p50", ...) of original and pruned, from when a request was due, so that one that
            had to wait for a free connection is charged for it; None where no request was answered.
        sent: requests that were due for each.
        failed: those of them that were not answered with outputs.
    """

    rate_rps: float
    latency_ms: tuple[dict[str, Estimate] | None, ...]
    sent: tuple[int, ...]
    failed: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return percentiles as numbers, their intervals beside them."""
        versions = {
            name: {
                "latency_ms": {k: x.value for k, x in (latency or {}).items()},
                "latency_ms_interval": {k: [x.low, x.high] for k, x in (latency or {}).items()},
                "sent": sent,
                "failed": failed,
            }
            for name, latency, sent, failed in zip(NAMES, self.latency_ms, self.sent, self.failed, strict=True)
        }
        return {"rate_rps": self.rate_rps, **versions}

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield a title and a cell for each version."""
        for q in PERCENTILES:
            original, pruned = ("-" if each is None else f"{each[f'p{q}'].value:.2f}" for each in self.latency_ms)
            yield f"at {self.rate_rps:g}/s p{q} (ms)", original, pruned
        original, pruned = (f"{failed} of {sent}" for failed, sent in zip(self.failed, self.sent, strict=True))
        yield f"at {self.rate_rps:g}/s failed", original, pruned


def measure_open_loop(load: Load, rate_rps: float, seconds: float, progress: Progress = lambda share: None) -> OpenLoop:
    """Send Poisson arrivals to each version in turn, original, pruned, pruned, original, for ``seconds`` in all."""
    replies: tuple[list[Reply], list[Reply]] = ([], [])
    for turn, version in enumerate(THERE_AND_BACK):
        schedule = Schedule(rate_rps, seconds / len(THERE_AND_BACK), CONNECTIONS, load.seed + turn)
        replies[version].extend(run_open_loop(load.endpoints[version], load.payloads, schedule))
        progress((turn + 1) / len(THERE_AND_BACK))
    rng = np.random.default_rng(load.seed)
    good = [[1000 * reply.latency_s for reply in each if reply.ok] for each in replies]
    latency = tuple({f"p{q}": percentile_interval(x, q / 100, rng) for q in PERCENTILES} if x else None for x in good)
    failed = tuple(len(each) - len(x) for each, x in zip(replies, good, strict=True))
    return OpenLoop(rate_rps, latency, tuple(map(len, replies)), failed)


@dataclass(frozen=True)
class Schedule:
    """Arrivals that do not depend on the answers, as users' requests do not.

    Attributes:
        rate_rps: mean number of requests per second.
        seconds: length of the run.
        connections: most requests in flight at a time.
        seed: of the arrivals and the order of inputs.
    """

    rate_rps: float
    seconds: float
    connections: int
    seed: int

    def __post_init__(self) -> None:
        if self.rate_rps <= 0 or self.seconds <= 0:
            found = f"a rate of {self.rate_rps:g}/s over {self.seconds:g} s"
            raise RedppError(found, "positive numbers", "pass a rate and a time")


def run_open_loop(endpoint: Endpoint, payloads: Sequence[Payload], schedule: Schedule) -> list[Reply]:
    """Send Poisson arrivals to one version, whether or not earlier ones are answered.

    Latency counts from the time a request was due, so a request that waits for a free connection is charged for it:
    no coordinated omission. A request that could not be sent within twice the time is a reply of status 0, so that
    the run ends at an overloaded endpoint too.
    """
    _check(payloads, schedule.connections)
    rng = np.random.default_rng(schedule.seed)
    due = rng.uniform(0, schedule.seconds, rng.poisson(schedule.rate_rps * schedule.seconds))
    due.sort()
    inputs = _shuffled(len(payloads), rng)
    chosen = [next(inputs) for _ in due]
    exchanges: list[Exchange | None] = [None] * due.size
    count = schedule.connections
    with ThreadPoolExecutor(count) as pool, _connections(endpoint, count) as connections:
        _warm_up(pool, connections, payloads)
        queue, lock, origin = iter(range(due.size)), threading.Lock(), time.perf_counter()

        def work(connection: Wire) -> None:
            while True:
                with lock:
                    turn = next(queue, None)
                if turn is None:
                    return
                moment = origin + float(due[turn])
                exchanges[turn] = _send_when_due(
                    connection, payloads[chosen[turn]], moment, origin + 2 * schedule.seconds
                )

        list(pool.map(work, connections))
    decoder = Decoder(origin)
    return [decoder.reply(endpoint.label, i, x) for i, x in zip(chosen, exchanges, strict=True) if x is not None]


def preflight(endpoint: Endpoint, payloads: Sequence[Payload]) -> None:
    """Find a dead or refusing endpoint at once, not at the end of the measurement."""
    decoder, replies = Decoder(0.0), []
    with closing(endpoint.connect()) as connection:
        for index, payload in enumerate(payloads[:PREFLIGHT_INPUTS]):
            replies.append(decoder.reply(endpoint.label, index, connection.send(payload)))
            if replies[-1].ok:
                break
    require_success(endpoint, replies)


def require_success(endpoint: Endpoint, replies: Sequence[Reply]) -> None:
    """Refuse a version that answered nothing, with the first text it sent instead."""
    if not any(reply.ok for reply in replies):
        first = replies[0]
        raise RedppError(
            f"{endpoint.label} ({endpoint.url}) answered none of {len(replies)} requests: "
            f"status {first.status}: {first.error}",
            "status 200 with outputs",
            "check that the model is loaded there and that the inputs fit it",
        )


def _send_when_due(connection: Wire, payload: Payload, due: float, end: float) -> Exchange:
    """Send at ``due`` unless it is later than ``end``; both are on the clock of ``time.perf_counter``."""
    time.sleep(max(0.0, due - time.perf_counter()))
    now = time.perf_counter()
    if now > end:
        return Exchange(due, now - due, None, 0, b"", "not sent: every connection was busy for longer than the run")
    exchange = connection.send(payload)
    return exchange._replace(start_s=due, latency_s=exchange.start_s + exchange.latency_s - due)


def _closed_loop(
    pool: ThreadPoolExecutor,
    connections: list[Wire],
    payloads: Sequence[Payload],
    seconds: float,
    rng: np.random.Generator,
) -> Throughput:
    start = time.perf_counter()

    def work(connection: Wire, seed: int) -> tuple[int, int, str]:
        completed, failed, error = 0, 0, ""
        inputs = _shuffled(len(payloads), np.random.default_rng(seed))
        while time.perf_counter() - start < seconds:
            exchange = connection.send(payloads[next(inputs)])
            completed, failed = completed + exchange.ok, failed + (not exchange.ok)
            if not exchange.ok and not error:
                error = as_text(exchange)
        return completed, failed, error

    seeds = rng.integers(0, 2**32, len(connections)).tolist()
    completed, failed, errors = zip(*pool.map(work, connections, seeds), strict=True)
    # Until the last answer, not until the deadline: a count of whole requests over a cut time would be biased.
    return Throughput(sum(completed), sum(failed), time.perf_counter() - start, next(filter(None, errors), ""))


def _total(blocks: list[Throughput]) -> Throughput:
    completed, failed = sum(block.completed for block in blocks), sum(block.failed for block in blocks)
    error = next((block.error for block in blocks if block.error), "")
    return Throughput(completed, failed, sum(block.seconds for block in blocks), error)


def _send(connection: Wire, payload: Payload) -> Exchange:
    return connection.send(payload)


@contextmanager
def _connections(endpoint: Endpoint, count: int) -> Iterator[list[Wire]]:
    """Yield one connection per worker, closed at the end."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(endpoint.connect())) for _ in range(count)]


def _warm_up(pool: ThreadPoolExecutor, connections: list[Wire], payloads: Sequence[Payload]) -> None:
    """Open every connection and let the server run each shape of batch before the clock starts."""
    for turn in range(WARMUP_REQUESTS):
        list(pool.map(_send, connections, [payloads[turn % len(payloads)]] * len(connections)))


def _shuffled(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Yield random passes over all indices: random order, yet every input gets its turn."""
    while True:
        yield from rng.permutation(count).tolist()


def _check(payloads: Sequence[Payload], concurrency: int) -> None:
    if not payloads:
        raise RedppError("no inputs to send", "at least one payload", "pass inputs")
    if concurrency < 1:
        raise RedppError(f"a concurrency of {concurrency}", "1 or more", "pass another concurrency")
