"""How long a call takes on a device, and the rounds in which calls take turns so that drift meets all of them alike."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.ranges import random_integers
from redpp_serve.runtime.plan import LEAST_GAIN, Timing, upper_bound
from redpp_serve.runtime.serving_graph import channels_last

Make = Callable[[Mapping[str, Tensor]], Callable[..., object]]  # a layer's program that reads these weights

FEWEST_ROUNDS, MOST_ROUNDS = 7, 41
_SLOT_S = 0.5e-3  # a reading covers as many calls as fit into this time
_MOST_CALLS = 20
_BETWEEN = 1 << 16  # float32 numbers written between two calls, so that a core's first cache no longer holds the layer
_COPIES = 64  # most copies of a weight that keep it out of a GPU's cache
_WARM_UPS = 3


class Timer(Protocol):
    """Prepares a kernel for timing."""

    def prepare(self, make: Make, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], float]:
        """Return a function that runs the kernel several times and returns the seconds of one call."""


def timer_for(graph: Graph, device: torch.device) -> Timer:
    """Return the timer for a network's layers on a device."""
    if device.type != "cuda":
        return ClockTimer()
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    weights = sum(t.numel() * t.element_size() for t in graph.tensors.values())
    return EventTimer(device, 2 * cache if weights > cache else 0)


class ClockTimer:
    """Reads a clock before and after each call.

    Between two calls other memory is written, as between two calls of a layer within its network: with all of a small
    layer in the first cache, kernels look faster than they are there, and not all to the same degree.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._other = clock, torch.zeros(_BETWEEN)

    def prepare(self, make: Make, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], float]:
        """Warm the kernel up, as `Timer.prepare`."""
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
    """Measures many calls in one CUDA graph between two events.

    Args:
        device: where the layer runs.
        cold_bytes: weights pass through so many bytes of copies before one is read again, as when a network's weights
            do not fit the L2 cache; 0 for the same weight each time, as when they do.
    """

    def __init__(self, device: torch.device, cold_bytes: int) -> None:
        self._device, self._cold_bytes = device, cold_bytes

    def prepare(self, make: Make, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], float]:
        """Warm the kernel up and record the graph, as `Timer.prepare`."""
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
            return float(before.elapsed_time(after)) / 1e3 / repeats

        return run


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Return a function that makes a call and returns the seconds that it took by a clock."""

    def run() -> float:
        start = clock()
        call()
        return clock() - start

    return run


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with that many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rounds(runs: Sequence[Callable[[], float]]) -> Iterator[list[float]]:
    """Yield the seconds of each run, round by round, for as long as the caller asks.

    A round runs all of them forwards and then backwards and yields the mean of both, so that drift meets all alike.
    """
    while True:
        there = [run() for run in runs]
        back = [run() for run in reversed(runs)][::-1]
        yield [(a + b) / 2 for a, b in zip(there, back, strict=True)]


def in_turns(runs: Sequence[Callable[[], float]], end: float, gain: float = LEAST_GAIN) -> list[list[float]]:
    """Time runs in `rounds`, at least `FEWEST_ROUNDS` and at most `MOST_ROUNDS` of them.

    Args:
        runs: each returns the seconds of one call.
        end: the time of the performance counter at which to stop.
        gain: stop early once each run is surely faster, or surely not faster, than the first by this share.

    Returns:
        Rounds of the seconds of each run.
    """
    found: list[list[float]] = []
    for row in rounds(runs):
        found.append(row)
        late = time.perf_counter() > end
        if len(found) == MOST_ROUNDS or (len(found) >= FEWEST_ROUNDS and (late or _decided(found, 1 - gain))):
            break
    return found


def timings(kernels: Sequence[str], found: Sequence[Sequence[float]]) -> dict[str, Timing]:
    """Summarise the rounds of `in_turns` for each kernel; ratios are to the first."""
    return {
        kernel: Timing(
            sorted(row[k] for row in found)[len(found) // 2],
            upper_bound([row[k] / row[0] for row in found]) if k else 1.0,
        )
        for k, kernel in enumerate(kernels)
    }


def random_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Draw normal random numbers, images channels-last; integers are zeros, which are valid indices everywhere."""
    drawn = torch.randn(*shape, generator=generator) if dtype.is_floating_point else torch.zeros(*shape)
    return channels_last(drawn.to(device, dtype))


def random_input(spec: InputSpec, batch: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Draw inputs (batch, ...) of a network: `random_tensor`, or integers of their range."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return random_tensor((batch, *spec.shape), dtype, device, generator)
    return channels_last(random_integers(spec, batch, generator).to(device))


def _decided(found: Sequence[Sequence[float]], wanted: float) -> bool:
    for k in range(1, len(found[0])):
        ratios = [row[k] / row[0] for row in found]
        if upper_bound(ratios) > wanted > 1 / upper_bound([1 / ratio for ratio in ratios]):
            return False
    return True
