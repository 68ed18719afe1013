"""Layers take over what follows them: the addition and the activation that alone read a convolution or Linear.

Device-independent: the nodes keep their plain weights and mean plain PyTorch. `candidates` turns them into calls of a
kernel for the device that serves. Original and pruned networks get the same treatment.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .graph import Graph, Node, Ref, conv2d_geometry
from .layer_ops import FUSED_CONV2D, FUSED_LINEAR
from .program import value_types

_CONV, _LINEAR, _ADD = "aten.conv2d.default", "aten.linear.default", "aten.add.Tensor"
_ACTIVATIONS = {
    f"aten.{name}.default": name for name in ("relu", "relu6", "silu", "sigmoid", "hardswish", "hardsigmoid", "gelu")
}
_BATCH = 2  # of the run that finds the shapes: a summand that is one row for all inputs shows


def fuse_epilogues(graph: Graph) -> Graph:
    """The same function with each convolution and Linear that has stored parameters as a node of `layer_ops`.

    Such a node holds its layer, then an unscaled addition of a value of the same shape, then an activation, as far as
    each alone reads the one before. Runs the network once on zeros, on the CPU.
    """
    users, types = graph.users(), value_types(graph, "cpu", _BATCH)
    types |= {i.name: ((_BATCH, *i.shape), getattr(torch, i.dtype)) for i in graph.inputs}
    replaced: dict[str, Node] = {}
    absorbed: set[str] = set()
    for node in graph.nodes:
        if not _is_layer(graph, node) or node.op == _CONV and len(types[node.name][0]) != 4:
            continue
        last, other, activation = node, None, "none"
        follower = _only_reader(graph, users, last)
        partner = _other_summand(follower, node.name)
        if partner and follower.name not in {*absorbed, *replaced} and types.get(partner) == types[node.name]:
            absorbed.add(last.name)
            last, other = follower, Ref(partner)
            follower = _only_reader(graph, users, last)
        if follower and (name := _activation(follower)):
            absorbed.add(last.name)
            last, activation = follower, name
        x, weight, *rest = node.args
        bias = rest[0] if rest else None
        if node.op == _CONV:
            call = FUSED_CONV2D, (x, other, weight, bias, *conv2d_geometry(node), activation)
        else:
            call = FUSED_LINEAR, (x, other, weight, bias, activation)
        replaced[last.name] = Node(last.name, *call)
    nodes = tuple(replaced.get(n.name, n) for n in graph.nodes if n.name in replaced or n.name not in absorbed)
    return replace(graph, nodes=nodes).pruned_of_unused()


def _is_layer(graph: Graph, node: Node) -> bool:
    """A convolution or Linear whose weight and bias are stored, and its input is not."""
    if node.op not in (_CONV, _LINEAR) or node.kwargs or node.args[0].name in graph.tensors:
        return False
    return all(ref.name in graph.tensors for ref in node.args[1:3] if ref is not None)


def _activation(node: Node) -> str | None:
    """The name by which kernels know an activation."""
    if node.op == "aten.gelu.default" and node.kwargs:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if node.op == "aten.hardtanh.default":
        return "relu6" if node.args[1:] == (0.0, 6.0) else None
    return _ACTIVATIONS.get(node.op)


def _only_reader(graph: Graph, users: dict[str, list[Node]], node: Node) -> Node | None:
    readers = users.get(node.name, [])
    return readers[0] if len(readers) == 1 and node.name not in graph.outputs else None


def _other_summand(node: Node | None, name: str) -> str | None:
    """What an unscaled add of two values adds to ``name``."""
    if node is None or node.op != _ADD or node.kwargs or not all(isinstance(a, Ref) for a in node.args):
        return None
    return next((a.name for a in node.args if a.name != name), None)
