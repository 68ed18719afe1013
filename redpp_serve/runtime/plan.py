"""Which engine runs the network and which kernel each layer in each bucket, on what evidence; the deciding rule."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from redpp_serve.engines import OWN
from redpp_serve.runtime.buckets import Bucket, as_sizes

DENSE = "dense"
LEAST_GAIN = 0.03  # a kernel has to be this much faster than the dense one
_DOUBT = 0.01  # how often an interval may miss a kernel's true ratio


@dataclass(frozen=True)
class Timing:
    """Measured time of one kernel for one layer.

    Attributes:
        seconds: the median of a call; infinite for a kernel that failed.
        high: a 99 % upper bound of the median ratio to the dense kernel's time; 1 for the dense kernel.
    """

    seconds: float
    high: float


@dataclass(frozen=True)
class Choice:
    """The kernel chosen for one layer at one batch size.

    Attributes:
        layer: the name of the layer's node.
        name: the layer's name as the user knows it.
        batch: the batch size.
        kernel: the kernel that runs the layer.
        source: where the decision comes from: ``measured`` now, ``cached`` from earlier on this machine, ``shipped``
            in the table that comes with the package; ``rule``, nothing else was worth timing; ``network``, the network
            as a whole was not faster; ``budget``, not timed because the time ran out.
        times: median seconds of each kernel that was timed.
        shape: the shape of the layer's input, as in ``4x3x32x32``.
        sizes: the sizes of the network's inputs, by symbol, where they vary.
    """

    layer: str
    name: str
    batch: int
    kernel: str
    source: str
    times: Mapping[str, float]
    shape: str
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def bucket(self) -> Bucket:
        """The requests that it serves."""
        return Bucket(self.batch, as_sizes(self.sizes))


@dataclass(frozen=True)
class EngineChoice:
    """The engine and precision that run the whole network at one batch size.

    Attributes:
        batch: the batch size.
        engine: the engine's name; ``redpp`` for the own runtime.
        precision: the precision.
        source: where the decision comes from: ``measured`` now, ``cached`` from earlier on this machine; ``rule``,
            there was nothing else; ``budget``, there was no time; ``failed``, the chosen engine did not start.
        times: median seconds of each engine and precision that was timed.
        sizes: the sizes of the network's inputs, by symbol, where they vary.
    """

    batch: int
    engine: str
    precision: str
    source: str
    times: Mapping[str, float]
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def bucket(self) -> Bucket:
        """The requests that it serves."""
        return Bucket(self.batch, as_sizes(self.sizes))


@dataclass(frozen=True)
class Plan:
    """All choices for a network on a device.

    Attributes:
        device: the device's product name.
        precision: the precision that the network runs in; several, joined by ``+``, where batch sizes differ.
        batches: the batch sizes, ascending.
        choices: a choice for each layer, batch size and choice of sizes that the own runtime serves, in order of
            execution.
        seconds: how long making the plan took.
        engines: the engine for each batch size and choice of sizes; that at which the network was pruned comes first.
        left_out: why engines, or engines in a precision, are not used.
        built: the seconds that building the network took, by engine and precision, import included; those that were
            neither tried nor used now are not among them.
    """

    device: str
    precision: str
    batches: tuple[int, ...]
    choices: tuple[Choice, ...]
    seconds: float
    engines: tuple[EngineChoice, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    built: Mapping[str, float] = field(default_factory=dict)

    def kernel(self, layer: str, batch: int) -> str:
        """Return the kernel of a layer at a batch size, at the first of the sizes where they vary.

        Raises:
            KeyError: the plan lacks the layer or the batch size.
        """
        for choice in self.choices:
            if choice.layer == layer and choice.batch == batch:
                return choice.kernel
        raise KeyError((layer, batch))

    def counts(self, batch: int) -> dict[str, int]:
        """Count the layers that each kernel runs at a batch size, by name; an engine runs the network as one.

        Where sizes vary, the counts are those at which the network was pruned.
        """
        served = next((choice for choice in self.engines if choice.batch == batch), None)
        if served and served.engine != OWN:
            return {served.engine: 1}
        sizes = served.sizes if served else {}
        kernels = (choice.kernel for choice in self.choices if choice.batch == batch and choice.sizes == sizes)
        return dict(sorted(Counter(kernels).items()))

    @property
    def engine(self) -> str:
        """The engine; several, joined by ``+``, where batch sizes differ."""
        return "+".join(dict.fromkeys(choice.engine for choice in self.engines)) or OWN

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that differ if the kernel of a layer does."""
        chosen: list[Any] = [(c.layer, c.batch, c.kernel, *c.sizes.items()) for c in self.choices]
        chosen += [(c.batch, c.engine, c.precision, *c.sizes.items()) for c in self.engines if c.engine != OWN]
        return hashlib.sha256(json.dumps([self.precision, chosen]).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """Return the plan, with its digest, as JSON takes it."""
        plain = asdict(self)
        for choice in (*plain["choices"], *plain["engines"]):
            if not choice["sizes"]:
                del choice["sizes"]
        return {**plain, "digest": self.digest}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Plan:
        """Invert `to_json`.

        Raises:
            KeyError: a part is missing.
            TypeError: a choice lacks a part.
        """
        choices = tuple(Choice(**choice) for choice in document["choices"])
        engines = tuple(EngineChoice(**choice) for choice in document.get("engines", ()))
        return Plan(
            document["device"],
            document["precision"],
            tuple(document["batches"]),
            choices,
            document["seconds"],
            engines,
            document.get("left_out", {}),
            document.get("built", {}),
        )


def decide(timings: Mapping[str, Timing]) -> str:
    """Return the fastest kernel that is surely at least `LEAST_GAIN` faster than the dense one; else the dense one."""
    winners = [kernel for kernel, timing in timings.items() if timing.high <= 1 - LEAST_GAIN]
    return min(winners, key=lambda kernel: timings[kernel].seconds, default=DENSE)


def upper_bound(ratios: Sequence[float]) -> float:
    """Bound from above, in 99 of 100 cases, the median of the distribution behind n >= 1 independent ratios.

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
