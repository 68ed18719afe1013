"""Choosing the engine and the precision that run a network, by measurement on the device that serves.

The project's own runtime with dense kernels is the incumbent. The engines that are installed are checked and timed in
processes of their own (`engine_times`). What wins is built here. One engine serves all buckets unless that costs 2 %
somewhere: about as much as a second engine in the same process costs.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpp_serve import engines
from redpp_serve.engines import ENGINES, OWN
from redpp_serve.engines.processor import describe
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.graph.graph import Graph, once_per_graph
from redpp_serve.graph.sizes import is_varying
from redpp_serve.runtime.buckets import Bucket, buckets
from redpp_serve.runtime.compiled import COMPILED, CompiledRun
from redpp_serve.runtime.engine_network import AUTO, Candidate, EngineRun, Network, Run, own_run, ranges
from redpp_serve.runtime.engine_times import Expected, measure, one_line
from redpp_serve.runtime.memory import free_memory
from redpp_serve.runtime.plan import EngineChoice, Timing
from redpp_serve.runtime.plan_cache import PlanCache, default_path, device_key
from redpp_serve.runtime.serving_graph import serving_graph, serving_program
from redpp_serve.runtime.timing import timed

log = logging.getLogger(__name__)

_ENGINE_SECONDS = 8.0  # for finding the engine that would serve a network
_FEW_ROWS = 3  # of the stored inputs, at which a kept choice is checked at each of several sizes
_ONE_FOR_ALL = 1.02  # so much slower than its own best may a bucket be for one engine to serve all

# Operators whose first argument is looked into at the places that the others name.
_LOOKUPS = frozenset(
    f"aten.{name}" for name in ("embedding.default", "gather.default", "index_select.default", "index.Tensor")
)

_CASTS = frozenset({"aten.to.dtype", "aten._to_copy.default"})


@dataclass
class Chosen:
    """The outcome of a choice.

    Attributes:
        choices: the engine and precision of each bucket.
        runs: by candidate, what runs it; the own runtime is not among them.
        left_out: why candidates are not used.
        built: the seconds that building took, by candidate; the first of an engine's includes its import.
    """

    choices: tuple[EngineChoice, ...]
    runs: dict[str, EngineRun | CompiledRun] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    built: dict[str, float] = field(default_factory=dict)


def check_engine(engine: Any, where: str = "--engine") -> None:
    """Refuse a name that is no engine.

    Args:
        engine: what was given.
        where: the file or flag that says so.

    Raises:
        RedppError: it is none.
    """
    names = (AUTO, OWN, *ENGINES, COMPILED)
    if engine not in names:
        raise RedppError(f"engine is {str(engine)[:40]!r} in {where}", f"one of {', '.join(names)}", f"correct {where}")


def choose_engine(
    network: Network,
    own: Mapping[str, Run],
    batches: Sequence[int],
    *,
    engine: str = AUTO,
    seconds: float,
    cache: PlanCache | None = None,
) -> Chosen:
    """Choose the engine and precision of each bucket: of each batch size, at each of the network's choices of sizes.

    Args:
        network: the network.
        own: the own runtime with dense kernels, by precision; the first is the incumbent.
        batches: the batch sizes, ascending.
        engine: the engine to use, ``redpp`` for the own runtime; ``auto`` to choose the fastest.
        seconds: about how long trying and timing may take; 0 keeps the own runtime.
        cache: where times of earlier runs are looked up and new ones kept.
    """
    first = Candidate(OWN, next(iter(own)))
    each = buckets(batches, network.sizes, network.graph.inputs)
    if engine == COMPILED:
        return _compiled(network, first, own, each)
    candidates, left_out = _candidates(network, engine)
    if seconds <= 0 or not (candidates or len(own) > 1):
        source = "rule" if seconds > 0 else "budget"
        return Chosen(_everywhere(each, first, source), {}, left_out)
    chosen = Chosen((), {}, left_out)
    keep = cache or PlanCache(None, shipped=None)
    key = f"{device_key(network.device, '+'.join(network.precisions))}, {describe()}, {network.threads} usable"
    versions = ", ".join(ENGINES[name].version for name in sorted({c.engine for c in candidates}))
    signature = f"engines {network.digest} {versions} {_sources()}"
    names = {str(candidate) for candidate in (*(Candidate(OWN, precision) for precision in own), *candidates)}
    with keep.locked(wait_s=3 * seconds):  # workers that start together measure once
        known = {b: _known(keep, key, f"{signature} {b}", names) for b in each}
        cached = all(found and _serves(engine, found) for found in known.values())
        if cached:
            times = known
        else:
            seconds = max(seconds, ENGINES[engine].patience if engine in ENGINES else 0.0)
            measured = measure(network, own, candidates, each, seconds=seconds, everywhere=engine != AUTO)
            times, chosen.built = measured.times, measured.built
            left_out |= measured.left_out
            if all(_serves(engine, found) for found in times.values()):
                failed = {str(c): Timing(math.inf, math.inf) for c in candidates if str(c) in left_out}
                keep.add(key, {f"{signature} {b}": found | failed for b, found in times.items()})
    chosen.choices = _pick(times, each, str(first), "cached" if cached else "measured", forced=engine)
    if first.precision not in network.precisions and all(c.precision == first.precision for c in chosen.choices):
        told = f"no engine that serves {', '.join(network.precisions)} is surely faster than the own runtime"
        chosen.left_out.setdefault(", ".join(network.precisions), told)
    return _ready(network, own, chosen, first)


def _compiled(network: Network, first: Candidate, own: Mapping[str, Run], each: Sequence[Bucket]) -> Chosen:
    """Compile the network for all buckets, however long that takes; leave the own runtime where it fails."""
    candidate, reason = Candidate(COMPILED, "fp32"), ""
    times: dict[Bucket, float] = {}
    try:
        if first.precision != "fp32":
            raise RedppError(f"precision {first.precision}", "fp32 with torch-compile", "change --precision")
        run = CompiledRun(network.graph, network.device)
        expected = Expected(network, own["fp32"])
        for bucket in each:
            inputs = network.inputs(bucket.batch, bucket.sizes)
            reason = reason or expected.wrong(candidate, [run(inputs)], bucket.sizes)
            times[bucket] = min(timed(partial(run, inputs), network.clock)() for _ in range(3))
    except Exception as error:  # such as no compiler, or a cache that cannot be written
        reason = one_line(error)
    if reason:
        return Chosen(_everywhere(each, first, "failed"), {}, {str(candidate): reason})
    choices = (_choice(b, candidate, "measured", {str(candidate): times[b]}) for b in each)
    return Chosen(tuple(choices), {str(candidate): run})


def _known(cache: PlanCache, key: str, signature: str, names: Set[str]) -> dict[str, Timing]:
    """Return the kept times of a batch size, of what may serve now alone."""
    found, _ = cache.find(key, signature) or ({}, "")
    return {name: timing for name, timing in found.items() if name in names}


@functools.cache
def _sources() -> str:
    """Return eight digits that differ between releases of the engines' code."""
    digest = hashlib.sha256()
    for path in sorted((*Path(engines.__file__).parent.glob("*.py"), *Path(__file__).parent.glob("engine_*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _serves(engine: str, times: Mapping[str, Timing]) -> bool:
    """Tell whether the engine asked for ran; one that did not is tried again at each start, and says why."""
    return engine == AUTO or any(
        Candidate.parse(name).engine == engine and math.isfinite(timing.seconds) for name, timing in times.items()
    )


def check_engine_here(engine: str, device: torch.device) -> None:
    """Refuse an engine that is only used where it is named, where it cannot be used.

    Raises:
        RedppError: it serves on another kind of device, or is not installed.
    """
    found = ENGINES.get(engine)
    if found and found.patience and (reason := found.unavailable(device.type)):
        raise RedppError(
            f"--engine {engine} on {device}: {reason}",
            f"a {found.device} device, and onnxruntime with {found.provider}",
            "name another engine, or auto for the fastest",
        )


def _candidates(network: Network, engine: str) -> tuple[list[Candidate], dict[str, str]]:
    found, left_out = list[Candidate](), dict[str, str]()
    device = network.device.type
    offered = [e for e in ENGINES.values() if e.device == device and not e.patience]
    wanted = offered if engine == AUTO else [e for e in ENGINES.values() if e.name == engine]
    if any(spec.dtype == "bfloat16" for spec in network.graph.inputs):
        return found, {e.name: "inputs are of bfloat16, which engines take no arrays of" for e in wanted}
    for each in wanted:
        if reason := each.unavailable(device):
            left_out[each.name] = reason
            continue
        if not each.exact_integers and (why := _odd(network.graph)):
            left_out[each.name] = why
            continue
        if each.patience and is_varying(network.graph.inputs):
            left_out[each.name] = "it takes minutes for each size of the inputs, which vary"
            continue
        usable = [p for p in network.precisions if p in each.precisions()]
        if engine != AUTO and not usable:
            left_out[each.name] = f"it does not serve {', '.join(network.precisions)} on this processor"
        for precision in usable:
            if precision == "int8" and not ranges(network.artifact.description):
                left_out[f"{each.name} int8"] = "the artifact holds no ranges for eight bits: package the model again"
            else:
                found.append(Candidate(each.name, precision))
    return found, left_out


def _odd(graph: Graph) -> str:
    """Return what a network does with its inputs that an engine without 64 bits does not; empty for nothing."""
    if _looks_up(graph):
        return "it answers indices that are out of range, where the network refuses them"
    readers = graph.users()
    for spec in graph.inputs:
        narrow = spec.dtype in ("float32", "float16", "bool")
        if not narrow and not (
            spec.dtype in ("uint8", "int8") and all(node.op in _CASTS for node in readers.get(spec.name, ()))
        ):
            return f"it computes {spec.dtype} in fewer bits"
    return ""


def _looks_up(graph: Graph) -> bool:
    """Tell whether indices that depend on the network's inputs look something up, as token ids do."""
    inputs = {spec.name for spec in graph.inputs}
    indices = [name for node in graph.nodes if node.op in _LOOKUPS for name in tuple(node.refs())[1:]]
    return bool(graph.needed_for(indices) & inputs)


def _pick(
    times: Mapping[Bucket, Mapping[str, Timing]], each: Sequence[Bucket], first: str, source: str, forced: str
) -> tuple[EngineChoice, ...]:
    """Return the fastest candidate of each bucket; one for all where none loses more than 2 % by it."""

    def seconds(bucket: Bucket, name: str) -> float:
        timing = times[bucket].get(name)
        return timing.seconds if timing else math.inf

    def wins(bucket: Bucket, name: str) -> bool:
        return name == first or (name in times[bucket] and times[bucket][name].high < 1.0)

    names = list(dict.fromkeys(n for b in each for n in times[b]))
    usable = [n for n in names if Candidate.parse(n).engine == forced] or names if forced != AUTO else names
    best = {b: min((seconds(b, n), n) for n in usable if forced != AUTO or wins(b, n) or n == first)[1] for b in each}
    for name in sorted(set(best.values()), key=lambda n: sum(math.log(max(seconds(b, n), 1e-9)) for b in each)):
        if all(seconds(b, name) <= _ONE_FOR_ALL * seconds(b, best[b]) for b in each):
            best = dict.fromkeys(each, name)
            break
    measured = {b: {n: t.seconds for n, t in times[b].items() if math.isfinite(t.seconds)} for b in each}
    return tuple(_choice(b, Candidate.parse(best[b]), source, measured[b]) for b in each)


def _choice(bucket: Bucket, candidate: Candidate, source: str, times: Mapping[str, float]) -> EngineChoice:
    sizes = dict(bucket.sizes)
    return EngineChoice(bucket.batch, candidate.engine, candidate.precision, source, times, sizes)


def _ready(network: Network, own: Mapping[str, Run], chosen: Chosen, first: Candidate) -> Chosen:
    """Build what was chosen, and fall back to the own runtime where that fails.

    Kept times are of these operators and shapes; with other weights the engine may compute something else.
    """
    expected = Expected(network, next(iter(own.values())))
    free_memory()  # of trying, before more is needed
    for name in sorted({str(Candidate(c.engine, c.precision)) for c in chosen.choices if c.engine != OWN}):
        try:
            chosen.runs[name] = _built(network, Candidate.parse(name), chosen.built, expected)
        except (Exception, SystemExit) as error:  # a server starts without it
            log.warning("%s is left out: %s", name, one_line(error))
            chosen.left_out[name] = one_line(error)
    chosen.choices = tuple(
        c
        if c.engine == OWN or str(Candidate(c.engine, c.precision)) in chosen.runs
        else _choice(c.bucket, first, "failed", c.times)
        for c in chosen.choices
    )
    network.forget_models()
    return chosen


def _built(network: Network, candidate: Candidate, built: dict[str, float], expected: Expected) -> EngineRun:
    """Build the network in an engine here, and check it where no process of its own has done so in this run."""
    network.model(candidate)  # its time is not the engine's
    start = time.perf_counter()
    run = network.run(candidate)
    if str(candidate) in built:
        return run
    built[str(candidate)] = time.perf_counter() - start
    reason = ""
    for sizes in network.checked:
        rows = _FEW_ROWS if sizes else network.stored
        reason = reason or expected.wrong(candidate, [run(network.inputs(rows, sizes))], sizes)
    if reason:
        run.close()
        raise RuntimeError(reason)
    return run


@once_per_graph
def serving_engine(graph: Graph, device: torch.device) -> str:
    """Return the engine that would serve a stored graph in its own precision here, one input at a time."""
    served = serving_graph(graph, device)
    own = {"fp32": own_run(serving_program(graph, device), device)}
    network = Network(LoadedArtifact(graph, {}), served, ("fp32",), device)
    chosen = choose_engine(network, own, (1,), seconds=_ENGINE_SECONDS, cache=PlanCache(default_path()))
    for run in chosen.runs.values():
        run.close()
    return chosen.choices[0].engine


def run_in(engine: str, graph: Graph, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """Build a stored graph in an engine, or with the own runtime's dense kernels; inputs come on the device.

    Raises:
        Exception: whatever the engine raises on a network that it does not take.
    """
    if engine == OWN:
        return serving_program(graph, device)
    network = Network(LoadedArtifact(graph, {}), serving_graph(graph, device), ("fp32",), device)
    run = network.run(Candidate(engine, "fp32"))
    return lambda *inputs: run(inputs)


def _everywhere(each: Sequence[Bucket], candidate: Candidate, source: str) -> tuple[EngineChoice, ...]:
    return tuple(_choice(bucket, candidate, source, {}) for bucket in each)
