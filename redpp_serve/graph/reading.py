"""Rules of operators that sum over channels: convolutions, Linear, matrix products, attention, gated units."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..runtime.graph import Node, Ref
from .joining import join, tensors_in, unknown
from .labels import once
from .walk import Produced, Read, Walk

_DEPTHWISE = "depthwise: its channels are those of its input"
_GROUPED = "grouped: a group of its channels goes with that of its input"


def layer_name(node: Node) -> str:
    """A layer's name: that of its weight without the ending, or of the call where the weight is computed."""
    weight = node.args[1] if len(node.args) > 1 else None
    return weight.name.removesuffix(".weight") if isinstance(weight, Ref) else node.name


def conv_groups(node: Node) -> int:
    """The number of groups of any convolution's call."""
    at = 8 if node.op == "aten.convolution.default" else 6
    return node.args[at] if len(node.args) > at else 1


def conv(walk: Walk, node: Node) -> Any:
    """A convolution reads its input's channels and creates its output's; with groups, a group is a channel of both."""
    labels, weight, bias = walk.value(node.args[0]), *_weights(node)
    shape, groups = walk.shapes[node.name], conv_groups(node)
    transposed = node.args[6] if node.op == "aten.convolution.default" else "transpose" in node.op
    if not (walk.is_own(weight) and walk.is_own(bias)):
        return _refuse(walk, node, "its weight is computed or used elsewhere")
    if not walk.flat_over(labels, 1):
        return _refuse(walk, node, "it reads another axis than that of the channels")
    row = walk.along(labels, 1)
    if groups > 1:
        return walk.spread(_grouped(walk, node, row, groups, shape[1], transposed), 1, shape)
    return walk.spread(_read(walk, node, row, 1, int(not transposed), shape[1]), 1, shape)


def linear(walk: Walk, node: Node) -> Any:
    """A Linear reads and creates channels along the last axis; one over positions leaves the channels as they are."""
    labels, weight, bias = walk.value(node.args[0]), *_weights(node)
    shape, last = walk.shapes[node.name], labels.dim() - 1
    if not (walk.is_own(weight) and walk.is_own(bias)):
        return _refuse(walk, node, "its weight is computed or used elsewhere")
    if bool((once(labels) != once(labels).narrow(last, 0, 1)).any()):  # channels lie along the last axis, tied or not
        for axis in walk.varying(labels):
            if axis != last:  # the same columns read every position (a class token's and the patches', say)
                walk.labels.tie(labels, axis, f"is read by one Linear at every position ({node.name})")
    moves = walk.varying(labels)
    if moves and last not in moves:
        walk.refused[layer_name(node)] = "it mixes positions, not channels"
        for tensor, dim, size in ((weight, 1, labels.shape[last]), (weight, 0, shape[-1]), (bias, 0, shape[-1])):
            walk.use(tensor, dim, walk.none(size))
        return labels.narrow(last, 0, 1).expand(shape)
    if len(moves) > 1:
        return _refuse(walk, node, "it reads another axis than that of the channels")
    return walk.spread(_read(walk, node, walk.along(labels, last), last, 1, shape[-1]), last, shape)


def _weights(node: Node) -> tuple[Any, Any]:
    return node.args[1], node.args[2] if len(node.args) > 2 else None


def _refuse(walk: Walk, node: Node, reason: str) -> Tensor:
    """The layer stays, and all that it reads."""
    name = layer_name(node)
    walk.refused[name] = reason
    for labels in tensors_in([walk.value(a) for a in node.args[:3]]):
        walk.labels.close(labels, f"is read by {name}: {reason}")
    for tensor in _weights(node):
        if isinstance(tensor, Ref) and walk.is_own(tensor):
            for dim, size in enumerate(walk.graph.tensors[tensor.name].shape):
                walk.use(tensor, dim, walk.none(size))
    return walk.none(*walk.shapes[node.name])


def _read(walk: Walk, node: Node, row: Tensor, axis: int, into: int, count: int) -> Tensor:
    """Read the channels ``row`` by dimension ``into`` of the weight, and create ``count`` by the other one."""
    weight, bias = _weights(node)
    walk.reads.append(Read(node.name, weight.name, into, node.args[0].name, axis, row))
    walk.use(weight, into, row)
    created = walk.rows(weight, 1 - into, count)
    walk.use(weight, 1 - into, created)
    walk.use(bias, 0, created)
    walk.produced.append(Produced(layer_name(node), node.name, created))
    return created


def _grouped(walk: Walk, node: Node, row: Tensor, groups: int, count: int, transposed: bool) -> Tensor:
    """Each group of input channels becomes one channel, with the group's output channels."""
    name, (weight, bias) = layer_name(node), _weights(node)
    if bool((row == walk.labels.NONE).any()):
        walk.labels.close(row, f"is read by {name} in groups with values that are no channels")
    walk.labels.tie(row.view(groups, -1), 1, f"is read by a grouped convolution ({name})")
    created = row.view(groups, -1)[:, :1].expand(groups, count // groups).reshape(-1)
    walk.use(weight, 0, row if transposed else created)
    walk.use(bias, 0, created)
    walk.refused[name] = _DEPTHWISE if groups == count == len(row) else _GROUPED
    return created


def matmul(walk: Walk, node: Node) -> Any:
    """A product of two computed values: what is summed over is tied, heads (batch axes with channels) are joined."""
    a, b = (walk.value(x) for x in node.args[:2])
    if min(a.dim(), b.dim()) < 2:
        return unknown(walk, node)
    why, shape = f"is contracted with another value ({node.name})", walk.shapes[node.name]
    walk.labels.tie(a, a.dim() - 1, why)
    walk.labels.tie(b, b.dim() - 2, why)
    if any(d < t.dim() - 2 for t in (a, b) for d in walk.varying(t)):
        return _joined_heads(walk, [a, b], node, shape)
    if a.dim() - 2 in walk.varying(a):
        if b.dim() - 1 in walk.varying(b):
            for labels in (a, b):
                walk.labels.close(labels, why)
            return walk.none(*shape)
        return a.narrow(-1, 0, 1).expand(shape)
    return b.narrow(-2, 0, 1).expand(shape)


def _joined_heads(walk: Walk, operands: list[Tensor], node: Node, shape: tuple[int, ...]) -> Tensor:
    """Each head is one channel, the same in all operands."""
    for labels in operands:
        for d in (labels.dim() - 1, labels.dim() - 2):
            walk.labels.tie(labels, d, f"belongs to a head ({node.name})")
    heads = operands[0][..., :1, :1]
    for labels in operands[1:]:
        heads = join(walk, heads, labels[..., :1, :1], node)
    return heads.expand(shape)


def attention(walk: Walk, node: Node) -> Any:
    """Scaled dot-product attention; a mask or bias joins the heads where it differs between them."""
    if node.kwargs.get("enable_gqa") or len(node.args) > 7:
        return unknown(walk, node)
    operands = tensors_in([walk.value(a) for a in (*node.args[:4], *node.kwargs.values())])
    return _joined_heads(walk, operands, node, walk.shapes[node.name])


def glu(walk: Walk, node: Node) -> Any:
    """The first half times a gate that the second half gives."""
    labels = walk.value(node.args[0])
    axis = node.args[1] if len(node.args) > 1 else -1
    half = labels.shape[axis] // 2
    return join(walk, labels.narrow(axis, 0, half), labels.narrow(axis, half, half), node)
