"""Add constants to what layers give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from redpp_serve.graph.graph import Graph, Node, Ref
from redpp_serve.graph.layers import LINEAR, is_convolution
from redpp_serve.graph.passes import is_inference_norm


def add_constant(graph: Graph, node: str, constant: Tensor) -> Graph:
    """Add (n_out,) to a layer's output, at every call that shares its weight.

    It goes into the bias, into the means of the batch norms that alone read the calls, or into a new bias. The graph
    stays as it is if a call takes no bias, or if other layers use the bias too.
    """
    users = graph.users()
    calls = users[graph.node(node).args[1].name]
    if not all(is_convolution(call) or call.op == LINEAR for call in calls):
        return graph
    biases = {call.argument(2) for call in calls}
    if biases != {None}:
        name = next(bias.name for bias in biases if bias is not None)
        alone = len(biases) == 1 and name in graph.tensors and len(users[name]) == len(calls)
        return _shifted(graph, name, constant) if alone else graph
    means = [_mean_behind(graph, users, call) for call in calls]
    if None not in means and all(len(users[mean]) == means.count(mean) for mean in means if mean):
        for mean in filter(None, dict.fromkeys(means)):
            graph = _shifted(graph, mean, -constant)
        return graph
    name = f"{calls[0].name}.bias"
    while name in graph.tensors:  # a module may be called as a call is
        name = f"{name}_new"
    changed = {call.name: replace(call, args=(*call.args[:2], Ref(name), *call.args[3:])) for call in calls}
    new = constant.to(graph.tensors[calls[0].args[1].name])
    return graph.with_tensors({name: new}).with_nodes(changed)


def _mean_behind(graph: Graph, users: Mapping[str, Sequence[Node]], call: Node) -> str | None:
    """Name the stored mean of the batch norm that alone reads a call."""
    readers = users.get(call.name, [])
    if len(readers) != 1 or not is_inference_norm(readers[0]) or call.name in graph.outputs:
        return None
    mean: str = readers[0].args[3].name
    return mean if mean in graph.tensors else None


def _shifted(graph: Graph, name: str, constant: Tensor) -> Graph:
    old = graph.tensors[name]
    return graph.with_tensors({name: (old.double() + constant.to(old.device)).to(old)})
