"""One recorded CUDA graph for each batch bucket, with static buffers, padded rows, and chunks of larger batches.

Rows are independent of each other, as capture with a dynamic batch asserts; padding is zeros all the same, so that no
request's numbers are left for the next one. The buffers are shared: only one request may run at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec
from redpp_serve.graph.ranges import blank
from redpp_serve.graph.sizes import all_choices, resized
from redpp_serve.runtime.buckets import Bucket, Sizes, nearest_sizes
from redpp_serve.runtime.serving_graph import bucket_for, channels_last, chunks

Shapes = tuple[tuple[int, ...], ...]  # of one of each input
_MOST_SIZES = 8  # that are all recorded; each takes buffers for its largest batch
WARM_UPS = 3  # runs before recording: libraries choose their algorithms and make their workspaces


class Recorder(Protocol):
    """Records a run once so that it can be repeated on the same buffers."""

    def record(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
        """Return a function that repeats ``run``, and the tensors that hold its results afterwards."""


class CudaRecorder:
    """Records CUDA graphs in one memory pool: they never run at the same time, so they may share memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
        """Warm up and record a run, as `Recorder.record`.

        Raises:
            RuntimeError: the run does something that no graph can hold, such as waiting for the device.
        """
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run()
        return graph.replay, outputs


@dataclass(frozen=True)
class Recorded:
    """A recorded bucket.

    Attributes:
        inputs: buffers (batch, ...) that the graph reads.
        outputs: buffers (batch, ...) that the graph writes.
        replay: runs the graph.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], object]


class BucketRunner:
    """Runs any number of rows through the recorded buckets.

    Args:
        programs: a program for each bucket, on ``device``.
        inputs: the inputs of the programs.
        device: where they run.
        recorder: records their runs; a `CudaRecorder` but in tests.

    Raises:
        RuntimeError: a program cannot be recorded, or its outputs' batch size differs from its inputs'.
    """

    def __init__(
        self, programs: Mapping[int, Program], inputs: Sequence[InputSpec], device: torch.device, recorder: Recorder
    ) -> None:
        self.batches = tuple(sorted(programs))
        pinned = device.type == "cuda"
        static = [_buffer(i, self.batches[-1], device) for i in inputs]
        self._staging = [torch.empty_like(buffer, device="cpu", pin_memory=pinned) for buffer in static]
        self._padding = [blank(spec, 1, device) for spec in inputs]  # what the network can read
        self._recorded: dict[int, Recorded] = {}
        for batch in reversed(self.batches):  # the largest first: the pool then has room for all others
            views = tuple(buffer[:batch] for buffer in static)
            replay, outputs = recorder.record(partial(programs[batch].forward, *views))
            if any(y.dim() == 0 or y.shape[0] != batch for y in outputs):
                raise RuntimeError(f"outputs of shapes {[tuple(y.shape) for y in outputs]} for a batch of {batch}")
            self._recorded[batch] = Recorded(views, outputs, replay)
        largest = self._recorded[self.batches[-1]].outputs
        self._results = [torch.empty_like(y, device="cpu", pin_memory=pinned) for y in largest]
        self._device = device

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Map inputs (N, ...) on the CPU, in any floating-point dtype and layout, to outputs (N, ...) on the CPU."""
        parts = [self._chunk([x[part] for x in inputs]) for part in chunks(len(inputs[0]), self.batches[-1])]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _chunk(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        rows = len(inputs[0])
        recorded = self._recorded[bucket_for(self.batches, rows)]
        for x, staging, static, padding in zip(inputs, self._staging, recorded.inputs, self._padding, strict=True):
            staging[:rows].copy_(x)
            static[:rows].copy_(staging[:rows], non_blocking=True)
            static[rows:].copy_(padding)
        recorded.replay()
        for y, result in zip(recorded.outputs, self._results, strict=True):
            result[:rows].copy_(y[:rows], non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return tuple(result[:rows].clone() for result in self._results)


def record_sizes(
    programs: Mapping[Bucket, Program],
    inputs: Sequence[InputSpec],
    sizes: Sequence[Sizes],
    device: torch.device,
    recorder: Recorder,
) -> dict[Shapes, BucketRunner]:
    """Record a network at its sizes: at all that it admits where they are few, else at those that are planned for.

    Nothing is padded along a size that varies, since that may change other values: each size has graphs of its own.

    Args:
        programs: a program for each bucket, on ``device``; a size without any is not recorded.
        inputs: the inputs of the programs.
        sizes: the choices of sizes that are planned for.
        device: where the programs run.
        recorder: as for `BucketRunner`.

    Returns:
        What runs inputs, by their shapes without the batch.

    Raises:
        RuntimeError: as for `BucketRunner`.
    """
    found: dict[Shapes, BucketRunner] = {}
    for each in all_choices(inputs, _MOST_SIZES) or list(map(dict, sizes)):
        specs = tuple(resized(spec, each) for spec in inputs)
        near = nearest_sizes(sizes, inputs, [spec.shape for spec in specs])
        served = {bucket.batch: program for bucket, program in programs.items() if bucket.sizes == near}
        if served:
            found[tuple(spec.shape for spec in specs)] = BucketRunner(served, specs, device, recorder)
    return found


def _buffer(spec: InputSpec, batch: int, device: torch.device) -> Tensor:
    """Make a blank input; images in channels-last layout."""
    return channels_last(blank(spec, batch, device))
