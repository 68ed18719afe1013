"""A plan's last test: the whole network with the chosen kernels against the same network with dense ones.

Layers are timed alone. Within the network they find other caches and other neighbours, so a sum of small gains may be
none: a choice for a batch size stands only where the network as a whole is surely not slower with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .candidates import signature
from .graph import Graph
from .layers import fused_layers
from .plan import DENSE, Choice, Timing
from .plan_cache import PlanCache
from .precision import precision_dtype
from .programs import channels_last, planned_programs
from .timers import FEWEST_ROUNDS, ClockTimer, EventTimer, in_turns, timings

log = logging.getLogger(__name__)

PLANNED = "planned"


def confirmed(
    graph: Graph, choices: Sequence[Choice], inputs: Mapping[str, tuple[int, ...]], device: torch.device, precision: str,
    cache: PlanCache, key: str, seconds: float,
) -> list[Choice]:  # fmt: skip
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
            kept = [replace(c, kernel=DENSE, source=source) if c.batch == batch and c.kernel != DENSE else c for c in kept]
    return kept


def _time_or_fail(
    graph: Graph, batch: int, kernels: Mapping[str, str], inputs: Mapping[str, tuple[int, ...]], device: torch.device,
    precision: str, end: float,
) -> dict[str, Timing]:  # fmt: skip
    """`_time`; infinite where the network does not run with the planned kernels, for want of memory for example."""
    try:
        return _time(graph, batch, kernels, inputs, device, precision, end)
    except Exception as error:  # whatever a driver raises: a plan never stops a worker
        log.warning("the network does not run with the kernels chosen for batch %d: %s", batch,
                    " ".join(str(error).split())[:300])  # fmt: skip
        return {PLANNED: Timing(math.inf, math.inf)}


def _time(
    graph: Graph, batch: int, kernels: Mapping[str, str], inputs: Mapping[str, tuple[int, ...]], device: torch.device,
    precision: str, end: float,
) -> dict[str, Timing]:  # fmt: skip
    """Times of the network with dense and with the planned kernels; nothing where the time would not suffice."""
    if time.perf_counter() >= end:
        return {}
    dtype = precision_dtype(precision)
    programs = [
        planned_programs(graph, (batch,), lambda layer, _, table=table: table.get(layer, DENSE), inputs, device, dtype)[batch]
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
    shapes = [(name, list(t.shape)) for name, t in graph.tensors.items()] + [(i.name, list(i.shape)) for i in graph.inputs]
    digest = hashlib.sha256(json.dumps([nodes, layers, shapes]).encode()).hexdigest()[:16]
    return f"network {digest} batch={batch}"
