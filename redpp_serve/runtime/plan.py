"""Which kernel runs each layer at each batch size, on what evidence, and the rule that decides."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

DENSE = "dense"
LEAST_GAIN = 0.03  # a kernel has to be this much faster than the dense one
_DOUBT = 0.01  # how often an interval may miss a kernel's true ratio
SOURCES = {
    "measured": "timed now",
    "cached": "timed earlier on this machine",
    "shipped": "timed on such a device, in the table that comes with the package",
    "rule": "nothing else was worth timing",
    "network": "the network as a whole was not faster with the kernel that won alone",
    "budget": "not timed: the time budget ended before",
}


@dataclass(frozen=True)
class Timing:
    """One kernel of one layer: median ``seconds`` of a call, and what its ratio to the dense kernel stays below
    (99 % one-sided bound of the median over paired rounds; 1 for the dense kernel).
    """

    seconds: float
    high: float


@dataclass(frozen=True)
class Choice:
    """``kernel`` for a layer at a batch size. ``name`` is the user's for the layer, ``layer`` the graph's; ``times`` are median seconds of each kernel that was timed, and ``shape``
    is of the layer's input. ``source`` is a key of `SOURCES`.
    """

    layer: str
    name: str
    batch: int
    kernel: str
    source: str
    times: Mapping[str, float]
    shape: str


@dataclass(frozen=True)
class Plan:
    """All choices for a network on a device; ``seconds`` is what making the plan took."""

    device: str
    precision: str
    batches: tuple[int, ...]
    choices: tuple[Choice, ...]
    seconds: float

    def kernel(self, layer: str, batch: int) -> str:
        """The kernel for a layer at a batch bucket; KeyError where the plan lacks it."""
        for choice in self.choices:
            if choice.layer == layer and choice.batch == batch:
                return choice.kernel
        raise KeyError((layer, batch))

    def counts(self, batch: int) -> dict[str, int]:
        """How many layers each kernel runs at a batch bucket, by name."""
        found: dict[str, int] = {}
        for choice in self.choices:
            if choice.batch == batch:
                found[choice.kernel] = found.get(choice.kernel, 0) + 1
        return dict(sorted(found.items()))

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that differ where a kernel of a layer does."""
        chosen = [(c.layer, c.batch, c.kernel) for c in self.choices]
        return hashlib.sha256(json.dumps([self.precision, chosen]).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "digest": self.digest}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`; KeyError or TypeError where a part is missing."""
        choices = tuple(Choice(**choice) for choice in document["choices"])
        return Plan(document["device"], document["precision"], tuple(document["batches"]), choices, document["seconds"])


def decide(timings: Mapping[str, Timing]) -> str:
    """The fastest kernel that is surely at least `LEAST_GAIN` faster than the dense one; else the dense one."""
    winners = [kernel for kernel, timing in timings.items() if timing.high <= 1 - LEAST_GAIN]
    return min(winners, key=lambda kernel: timings[kernel].seconds, default=DENSE)


def upper_bound(ratios: Sequence[float]) -> float:
    """What the median of the distribution behind n >= 1 independent ratios stays below in 99 of 100 cases.

    The order statistic of the binomial interval, which assumes nothing of the distribution; infinite for n < 7, where
    even the largest value does not bound it that surely.
    """
    n, ordered = len(ratios), sorted(ratios)
    tail, bound = 0.0, math.inf  # the chance that at most n - k values lie above the median, from k = n downwards
    for k in range(n, 0, -1):
        tail += math.comb(n, n - k) / 2**n
        if tail > _DOUBT:
            break
        bound = ordered[k - 1]
    return bound
