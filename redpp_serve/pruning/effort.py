"""How much work one pruning run spends, beyond what the user's options say; tests spend less."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from redpp_serve.graph.executor import value_shapes
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import mac_count
from redpp_serve.pruning.matching import SynthesisBudget

# Of one thread, or a GPU: assumed, not measured.
_SECONDS_PER_MAC = {"cpu": 25e-12, "cuda": 0.5e-12}
_SECONDS_PER_NUMBER = {"cpu": 2.5e-9, "cuda": 1e-11}  # that an operator writes
_SECONDS_PER_CALL = 5e-6
_BUSY = 0.8  # of the threads, on average: some work runs on one


@dataclass(frozen=True)
class Effort:
    """Settings that trade the precision of a run for its time.

    Attributes:
        synthesis: how many inputs to make, in how many steps; None derives both from the network.
        frontier_points: number of networks over the whole range of costs that the report shows, at least.
        latency_seconds: time for measuring the latencies of one set of networks.
        distillation_patience: the distillation is cut short after this many times its budget.
        pace: seconds of the original for one input; None predicts it.
    """

    synthesis: SynthesisBudget | None = None
    frontier_points: int = 10
    latency_seconds: float = 8.0
    distillation_patience: float = 1.2
    pace: float | None = None


def pace(graph: Graph, device: str = "cpu") -> float:
    """Predict the seconds of `spent` that a network takes for one input.

    The figure follows from the network alone: plans are made by it, and two runs must plan, and give, the same.
    """
    macs, numbers = _SECONDS_PER_MAC[device.split(":")[0]], _SECONDS_PER_NUMBER[device.split(":")[0]]
    moved = sum(math.prod(shape) for shape in value_shapes(graph).values())
    threads = 1 if device.startswith("cuda") else _threads()
    return (mac_count(graph) * macs + moved * numbers + len(graph.nodes) * _SECONDS_PER_CALL) / threads


def _threads() -> float:
    return 1 + _BUSY * (torch.get_num_threads() - 1)


def spent() -> float:
    """Return the seconds that this process would have taken so far on an idle machine.

    They follow from the seconds of all its threads, so a busy machine does not shorten what a run does. A GPU's work
    takes none of these, so there the clock on the wall counts.
    """
    if torch.cuda.is_available():
        return time.monotonic()
    return time.process_time() / _threads()
