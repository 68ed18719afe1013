"""The step of widths that pays in the engine that serves: engines pad channels to tiles, and half a tile costs a whole.

Two convolutions, ``_OUTER`` -> width -> ``_OUTER`` channels, are timed at widths around the steps that come into
question, in the fastest of the installed engines, or the one that was asked for. The times are kept beside those of
kernels (`runtime.plan_cache`), so a machine measures once and later runs step alike.
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

from redpp_serve.engines import ENGINES, OWN
from redpp_serve.engines.processor import describe
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.options import Options, Serving
from redpp_serve.runtime.engine_choice import Candidate, EngineRun, Network, choose_engine, own_run
from redpp_serve.runtime.plan import Timing
from redpp_serve.runtime.plan_cache import PlanCache, default_path, device_key
from redpp_serve.runtime.serving_graph import PlanContext, dense_program
from redpp_serve.runtime.timing import FEWEST_ROUNDS, MOST_ROUNDS, rounds, timed, torch_threads
from redpp_serve.stages import Stages

STEPS = (8, 16, 32, 64)  # the first is taken where nothing is measured
WIDTHS = (40, 48, 56, 64, 72, 80, 96, 128)
_PADDED = 0.7  # of what fewer channels should save: a step pays where less is saved than this
_OUTER, _SIZE, _BATCH = 128, 14, 4
_CHOICE_SECONDS, _TIMING_SECONDS = 4.0, 1.0  # at most
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


def with_step(options: Options, stages: Stages, serving: Serving = Serving()) -> Options:
    """Put the measured step of widths in the place of ``--round-to auto``; other options are returned as they are.

    Args:
        options: the options of a pruning run.
        stages: collects (and prints) the steps of the run.
        serving: the engine, precision and threads that the networks are served with.
    """
    if isinstance(options.round_to, int):
        return options
    with stages.run("step") as stage:
        found = measured_step(torch.device(options.device), serving, PlanCache(default_path()))
        stage.reason = f"widths are multiples of {found.channels}: {found.reason}"
    return replace(options, round_to=found.channels)


def measured_step(device: torch.device, serving: Serving, cache: PlanCache) -> Step:
    """Return the step of widths that pays on a device, from times that are kept or taken now (one to three seconds).

    Args:
        device: where the networks are served.
        serving: the engine, precision and threads that they are served with.
        cache: where times of earlier runs are looked up and new ones kept.
    """
    if device.type != "cpu":
        return Step(STEPS[0], f"the own runtime serves on {device.type}")
    with torch_threads(serving.threads):
        precision = serving.precision if serving.precision == "bf16" else "fp32"
        key = f"{device_key(device, precision)}, {describe()}"
        versions = ", ".join(engine.version for engine in ENGINES.values())
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
    # Other work on the machine only adds to a time, and small differences count here.
    least = [min(column) for column in zip(*found, strict=True)]
    return {f"{choice} {width}": Timing(seconds, 1.0) for width, seconds in zip(WIDTHS, least, strict=True)}


def _calls(runs: Sequence[EngineRun], inputs: tuple[torch.Tensor, ...]) -> list[Callable[[], float]]:
    for run in runs:
        for _ in range(_WARM_UPS):
            run(inputs)
    return [timed(partial(run, inputs)) for run in runs]


def _network(width: int, device: torch.device, precision: str) -> Network:
    """Return two convolutions with that many channels between them."""
    generator = torch.Generator().manual_seed(width)
    shapes = {"first": (width, _OUTER, 3, 3), "second": (_OUTER, width, 3, 3)}
    tensors = {name: 0.05 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    geometry: tuple[Any, ...] = (None, [1, 1], [1, 1])
    nodes = (
        Node("inner", "aten.conv2d.default", (Ref("x"), Ref("first"), *geometry)),
        Node("active", "aten.relu.default", (Ref("inner"),)),
        Node("outer", "aten.conv2d.default", (Ref("active"), Ref("second"), *geometry)),
    )
    graph = Graph((InputSpec("x", (_OUTER, _SIZE, _SIZE)),), tensors, nodes, ("outer",))
    sample = torch.randn(_BATCH, _OUTER, _SIZE, _SIZE, generator=generator)
    context = PlanContext.prepare(graph, device)
    return Network(LoadedArtifact(graph, {}, (sample,)), context.graph, (precision,), device)
