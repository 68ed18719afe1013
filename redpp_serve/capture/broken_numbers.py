"""Refuse numbers that make outputs NaN: weights that come out as NaN of finite parts, and variances below zero."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from redpp_serve.capture.sniff import shorten
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import weight_calls
from redpp_serve.graph.passes import is_inference_norm

_DIRECTIONS = (".original1", "_v")  # of both forms of torch's weight norm
_EARLIER = "use an earlier checkpoint, or correct that tensor"


def refuse_broken_numbers(graph: Graph, stored: Mapping[str, Tensor]) -> None:
    """Refuse a graph with NaN in a weight or in a computed constant, or with a variance that has no root.

    Args:
        graph: the graph.
        stored: the network's own tensors; where one of these is NaN and no weight, others decide.

    Raises:
        RedppError: naming the tensors.
    """
    computed = (graph.tensors.keys() - stored.keys()) | weight_calls(graph).keys()
    if bad := [name for name, t in graph.tensors.items() if name in computed and bool(t.isnan().any())]:
        zero = [name for name, tensor in stored.items() if name.endswith(_DIRECTIONS) and _has_zero_row(tensor)]
        why = f", for {shorten(zero)} has directions of zeros, which have no weight norm" if zero else ""
        raise RedppError(f"{shorten(bad)} comes out as NaN{why}", "weights that are numbers", _EARLIER)
    for node in filter(is_inference_norm, graph.nodes):
        name, epsilon = node.args[4].name, node.args[7]
        variance = graph.tensors[name]
        if bool((variance + epsilon <= 0).any()):
            raise RedppError(
                f"{name} has variances down to {float(variance.min()):.3g}, which have no root",
                f"variances above -{epsilon:g}",
                _EARLIER,
            )


def _has_zero_row(tensor: Tensor) -> bool:
    return bool((tensor.flatten(1) == 0).all(1).any()) if tensor.dim() > 1 else False
