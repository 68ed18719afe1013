"""Convolution epilogues on the CPU: activation and residual add inside oneDNN's convolution, weights packed once.

The calls that torch.compile makes when it freezes a network (torch/_inductor/fx_passes/mkldnn_fusion.py), made here
at load, without a compiler on the server. Original and pruned networks get the same treatment.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .graph import Graph, Node, Ref, conv2d_geometry
from .ops import FUSED_CONV
from .program import value_shapes

_CONV, _ADD, _RELU = "aten.conv2d.default", "aten.add.Tensor", "aten.relu.default"
_ACTIVATIONS: dict[str, tuple[str, list[float]]] = {
    _RELU: ("relu", []),
    "aten.relu6.default": ("hardtanh", [0.0, 6.0]),
    "aten.silu.default": ("swish", []),
    "aten.hardswish.default": ("hardswish", []),
    "aten.hardsigmoid.default": ("hardsigmoid", []),
}


def fuse_epilogues(graph: Graph) -> Graph:
    """The same function with each float32 convolution taking over the add and the activation that alone follow it.

    The weights become packed tensors that only the CPU can read: call it last.
    """
    users, shapes = graph.users(), {i.name: (1, *i.shape) for i in graph.inputs} | value_shapes(graph, "cpu")
    tensors, replaced, absorbed = dict(graph.tensors), {}, set()
    for node in graph.nodes:
        if node.op != _CONV or node.args[1].name not in tensors or tensors[node.args[1].name].dtype != torch.float32:
            continue
        last, other, activation = node, None, ("none", [])
        follower = _only_reader(graph, users, last)
        partner = _other_summand(follower, node.name)
        if partner and follower.name not in {*absorbed, *replaced} and shapes.get(partner) == shapes[node.name]:
            absorbed.add(last.name)
            last, other = follower, Ref(partner)
            follower = _only_reader(graph, users, last)
        if follower and follower.op in (_ACTIVATIONS if other is None else (_RELU,)):
            absorbed.add(last.name)
            last, activation = follower, _ACTIVATIONS[follower.op]
        packed, geometry = _pack(tensors[node.args[1].name], node, shapes[node.args[0].name])
        tensors[f"{node.name}.packed"] = packed
        bias = node.args[2] if len(node.args) > 2 else None
        replaced[last.name] = Node(last.name, FUSED_CONV, (node.args[0], other, Ref(f"{node.name}.packed"), bias, *geometry, *activation))
    nodes = tuple(replaced.get(n.name, n) for n in graph.nodes if n.name in replaced or n.name not in absorbed)
    return replace(graph, nodes=nodes, tensors=tensors).pruned_of_unused()


def _pack(weight: Tensor, node: Node, source: tuple[int, ...]) -> tuple[Tensor, tuple[Any, ...]]:
    """The weight in the layout that oneDNN wants for inputs of this shape; in another it is laid out anew at each call."""
    stride, padding, dilation, groups = geometry = conv2d_geometry(node)
    pack = torch.ops.mkldnn._reorder_convolution_weight
    return pack(weight.contiguous(), padding, stride, dilation, groups, list(source)), geometry


def _only_reader(graph: Graph, users: dict[str, list[Node]], node: Node) -> Node | None:
    readers = users.get(node.name, [])
    return readers[0] if len(readers) == 1 and node.name not in graph.outputs else None


def _other_summand(node: Node | None, name: str) -> str | None:
    """What an unscaled add of two values adds to ``name``."""
    if node is None or node.op != _ADD or node.kwargs or not all(isinstance(a, Ref) for a in node.args):
        return None
    return next((a.name for a in node.args if a.name != name), None)
