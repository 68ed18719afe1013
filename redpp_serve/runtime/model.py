"""An artifact that is ready to answer requests, with each layer run by the kernel of a plan."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpp_serve.graph.artifact import load
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec
from redpp_serve.graph.passes import check_precision, set_switches
from redpp_serve.runtime.cuda_graphs import BucketRunner, CudaRecorder
from redpp_serve.runtime.plan import Plan
from redpp_serve.runtime.plan_cache import PlanCache, default_path
from redpp_serve.runtime.planner import PLAN_SECONDS, make_plan
from redpp_serve.runtime.serving_graph import PlanContext, batch_buckets, bucket_for, channels_last, planned_programs

log = logging.getLogger(__name__)


class ServingModel:
    """Runs the artifact of an original or a pruned network.

    On a GPU, each batch bucket is a recorded CUDA graph and requests are padded to it; a network that cannot be
    recorded runs call by call. On a CPU, a bucket decides only which kernels run, and rows are never padded.

    Args:
        source: path of the artifact, or its bytes.
        device: where to run, such as ``cpu`` or ``cuda:0``. A GPU becomes the process's current device.
        precision: ``fp32``, ``tf32`` (on a GPU; on a CPU the same as fp32), ``fp16`` or ``bf16``. fp32 and tf32 set
            torch's switches for the whole process.
        batch: the largest batch to be ready for; larger ones are served too, in parts on a GPU.
        plan_seconds: about how long timing the layers' kernels may take; 0 leaves all of them dense.
        cache: where their times are kept: ``default`` for the user's cache file, None for nowhere.
        everything: time also kernels that the rules would skip.

    Attributes:
        description: what the artifact says about itself.
        inputs: the network's inputs.
        device: where the network runs.
        precision: the precision that it runs in.
        batches: the batch buckets, ascending.
        plan: the kernels that run its layers.

    Raises:
        RedppError: the artifact is damaged, the precision unknown, or the network does not run in it.
    """

    def __init__(
        self,
        source: Path | bytes,
        device: str = "cpu",
        *,
        precision: str = "fp32",
        batch: int = 1,
        plan_seconds: float = PLAN_SECONDS,
        cache: PlanCache | str | None = "default",
        everything: bool = False,
    ) -> None:
        check_precision(precision)
        artifact = load(source)
        self.description: dict[str, Any] = artifact.description
        self.inputs: tuple[InputSpec, ...] = artifact.graph.inputs
        self.device, self.precision = torch.device(device), precision
        self.batches = tuple(batch_buckets(batch))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
            set_switches(precision)
        context = PlanContext.prepare(artifact.graph, self.device, precision)
        kept = PlanCache(default_path()) if isinstance(cache, str) else cache
        self.plan: Plan = make_plan(context, self.batches, seconds=plan_seconds, cache=kept, everything=everything)
        self._programs: dict[int, Program] = planned_programs(context, self.batches, self.plan.kernel)
        self._recorded = self._record() if self.device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Map batched inputs (N, ...), as the artifact declares them, to the network's outputs on the CPU."""
        if self._recorded:
            return self._recorded(*inputs)
        program = self._programs[bucket_for(self.batches, len(inputs[0]))]
        return tuple(y.cpu() for y in program(*(channels_last(x.to(self.device)) for x in inputs)))

    def warm_up(self) -> None:
        """Run zeros in every bucket, so that no request pays for first-call set-up."""
        for size in self.batches:
            self(*(torch.zeros(size, *i.shape, dtype=getattr(torch, i.dtype)) for i in self.inputs))

    @torch.inference_mode()
    def _record(self) -> BucketRunner | None:
        try:
            return BucketRunner(self._programs, self.inputs, self.device, CudaRecorder(self.device))
        except RuntimeError as error:
            log.warning("the network runs without CUDA graphs: %s", " ".join(str(error).split())[:300])
            return None
