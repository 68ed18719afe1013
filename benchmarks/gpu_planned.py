"""The planner's choices, measured again: each layer that it takes from the dense kernel, against the dense kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cells import Call, Cell, Contender, tensors_bytes
from benchmarks.gpu_networks import Network
from benchmarks.gpu_timing import Bench
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node
from redpp_serve.runtime.candidates import candidates, signature
from redpp_serve.runtime.fused_layer import FusedLayer, fused_layers
from redpp_serve.runtime.serving_graph import layer_inputs


def planned_cells(
    network: Network, version: str, bench: Bench, batches: Sequence[int], seen: set[str]
) -> Iterator[Cell]:
    """A cell for each such layer and batch; of equal ones the first, and none whose key is in ``seen`` (it grows)."""
    graph, chosen = network.served[version], network.plans[version]
    inputs = layer_inputs(graph, bench.device)
    for batch in batches:
        for layer in fused_layers(graph):
            shape = (batch * inputs[layer.node.name][0], *inputs[layer.node.name][1:])
            kernel = chosen.kernel(layer.node.name, batch)
            key = f"{signature(graph, layer.node, shape, bench.dtype)} {kernel}"
            if kernel != "dense" and key not in seen:
                seen.add(key)
                fields = {"network": network.name, "version": version, "layer": layer.node.name, "batch": batch}
                yield planned_cell(graph, layer, shape, kernel, fields, bench)


def planned_cell(
    graph: Graph, layer: FusedLayer, shape: tuple[int, ...], kernel: str, fields: dict[str, Any], bench: Bench
) -> Cell:
    """The layer by both kernels, on random inputs of this shape."""
    stored = {ref.name: graph.tensors[ref.name] for ref in (layer.weight, layer.bias) if ref}
    options = functools.cache(
        lambda: {c.kernel: c for c in candidates(graph, layer.node, shape, bench.device, bench.dtype)}
    )
    inputs = functools.cache(lambda: _layer_inputs(layer, shape, stored, bench))
    results = layer.rows(shape) * len(layer.values) * (2 if layer.other else 1)
    moved = tensors_bytes(*stored.values()) + (math.prod(shape) + results) * layer.values.element_size()
    flop = 2 * layer.rows(shape) * layer.values.numel()

    def contender(name: str) -> Contender:
        def fresh() -> Call:
            node, tensors = options()[name].make()
            program = Program(_one_layer(node, {k: t.clone() for k, t in tensors.items()}, layer))
            return lambda: program(*inputs())[0]

        return Contender(name, fresh, moved, flop)

    def expected() -> Tensor:
        wide = _one_layer(layer.node, {k: t.float() for k, t in stored.items()}, layer)
        return Program(wide)(*(value.float() for value in inputs()))[0]

    return Cell("planned", fields, [contender("dense"), contender(kernel)], expected)


def _layer_inputs(
    layer: FusedLayer, shape: tuple[int, ...], stored: dict[str, Tensor], bench: Bench
) -> tuple[Tensor, ...]:
    """A random input of the layer and, if it has one, a random summand of its result's shape."""
    x = bench.randn(*shape, seed=1)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    if layer.other is None:
        return (x,)
    alone = replace(layer.node, args=(layer.x, None, *layer.node.args[2:]))
    return x, torch.randn_like(Program(_one_layer(alone, stored, replace(layer, other=None)))(x)[0])


def _one_layer(node: Node, tensors: dict[str, Tensor], layer: FusedLayer) -> Graph:
    """A network of that node alone; its inputs are the layer's input and, if it has one, its summand."""
    sources = [layer.x.name, *([layer.other.name] if layer.other else [])]
    return Graph(tuple(InputSpec(name, ()) for name in sources), tensors, (node,), (node.name,))
