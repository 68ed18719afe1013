"""Which kernels may run a layer on a device, and which of them are worth the time to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .graph import Graph, Node, Ref
from .layers import FusedLayer, fused_layer
from .onednn import available, onednn_conv2d


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer.

    ``worth_timing`` is the prior's verdict and ``reason`` says why, in words. ``make()`` gives a node of the layer's
    name, and by name the tensors that it reads beside its input and its summand, in this kernel's form, on the device.
    """

    kernel: str
    worth_timing: bool
    reason: str
    make: Callable[[], tuple[Node, dict[str, Tensor]]]


def candidates(
    graph: Graph, node: Node, x_shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> list[Candidate]:
    """The kernels that can run a layer; ``dense`` comes first, always exists and is the yardstick.

    Args:
        graph: fused, in the precision that it runs in, on the device.
        node: a node of `layers.fused_layers`.
        x_shape: of the layer's input, with the batch.
        dtype: of the precision; a layer that keeps another (integers aside) has the dense kernel alone.
    """
    layer = fused_layer(graph, node)
    return [_dense(graph, layer, x_shape, device)]


def signature(graph: Graph, node: Node, x_shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Canonical text of all that a layer's times depend on, apart from the device; equal layers have equal texts."""
    layer = fused_layer(graph, node)
    parts = {
        "op": node.op,
        "x": "x".join(map(str, x_shape)),
        "weight": "x".join(map(str, layer.values.shape)),
        "dtype": str(layer.values.dtype).removeprefix("torch."),
        "bias": int(layer.bias is not None),
        "sum": int(layer.other is not None),
        "activation": layer.activation,
    }
    if layer.is_conv:
        parts["window"] = "/".join("x".join(map(str, pair)) for pair in layer.geometry)
        parts["groups"] = layer.groups
    return " ".join(f"{key}={value}" for key, value in parts.items())


def with_kernels(graph: Graph, choice: Mapping[str, Candidate]) -> Graph:
    """The graph with each layer named in ``choice`` run by that candidate; weights in forms that no node reads go."""
    made = {name: candidate.make() for name, candidate in choice.items()}
    tensors = {name: tensor for _, forms in made.values() for name, tensor in forms.items()}
    changed = graph.with_nodes({name: node for name, (node, _) in made.items()})
    return replace(changed, tensors={**graph.tensors, **tensors}).pruned_of_unused()


def _dense(graph: Graph, layer: FusedLayer, x_shape: tuple[int, ...], device: torch.device) -> Candidate:
    """The library's call, with as much of the epilogue as the library takes on a CPU."""

    def make() -> tuple[Node, dict[str, Tensor]]:
        if device.type != "cpu" or not layer.is_conv or not available(layer.values.dtype):
            return layer.node, _stored(graph, layer.weight, layer.bias)
        # laid out for one image whatever the batch: each bucket would else hold a form of its own
        node, forms = onednn_conv2d(layer, (1, *x_shape[1:]))
        return node, forms | _stored(graph, layer.bias)

    return Candidate("dense", True, "the yardstick", make)


def _stored(graph: Graph, *refs: Ref | None) -> dict[str, Tensor]:
    return {ref.name: graph.tensors[ref.name] for ref in refs if ref is not None}
