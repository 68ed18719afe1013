"""Both arms at a rate of requests that does not depend on their answers, as users' traffic does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from redpp_serve.comparison.client import Endpoint, Payload, Reply
from redpp_serve.comparison.load import run_open_loop
from redpp_serve.comparison.statistics import Estimate, percentile_interval

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
            arms[label] = {"latency_ms": {k: x.value for k, x in found.items()},
                           "latency_ms_interval": {k: [x.low, x.high] for k, x in found.items()},
                           "sent": sent, "failed": failed}  # fmt: skip
        return {"rate_rps": self.rate_rps, **arms}

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Title and a cell for each arm."""
        for q in PERCENTILES:
            cells = ["-" if latency is None else f"{latency[f'p{q}'].value:.2f}" for latency in self.latency_ms]
            yield f"at {self.rate_rps:g}/s p{q} (ms)", cells[0], cells[1]
        failed = [f"{failed} of {sent}" for failed, sent in zip(self.failed, self.sent)]
        yield f"at {self.rate_rps:g}/s failed", failed[0], failed[1]


def measure_open_loop(
    original: Endpoint, pruned: Endpoint, payloads: Sequence[Payload], rate_rps: float, seconds: float, seed: int,
    progress: Callable[[float], None] = lambda share: None,
) -> OpenLoop:  # fmt: skip
    """Poisson arrivals at ``rate_rps`` for each arm in turns, original, pruned, pruned, original, ``seconds`` in all."""
    replies: tuple[list[Reply], list[Reply]] = ([], [])
    for turn, arm in enumerate(_ORDER):
        replies[arm].extend(run_open_loop((original, pruned)[arm], payloads, rate_rps, seconds / len(_ORDER), CONNECTIONS,
                                          seed + turn))  # fmt: skip
        progress((turn + 1) / len(_ORDER))
    rng = numpy.random.default_rng(seed)
    good = [[1000 * reply.latency_s for reply in arm if reply.ok] for arm in replies]
    latency = tuple({f"p{q}": percentile_interval(x, q / 100, rng) for q in PERCENTILES} if x else None for x in good)
    return OpenLoop(rate_rps, latency, tuple(map(len, replies)), tuple(len(arm) - len(x) for arm, x in zip(replies, good)))
