"""Choosing the kernel of each layer by timing the candidates on the device that serves, before any request.

A prior (`candidates`) says what is worth timing, a budget how long it may take. Candidates run in turns, each round
forwards and backwards, so that a busy machine or a changing clock meets all of them alike; the dense kernel is left only
for one that is surely faster (`plan.decide`). A candidate that fails or differs from the dense kernel's result is out.

A plan's last test: the whole network with the chosen kernels against the same network with dense ones.

Layers are timed alone. Within the network they find other caches and other neighbours, so a sum of small gains may be
none: a choice for a batch size stands only where the network as a whole is surely not slower with it.
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

import torch
from torch import Tensor

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.passes import precision_dtype
from redpp_serve.runtime.candidates import Candidate, candidates, signature
from redpp_serve.runtime.device import device_name
from redpp_serve.runtime.fused_layer import Form, FusedLayer, fused_layers
from redpp_serve.runtime.plan import DENSE, Choice, Plan, Timing, decide
from redpp_serve.runtime.plan_cache import PlanCache, device_key
from redpp_serve.runtime.serving_graph import channels_last, layer_inputs, planned_programs
from redpp_serve.runtime.timing import FEWEST_ROUNDS, ClockTimer, EventTimer, Timer, in_turns, timer_for, timings

log = logging.getLogger(__name__)

PLANNED = "planned"


def confirmed(
    graph: Graph,
    choices: Sequence[Choice],
    inputs: Mapping[str, tuple[int, ...]],
    device: torch.device,
    precision: str,
    cache: PlanCache,
    key: str,
    seconds: float,
) -> list[Choice]:
    """The choices, with dense kernels for each batch size at which the others do not make the network faster.

    Args:
        graph: of `programs.serving_graph`.
        inputs: of `programs.layer_inputs`.
        key: of the cache, for this device.
        seconds: for all batch sizes; where it does not suffice, or is 0 and the cache knows nothing, dense kernels stay.
    """
    end = time.perf_counter() + seconds
    kept = list(choices)
    for batch in sorted({choice.batch for choice in choices if choice.kernel != DENSE}):
        kernels = {choice.layer: choice.kernel for choice in choices if choice.batch == batch}
        name = _signature(graph, batch, kernels, inputs, precision_dtype(precision))
        found = cache.find(key, name)
        if found and PLANNED not in found[0]:  # of a file that was edited
            found = None
        known = found[0] if found else _time_or_fail(graph, batch, kernels, inputs, device, precision, end)
        if known and not found and math.isfinite(known[PLANNED].seconds):
            cache.add(key, {name: known})
        if not known or known[PLANNED].high > 1.0:
            source = "network" if known else "budget"
            kept = [
                replace(c, kernel=DENSE, source=source) if c.batch == batch and c.kernel != DENSE else c for c in kept
            ]
    return kept


def _time_or_fail(
    graph: Graph,
    batch: int,
    kernels: Mapping[str, str],
    inputs: Mapping[str, tuple[int, ...]],
    device: torch.device,
    precision: str,
    end: float,
) -> dict[str, Timing]:
    """`_time`; infinite where the network does not run with the planned kernels, for want of memory for example."""
    try:
        return _time(graph, batch, kernels, inputs, device, precision, end)
    except Exception as error:  # whatever a driver raises: a plan never stops a worker
        log.warning(
            "the network does not run with the kernels chosen for batch %d: %s",
            batch,
            " ".join(str(error).split())[:300],
        )
        return {PLANNED: Timing(math.inf, math.inf)}


def _time(
    graph: Graph,
    batch: int,
    kernels: Mapping[str, str],
    inputs: Mapping[str, tuple[int, ...]],
    device: torch.device,
    precision: str,
    end: float,
) -> dict[str, Timing]:
    """Times of the network with dense and with the planned kernels; nothing where the time would not suffice."""
    if time.perf_counter() >= end:
        return {}
    dtype = precision_dtype(precision)
    programs = [
        planned_programs(graph, (batch,), lambda layer, _, table=table: table.get(layer, DENSE), inputs, device, dtype)[
            batch
        ]
        for table in ({}, kernels)
    ]
    x = tuple(_example(i.shape, batch, getattr(torch, i.dtype), device) for i in graph.inputs)
    timer = ClockTimer() if device.type != "cuda" else EventTimer(device, 0)
    start = time.perf_counter()
    runs = [timer.prepare(lambda _, program=program: program, {}, x) for program in programs]
    once = (time.perf_counter() - start) / 2
    if time.perf_counter() + 2 * FEWEST_ROUNDS * once > end:
        return {}
    return timings((DENSE, PLANNED), in_turns(runs, end, gain=0.0))


def _example(shape: tuple[int, ...], batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal random numbers; zeros for integers, which are valid indices everywhere."""
    made = torch.randn(batch, *shape) if dtype.is_floating_point else torch.zeros(batch, *shape)
    return channels_last(made.to(device, dtype))


def _signature(
    graph: Graph, batch: int, kernels: Mapping[str, str], inputs: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> str:
    """Of all that the times depend on: operators and their arguments, layers, shapes, the kernels chosen."""
    nodes = [(node.op, kernels.get(node.name, ""), repr((node.args, node.kwargs))) for node in graph.nodes]
    layers = [signature(graph, layer.node, inputs[layer.node.name], dtype) for layer in fused_layers(graph)]
    shapes = [(name, list(t.shape)) for name, t in graph.tensors.items()] + [
        (i.name, list(i.shape)) for i in graph.inputs
    ]
    digest = hashlib.sha256(json.dumps([nodes, layers, shapes]).encode()).hexdigest()[:16]
    return f"network {digest} batch={batch}"


PLAN_SECONDS = 20.0
_FOR_LAYERS = 0.75  # of the budget; the rest is for the network as a whole, without which no choice stands
# Largest difference from the dense kernel, in units of the dtype's rounding of the largest value: sums of thousands
# of products in another order differ by some tens of it (measured on random layers).
_ROUNDINGS = {torch.float32: 256.0, torch.float16: 16.0, torch.bfloat16: 16.0}
_TF32_EPS = 2.0**-10  # products with as many binary places as fp16 has


@dataclass(frozen=True)
class _Cell:
    """Layers of one signature at one batch size."""

    batch: int
    signature: str
    layers: tuple[FusedLayer, ...]
    x_shape: tuple[int, ...]
    options: tuple[Candidate, ...]

    def choices(self, kernel: str, source: str, timings: dict[str, Timing]) -> Iterator[Choice]:
        times = {name: timing.seconds for name, timing in timings.items() if math.isfinite(timing.seconds)}
        for layer in self.layers:
            yield Choice(
                layer.node.name, layer.name, self.batch, kernel, source, times, "x".join(map(str, self.x_shape))
            )


@torch.inference_mode()
def make_plan(
    graph: Graph,
    device: torch.device,
    precision: str,
    batches: Sequence[int],
    inputs: Mapping[str, tuple[int, ...]] | None = None,
    *,
    seconds: float = PLAN_SECONDS,
    cache: PlanCache | None = None,
    everything: bool = False,
) -> Plan:
    """Choose a kernel for each layer of a network at each batch size.

    Args:
        graph: of `programs.serving_graph`, on the device.
        inputs: of `programs.layer_inputs`, where the caller has them.
        seconds: about how long timing may take; what is not reached stays dense. The costliest layers come first.
        cache: where times of earlier runs are looked up and new ones kept.
        everything: time also what the prior rules out.
    """
    start = time.perf_counter()
    inputs = layer_inputs(graph, device, precision) if inputs is None else inputs
    cells = _cells(graph, inputs, device, precision_dtype(precision), batches, everything)
    cache = cache or PlanCache(None, shipped=None)
    key = device_key(device, precision)
    choosing = seconds > 0 and any(len(cell.options) > 1 for cell in cells)
    with cache.locked(wait_s=3 * seconds) if choosing else nullcontext():
        known, missing = _look_up(cells, cache, key)
        measured = _measure(missing, timer_for(graph, device), _FOR_LAYERS * seconds) if choosing else {}
        cache.add(key, measured)
        choices = [choice for cell in cells for choice in _decide(cell, known, measured)]
        order = {layer.node.name: k for k, layer in enumerate(fused_layers(graph))}
        choices.sort(key=lambda choice: (order[choice.layer], choice.batch))
        left = seconds - (time.perf_counter() - start)
        choices = confirmed(graph, choices, inputs, device, precision, cache, key, left if choosing else 0.0)
    return Plan(device_name(device), precision, tuple(batches), tuple(choices), time.perf_counter() - start)


def _decide(
    cell: _Cell, known: Mapping[str, tuple[dict[str, Timing], str]], measured: Mapping[str, dict[str, Timing]]
) -> Iterator[Choice]:
    if len(cell.options) == 1:
        return cell.choices(DENSE, "rule", {})
    timings, source = known.get(cell.signature) or (measured.get(cell.signature, {}), "measured")
    timings = {c.kernel: timings[c.kernel] for c in cell.options if c.kernel in timings}
    return cell.choices(decide(timings), source if timings else "budget", timings)


def _cells(
    graph: Graph,
    inputs: Mapping[str, tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
    batches: Sequence[int],
    everything: bool,
) -> list[_Cell]:
    found: dict[tuple[int, str], _Cell] = {}  # one layer's input at batch 4 may have another's shape at batch 1
    for batch in batches:
        for layer in fused_layers(graph):
            one = inputs[layer.node.name]
            shape = (one[0] * batch, *one[1:])
            text = signature(graph, layer.node, shape, dtype)
            if (batch, text) in found:
                found[batch, text] = _with_layer(found[batch, text], layer)
                continue
            options = candidates(graph, layer.node, shape, device, dtype)
            kept = tuple(c for c in options if c.kernel == DENSE or c.worth_timing or everything)
            found[batch, text] = _Cell(batch, text, (layer,), shape, kept)
    return list(found.values())


def _with_layer(cell: _Cell, layer: FusedLayer) -> _Cell:
    return _Cell(cell.batch, cell.signature, (*cell.layers, layer), cell.x_shape, cell.options)


def _look_up(
    cells: Sequence[_Cell], cache: PlanCache, key: str
) -> tuple[dict[str, tuple[dict[str, Timing], str]], list[_Cell]]:
    """What is known by signature, and the cells with a candidate whose time is not."""
    known, missing = {}, []
    for cell in cells:
        found = cache.find(key, cell.signature)
        if found and {c.kernel for c in cell.options} <= found[0].keys():
            known[cell.signature] = found
        elif len(cell.options) > 1:
            missing.append(cell)
    return known, missing


def _measure(cells: Sequence[_Cell], timer: Timer, seconds: float) -> dict[str, dict[str, Timing]]:
    """Times by signature, for as many cells as the budget reaches, the costliest first."""
    end = time.perf_counter() + seconds
    products = {cell.signature: cell.layers[0].rows(cell.x_shape) * cell.layers[0].values.numel() for cell in cells}
    ordered = sorted(cells, key=lambda cell: -products[cell.signature] * len(cell.layers))
    found: dict[str, dict[str, Timing]] = {}
    for done, cell in enumerate(ordered):
        left = end - time.perf_counter()
        if left <= 0:
            break
        if cell.signature not in found:
            share = left / (len(ordered) - done)
            found[cell.signature] = time_candidates(cell.layers[0], cell.x_shape, cell.options, timer, share, end)
    if late := sum(not found.get(cell.signature) for cell in ordered):
        log.warning(
            "%d of %d layers keep the dense kernel: the %.0f s for timing do not reach them",
            late,
            len(ordered),
            seconds,
        )
    return {text: timings for text, timings in found.items() if timings}


def time_candidates(
    layer: FusedLayer,
    x_shape: tuple[int, ...],
    options: Sequence[Candidate],
    timer: Timer,
    seconds: float,
    latest: float = math.inf,
) -> dict[str, Timing]:
    """Median seconds of each candidate that computes what the dense one (the first) does.

    A candidate that fails or differs keeps an infinite time, so that it is not tried again; the log says why.

    Args:
        seconds: for all rounds; at least `timers.FEWEST_ROUNDS` are made.
        latest: by the performance counter; nothing is timed where that many rounds of the dense kernel's duration would
            end later.
    """
    end = time.perf_counter() + seconds
    inputs = _inputs(layer, x_shape)
    runs: dict[str, Callable[[], float]] = {}
    expected: Tensor | None = None
    for option in options:
        try:
            form = option.make()
            result = _program(layer, form)(*inputs)[0]
            difference = 0.0 if expected is None else _difference(result, expected)
            if not difference <= _most_roundings(result):
                raise ValueError(f"its result differs by {difference:.0f} roundings from the dense kernel's")
            runs[option.kernel] = timer.prepare(
                lambda tensors, node=form[0]: _program(layer, (node, tensors)), form[1], inputs
            )
        except Exception as error:  # whatever a compiler or a driver raises: this kernel is not for this device
            if expected is None:
                raise
            log.warning(
                "%s cannot run %s with an input of shape %s: %s",
                option.kernel,
                layer.node.name,
                x_shape,
                " ".join(str(error).split())[:300],
            )
            continue
        if expected is None:
            expected = result
            if time.perf_counter() + 2 * FEWEST_ROUNDS * len(options) * _duration(runs[option.kernel]) > latest:
                return {}
    failed = {option.kernel: Timing(math.inf, math.inf) for option in options if option.kernel not in runs}
    return timings(list(runs), in_turns(list(runs.values()), end)) | failed


def _inputs(layer: FusedLayer, x_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The layer's input and, unless it is the same value, its summand; normal random numbers, images channels-last."""
    weight = layer.values
    generator = torch.Generator().manual_seed(0)
    shapes = [x_shape]
    if layer.other is not None and layer.other != layer.x:
        shapes.append(layer.result_shape(x_shape))
    made = (torch.randn(shape, generator=generator).to(weight.device, weight.dtype) for shape in shapes)
    return tuple(channels_last(x) for x in made)


def _program(layer: FusedLayer, form: Form) -> Program:
    """One layer alone."""
    node, tensors = form
    values = list(dict.fromkeys([layer.x, layer.other] if layer.other is not None else [layer.x]))
    dtype = str(layer.values.dtype).removeprefix("torch.")
    specs = tuple(InputSpec(value.name, (), dtype) for value in values)  # a program does not look at shapes
    return Program(Graph(specs, tensors, (node,), (node.name,))).eval()


def _duration(run: Callable[[], float]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _most_roundings(result: Tensor) -> float:
    if result.is_cuda and result.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return _ROUNDINGS[torch.float16] * _TF32_EPS / torch.finfo(torch.float32).eps
    return _ROUNDINGS.get(result.dtype, 256.0)


def _difference(result: Tensor, expected: Tensor) -> float:
    """In roundings of the largest value; NaN where one of both is not finite."""
    largest = float(expected.float().abs().max()) if expected.numel() else 0.0
    if not expected.numel() or not largest:
        return float(result.float().abs().sum())
    return float((result.float() - expected.float()).abs().max()) / (largest * torch.finfo(expected.dtype).eps)
