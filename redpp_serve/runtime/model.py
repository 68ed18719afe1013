"""An artifact that is ready to answer requests, with each layer run by the kernel of a plan."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpp_serve.engines import ENGINES, OWN
from redpp_serve.graph.artifact import LoadedArtifact, load
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.passes import check_served, set_switches
from redpp_serve.graph.ranges import blank
from redpp_serve.graph.sizes import planned, resized
from redpp_serve.runtime.buckets import Bucket, Sizes, as_sizes, buckets, nearest_sizes
from redpp_serve.runtime.cuda_graphs import BucketRunner, CudaRecorder, Shapes, record_sizes
from redpp_serve.runtime.device import device_name
from redpp_serve.runtime.engine_choice import Chosen, check_engine, choose_engine
from redpp_serve.runtime.engine_network import AUTO, Network, own_precisions, own_run, served_precisions
from redpp_serve.runtime.memory import free_memory
from redpp_serve.runtime.plan import Choice, Plan
from redpp_serve.runtime.plan_cache import PlanCache, default_path
from redpp_serve.runtime.planner import PLAN_SECONDS, plan_sizes
from redpp_serve.runtime.serving_graph import (
    PlanContext,
    batch_buckets,
    bucket_for,
    channels_last,
    dense_program,
    planned_programs,
    serving_graph,
)

log = logging.getLogger(__name__)


class ServingModel:
    """Runs the artifact of an original or a pruned network.

    On a GPU, each batch bucket is a recorded CUDA graph and requests are padded to it; a network that cannot be
    recorded runs call by call. On a CPU, a bucket decides only which kernels run, and rows are never padded.

    Where sizes of the inputs vary, engines and kernels are chosen at the smallest, the declared and the largest sizes,
    and a request is served by the choice for the nearest. A GPU records few sizes; others run call by call.

    Args:
        source: path of the artifact, or its bytes.
        device: where to run, such as ``cpu`` or ``cuda:0``. A GPU becomes the process's current device.
        precision: ``fp32``, ``tf32`` (on a GPU; on a CPU the same as fp32), ``fp16``, ``bf16``, or ``int8`` where an
            engine serves it; ``auto`` for the fastest that the artifact allows. fp32 and tf32 set torch's switches for
            the whole process.
        batch: the largest batch to be ready for; larger ones are served too, in parts on a GPU.
        plan_seconds: about how long timing engines and kernels may take; 0 for the own runtime with dense kernels.
        engine: the engine that runs the network, ``redpp`` for the own runtime; ``auto`` for the fastest.
        cache: where their times are kept: ``default`` for the user's cache file, None for nowhere.
        everything: time also kernels that the rules would skip.

    Attributes:
        description: what the artifact says about itself.
        inputs: the network's inputs.
        output_names: the names of its outputs, in order.
        names_outputs: whether a reply is read by these names, see `Graph.names_outputs`.
        device: where the network runs.
        precision: the precision that it runs in, as `Plan.precision` names it.
        batches: the batch buckets, ascending.
        sizes: the choices of sizes that are planned for, the declared one first; one without any where none varies.
        plan: the engine that runs it, and the kernels of its layers.

    Raises:
        RedppError: the artifact is damaged, the precision unknown, or the network does not run in it.
    """

    def __init__(  # noqa: PLR0913 - given by keyword
        self,
        source: Path | bytes,
        device: str = "cpu",
        *,
        precision: str = "fp32",
        batch: int = 1,
        plan_seconds: float = PLAN_SECONDS,
        engine: str = AUTO,
        cache: PlanCache | str | None = "default",
        everything: bool = False,
    ) -> None:
        check_served(precision)
        check_engine(engine)
        start = time.perf_counter()
        artifact = load(source)
        self.description: dict[str, Any] = artifact.description
        self.inputs: tuple[InputSpec, ...] = artifact.graph.inputs
        self.output_names, self.names_outputs = artifact.graph.output_names, artifact.graph.names_outputs
        self.device = torch.device(device)
        self.batches = tuple(batch_buckets(batch))
        self.sizes: tuple[Sizes, ...] = tuple(map(as_sizes, planned(self.inputs)))
        self._buckets = buckets(self.batches, self.sizes, self.inputs)
        self._batches = {each: [b.batch for b in self._buckets if b.sizes == each] for each in self.sizes}
        served = served_precisions(artifact.description, precision)
        own = own_precisions(served, self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
            set_switches("tf32" if "tf32" in own else "fp32")
        kept = PlanCache(default_path()) if isinstance(cache, str) else cache
        contexts = {name: PlanContext.prepare(artifact.graph, self.device, name) for name in own}
        artifact = replace(artifact, graph=self._engine_graph(artifact, contexts, engine))  # frees the stored weights
        chosen = self._choose_engine(artifact, served, contexts, engine, plan_seconds, kept)
        self._engines = {c.bucket: chosen.runs[f"{c.engine} {c.precision}"] for c in chosen.choices if c.engine != OWN}
        kernels: list[Choice] = []
        self._programs: dict[Bucket, Program] = {}
        for name, context in contexts.items():
            here = [c.bucket for c in chosen.choices if c.engine == OWN and c.precision == name]
            end = start + plan_seconds if plan_seconds else 0.0
            found = plan_sizes(context, here, end, cache=kept, everything=everything)
            self._programs |= planned_programs(context, here, partial(_kernel, _by_bucket(found)))
            kernels += found
        self.plan = Plan(
            device_name(self.device),
            "+".join(dict.fromkeys(choice.precision for choice in chosen.choices)),
            self.batches,
            tuple(kernels),
            time.perf_counter() - start,
            chosen.choices,
            chosen.left_out,
            chosen.built,
        )
        self.precision = self.plan.precision
        self._recorded = self._record() if self.device.type == "cuda" else {}
        del artifact, contexts, chosen  # what no bucket runs
        free_memory()

    def _choose_engine(
        self,
        artifact: LoadedArtifact,
        served: tuple[str, ...],
        contexts: Mapping[str, PlanContext],
        engine: str,
        seconds: float,
        cache: PlanCache | None,
    ) -> Chosen:
        network = Network(artifact, artifact.graph, served, self.device, self.sizes)
        dense = {name: own_run(dense_program(context), self.device) for name, context in contexts.items()}
        return choose_engine(network, dense, self.batches, engine=engine, seconds=seconds, cache=cache)

    def _engine_graph(self, artifact: LoadedArtifact, contexts: Mapping[str, PlanContext], engine: str) -> Graph:
        """Return the graph from which engines are built: on the CPU and in fp32, since they narrow it themselves."""
        cpu = self.device.type == "cpu"
        if (cpu and "fp32" in contexts) or (not cpu and engine not in ENGINES):
            return next(iter(contexts.values())).graph
        return serving_graph(artifact.graph, torch.device("cpu"))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Map batched inputs (N, ...), as the artifact declares them, to the network's outputs on the CPU."""
        sizes = self.sizes[0] if len(self.sizes) == 1 else self._sizes_for(inputs)
        bucket = Bucket(bucket_for(self._batches[sizes], len(inputs[0])), sizes)
        run = self._engines.get(bucket)
        return run(inputs) if run else self._run_here(bucket, inputs)

    def _sizes_for(self, inputs: tuple[Tensor, ...]) -> Sizes:
        return nearest_sizes(self.sizes, self.inputs, [x.shape[1:] for x in inputs])

    @torch.inference_mode()
    def _run_here(self, bucket: Bucket, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the own runtime; engines need no inference mode."""
        if self._recorded and (recorded := self._recorded.get(tuple(x.shape[1:] for x in inputs))):
            return recorded(*inputs)
        return tuple(y.cpu() for y in self._programs[bucket](*(channels_last(x.to(self.device)) for x in inputs)))

    def warm_up(self) -> None:
        """Run blank inputs in every bucket, so that no request pays for first-call set-up."""
        for bucket in self._buckets:
            self(*(blank(resized(spec, dict(bucket.sizes)), bucket.batch) for spec in self.inputs))

    @torch.inference_mode()
    def _record(self) -> dict[Shapes, BucketRunner]:
        try:
            return record_sizes(self._programs, self.inputs, self.sizes, self.device, CudaRecorder(self.device))
        except RuntimeError as error:
            log.warning("the network runs without CUDA graphs: %s", " ".join(str(error).split())[:300])
            return {}


def _by_bucket(choices: Sequence[Choice]) -> dict[tuple[str, Bucket], str]:
    return {(choice.layer, choice.bucket): choice.kernel for choice in choices}


def _kernel(table: Mapping[tuple[str, Bucket], str], layer: str, bucket: Bucket) -> str:
    return table[layer, bucket]
