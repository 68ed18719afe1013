"""Choosing the kernel of each layer by timing the candidates on the device that serves, before any request.

A rule (`candidates`) says what is worth timing, a budget how long it may take. Candidates run in turns, so that a busy
machine or a changing clock meets all of them alike; a kernel replaces the dense one only if it is surely faster
(`plan.decide`). A candidate that fails, or differs from the dense kernel's result, is out.

Layers are timed alone. Within the network they find other caches and other neighbours, so a sum of small gains may be
none: in the end the network with the chosen kernels is timed against the same network with dense ones, and a choice
for a batch size stands only if the network as a whole is surely not slower with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node
from redpp_serve.runtime.buckets import Bucket
from redpp_serve.runtime.candidates import Candidate
from redpp_serve.runtime.device import device_name
from redpp_serve.runtime.fused_layer import FusedLayer, fused_layers
from redpp_serve.runtime.plan import DENSE, Choice, Plan, Timing, decide
from redpp_serve.runtime.plan_cache import PlanCache, device_key
from redpp_serve.runtime.serving_graph import PlanContext, planned_programs
from redpp_serve.runtime.timing import (
    FEWEST_ROUNDS,
    ClockTimer,
    EventTimer,
    Make,
    Timer,
    in_turns,
    random_input,
    random_tensor,
    timer_for,
    timings,
)

log = logging.getLogger(__name__)

PLAN_SECONDS = 20.0
PLANNED = "planned"
_FOR_LAYERS = 0.75  # of the budget; the rest is for the network as a whole, without which no choice stands
# Largest difference from the dense kernel, in units of the dtype's rounding of the largest value: sums of thousands
# of products in another order differ by some tens of it (measured on random layers).
_ROUNDINGS = {torch.float32: 256.0, torch.float16: 16.0, torch.bfloat16: 16.0}
_TF32_EPS = 2.0**-10  # products with as many binary places as fp16 has


@dataclass(frozen=True)
class _Cell:
    """Equal layers at one batch size."""

    batch: int
    signature: str
    layers: tuple[FusedLayer, ...]
    x_shape: tuple[int, ...]
    options: tuple[Candidate, ...]

    @property
    def cost(self) -> int:
        """Multiply-accumulates of all its layers."""
        layer = self.layers[0]
        return layer.rows(self.x_shape) * layer.values.numel() * len(self.layers)

    def choices(self, kernel: str, source: str, found: Mapping[str, Timing]) -> Iterator[Choice]:
        times = {name: timing.seconds for name, timing in found.items() if math.isfinite(timing.seconds)}
        shape = "x".join(map(str, self.x_shape))
        for layer in self.layers:
            yield Choice(layer.node.name, layer.name, self.batch, kernel, source, times, shape)


@torch.inference_mode()
def make_plan(
    context: PlanContext,
    batches: Sequence[int],
    *,
    seconds: float = PLAN_SECONDS,
    cache: PlanCache | None = None,
    everything: bool = False,
    timer: Timer | None = None,
    network_timer: Timer | None = None,
) -> Plan:
    """Choose a kernel for each layer of a network at each batch size.

    Args:
        context: the network.
        batches: the batch sizes.
        seconds: about how long timing may take; layers that it does not reach stay dense. The costliest come first.
        cache: where times of earlier runs are looked up and new ones kept.
        everything: time also kernels that the rules would skip.
        timer: times layers; None: the one for the device.
        network_timer: times the network as a whole; None: the one for the device.
    """
    start = time.perf_counter()
    cells = _cells(context, batches, everything)
    cache = cache or PlanCache(None, shipped=None)
    key = device_key(context.device, context.precision)
    choosing = seconds > 0 and any(len(cell.options) > 1 for cell in cells)
    with cache.locked(wait_s=3 * seconds) if choosing else nullcontext():
        known, missing = _look_up(cells, cache, key)
        measured = {}
        if choosing:
            timer = timer or timer_for(context.graph, context.device)
            measured = _measure(missing, timer, _FOR_LAYERS * seconds)
        cache.add(key, measured)
        choices = [choice for cell in cells for choice in _decide(cell, known, measured)]
        order = {layer.node.name: k for k, layer in enumerate(fused_layers(context.graph))}
        choices.sort(key=lambda choice: (order[choice.layer], choice.batch))
        left = seconds - (time.perf_counter() - start) if choosing else 0.0
        choices = confirmed(context, choices, cache, left, network_timer)
    taken = time.perf_counter() - start
    return Plan(device_name(context.device), context.precision, tuple(batches), tuple(choices), taken)


def plan_sizes(
    context: PlanContext,
    served: Sequence[Bucket],
    end: float,
    *,
    cache: PlanCache | None = None,
    everything: bool = False,
) -> list[Choice]:
    """Choose a kernel for each layer of a network in each bucket, at one choice of sizes after another.

    Args:
        context: the network.
        served: the buckets.
        end: the time of the performance counter at which timing should end.
        cache: as for `make_plan`.
        everything: as for `make_plan`.
    """
    found: list[Choice] = []
    by_sizes = [
        (sizes, [b.batch for b in served if b.sizes == sizes]) for sizes in dict.fromkeys(b.sizes for b in served)
    ]
    for done, (sizes, batches) in enumerate(by_sizes):
        seconds = max(0.0, end - time.perf_counter()) / (len(by_sizes) - done)
        at = context.at(dict(sizes))
        plan = make_plan(at, batches, seconds=seconds, cache=cache, everything=everything)
        found += [replace(choice, sizes=dict(sizes)) for choice in plan.choices]
    return found


def confirmed(
    context: PlanContext, choices: Sequence[Choice], cache: PlanCache, seconds: float, timer: Timer | None = None
) -> list[Choice]:
    """Return the choices, with dense kernels for each batch size at which the others do not make the network faster.

    Args:
        context: the network.
        choices: the choices for its layers.
        cache: where the times of networks are looked up and kept.
        seconds: time for all batch sizes; dense kernels stay where it does not suffice and the cache knows nothing.
        timer: times a whole network; None: the one for the device.
    """
    end = time.perf_counter() + seconds
    key = device_key(context.device, context.precision)
    if timer is None:
        timer = ClockTimer() if context.device.type != "cuda" else EventTimer(context.device, 0)
    kept = list(choices)
    for batch in sorted({choice.batch for choice in choices if choice.kernel != DENSE}):
        kernels = {choice.layer: choice.kernel for choice in choices if choice.batch == batch}
        name = _network_key(context, batch, kernels)
        known, _ = cache.find(key, name) or ({}, "")
        if PLANNED not in known:  # also in a file that somebody edited
            known = _time_networks(context, batch, kernels, timer, end)
            if known and math.isfinite(known[PLANNED].seconds):
                cache.add(key, {name: known})
        if not known or known[PLANNED].high > 1.0:
            source = "network" if known else "budget"
            kept = [
                replace(c, kernel=DENSE, source=source) if c.batch == batch and c.kernel != DENSE else c for c in kept
            ]
    return kept


def _time_networks(
    context: PlanContext, batch: int, kernels: Mapping[str, str], timer: Timer, end: float
) -> dict[str, Timing]:
    """Time the network with dense and with the planned kernels; return nothing where the time would not suffice.

    The time is infinite if the network does not run with the planned kernels, for want of memory for example.
    """
    if time.perf_counter() >= end:
        return {}
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(random_input(spec, batch, context.device, generator) for spec in context.graph.inputs)
    try:
        start = time.perf_counter()
        runs = [timer.prepare(_network(context, batch, table), {}, inputs) for table in ({}, kernels)]
        once = (time.perf_counter() - start) / 2
        if time.perf_counter() + 2 * FEWEST_ROUNDS * once > end:
            return {}
        return timings((DENSE, PLANNED), in_turns(runs, end, gain=0.0))
    except Exception as error:  # whatever a driver raises: a plan never stops a worker
        log.warning("the network does not run with the kernels chosen for batch %d: %s", batch, _one_line(error))
        return {PLANNED: Timing(math.inf, math.inf)}


def _network(context: PlanContext, batch: int, kernels: Mapping[str, str]) -> Make:
    program = planned_programs(context, (batch,), lambda layer, _: kernels.get(layer, DENSE))[batch]
    return lambda _: program


def _network_key(context: PlanContext, batch: int, kernels: Mapping[str, str]) -> str:
    """Name everything that the times of a network depend on: operators, arguments, layers, shapes, kernels."""
    graph = context.graph
    nodes = [(node.op, kernels.get(node.name, ""), repr((node.args, node.kwargs))) for node in graph.nodes]
    layers = [context.signature(layer.node, 1) for layer in fused_layers(graph)]
    shapes = [(name, list(t.shape)) for name, t in graph.tensors.items()]
    shapes += [(i.name, list(i.shape)) for i in graph.inputs]
    digest = hashlib.sha256(json.dumps([nodes, layers, shapes]).encode()).hexdigest()[:16]
    return f"network {digest} batch={batch}"


def _cells(context: PlanContext, batches: Sequence[int], everything: bool) -> list[_Cell]:
    found: dict[tuple[int, str], _Cell] = {}  # one layer's input at batch 4 may have another's shape at batch 1
    for batch in batches:
        for layer in fused_layers(context.graph):
            text = context.signature(layer.node, batch)
            cell = found.get((batch, text))
            if cell is None:
                options = context.candidates(layer.node, batch)
                kept = tuple(c for c in options if c.kernel == DENSE or c.worth_timing or everything)
                cell = _Cell(batch, text, (), context.x_shape(layer.node, batch), kept)
            found[batch, text] = replace(cell, layers=(*cell.layers, layer))
    return list(found.values())


def _look_up(
    cells: Sequence[_Cell], cache: PlanCache, key: str
) -> tuple[dict[str, tuple[dict[str, Timing], str]], list[_Cell]]:
    """Return the known times and their source by signature, and the cells with a candidate whose time is unknown."""
    known, missing = {}, []
    for cell in cells:
        found = cache.find(key, cell.signature)
        if found and {c.kernel for c in cell.options} <= found[0].keys():
            known[cell.signature] = found
        elif len(cell.options) > 1:
            missing.append(cell)
    return known, missing


def _decide(
    cell: _Cell, known: Mapping[str, tuple[dict[str, Timing], str]], measured: Mapping[str, dict[str, Timing]]
) -> Iterator[Choice]:
    if len(cell.options) == 1:
        return cell.choices(DENSE, "rule", {})
    found, source = known.get(cell.signature) or (measured.get(cell.signature, {}), "measured")
    found = {c.kernel: found[c.kernel] for c in cell.options if c.kernel in found}
    return cell.choices(decide(found), source if found else "budget", found)


def _measure(cells: Sequence[_Cell], timer: Timer, seconds: float) -> dict[str, dict[str, Timing]]:
    """Time as many cells as the budget reaches, the costliest first; return the times by signature."""
    end = time.perf_counter() + seconds
    ordered = sorted(cells, key=lambda cell: -cell.cost)
    found: dict[str, dict[str, Timing]] = {}
    for done, cell in enumerate(ordered):
        left = end - time.perf_counter()
        if left <= 0:
            break
        if cell.signature not in found:
            share = left / (len(ordered) - done)
            found[cell.signature] = time_candidates(cell.layers[0], cell.x_shape, cell.options, timer, share, end)
    if late := sum(not found.get(cell.signature) for cell in ordered):
        text = "%d of %d layers keep the dense kernel: the %.0f s for timing do not reach them"
        log.warning(text, late, len(ordered), seconds)
    return {text: times for text, times in found.items() if times}


def time_candidates(
    layer: FusedLayer,
    x_shape: tuple[int, ...],
    options: Sequence[Candidate],
    timer: Timer,
    seconds: float,
    latest: float = math.inf,
) -> dict[str, Timing]:
    """Time each candidate whose result is that of the dense one, which comes first.

    A candidate that fails or differs keeps an infinite time, so that it is not tried again; the log says why.

    Args:
        layer: the layer.
        x_shape: the shape of its input, with the batch.
        options: the candidates.
        timer: times a layer on its device.
        seconds: for all rounds; at least `timing.FEWEST_ROUNDS` are made.
        latest: a time of the performance counter; nothing is timed where that many rounds of the dense kernel's
            duration would end later.
    """
    end = time.perf_counter() + seconds
    inputs = _inputs(layer, x_shape)
    runs: dict[str, Callable[[], float]] = {}
    expected: Tensor | None = None
    for option in options:
        try:
            node, tensors = option.make()
            result = _program(layer, node, tensors)(*inputs)[0]
            difference = 0.0 if expected is None else _difference(result, expected)
            if not difference <= most_roundings(result):
                raise ValueError(f"its result differs by {difference:.0f} roundings from the dense kernel's")
            runs[option.kernel] = timer.prepare(partial(_program, layer, node), tensors, inputs)
        except Exception as error:  # whatever a compiler or a driver raises: this kernel is not for this device
            if expected is None:
                raise
            text = "%s cannot run %s with an input of shape %s: %s"
            log.warning(text, option.kernel, layer.node.name, x_shape, _one_line(error))
            continue
        if expected is None:
            expected = result
            start = time.perf_counter()
            runs[option.kernel]()
            now = time.perf_counter()
            if now + 2 * FEWEST_ROUNDS * len(options) * (now - start) > latest:
                return {}
    failed = {option.kernel: Timing(math.inf, math.inf) for option in options if option.kernel not in runs}
    return timings(list(runs), in_turns(list(runs.values()), end)) | failed


def _inputs(layer: FusedLayer, x_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Draw the layer's input and, unless it is the same value, its summand."""
    generator = torch.Generator().manual_seed(0)
    shapes = [x_shape]
    if layer.other is not None and layer.other != layer.x:
        shapes.append(layer.result_shape(x_shape))
    return tuple(random_tensor(shape, layer.values.dtype, layer.values.device, generator) for shape in shapes)


def _program(layer: FusedLayer, node: Node, tensors: Mapping[str, Tensor]) -> Program:
    """Build a program of one layer alone."""
    values = list(dict.fromkeys([layer.x, layer.other] if layer.other is not None else [layer.x]))
    dtype = str(layer.values.dtype).removeprefix("torch.")
    specs = tuple(InputSpec(value.name, (), dtype) for value in values)  # a program does not look at shapes
    return Program(Graph(specs, dict(tensors), (node,), (node.name,))).eval()


def most_roundings(result: Tensor) -> float:
    """Return the largest difference from the dense kernel, in roundings of the largest value, that is no fault."""
    if result.is_cuda and result.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return _ROUNDINGS[torch.float16] * _TF32_EPS / torch.finfo(torch.float32).eps
    return _ROUNDINGS.get(result.dtype, 256.0)


def _difference(result: Tensor, expected: Tensor) -> float:
    """Return the largest difference in roundings of the largest value; NaN if a value is not finite."""
    largest = float(expected.float().abs().max()) if expected.numel() else 0.0
    if not expected.numel() or not largest:
        return float(result.float().abs().sum())
    return float((result.float() - expected.float()).abs().max()) / (largest * torch.finfo(expected.dtype).eps)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
