"""Time on a GPU: passes over many calls inside one CUDA graph, taken in turns, and what the machine itself can do.

Where no graph can be (a rehearsal on a CPU), the same passes run under the host's clock.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

FEWEST_ROUNDS, MOST_ROUNDS = 5, 60
PASS_S = 3e-4  # of work between two events: their resolution and a graph's launch vanish in it
FEWEST_CALLS, MOST_CALLS = 4, 24
L2_TIMES = 3  # a cold pass walks over this many times the L2 cache before it comes back to the same bytes
MOST_COPIES = 256


class Pass(Protocol):
    """One pass over a list of calls: seconds for each call. ``result`` is what the last call gave."""

    result: Tensor

    def __call__(self) -> float: ...


class GraphPass:
    """The calls as one CUDA graph. Every call runs once before: compilers and checks of values have their turn then."""

    def __init__(self, calls: Sequence[Callable[[], Tensor]]) -> None:
        self.count = len(calls)
        for call in dict.fromkeys(calls):
            call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                self.result = call()
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()

    def __call__(self) -> float:
        self.graph.replay()  # while it runs, the host queues all that follows
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3 / self.count


class HostPass:
    """The calls one after the other, under the host's clock."""

    def __init__(self, calls: Sequence[Callable[[], Tensor]]) -> None:
        self.calls = calls
        self.result = calls[-1]()

    def __call__(self) -> float:
        start = time.perf_counter()
        for call in self.calls:
            self.result = call()
        return (time.perf_counter() - start) / len(self.calls)


@dataclass(frozen=True)
class Spread:
    """Seconds: median, 10th and 90th percentile over the rounds."""

    median: float
    p10: float
    p90: float
    rounds: int

    def micro(self) -> list[float]:
        """Median, p10, p90 in microseconds."""
        return [round(1e6 * value, 3) for value in (self.median, self.p10, self.p90)]


def quantile(values: Sequence[float], q: float) -> float:
    """By linear interpolation, as numpy's default."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return low + (high - low) * (at - math.floor(at))


def spread(values: Sequence[float]) -> Spread:
    return Spread(quantile(values, 0.5), quantile(values, 0.1), quantile(values, 0.9), len(values))


def in_turns(
    passes: Mapping[str, Callable[[], float]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each pass in each round: the mean of two, once in the given order and once in the reverse.

    So every pair runs as A B B A and slow drift cancels in their ratio. The first round is a warm-up and is dropped.
    """
    end, names = clock() + seconds, list(passes)
    times: dict[str, list[float]] = {name: [] for name in names}
    count = 0
    while count <= FEWEST_ROUNDS or (clock() < end and count <= MOST_ROUNDS):
        spent = dict.fromkeys(names, 0.0)
        for name in (*names, *reversed(names)):
            spent[name] += passes[name]() / 2
        count += 1
        for name in names if count > 1 else ():
            times[name].append(spent[name])
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """How many times faster the second is than the first: the spread of the rounds' ratios."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


@dataclass(frozen=True)
class Peaks:
    """What this machine reached in this run: bytes/s of a large copy (read and written), FLOP/s of a large product in
    half precision on random numbers, seconds of the smallest kernel inside a graph; bytes of its L2 cache."""

    bandwidth: float
    matrix: float
    floor: float
    l2: int

    def roofline(self, moved: int, flop: int) -> float:
        """Seconds that nothing which moves these bytes and does these operations can go below."""
        return max(moved / self.bandwidth, flop / self.matrix)

    def calls(self, moved: int, flop: int) -> int:
        """How many calls fill one pass."""
        expected = max(self.roofline(moved, flop), self.floor)
        return min(MOST_CALLS, max(FEWEST_CALLS, math.ceil(PASS_S / expected)))

    def copies(self, moved: int) -> int:
        """How many sets of operands make a pass over them cold."""
        return min(MOST_COPIES, max(2, math.ceil(L2_TIMES * self.l2 / max(1, moved))))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Bench:
    """Where to measure and how: a GPU with graphs, or for a rehearsal the CPU with the host's clock."""

    device: torch.device
    dtype: torch.dtype
    rehearse: bool = False

    @property
    def make_pass(self) -> Callable[[Sequence[Callable[[], Tensor]]], Pass]:
        return HostPass if self.rehearse else GraphPass

    def works(self) -> None:
        """Raises whatever CUDA raises after a kernel has broken it."""
        if not self.rehearse:
            torch.cuda.synchronize()

    def randn(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return (scale * torch.randn(shape, generator=generator, device=self.device)).to(self.dtype)

    def peaks(self) -> Peaks:
        """Measure the machine."""
        size, side = (1 << 20, 128) if self.rehearse else (1 << 30, 8192)
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_(0, 256)
        target = torch.empty_like(source)
        a, b = self.randn(side, side, seed=1), self.randn(side, side, seed=2)
        product, tiny = torch.empty_like(a), self.randn(32)
        copied = self._median([lambda: target.copy_(source)] * 4)
        multiplied = self._median([lambda: torch.mm(a, b, out=product)] * 4)
        floor = self._median([lambda: tiny.add_(0)] * 64)
        l2 = (1 << 16) if self.rehearse else torch.cuda.get_device_properties(self.device).L2_cache_size
        return Peaks(2 * size / copied, 2 * side**3 / multiplied, floor, l2)

    def _median(self, calls: Sequence[Callable[[], Tensor]]) -> float:
        return spread(in_turns({"": self.make_pass(calls)}, 0.0 if self.rehearse else 0.5)[""]).median


class Monitor:
    """Clocks and power while the run goes on, as nvidia-smi says them; empty where there is no nvidia-smi."""

    FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")

    def __init__(self, command: str = "nvidia-smi") -> None:
        self.process = None
        if shutil.which(command):
            call = [command, f"--query-gpu={','.join(self.FIELDS)}", "--format=csv,noheader,nounits", "-lms", "1000"]
            self.process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def stop(self) -> dict[str, Any]:
        """Ends it; for each field the smallest, the median and the largest reading."""
        if self.process is None:
            return {}
        self.process.terminate()
        try:
            text = self.process.communicate(timeout=10)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            return {}
        return self.summary(text)

    @classmethod
    def summary(cls, text: str) -> dict[str, Any]:
        columns: dict[str, list[float]] = {field: [] for field in cls.FIELDS}
        for line in text.splitlines():
            cells = line.split(",")
            for field, cell in zip(cls.FIELDS, cells, strict=True) if len(cells) == len(cls.FIELDS) else ():
                try:
                    columns[field].append(float(cell))
                except ValueError:
                    continue  # "[N/A]"
        return {field: [quantile(values, q) for q in (0.0, 0.5, 1.0)] for field, values in columns.items() if values}
