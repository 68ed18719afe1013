"""How much work one pruning run spends, beyond what the user's options say; tests spend less."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.pruning.inputs import SynthesisBudget

_TIMED, _ROUNDS = 8, 3  # inputs at once, and how often, to find the pace
_BUSY = 0.8  # of the threads, on average: some work runs on one


@dataclass(frozen=True)
class Effort:
    """Settings that trade the precision of a run for its time.

    Attributes:
        synthesis: how many inputs to make, in how many steps; None derives both from the network.
        frontier_points: number of networks over the whole range of costs that the report shows, at least.
        latency_seconds: time for measuring the latencies of one set of networks.
        distillation_patience: the distillation is cut short after this many times its budget.
        pace: seconds of the original for one input; None measures it.
    """

    synthesis: SynthesisBudget | None = None
    frontier_points: int = 10
    latency_seconds: float = 8.0
    distillation_patience: float = 1.2
    pace: float | None = None


def pace(graph: Graph, device: str = "cpu") -> float:
    """Measure the seconds of `spent` that a network takes for one input, rounded to a power of two.

    Plans follow from the rounded figure, so that two runs on one machine plan, and give, the same.
    """
    program = Program(graph).to(device)
    inputs = [torch.zeros(_TIMED, *i.shape, dtype=getattr(torch, i.dtype), device=device) for i in graph.inputs]
    times = []
    with torch.no_grad():
        for _ in range(_ROUNDS):
            start = spent()
            program(*inputs)
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            times.append(spent() - start)
    return float(2.0 ** round(math.log2(max(min(times) / _TIMED, 1e-7))))


def spent() -> float:
    """Return the seconds that this process would have taken so far on an idle machine.

    They follow from the seconds of all its threads, so a busy machine does not shorten what a run does. A GPU's work
    takes none of these, so there the clock on the wall counts.
    """
    if torch.cuda.is_available():
        return time.monotonic()
    return time.process_time() / (1 + _BUSY * (torch.get_num_threads() - 1))
