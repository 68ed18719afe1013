"""The milliseconds of each layer in the engine that would serve a network on this machine, for `inspect`."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from redpp_serve.engines import ENGINES, OWN
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import weight_calls
from redpp_serve.graph.passes import activation_of
from redpp_serve.options import Serving
from redpp_serve.runtime.device import parse_device
from redpp_serve.runtime.engine_choice import choose_engine
from redpp_serve.runtime.engine_network import Candidate, Network, own_run
from redpp_serve.runtime.fused_layer import fused_layers
from redpp_serve.runtime.plan_cache import PlanCache, default_path
from redpp_serve.runtime.serving_graph import PlanContext, channels_last, dense_program
from redpp_serve.runtime.timing import random_input, torch_threads

_PRECISION = "fp32"
_CHOICE_SECONDS, _PROFILE_SECONDS = 4.0, 1.0  # at most, about
_FEWEST_RUNS, _MOST_RUNS = 5, 100
_SAMPLES = 2


@dataclass(frozen=True)
class LayerTimes:
    """The times of a network's parts in one engine, at batch size 1.

    Attributes:
        engine: the engine, ``redpp`` for the own runtime.
        precision: the precision.
        threads: number of threads.
        layers: the seconds of each layer by name; one that the engine fuses into another has none.
        others: the seconds of all else.
    """

    engine: str
    precision: str
    threads: int
    layers: Mapping[str, float]
    others: float

    def __str__(self) -> str:
        layers, threads = sum(self.layers.values()), f"{self.threads} thread" + "s" * (self.threads != 1)
        whole = layers + self.others
        return (
            f"{self.engine} {self.precision}, batch 1, {threads}: {whole * 1e3:.3g} ms, "
            f"{layers / max(whole, 1e-12):.0%} of it in the layers below"
        )


def layer_times(graph: Graph, serving: Serving = Serving()) -> LayerTimes | None:
    """Time the layers of a network in the engine that would serve it here; None where nothing could be measured.

    The engine follows from kept times where a worker has left some, and from a short trial elsewhere. Nothing is kept.

    Args:
        graph: a captured network.
        serving: the engine and the threads that it is served with.
    """
    device = parse_device(None)
    with torch_threads(serving.threads), contextlib.suppress(RedppError, RuntimeError, ValueError, TypeError, OSError):
        context = PlanContext.prepare(graph, device, _PRECISION)
        generator = torch.Generator().manual_seed(0)
        samples = tuple(random_input(spec, _SAMPLES, torch.device("cpu"), generator) for spec in graph.inputs)
        network = Network(LoadedArtifact(graph, {}, samples), context.graph, (_PRECISION,), device)
        engine = _engine(network, context, serving.engine)
        if engine != OWN:
            with contextlib.suppress(Exception):  # whatever an engine raises, the own runtime is left
                return _in_engine(network, engine)
        return _in_own_runtime(network, context)
    return None


def _engine(network: Network, context: PlanContext, wanted: str) -> str:
    """Return the engine that serves batches of one."""
    own = {_PRECISION: own_run(dense_program(context), network.device)}
    kept = PlanCache(None, shipped=default_path())  # to look up, not to write to
    chosen = choose_engine(network, own, (1,), engine=wanted, seconds=_CHOICE_SECONDS, cache=kept)
    for run in chosen.runs.values():
        run.close()
    return chosen.choices[0].engine


def _in_engine(network: Network, engine: str) -> LayerTimes | None:
    from redpp_serve.engines.onnx_builder import to_onnx  # noqa: PLC0415 - needs onnx, which is optional
    from redpp_serve.engines.onnx_writer import node_names  # noqa: PLC0415

    model = to_onnx(network.graph)
    session = ENGINES[engine].session(model.SerializeToString(), _PRECISION, network.threads, profiled=True)
    try:
        inputs = [x.contiguous().numpy() for x in network.inputs(1)]
        seconds = session.node_seconds(inputs, _PROFILE_SECONDS)
    finally:
        session.close()
    owners = node_names(model, network.graph)
    return _times(network, Candidate(engine, _PRECISION), ((_owner(name, owners), s) for name, s in seconds.items()))


def _owner(name: str, owners: Mapping[str, str]) -> str:
    """Return the graph's node behind an engine's: engines append to the names of those that they rewrite."""
    made = [known for known in owners if name.startswith(known) and not name[len(known) :][:1].isalnum()]
    return owners[max(made, key=len)] if made else ""


@torch.inference_mode()
def _in_own_runtime(network: Network, context: PlanContext) -> LayerTimes | None:
    program = dense_program(context)
    inputs = [channels_last(x.to(network.device)) for x in network.inputs(1)]
    program(*inputs)
    found: list[dict[str, float]] = []
    end = time.perf_counter() + _PROFILE_SECONDS
    while len(found) < _FEWEST_RUNS or (len(found) < _MOST_RUNS and time.perf_counter() < end):
        found.append(program.seconds(*inputs))
    medians = ((name, statistics.median(run[name] for run in found)) for name in found[0])
    return _times(network, Candidate(OWN, _PRECISION), medians)


def _times(network: Network, candidate: Candidate, seconds: Iterable[tuple[str, float]]) -> LayerTimes | None:
    """Add up what belongs to each layer, by the names of the served graph's nodes."""
    layers = {layer.node.name: layer.name for layer in fused_layers(network.graph)}
    users = network.graph.users()
    for weight, calls in weight_calls(network.graph).items():  # those that only engines fuse with what follows
        name = weight.removesuffix(".weight").removesuffix(".folded")
        for call in calls:
            readers = users.get(call.name, [])
            alone = len(readers) == 1 and activation_of(readers[0]) is not None
            layers |= dict.fromkeys((call.name, *(reader.name for reader in readers if alone)), name)
    found, others = dict[str, float](), 0.0
    for node, value in seconds:
        if node in layers and value > 0:
            found[layers[node]] = found.get(layers[node], 0.0) + value
        else:
            others += value
    return LayerTimes(candidate.engine, candidate.precision, network.threads, found, others) if found else None
