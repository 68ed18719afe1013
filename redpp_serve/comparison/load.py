"""Both arms at a rate of requests that does not depend on their answers, as users' traffic does not.

Requests to one or two endpoints: paired rounds, closed-loop throughput, and an open loop on a schedule.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy

from redpp_serve.comparison.client import Decoder, Endpoint, Exchange, Payload, Reply, Wire, as_text
from redpp_serve.errors import RedppError
from redpp_serve.statistics.intervals import Estimate, mean_interval, percentile_interval

Progress = Callable[[float], None]
"""Called with the share of the run that is done, 0..1."""

WARMUP_REQUESTS = 3
PREFLIGHT_INPUTS = 4
# A throughput block holds many requests per worker, and there are enough blocks for an interval.
BLOCK_LATENCIES, SHORTEST_BLOCK_S, MOST_BLOCKS, FEWEST_BLOCKS = 20, 0.25, 16, 4


@dataclass(frozen=True)
class Throughput:
    """A closed loop's count: ``completed`` answered with 200, ``failed`` the rest, ``rps`` completed per second."""

    completed: int
    failed: int
    seconds: float
    rps: float
    error: str = ""


@dataclass(frozen=True)
class BlockThroughput:
    """Throughput of two arms over alternating blocks; ``ratio`` is b / a, None where an arm answered nothing."""

    a: Throughput
    b: Throughput
    ratio: Estimate | None


def run_paired(
    a: Endpoint,
    b: Endpoint,
    payloads: Sequence[Payload],
    concurrency: int,
    pairs: int | None,
    seconds: float | None,
    seed: int,
    progress: Progress = lambda share: None,
) -> list[tuple[Reply, Reply]]:
    """Send the same inputs to both arms until ``pairs`` or ``seconds`` are reached, whichever comes first.

    In each round every worker takes an input (shuffled passes over all of them) and all send it to one arm, then all
    to the other, in random order. Were the workers to run freely, most of them would stand in the queue of the slower
    arm: it would be measured under more load than the faster one, and the ratio would come out too large. Here both
    arms see bursts of ``concurrency`` requests, alone on the machine; a round is one independent observation.

    Returns:
        (reply of a, reply of b) per pair, in order of time; failed replies are kept, with their text.
    """
    _check(payloads, concurrency)
    if not (pairs or seconds) or min(pairs or 1, seconds or 1) < 0:
        raise RedppError(
            f"paired load of {pairs} pairs in {seconds} seconds",
            "a number of pairs above 0, a time above 0, or both",
            "pass pairs or seconds",
        )
    rng = numpy.random.default_rng(seed)
    inputs = _shuffled(len(payloads), rng)
    results: list[tuple[Reply, Reply]] = []
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(concurrency))
        arms = [stack.enter_context(_connections(arm, concurrency)) for arm in (a, b)]
        for connections in arms:
            _warm_up(pool, connections, payloads)
        origin = time.perf_counter()
        decoder = Decoder(origin)
        done = 0.0
        while done < 1:
            size = concurrency if pairs is None else min(concurrency, pairs - len(results))
            chosen = [next(inputs) for _ in range(size)]
            sent = [payloads[index] for index in chosen]
            exchanges: list[list[Exchange]] = [[], []]
            for arm in rng.permutation(2):
                exchanges[arm] = list(pool.map(_send, arms[arm], sent))
            for index, *both in zip(chosen, *exchanges, strict=True):
                reply_a, reply_b = (decoder.reply(arm.label, index, x) for arm, x in zip((a, b), both, strict=True))
                results.append((reply_a, reply_b))
            by_count = len(results) / pairs if pairs else 0.0
            done = max(by_count, (time.perf_counter() - origin) / seconds if seconds else 0.0)
            progress(min(done, 1.0))
    return results


def run_throughput(
    endpoint: Endpoint, payloads: Sequence[Payload], concurrency: int, seconds: float, seed: int
) -> Throughput:
    """Closed loop: each of ``concurrency`` workers sends its next request as soon as the last one is answered."""
    _check(payloads, concurrency)
    with ThreadPoolExecutor(concurrency) as pool, _connections(endpoint, concurrency) as connections:
        _warm_up(pool, connections, payloads)
        return _closed_loop(pool, connections, payloads, seconds, numpy.random.default_rng(seed))


def run_blocks(
    a: Endpoint,
    b: Endpoint,
    payloads: Sequence[Payload],
    concurrency: int,
    block_seconds: float,
    blocks: int,
    seed: int,
    progress: Progress = lambda share: None,
) -> BlockThroughput:
    """Closed-loop throughput of both arms in alternating blocks, A B B A ..., which cancels a linear drift.

    The ratio is that of the totals; its interval comes from the log-ratios of neighbouring blocks. ``blocks`` is even, at least 4.
    """
    _check(payloads, concurrency)
    if blocks < FEWEST_BLOCKS or blocks % 2:
        raise RedppError(
            f"{blocks} throughput blocks", f"an even number, at least {FEWEST_BLOCKS}", "pass another number of blocks"
        )
    rng = numpy.random.default_rng(seed)
    counts: tuple[list[Throughput], list[Throughput]] = ([], [])
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(concurrency))
        arms = [stack.enter_context(_connections(arm, concurrency)) for arm in (a, b)]
        for connections in arms:
            _warm_up(pool, connections, payloads)
        for block in range(blocks):
            arm = (0, 1, 1, 0)[block % 4]
            counts[arm].append(_closed_loop(pool, arms[arm], payloads, block_seconds, rng))
            progress((block + 1) / blocks)
    logs = [numpy.log(y.rps / x.rps) for x, y in zip(*counts, strict=True) if x.completed and y.completed]
    totals = _total(counts[0]), _total(counts[1])
    if len(logs) < 2:
        return BlockThroughput(*totals, None)
    _, low, high = numpy.exp(mean_interval(logs, rng)).tolist()
    ratio = totals[1].rps / totals[0].rps
    return BlockThroughput(*totals, Estimate(ratio, min(low, ratio), max(high, ratio)))


def plan_blocks(seconds: float, latency_s: float) -> tuple[float, int]:
    """(seconds per block, number of blocks), an even number that fits into ``seconds``."""
    shortest = max(SHORTEST_BLOCK_S, BLOCK_LATENCIES * latency_s)
    blocks = min(MOST_BLOCKS, max(FEWEST_BLOCKS, int(seconds / shortest) // 2 * 2))
    return seconds / blocks, blocks


def run_open_loop(
    endpoint: Endpoint,
    payloads: Sequence[Payload],
    rate_rps: float,
    seconds: float,
    concurrency_limit: int,
    seed: int,
    progress: Progress = lambda share: None,
) -> list[Reply]:
    """Send Poisson arrivals of ``rate_rps`` for ``seconds``, whether or not earlier ones are answered.

    Latency counts from the time a request was due, so a request that waits for a free connection (at most
    ``concurrency_limit`` are in flight) is charged for it: no coordinated omission. What could not be sent within
    twice the time is a reply of status 0, so an overloaded endpoint ends too.
    """
    _check(payloads, concurrency_limit)
    if rate_rps <= 0 or seconds <= 0:
        raise RedppError(f"a rate of {rate_rps:g}/s over {seconds:g} s", "positive numbers", "pass a rate and a time")
    rng = numpy.random.default_rng(seed)
    due = rng.uniform(0, seconds, rng.poisson(rate_rps * seconds))
    due.sort()
    inputs = _shuffled(len(payloads), rng)
    chosen = [next(inputs) for _ in due]
    exchanges: list[Exchange | None] = [None] * due.size
    with ThreadPoolExecutor(concurrency_limit) as pool, _connections(endpoint, concurrency_limit) as connections:
        _warm_up(pool, connections, payloads)
        queue, lock, origin = iter(range(due.size)), threading.Lock(), time.perf_counter()

        def work(connection: Wire) -> None:
            while True:
                with lock:
                    turn = next(queue, None)
                if turn is None:
                    return
                payload, moment = payloads[chosen[turn]], origin + float(due[turn])
                exchanges[turn] = _send_when_due(connection, payload, moment, origin + 2 * seconds)
                progress((turn + 1) / due.size)

        list(pool.map(work, connections))
    decoder = Decoder(origin)
    return [decoder.reply(endpoint.label, i, x) for i, x in zip(chosen, exchanges, strict=True) if x is not None]


def preflight(endpoint: Endpoint, payloads: Sequence[Payload]) -> None:
    """Find a dead or refusing endpoint at once, not at the end of the measurement."""
    _check(payloads, concurrency=1)
    decoder, replies = Decoder(0.0), []
    with closing(endpoint.connect()) as connection:
        for index, payload in enumerate(payloads[:PREFLIGHT_INPUTS]):
            replies.append(decoder.reply(endpoint.label, index, connection.send(payload)))
            if replies[-1].ok:
                break
    require_success(endpoint, replies)


def require_success(endpoint: Endpoint, replies: Sequence[Reply]) -> None:
    """Refuse an arm that answered nothing, with the first text it sent instead."""
    if not any(reply.ok for reply in replies):
        first = replies[0]
        raise RedppError(
            f"{endpoint.label} ({endpoint.url}) answered none of {len(replies)} requests: "
            f"status {first.status}: {first.error}",
            "status 200 with outputs",
            "check that the model is loaded there and that the inputs fit it",
        )


def _send_when_due(connection: Wire, payload: Payload, due: float, end: float) -> Exchange:
    """Times are on the clock of ``time.perf_counter``."""
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
    rng: numpy.random.Generator,
) -> Throughput:
    start = time.perf_counter()

    def work(connection: Wire, seed: int) -> tuple[int, int, str]:
        completed, failed, error = 0, 0, ""
        inputs = _shuffled(len(payloads), numpy.random.default_rng(seed))
        while time.perf_counter() - start < seconds:
            exchange = connection.send(payloads[next(inputs)])
            completed, failed = completed + exchange.ok, failed + (not exchange.ok)
            if not exchange.ok and not error:
                error = as_text(exchange)
        return completed, failed, error

    seeds = rng.integers(0, 2**32, len(connections)).tolist()
    done = list(pool.map(work, connections, seeds))
    # Until the last answer, not until the deadline: a count of whole requests over a cut time would be biased.
    elapsed = time.perf_counter() - start
    completed, failed = sum(item[0] for item in done), sum(item[1] for item in done)
    return Throughput(completed, failed, elapsed, completed / elapsed, next((e for *_, e in done if e), ""))


def _total(blocks: list[Throughput]) -> Throughput:
    completed, failed = sum(block.completed for block in blocks), sum(block.failed for block in blocks)
    seconds = sum(block.seconds for block in blocks)
    return Throughput(completed, failed, seconds, completed / seconds, next((x.error for x in blocks if x.error), ""))


def _send(connection: Wire, payload: Payload) -> Exchange:
    return connection.send(payload)


@contextmanager
def _connections(endpoint: Endpoint, count: int) -> Iterator[list[Wire]]:
    """One connection per worker, closed at the end."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(endpoint.connect())) for _ in range(count)]


def _warm_up(pool: ThreadPoolExecutor, connections: list[Wire], payloads: Sequence[Payload]) -> None:
    """Open every connection and let the server run each shape of batch before the clock starts."""
    for turn in range(WARMUP_REQUESTS):
        list(pool.map(_send, connections, [payloads[turn % len(payloads)]] * len(connections)))


def _shuffled(count: int, rng: numpy.random.Generator) -> Iterator[int]:
    """Random passes over all indices: random order, yet every input gets its turn."""
    while True:
        yield from rng.permutation(count).tolist()


def _check(payloads: Sequence[Payload], concurrency: int) -> None:
    if not payloads:
        raise RedppError("no inputs to send", "at least one payload", "pass inputs")
    if concurrency < 1:
        raise RedppError(f"a concurrency of {concurrency}", "1 or more", "pass another concurrency")


PERCENTILES = (50, 95, 99)
CONNECTIONS = 32
_ORDER = (0, 1, 1, 0)  # cancels a linear drift


@dataclass(frozen=True)
class OpenLoop:
    """What both arms did at ``rate_rps`` requests per second.

    Attributes:
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
        """Percentiles as numbers, their intervals beside them."""
        arms = {}
        for label, latency, sent, failed in zip(("original", "pruned"), self.latency_ms, self.sent, self.failed):
            found = latency or {}
            arms[label] = {
                "latency_ms": {k: x.value for k, x in found.items()},
                "latency_ms_interval": {k: [x.low, x.high] for k, x in found.items()},
                "sent": sent,
                "failed": failed,
            }
        return {"rate_rps": self.rate_rps, **arms}

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Title and a cell for each arm."""
        for q in PERCENTILES:
            cells = ["-" if latency is None else f"{latency[f'p{q}'].value:.2f}" for latency in self.latency_ms]
            yield f"at {self.rate_rps:g}/s p{q} (ms)", cells[0], cells[1]
        failed = [f"{failed} of {sent}" for failed, sent in zip(self.failed, self.sent)]
        yield f"at {self.rate_rps:g}/s failed", failed[0], failed[1]


def measure_open_loop(
    original: Endpoint,
    pruned: Endpoint,
    payloads: Sequence[Payload],
    rate_rps: float,
    seconds: float,
    seed: int,
    progress: Callable[[float], None] = lambda share: None,
) -> OpenLoop:
    """Poisson arrivals at ``rate_rps`` for each arm in turns, original, pruned, pruned, original, ``seconds`` in all."""
    replies: tuple[list[Reply], list[Reply]] = ([], [])
    for turn, arm in enumerate(_ORDER):
        replies[arm].extend(
            run_open_loop((original, pruned)[arm], payloads, rate_rps, seconds / len(_ORDER), CONNECTIONS, seed + turn)
        )
        progress((turn + 1) / len(_ORDER))
    rng = numpy.random.default_rng(seed)
    good = [[1000 * reply.latency_s for reply in arm if reply.ok] for arm in replies]
    latency = tuple({f"p{q}": percentile_interval(x, q / 100, rng) for q in PERCENTILES} if x else None for x in good)
    return OpenLoop(
        rate_rps, latency, tuple(map(len, replies)), tuple(len(arm) - len(x) for arm, x in zip(replies, good))
    )
