"""Products with a stored matrix as Linear, the layer that they are.

Traced networks, programs of core operators and hand-written products give ``aten.linear`` as a matrix product with a
transposed weight, with reshapes around it and an addition after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from redpp_serve.graph.einsum import spelled
from redpp_serve.graph.executor import value_shapes
from redpp_serve.graph.graph import Graph, Node, Ref, map_refs
from redpp_serve.graph.layers import LINEAR

_PRODUCTS = ("aten.mm.default", "aten.bmm.default", "aten.matmul.default")
_BIASED, _EINSUM, _ADD = "aten.addmm.default", "aten.einsum.default", "aten.add.Tensor"
_RESHAPE, _EXPAND = "aten.reshape.default", "aten.expand.default"
_COPIES = ("aten.clone.default", "aten.contiguous.default", "aten.lift_fresh_copy.default")
_BATCHES = (3, 5)  # two sizes of the batch, so that a shape that depends on it is not taken for one that does not

_Shapes = tuple[Mapping[str, tuple[int, ...]], ...]


def linear_form(graph: Graph) -> Graph:
    """Return the graph with ``aten.linear`` for each product that a Linear with a stored weight computes.

    A stored matrix (n_in, n_out) is stored once more, as (n_out, n_in). What a reshape of the input and one of the
    result do to a product of matrices, Linear does by itself.
    """
    if not any(node.op in (*_PRODUCTS, _BIASED, _EINSUM) for node in graph.nodes):
        return graph
    try:
        shapes = tuple(_shapes(graph, batch) for batch in _BATCHES)
    except Exception:  # it takes one batch size alone, which the comparison with the network will say
        return graph
    graph = _without_idle_reshapes(graph, shapes)
    matrices = _stored_matrices(graph, shapes)
    tensors, buffers, changed = dict(graph.tensors), graph.buffers, {}
    for node in graph.nodes:
        if (found := _product(node, graph, matrices, shapes[0])) is None:
            continue
        x, (stored, is_weight), bias = found
        weight = stored if is_weight else f"{stored}_transposed"
        tensors.setdefault(weight, graph.tensors[stored].t().contiguous())
        if buffers is not None and stored in buffers:
            buffers |= {weight}
        changed[node.name] = Node(node.name, LINEAR, (x, Ref(weight), *([bias] if bias else [])))
    graph = replace(graph.with_nodes(changed), tensors=tensors, buffers=buffers)
    graph = _with_own_bias(_over_positions(graph, shapes))
    return graph.pruned_of_unused()


def _shapes(graph: Graph, batch: int) -> Mapping[str, tuple[int, ...]]:
    inputs = {spec.name: (batch, *spec.shape) for spec in graph.inputs}
    stored = {name: tuple(tensor.shape) for name, tensor in graph.tensors.items()}
    return {**inputs, **stored, **value_shapes(graph, "meta", batch)}


def _without_idle_reshapes(graph: Graph, shapes: _Shapes) -> Graph:
    """Leave out reshapes and expansions to the shape that the value has already."""
    same: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        args, kwargs = (map_refs(part, lambda name: Ref(same.get(name, name))) for part in (node.args, node.kwargs))
        source = args[0].name if node.op in (_RESHAPE, _EXPAND) else ""
        if source and node.name not in graph.outputs and all(s[node.name] == s[source] for s in shapes):
            same[node.name] = source
        else:
            nodes.append(Node(node.name, node.op, args, kwargs))
    return replace(graph, nodes=tuple(nodes))


def _stored_matrices(graph: Graph, shapes: _Shapes) -> dict[str, tuple[str, bool]]:
    """Map each value that is a stored matrix to its name, and to whether the value is the matrix transposed."""
    found = {name: (name, False) for name, t in graph.tensors.items() if t.dim() == 2 and t.is_floating_point()}
    for node in graph.nodes:
        source = node.args[0].name if node.args and isinstance(node.args[0], Ref) else ""
        if source not in found:
            continue
        stored, transposed = found[source]
        rank = len(shapes[0][source])
        if _swaps(node, rank):
            found[node.name] = stored, not transposed
        elif node.op in _COPIES or (node.op == _EXPAND and shapes[0][node.name][-2:] == shapes[0][source][-2:]):
            found[node.name] = found[source]
    return found


def _swaps(node: Node, rank: int) -> bool:
    """Return whether a call exchanges the last two of so many dimensions, and no others."""
    if node.op == "aten.permute.default":
        return [d % rank for d in node.args[1]] == [*range(rank - 2), rank - 1, rank - 2]
    if node.op == "aten.transpose.int":
        return {d % rank for d in node.args[1:3]} == {rank - 2, rank - 1}
    return node.op == "aten.t.default"


def _product(
    node: Node, graph: Graph, matrices: Mapping[str, tuple[str, bool]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Ref, tuple[str, bool], Ref | None] | None:
    """Return input, matrix and bias of a product of a computed value with a stored matrix; None for another call.

    The matrix is its name, and whether it is stored as a Linear's weight is, (n_out, n_in).
    """
    bias = None
    if node.op in _PRODUCTS:
        x, m = node.args[:2]
    elif node.op == _BIASED and all(value == 1 for value in node.kwargs.values()):
        bias, x, m = node.args
    elif node.op == _EINSUM:
        return _contraction(node, graph, shapes)
    else:
        return None
    if m.name not in matrices or x.name in matrices or x.name in graph.tensors or len(shapes[x.name]) < 2:
        return None
    if bias is not None and not (bias.name in graph.tensors and shapes[bias.name] == shapes[node.name][-1:]):
        return None
    return x, matrices[m.name], bias


def _contraction(
    node: Node, graph: Graph, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Ref, tuple[str, bool], None] | None:
    """Recognize an einsum over the last axis of a value and one axis of a stored matrix, whose other axis is last."""
    equation, operands = node.args[:2]
    if len(operands) != 2:
        return None
    axes, result = spelled(equation, [len(shapes[ref.name]) for ref in operands])
    for x, m, of_x, of_m in ((*operands, *axes), (*operands[::-1], *axes[::-1])):
        stored = graph.tensors.get(m.name)
        if stored is None or stored.dim() != 2 or x.name in graph.tensors or len(set(of_m)) != 2 or not of_x:
            continue
        (new,) = set(of_m) - {of_x[-1]} if of_x[-1] in of_m else ("",)
        if new and new not in of_x and of_x.count(of_x[-1]) == 1 and result == [*of_x[:-1], new]:
            return x, (m.name, of_m[0] == new), None
    return None


def _over_positions(graph: Graph, shapes: _Shapes) -> Graph:
    """Let Linear take (..., n_in) where a reshape makes rows of it, and one of the result undoes that."""
    calls, users = {node.name: node for node in graph.nodes}, graph.users()
    changed, dropped = {}, set()
    for node in graph.nodes:
        before = calls.get(node.args[0].name) if node.op == LINEAR else None
        readers = users.get(node.name, [])
        if before is None or before.op != _RESHAPE or len(readers) != 1 or readers[0].op != _RESHAPE:
            continue
        source, after = before.args[0].name, readers[0].name
        same = all(s[source][:-1] == s[after][:-1] and s[source][-1] == s[before.name][-1] for s in shapes)
        rows = all(s[after][-1] == s[node.name][-1] for s in shapes)
        if same and rows and node.name not in graph.outputs:
            changed[after] = Node(after, LINEAR, (Ref(source), *node.args[1:]))
            dropped.add(node.name)
    nodes = tuple(changed.get(node.name, node) for node in graph.nodes if node.name not in dropped)
    return replace(graph, nodes=nodes)


def _with_own_bias(graph: Graph) -> Graph:
    """Let a Linear without bias take over the addition of a stored vector (n_out,) that alone reads it."""
    calls, users = {node.name: node for node in graph.nodes}, graph.users()
    changed, dropped = {}, set()
    for node in graph.nodes:
        if node.op != _ADD or node.kwargs or not all(isinstance(a, Ref) for a in node.args):
            continue
        for value, vector in (node.args, node.args[::-1]):
            layer, bias = calls.get(value.name), graph.tensors.get(vector.name)
            if layer is None or layer.op != LINEAR or layer.argument(2) is not None or layer.name in graph.outputs:
                continue
            if bias is not None and len(users[layer.name]) == 1 and bias.shape == _rows(graph, layer):
                changed[node.name] = Node(node.name, LINEAR, (*layer.args[:2], vector))
                dropped.add(layer.name)
    nodes = tuple(changed.get(node.name, node) for node in graph.nodes if node.name not in dropped)
    return replace(graph, nodes=nodes)


def _rows(graph: Graph, layer: Node) -> Any:
    weight: Tensor | None = graph.tensors.get(layer.args[1].name)
    return None if weight is None else weight.shape[:1]
