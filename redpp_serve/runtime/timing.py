"""How long one call of a layer takes on a device: by the clock on a CPU, by events around a recorded graph on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from redpp_serve.graph.graph import Graph
from redpp_serve.runtime.plan import LEAST_GAIN, Timing, upper_bound

Make = Callable[[Mapping[str, Tensor]], Callable[..., object]]  # a layer's program that reads these weights

FEWEST_ROUNDS, MOST_ROUNDS = 7, 41
_SLOT_S = 0.5e-3  # one reading covers so many calls
_MOST_CALLS = 20
_BETWEEN = (
    1 << 16
)  # float32 numbers that are written between two calls: a core's first cache holds none of the layer then
_COPIES = 64  # of a weight at most, so that a GPU's cache does not hold it
_WARM_UPS = 3


class Timer(Protocol):
    """Readies a kernel for timing."""

    def prepare(self, make: Make, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], float]:
        """A function that runs the kernel some times and returns the seconds of one call."""


def timer_for(graph: Graph, device: torch.device) -> Timer:
    """The timer for a network's layers on a device."""
    if device.type != "cuda":
        return ClockTimer()
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    weights = sum(t.numel() * t.element_size() for t in graph.tensors.values())
    return EventTimer(device, 2 * cache if weights > cache else 0)


class ClockTimer:
    """The performance counter; ``clock`` gives seconds.

    Between two calls other memory is written, as between two calls of a layer within its network: with all of a small
    layer in the first cache, kernels look faster than they are there, and not all to the same degree.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._other = clock, torch.zeros(_BETWEEN)

    def prepare(self, make: Make, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], float]:
        call, clock, other = make(tensors), self._clock, self._other
        for _ in range(_WARM_UPS):
            start = clock()
            call(*inputs)
            once = clock() - start
        calls = max(1, min(_MOST_CALLS, round(_SLOT_S / max(once, 1e-9))))

        def run() -> float:
            spent = 0.0
            for _ in range(calls):
                other.add_(1.0)
                start = clock()
                call(*inputs)
                spent += clock() - start
            return spent / calls

        return run


class EventTimer:
    """Many calls in one CUDA graph between two events.

    Args:
        device: where the layer runs.
        cold_bytes: weights pass through so many bytes of copies before one is read again, as when a network's weights
            do not fit the L2 cache; 0 for the same weight each time, as when they do.
    """

    def __init__(self, device: torch.device, cold_bytes: int) -> None:
        self._device, self._cold_bytes = device, cold_bytes

    def prepare(self, make: Make, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], float]:
        size = max(1, sum(t.numel() * t.element_size() for t in tensors.values()))
        copies = max(1, min(_COPIES, math.ceil(self._cold_bytes / size)))
        calls = [make(tensors)] + [make({name: t.clone() for name, t in tensors.items()}) for _ in range(copies - 1)]
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                calls[0](*inputs)
        torch.cuda.synchronize(self._device)
        repeats = max(copies, 20)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for k in range(repeats):
                calls[k % copies](*inputs)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()

        def run() -> float:
            before.record()
            graph.replay()
            after.record()
            after.synchronize()
            return before.elapsed_time(after) / 1e3 / repeats

        return run


def in_turns(runs: Sequence[Callable[[], float]], end: float, gain: float = LEAST_GAIN) -> list[list[float]]:
    """Seconds of each run in each round: forwards and backwards, so that drift meets all alike.

    Stops at the time ``end`` of the performance counter, or early when each is surely better, or surely not better, than
    the first by that gain; not before `FEWEST_ROUNDS`.
    """
    rounds: list[list[float]] = []
    while len(rounds) < MOST_ROUNDS:
        there = [run() for run in runs]
        back = [run() for run in reversed(runs)][::-1]
        rounds.append([(a + b) / 2 for a, b in zip(there, back)])
        if len(rounds) >= FEWEST_ROUNDS and (time.perf_counter() > end or _decided(rounds, 1 - gain)):
            break
    return rounds


def timings(kernels: Sequence[str], rounds: Sequence[Sequence[float]]) -> dict[str, Timing]:
    """What the rounds say of each kernel; the first is what ratios are to."""
    found = {}
    for k, kernel in enumerate(kernels):
        column = sorted(row[k] for row in rounds)
        found[kernel] = Timing(column[len(column) // 2], upper_bound([row[k] / row[0] for row in rounds]) if k else 1.0)
    return found


def _decided(rounds: Sequence[Sequence[float]], wanted: float) -> bool:
    for k in range(1, len(rounds[0])):
        ratios = [row[k] / row[0] for row in rounds]
        if upper_bound(ratios) > wanted > 1 / upper_bound([1 / ratio for ratio in ratios]):
            return False
    return True
