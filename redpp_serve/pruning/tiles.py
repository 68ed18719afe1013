"""The step of widths that pays in the engine that serves: engines pad channels to tiles, and half a tile costs a whole.

Two convolutions, ``_OUTER`` -> width -> ``_OUTER`` channels, are timed at widths around the steps that come into
question, in the fastest of the installed engines, or the one that was asked for. The times are kept beside those of
kernels (`runtime.plan_cache`), so a machine measures once and later runs step alike.

What a step is worth: ResNet-50 of random weights with about 0.55 of its multiply-accumulates, at batch 8 on one thread
of a processor with AMX, timed in turns with the original in OpenVINO: in bfloat16 1.45 times as fast with widths in
steps of 8, 1.58 in steps of 16 and 1.84 of 32; in fp32 1.61, 1.68 and 1.74.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from redpp_serve.engines import ENGINES, ON_CPU, OWN
from redpp_serve.engines.processor import describe
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.graph.layers import find_layers
from redpp_serve.options import RED, Options, Serving
from redpp_serve.runtime.engine_choice import choose_engine
from redpp_serve.runtime.engine_network import AUTO, Candidate, EngineRun, Network, own_run
from redpp_serve.runtime.plan import Timing
from redpp_serve.runtime.plan_cache import PlanCache, default_path, device_key
from redpp_serve.runtime.serving_graph import PlanContext, dense_program
from redpp_serve.runtime.timing import FEWEST_ROUNDS, MOST_ROUNDS, rounds, timed, torch_threads
from redpp_serve.stages import Stages

STEPS = (8, 16, 32, 64)  # the first is taken where nothing is measured
WIDTHS = (40, 48, 56, 64, 72, 80, 96, 112, 128)
_PADDED = 0.7  # of what fewer channels should save: a step pays where less is saved than this
_FEWEST_STEPS = 4  # that a layer of median width has
_PAIRS, _OUTER, _SIZE, _BATCH = 3, 128, 14, 4
_CHOICE_SECONDS, _TIMING_SECONDS = 4.0, 3.0  # at most
_WARM_UPS = 2


@dataclass(frozen=True)
class Step:
    """A step of widths.

    Attributes:
        channels: the step.
        reason: where it comes from, in words.
    """

    channels: int
    reason: str


def with_step(options: Options, stages: Stages, graph: Graph, serving: Serving = Serving()) -> Options:
    """Put the measured step of widths in the place of ``--round-to auto``; other options are returned as they are.

    Half of the network's layers keep at least `_FEWEST_STEPS` steps to choose from, and nothing is measured where that
    leaves the first of `STEPS` alone.

    Args:
        options: the options of a pruning run.
        stages: collects (and prints) the steps of the run.
        graph: the network.
        serving: the engine, precision and threads that the networks are served with.
    """
    if isinstance(options.round_to, int):
        return options
    if options.method == RED:
        return replace(options, round_to=STEPS[0])
    layers = [layer.outputs for layer in find_layers(graph) if not layer.is_embedding]
    width = int(statistics.median(layers)) if layers else 0
    widest = max((step for step in STEPS if step * _FEWEST_STEPS <= width), default=STEPS[0])
    with stages.run("step") as stage:
        found = Step(STEPS[0], f"half of the layers have at most {width} channels")
        if widest > STEPS[0]:
            found = measured_step(torch.device(options.device), serving, PlanCache(default_path()))
        if found.channels > widest:
            found = Step(widest, f"{found.reason}; wider steps are too few for half of the layers ({width} channels)")
        stage.reason = f"widths are multiples of {found.channels}: {found.reason}"
    return replace(options, round_to=found.channels)


def measured_step(device: torch.device, serving: Serving, cache: PlanCache) -> Step:
    """Return the step of widths that pays on a device, from times that are kept or taken now (two to five seconds).

    Args:
        device: where the networks are served.
        serving: the engine, precision and threads that they are served with.
        cache: where times of earlier runs are looked up and new ones kept.
    """
    if device.type != "cpu":
        return Step(STEPS[0], f"the own runtime serves on {device.type}")
    with torch_threads(serving.threads):
        precision = "bf16" if _in_bf16(serving) else "fp32"
        key = f"{device_key(device, precision)}, {describe()}"
        versions = ", ".join(ENGINES[name].version for name in ON_CPU)
        signature = f"step of widths, engine {serving.engine}, {versions}"
        found = cache.find(key, signature)
        if found is None:
            try:
                times = _measure(device, serving.engine, precision, cache)
            except Exception as error:  # whatever an engine raises, pruning goes on without its tiles
                return Step(STEPS[0], f"nothing was measured: {' '.join(str(error).split())[:200]}")
            cache.add(key, {signature: times})
        else:
            times = found[0]
    return _step_of(times)


def _in_bf16(serving: Serving) -> bool:
    """Tell whether the pruned version is served in bfloat16: where asked for, or where its engine gains by it."""
    names = ON_CPU if serving.engine == AUTO else [name for name in ON_CPU if name == serving.engine]
    offered = any("bf16" in ENGINES[name].precisions() and not ENGINES[name].unavailable() for name in names)
    return serving.precision == "bf16" or (serving.precision == AUTO and offered)


def best_step(seconds: Mapping[int, float]) -> int:
    """Return the largest of `STEPS` such that widths between two of its multiples cost like the upper one.

    A step pays if the step before it does, and if the widths half-way between its multiples save clearly less than
    they would if time grew evenly with the width.

    Args:
        seconds: the time of a network at each of `WIDTHS`.
    """
    low, high = min(seconds), max(seconds)
    slope = (seconds[high] - seconds[low]) / (high - low)
    best = STEPS[0]
    for step in STEPS[1:] if slope > 0 else ():
        pairs = [(w, w + step // 2) for w in seconds if w % step == step // 2 and w + step // 2 in seconds]
        saved = statistics.median(seconds[upper] - seconds[width] for width, upper in pairs)
        if saved > _PADDED * slope * step / 2:
            break
        best = step
    return best


def _step_of(times: Mapping[str, Timing]) -> Step:
    """Decide by the times of `_measure`."""
    split = [(name.rpartition(" "), timing.seconds) for name, timing in times.items()]
    engine = split[0][0][0]
    if Candidate.parse(engine).engine == OWN:
        return Step(STEPS[0], "the own runtime serves here")
    step = best_step({int(width): seconds for (_, _, width), seconds in split})
    if step == STEPS[0]:
        return Step(step, f"{engine} is faster at each of them")
    return Step(step, f"{engine} takes as long for widths between two of them as for the upper one")


def _measure(device: torch.device, engine: str, precision: str, cache: PlanCache) -> dict[str, Timing]:
    """Time the network at all widths in the fastest engine; at the last alone where only the own runtime is left."""
    network = _network(WIDTHS[-1], device, precision)
    context = PlanContext.prepare(network.artifact.graph, device, precision)
    own = {precision: own_run(dense_program(context), device)}
    chosen = choose_engine(network, own, (_BATCH,), engine=engine, seconds=_CHOICE_SECONDS, cache=cache)
    for run in chosen.runs.values():
        run.close()
    tried = {name: t for name, t in chosen.choices[0].times.items() if Candidate.parse(name).engine != OWN}
    if not tried:
        return {f"{Candidate(OWN, precision)} {WIDTHS[-1]}": Timing(1.0, 1.0)}
    choice = Candidate.parse(min(tried, key=lambda name: (tried[name], name)))
    runs = [_network(width, device, precision).run(choice) for width in WIDTHS]
    found, end = list[list[float]](), time.perf_counter() + _TIMING_SECONDS
    for row in itertools.islice(rounds(_calls(runs, network.inputs(_BATCH))), MOST_ROUNDS):
        found.append(row)
        if time.perf_counter() > end and len(found) >= FEWEST_ROUNDS:
            break
    for run in runs:
        run.close()
    # Other work on the machine only adds to the processor's time, too, and small differences count here.
    least = [min(column) for column in zip(*found, strict=True)]
    return {f"{choice} {width}": Timing(seconds, 1.0) for width, seconds in zip(WIDTHS, least, strict=True)}


def _calls(runs: Sequence[EngineRun], inputs: tuple[torch.Tensor, ...]) -> list[Callable[[], float]]:
    for run in runs:
        for _ in range(_WARM_UPS):
            run(inputs)
    return [timed(partial(run, inputs), time.process_time) for run in runs]


def _network(width: int, device: torch.device, precision: str) -> Network:
    """Return `_PAIRS` pairs of convolutions with that many channels within each."""
    generator = torch.Generator().manual_seed(width)
    tensors: dict[str, torch.Tensor] = {}
    nodes: list[Node] = []
    geometry: tuple[Any, ...] = (None, [1, 1], [1, 1])
    name = "x"
    for layer, (rows, columns) in enumerate([(width, _OUTER), (_OUTER, width)] * _PAIRS):
        tensors[f"weight{layer}"] = 0.05 * torch.randn(rows, columns, 3, 3, generator=generator)
        nodes.append(Node(f"conv{layer}", "aten.conv2d.default", (Ref(name), Ref(f"weight{layer}"), *geometry)))
        name = f"active{layer}"
        nodes.append(Node(name, "aten.relu.default", (Ref(f"conv{layer}"),)))
    graph = Graph((InputSpec("x", (_OUTER, _SIZE, _SIZE)),), tensors, tuple(nodes), (name,))
    sample = torch.randn(_BATCH, _OUTER, _SIZE, _SIZE, generator=generator)
    context = PlanContext.prepare(graph, device)
    return Network(LoadedArtifact(graph, {}, (sample,)), context.graph, (precision,), device)
