"""A network with everything that engines need of it: its graph, its ONNX files, its stored inputs, what it allows."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpp_serve.engines import ENGINES, Engine
from redpp_serve.engines.processor import bf16_pays, usable_threads
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.passes import PRECISIONS, SERVED
from redpp_serve.graph.quantization import in_int8, symmetric
from redpp_serve.graph.ranges import blank
from redpp_serve.graph.sizes import drawn, resized, tiled
from redpp_serve.runtime.buckets import AS_DECLARED, Sizes, as_sizes
from redpp_serve.runtime.memory import forget_mapped
from redpp_serve.runtime.serving_graph import channels_last

AUTO = "auto"
_BETWEEN = 2  # choices of sizes at which engines are checked beside those that are planned for

Run = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Candidate:
    """An engine with a precision."""

    engine: str
    precision: str

    def __str__(self) -> str:
        return f"{self.engine} {self.precision}"

    @staticmethod
    def parse(text: str) -> Candidate:
        """Invert ``str``."""
        return Candidate(*text.split(" ", 1))


class EngineRun:
    """A network in an engine, for torch's tensors.

    Args:
        engine: the engine.
        precision: the precision.
        model: the file of the ONNX model.
        threads: number of threads.
        device: the device's number, where there are several.
    """

    def __init__(self, engine: Engine, precision: str, model: Path, threads: int, device: int = 0) -> None:
        self._session = engine.session(model, precision, threads, device)
        self._mapped: Path | None = model.parent

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map inputs (N, ...) in any layout to outputs (N, ...) that the caller owns."""
        found = self._session([x.detach().contiguous().numpy() for x in inputs])
        if self._mapped:  # the first call has laid the weights out anew: the file's are not read again
            forget_mapped(self._mapped)
            self._mapped = None
        return tuple(torch.from_numpy(y) for y in found)

    def close(self) -> None:
        """Free the network."""
        self._session.close()


@dataclass
class Network:
    """A network with everything that engines need of it.

    Attributes:
        artifact: the stored network.
        graph: its graph as it is served in fp32, see `serving_graph`; on the CPU for engines.
        precisions: the precisions that it may be served in.
        device: where the own runtime runs it.
        sizes: the choices of sizes to plan for, where they vary; that of the inputs' shapes alone by default.
    """

    artifact: LoadedArtifact
    graph: Graph
    precisions: tuple[str, ...]
    device: torch.device
    sizes: tuple[Sizes, ...] = (AS_DECLARED,)
    _models: dict[str, Path] = field(default_factory=dict)
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def model(self, candidate: Candidate) -> Path:
        """Return the file of the ONNX model for a candidate; each is written once, until `forget_models`.

        Raises:
            RedppError: the graph has no form in ONNX, or the artifact no ranges for eight bits.
        """
        from redpp_serve.engines.onnx_builder import write_onnx  # noqa: PLC0415 - needs onnx, which is optional

        signed = candidate.precision == "int8" and ENGINES[candidate.engine].symmetric
        kind = "signed" if signed else "int8" if candidate.precision == "int8" else "floats"
        if kind not in self._models:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="redpp-network-")
            folder = Path(self._folder.name) / kind
            folder.mkdir(exist_ok=True)
            graph = self.graph if kind == "floats" else self.in_int8(signed)
            self._models[kind] = write_onnx(graph, folder, signed)
        return self._models[kind]

    def forget_models(self) -> None:
        """Remove the files of `model`; what has mapped them keeps their content."""
        self._models.clear()
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    def in_int8(self, about_zero: bool = False) -> Graph:
        """Return the served graph with the stored ranges put in, as they are or widened to lie about zero."""
        stored = ranges(self.artifact.description)
        return in_int8(self.graph, symmetric(stored) if about_zero else stored)

    def run(self, candidate: Candidate) -> EngineRun:
        """Build the network in an engine."""
        model = self.model(candidate)
        return EngineRun(ENGINES[candidate.engine], candidate.precision, model, self.threads, self.device.index or 0)

    @property
    def threads(self) -> int:
        """The number of threads of an engine."""
        return usable_threads(torch.get_num_threads())

    @property
    def clock(self) -> Clock:
        """The clock of measurements: the processor's where one thread computes, since other work says nothing of it."""
        return time.process_time if self.device.type == "cpu" and self.threads == 1 else time.perf_counter

    @property
    def digest(self) -> str:
        """Sixteen digits that differ where the operators, shapes, stored kinds of values or precisions do."""
        nodes = [(n.op, repr((n.args, n.kwargs))) for n in self.graph.nodes]
        shapes = [(name, list(t.shape)) for name, t in self.graph.tensors.items()]
        inputs = [(i.name, list(i.shape), i.dtype, *map(str, i.varying)) for i in self.graph.inputs]
        return hashlib.sha256(json.dumps([nodes, shapes, inputs]).encode()).hexdigest()[:16]

    @property
    def stored(self) -> int:
        """The number of stored inputs, at least 1."""
        return len(self.artifact.samples[0]) if self.artifact.samples else 1

    def inputs(self, batch: int, sizes: Sizes = AS_DECLARED) -> tuple[Tensor, ...]:
        """Return what `stored_inputs` does of the artifact."""
        return stored_inputs(self.artifact, batch, dict(sizes))

    def shapes(self, sizes: Sizes) -> list[tuple[int, ...]]:
        """Return the shapes of one of each input at a choice of sizes."""
        return [resized(spec, dict(sizes)).shape for spec in self.graph.inputs]

    @property
    def checked(self) -> tuple[Sizes, ...]:
        """The choices of sizes at which engines are checked: those to plan for, and some between them."""
        if self.sizes == (AS_DECLARED,):
            return self.sizes
        others = drawn(self.graph.inputs, len(self.sizes) + _BETWEEN, seed=1)[len(self.sizes) :]
        return tuple(dict.fromkeys((*self.sizes, *map(as_sizes, others))))


def stored_inputs(artifact: LoadedArtifact, batch: int, sizes: Mapping[str, int] = {}) -> tuple[Tensor, ...]:
    """Return an artifact's stored inputs, repeated to a batch and to sizes that vary; blank ones where it has none."""
    specs = [resized(spec, sizes) for spec in artifact.graph.inputs]
    if not artifact.samples:
        return tuple(blank(spec, batch) for spec in specs)
    return tuple(tiled(x, (batch, *spec.shape)) for x, spec in zip(artifact.samples, specs, strict=True))


def recorded_error(description: Mapping[str, Any], precision: str) -> float:
    """Return the error that an artifact records for a precision, at most 1; 0 where it records none."""
    try:
        error = float((description.get("precision") or {})["errors"][precision])
    except (AttributeError, KeyError, TypeError, ValueError):
        return 0.0
    return min(error, 1.0) if error > 0 else 0.0


def ranges(description: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the ranges that an artifact stores for eight bits; none where it stores none."""
    try:
        found = (description.get("precision") or {}).get("ranges") or {}
        pairs = {str(name): (float(low), float(high)) for name, (low, high) in found.items()}
    except (AttributeError, TypeError, ValueError):
        return {}
    return pairs if all(-math.inf < low <= high < math.inf for low, high in pairs.values()) else {}


def served_precisions(description: Mapping[str, Any], wanted: str) -> tuple[str, ...]:
    """Return the precisions that a network may be served in: the one asked for, or those within the error budget."""
    if wanted != AUTO:
        return (wanted,)
    section = description.get("precision")
    allowed = section.get("auto") if isinstance(section, dict) else None
    return ("fp32", *(p for p in SERVED if p != "fp32" and isinstance(allowed, list) and p in allowed))


def own_precisions(served: Sequence[str], device: torch.device) -> tuple[str, ...]:
    """Return the precisions that the own runtime is tried in, the incumbent's first: fp32 where it is among them."""
    known = [p for p in served if p in PRECISIONS]
    if device.type == "cpu" and len(known) > 1:
        known = [p for p in known if p == "fp32" or (p == "bf16" and bf16_pays())]
    return tuple(known) or ("fp32",)


def own_run(program: Program, device: torch.device) -> Run:
    """Return the own runtime's run of a program, with outputs on the CPU."""

    @torch.inference_mode()
    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(y.cpu() for y in program(*(channels_last(x.to(device)) for x in inputs)))

    return run
