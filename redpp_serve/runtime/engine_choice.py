"""Choosing the engine and the precision that run a network, by measurement on the device that serves.

The project's own runtime with dense kernels is the incumbent. The engines that are installed build the network from its
ONNX form in a process of their own first (`engines.trial`): one that crashes, fails or gives other outputs on the
artifact's stored inputs is left out, with its reason. The others are timed in turns with the incumbent at each batch
bucket. One engine serves all buckets unless that costs 5 % somewhere.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpp_serve import engines
from redpp_serve.engines import ENGINES, OWN, Engine
from redpp_serve.engines.processor import bf16_pays, describe, usable_threads
from redpp_serve.engines.trial import Attempt, Outcome, try_engines
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, once_per_graph
from redpp_serve.graph.passes import PRECISIONS, SERVED
from redpp_serve.graph.quantization import in_int8
from redpp_serve.runtime.compiled import COMPILED, CompiledRun
from redpp_serve.runtime.plan import EngineChoice, Timing
from redpp_serve.runtime.plan_cache import PlanCache, default_path, device_key
from redpp_serve.runtime.serving_graph import channels_last, serving_graph, serving_program
from redpp_serve.runtime.timing import FEWEST_ROUNDS, in_turns, timed, timings

log = logging.getLogger(__name__)

AUTO = "auto"
_NEAR = 1.15  # times as slow as the fastest: candidates beyond are not timed again
_FOR_TRIALS = 0.5  # of the seconds; the rest is for timing
_ENGINE_SECONDS = 8.0  # for finding the engine that would serve a network
_UNSURE = 1.15  # a ratio of single readings may be so much too small
_ONE_FOR_ALL = 1.05  # so much slower than its own best may a bucket be for one engine to serve all
_EXACT = 1e-3  # largest error of fp32, relative to the spread of the outputs: sums in another order
# Limits for other precisions, of the error that was recorded, on a few stored inputs: eight bits are held against what
# the pass says of them, from which right engines differ by 0 to 0.035 (one that drops a scale in ConvNeXt by 0.096);
# bfloat16 is held against fp32.
_SLACK, _LEAST_LIMITS = {"int8": 1.0}, {"int8": 0.05}
_MOST_SLACK, _LEAST_LIMIT = 4.0, 0.1
_LARGEST_CHECK = 8  # rows of the largest batch that is checked

# Operators whose first argument is looked into at the places that the others name.
_LOOKUPS = frozenset(
    f"aten.{name}" for name in ("embedding.default", "gather.default", "index_select.default", "index.Tensor")
)

_CASTS = frozenset({"aten.to.dtype", "aten._to_copy.default"})

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
        model: the ONNX model.
        threads: number of threads.
    """

    def __init__(self, engine: Engine, precision: str, model: bytes, threads: int) -> None:
        self._session = engine.session(model, precision, threads)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map inputs (N, ...) in any layout to outputs (N, ...) that the caller owns."""
        return tuple(torch.from_numpy(y) for y in self._session([x.detach().contiguous().numpy() for x in inputs]))

    def close(self) -> None:
        """Free the network."""
        self._session.close()


@dataclass
class Network:
    """A network with everything that engines need of it.

    Attributes:
        artifact: the stored network.
        graph: its graph as it is served in fp32, see `serving_graph`.
        precisions: the precisions that it may be served in.
        device: where the own runtime runs it.
    """

    artifact: LoadedArtifact
    graph: Graph
    precisions: tuple[str, ...]
    device: torch.device
    _models: dict[bool, bytes] = field(default_factory=dict)

    def model(self, precision: str) -> bytes:
        """Return the ONNX model for a precision; it is built once.

        Raises:
            RedppError: the graph has no form in ONNX, or the artifact no ranges for eight bits.
        """
        from redpp_serve.engines.onnx_builder import to_onnx  # noqa: PLC0415 - needs onnx, which is optional

        int8 = precision == "int8"
        if int8 not in self._models:
            self._models[int8] = to_onnx(self.in_int8() if int8 else self.graph).SerializeToString()
        return self._models[int8]

    def in_int8(self) -> Graph:
        """Return the served graph with the stored ranges put in."""
        return in_int8(self.graph, ranges(self.artifact.description))

    def run(self, candidate: Candidate) -> EngineRun:
        """Build the network in an engine."""
        model = self.model(candidate.precision)
        return EngineRun(ENGINES[candidate.engine], candidate.precision, model, self.threads)

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
        inputs = [(i.name, list(i.shape), i.dtype) for i in self.graph.inputs]
        return hashlib.sha256(json.dumps([nodes, shapes, inputs]).encode()).hexdigest()[:16]

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Return what `stored_inputs` does of the artifact."""
        return stored_inputs(self.artifact, batch)


@dataclass
class Chosen:
    """The outcome of a choice.

    Attributes:
        choices: the engine and precision of each batch bucket.
        runs: by candidate, what runs it; the own runtime is not among them.
        left_out: why candidates are not used.
        built: the seconds that building took, by candidate; the first of an engine's includes its import.
    """

    choices: tuple[EngineChoice, ...]
    runs: dict[str, EngineRun | CompiledRun] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    built: dict[str, float] = field(default_factory=dict)


def stored_inputs(artifact: LoadedArtifact, batch: int) -> tuple[Tensor, ...]:
    """Return an artifact's stored inputs, repeated to a batch; zeros where it has none."""
    if not artifact.samples:
        return tuple(torch.zeros(batch, *i.shape, dtype=getattr(torch, i.dtype)) for i in artifact.graph.inputs)
    return tuple(x[torch.arange(batch) % len(x)] for x in artifact.samples)


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
    """Choose the engine and precision of each batch bucket.

    Args:
        network: the network.
        own: the own runtime with dense kernels, by precision; the first is the incumbent.
        batches: the batch buckets, ascending.
        engine: the engine to use, ``redpp`` for the own runtime; ``auto`` to choose the fastest.
        seconds: about how long trying and timing may take; 0 keeps the own runtime.
        cache: where times of earlier runs are looked up and new ones kept.
    """
    first = Candidate(OWN, next(iter(own)))
    if engine == COMPILED:
        return _compiled(network, first, own, batches)
    candidates, left_out = _candidates(network, engine)
    candidates += [Candidate(OWN, precision) for precision in list(own)[1:]]
    if seconds <= 0 or not candidates:
        source = "rule" if seconds > 0 else "budget"
        return Chosen(_everywhere(batches, first, source), {}, left_out)
    chosen = Chosen((), {}, left_out)
    keep = cache or PlanCache(None, shipped=None)
    key = f"{device_key(network.device, '+'.join(network.precisions))}, {describe()}, {network.threads} usable"
    versions = ", ".join(ENGINES[name].version for name in sorted({c.engine for c in candidates} - {OWN}))
    signature = f"engines {network.digest} {versions} {_sources()}"
    names = {str(candidate) for candidate in (first, *candidates)}
    with keep.locked(wait_s=3 * seconds):  # workers that start together measure once
        known = {b: _known(keep, key, f"{signature} batch={b}", names) for b in batches}
        cached = all(found and _serves(engine, found) for found in known.values())
        if cached:
            times = known
        else:
            ready = _tried(network, own, candidates, batches, chosen, _FOR_TRIALS * seconds)
            times = _timed(network, own, ready, batches, chosen, time.monotonic() + (1 - _FOR_TRIALS) * seconds)
            if all(_serves(engine, found) for found in times.values()):
                failed = {str(c): Timing(math.inf, math.inf) for c in candidates if str(c) in chosen.left_out}
                keep.add(key, {f"{signature} batch={b}": found | failed for b, found in times.items()})
    chosen.choices = _pick(times, batches, str(first), "cached" if cached else "measured", forced=engine)
    if first.precision not in network.precisions and all(c.precision == first.precision for c in chosen.choices):
        told = f"no engine that serves {', '.join(network.precisions)} is surely faster than the own runtime"
        chosen.left_out.setdefault(", ".join(network.precisions), told)
    return _ready(network, own, chosen, first)


def _compiled(network: Network, first: Candidate, own: Mapping[str, Run], batches: Sequence[int]) -> Chosen:
    """Compile the network for all buckets, however long that takes; leave the own runtime where it fails."""
    candidate, reason = Candidate(COMPILED, "fp32"), ""
    times: dict[int, float] = {}
    try:
        if first.precision != "fp32":
            raise RedppError(f"precision {first.precision}", "fp32 with torch-compile", "change --precision")
        run = CompiledRun(network.graph, network.device)
        for batch in batches:
            inputs = network.inputs(batch)
            outcome = Outcome([[y.numpy() for y in run(inputs)]])
            reason = reason or _wrong(network, candidate, outcome, [own["fp32"](inputs)])
            times[batch] = min(timed(partial(run, inputs), network.clock)() for _ in range(3))
    except Exception as error:  # such as no compiler, or a cache that cannot be written
        reason = _one_line(error)
    if reason:
        return Chosen(_everywhere(batches, first, "failed"), {}, {str(candidate): reason})
    choices = tuple(EngineChoice(b, COMPILED, "fp32", "measured", {str(candidate): times[b]}) for b in batches)
    return Chosen(choices, {str(candidate): run})


def _known(cache: PlanCache, key: str, signature: str, names: Set[str]) -> dict[str, Timing]:
    """Return the kept times of a batch size, of what may serve now alone."""
    found, _ = cache.find(key, signature) or ({}, "")
    return {name: timing for name, timing in found.items() if name in names}


@functools.cache
def _sources() -> str:
    """Return eight digits that differ between releases of the engines' code."""
    digest = hashlib.sha256()
    for path in (*sorted(Path(engines.__file__).parent.glob("*.py")), Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _serves(engine: str, times: Mapping[str, Timing]) -> bool:
    """Tell whether the engine asked for ran; one that did not is tried again at each start, and says why."""
    return engine == AUTO or any(
        Candidate.parse(name).engine == engine and math.isfinite(timing.seconds) for name, timing in times.items()
    )


def _candidates(network: Network, engine: str) -> tuple[list[Candidate], dict[str, str]]:
    found, left_out = list[Candidate](), dict[str, str]()
    if network.device.type != "cpu":
        return found, left_out
    if odd := [i.dtype for i in network.graph.inputs if i.dtype == "bfloat16"]:
        return found, dict.fromkeys(ENGINES, f"inputs are of {odd[0]}, which engines take no arrays of")
    wanted = [e for e in ENGINES.values() if engine in (AUTO, e.name)]
    for each in wanted:
        if reason := each.unavailable():
            left_out[each.name] = reason
            continue
        if not each.exact_integers and (why := _odd(network.graph)):
            left_out[each.name] = why
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


def _tried(
    network: Network,
    own: Mapping[str, Run],
    candidates: Iterable[Candidate],
    batches: Sequence[int],
    chosen: Chosen,
    seconds: float,
) -> list[Candidate]:
    """Return the candidates that build, survive and compute the network in a process of their own."""
    attempts, tried, ready = [], [], []
    for candidate in candidates:
        if candidate.engine == OWN:
            ready.append(candidate)
            continue
        try:
            attempts.append(Attempt(candidate.engine, candidate.precision, network.model(candidate.precision)))
            tried.append(candidate)
        except (Exception, SystemExit) as error:  # whatever a library raises, as it is imported too
            chosen.left_out[str(candidate)] = _one_line(error)
    sizes = sorted({1, 3, min(batches[-1], _LARGEST_CHECK)})
    inputs = [network.inputs(size) for size in sizes]
    expected = {precision: [run(x) for x in inputs] for precision, run in _expected(network, own, tried).items()}
    arrays = [[x.contiguous().numpy() for x in part] for part in inputs]
    outcomes = try_engines(attempts, arrays, network.threads, seconds) if attempts else []
    for candidate, outcome in zip(tried, outcomes, strict=True):
        reason = outcome.reason or _wrong(
            network, candidate, outcome, expected.get(candidate.precision, expected["fp32"])
        )
        if reason:
            chosen.left_out[str(candidate)] = reason
        else:
            chosen.built[str(candidate)] = outcome.seconds
            ready.append(candidate)
    return ready


def _expected(network: Network, own: Mapping[str, Run], tried: Sequence[Candidate]) -> dict[str, Run]:
    """Return what candidates are held against, by precision; ``fp32`` for those that have nothing of their own."""
    found = {"fp32": next(iter(own.values()))}
    if any(candidate.precision == "int8" for candidate in tried):
        found["int8"] = own_run(Program(network.in_int8()), network.device)
    return found


def _wrong(network: Network, candidate: Candidate, outcome: Outcome, expected: Sequence[tuple[Tensor, ...]]) -> str:
    """Return what is wrong with a candidate's outputs; empty where nothing is."""
    recorded = recorded_error(network.artifact.description, candidate.precision)
    slack = _SLACK.get(candidate.precision, _MOST_SLACK)
    least = _LEAST_LIMITS.get(candidate.precision, _LEAST_LIMIT)
    limit = _EXACT if candidate.precision == "fp32" else max(least, slack * recorded)
    worst = 0.0
    for k, wanted in enumerate(zip(*expected, strict=True)):
        got = [torch.from_numpy(outputs[k]) for outputs in outcome.outputs]
        if shapes := [tuple(y.shape) for x, y in zip(wanted, got, strict=True) if x.shape != y.shape]:
            return f"output {k} has other shapes than the network's, such as {shapes[0]}"
        worst = max(worst, _error(torch.cat(wanted), torch.cat(got)))
    return "" if worst <= limit else f"its outputs differ by {worst:.2g} of their spread, more than {limit:.2g}"


def _error(expected: Tensor, found: Tensor) -> float:
    """Return the root mean square difference, relative to the spread of the expected values; infinite for NaN."""
    x, y = expected.double(), found.double()
    centred = x - x.mean(0)
    spread = max(float(centred.square().mean().sqrt()), 1e-3 * float(x.square().mean().sqrt()), 1e-30)
    error = float((x - y).square().mean().sqrt()) / spread
    return error if error == error else math.inf


def _timed(
    network: Network,
    own: Mapping[str, Run],
    ready: Sequence[Candidate],
    batches: Sequence[int],
    chosen: Chosen,
    end: float,
) -> dict[int, dict[str, Timing]]:
    """Time the incumbent and the candidates at each batch bucket: all of them once, then the fastest in turns."""
    runs: dict[str, Run] = {str(Candidate(OWN, precision)): run for precision, run in own.items()}
    for candidate in ready:
        if candidate.engine != OWN:
            try:
                runs[str(candidate)] = _build(network, candidate, chosen)
            except (Exception, SystemExit) as error:  # it was built in its own process, but memory may be short here
                chosen.left_out[str(candidate)] = _one_line(error)
    quick = {batch: _once(runs, network.inputs(batch), network.clock) for batch in batches}
    found = {}
    for done, batch in enumerate(batches):
        left = (end - time.monotonic()) / (len(batches) - done)
        found[batch] = _in_turns(runs, quick[batch], network.inputs(batch), left, network.clock)
    return found


def _build(network: Network, candidate: Candidate, chosen: Chosen) -> EngineRun:
    """Build the network in an engine here, and note how long that took where no process of its own has told."""
    network.model(candidate.precision)  # made once, for all engines
    start = time.perf_counter()
    run = network.run(candidate)
    chosen.built.setdefault(str(candidate), time.perf_counter() - start)
    chosen.runs[str(candidate)] = run
    return run


def _in_turns(
    runs: Mapping[str, Run], quick: Mapping[str, float], inputs: tuple[Tensor, ...], seconds: float, clock: Clock
) -> dict[str, Timing]:
    """Time the incumbent, which is the first, and those near the fastest again, as far as the seconds reach."""
    first, best = next(iter(quick)), min(quick.values())
    found = {name: Timing(once, _UNSURE * once / quick[first]) for name, once in quick.items()}
    names = [first, *(name for name, once in quick.items() if name != first and once <= _NEAR * best)]
    if len(names) > 1 and 2 * FEWEST_ROUNDS * sum(quick[name] for name in names) <= seconds:
        calls = [timed(partial(runs[name], inputs), clock) for name in names]
        found |= timings(names, in_turns(calls, time.perf_counter() + seconds))
    return found


def _once(runs: Mapping[str, Run], inputs: tuple[Tensor, ...], clock: Clock) -> dict[str, float]:
    """Return the lesser of two times of each run, after a first call that prepares."""
    for run in runs.values():
        run(inputs)
    rounds = [{name: timed(partial(run, inputs), clock)() for name, run in runs.items()} for _ in range(2)]
    return {name: min(row[name] for row in rounds) for name in runs}


def _pick(
    times: Mapping[int, Mapping[str, Timing]], batches: Sequence[int], first: str, source: str, forced: str
) -> tuple[EngineChoice, ...]:
    """Return the fastest candidate of each bucket; one for all where none loses more than 5 % by it."""

    def seconds(batch: int, name: str) -> float:
        timing = times[batch].get(name)
        return timing.seconds if timing else math.inf

    def wins(batch: int, name: str) -> bool:
        return name == first or (name in times[batch] and times[batch][name].high < 1.0)

    names = list(dict.fromkeys(n for b in batches for n in times[b]))
    usable = [n for n in names if Candidate.parse(n).engine == forced] or names if forced != AUTO else names
    best = {
        b: min((seconds(b, n), n) for n in usable if forced != AUTO or wins(b, n) or n == first)[1] for b in batches
    }
    for name in sorted(set(best.values()), key=lambda n: sum(math.log(max(seconds(b, n), 1e-9)) for b in batches)):
        if all(seconds(b, name) <= _ONE_FOR_ALL * seconds(b, best[b]) for b in batches):
            best = dict.fromkeys(batches, name)
            break
    choices = []
    for batch in batches:
        found = Candidate.parse(best[batch])
        measured = {n: t.seconds for n, t in times[batch].items() if math.isfinite(t.seconds)}
        choices.append(EngineChoice(batch, found.engine, found.precision, source, measured))
    return tuple(choices)


def _ready(network: Network, own: Mapping[str, Run], chosen: Chosen, first: Candidate) -> Chosen:
    """Build and check what was chosen and is not built, free the rest, and fall back to the own runtime where need be.

    Kept times are of these operators and shapes; with other weights the engine may compute something else.
    """
    wanted = {str(Candidate(c.engine, c.precision)) for c in chosen.choices if c.engine != OWN}
    for name in wanted - chosen.runs.keys():
        candidate = Candidate.parse(name)
        try:
            run, inputs = (
                _build(network, candidate, chosen),
                network.inputs(max(1, len(network.artifact.samples or ()))),
            )
            outcome = Outcome([[y.numpy() for y in run(inputs)]])
            expected = _expected(network, own, [candidate])
            if reason := _wrong(
                network, candidate, outcome, [expected.get(candidate.precision, expected["fp32"])(inputs)]
            ):
                raise RuntimeError(reason)
        except (Exception, SystemExit) as error:  # a server starts without it
            log.warning("%s is left out: %s", name, _one_line(error))
            chosen.runs.pop(name, None)
            chosen.left_out[name] = _one_line(error)
    for name in chosen.runs.keys() - wanted:
        chosen.runs.pop(name).close()
    chosen.choices = tuple(
        c
        if c.engine == OWN or str(Candidate(c.engine, c.precision)) in chosen.runs
        else EngineChoice(c.batch, first.engine, first.precision, "failed", c.times)
        for c in chosen.choices
    )
    network._models.clear()
    free_memory()
    return chosen


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


def free_memory() -> None:
    """Give memory that nobody uses back to the system, where the C library can."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        log.debug("this C library cannot trim its heap")


def _everywhere(batches: Sequence[int], candidate: Candidate, source: str) -> tuple[EngineChoice, ...]:
    return tuple(EngineChoice(batch, candidate.engine, candidate.precision, source, {}) for batch in batches)


def own_run(program: Program, device: torch.device) -> Run:
    """Return the own runtime's run of a program, with outputs on the CPU."""

    @torch.inference_mode()
    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(y.cpu() for y in program(*(channels_last(x.to(device)) for x in inputs)))

    return run


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
