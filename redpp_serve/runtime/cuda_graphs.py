"""One recorded CUDA graph for each batch bucket: static buffers, padded rows, chunks of what is larger than a bucket.

Rows are independent of each other, as capture with a dynamic batch asserts; padding is zeros all the same, so that no
request's numbers are left for the next one. One request at a time: the buffers are shared.
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
from redpp_serve.runtime.buckets import bucket_for, chunks
from redpp_serve.runtime.serving_graph import channels_last

WARM_UPS = 3  # runs before recording: libraries choose their algorithms and make their workspaces


class Recorder(Protocol):
    """Records a run once so that it can be repeated on the same buffers."""

    def record(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
        """A call that repeats ``run``, and the tensors that then hold its results."""


class CudaRecorder:
    """CUDA graphs in one memory pool: they never run at the same time, so they may use the same intermediate memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
        """As `Recorder`.

        Raises:
            RuntimeError: the run does what no graph can hold, such as waiting for the device.
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
    """A bucket that is ready: ``replay`` turns what is in ``inputs`` (batch, ...) into ``outputs`` (batch, ...)."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], object]


class BucketRunner:
    """Runs any number of rows through the recorded buckets.

    Args:
        programs: one for each bucket, on ``device``.
        inputs: what the programs take.
        recorder: a `CudaRecorder`.

    Raises:
        RuntimeError: a program that cannot be recorded, or one whose outputs are not a row for each row of its inputs.
    """

    def __init__(
        self, programs: Mapping[int, Program], inputs: Sequence[InputSpec], device: torch.device, recorder: Recorder
    ) -> None:
        self.batches = tuple(sorted(programs))
        pinned = device.type == "cuda"
        static = [_buffer(i, self.batches[-1], device) for i in inputs]
        self._staging = [torch.empty_like(buffer, device="cpu", pin_memory=pinned) for buffer in static]
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
        """Inputs (N, ...) on the CPU, in any floating-point dtype and layout, to outputs (N, ...) on the CPU."""
        parts = [self._chunk([x[part] for x in inputs]) for part in chunks(len(inputs[0]), self.batches[-1])]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts))

    def _chunk(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        rows = len(inputs[0])
        recorded = self._recorded[bucket_for(self.batches, rows)]
        for x, staging, static in zip(inputs, self._staging, recorded.inputs):
            staging[:rows].copy_(x)
            static[:rows].copy_(staging[:rows], non_blocking=True)
            static[rows:].zero_()
        recorded.replay()
        for y, result in zip(recorded.outputs, self._results):
            result[:rows].copy_(y[:rows], non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return tuple(result[:rows].clone() for result in self._results)


def _buffer(spec: InputSpec, batch: int, device: torch.device) -> Tensor:
    """Zeros for one input; images in channels-last layout."""
    return channels_last(torch.zeros(batch, *spec.shape, dtype=getattr(torch, spec.dtype), device=device))
