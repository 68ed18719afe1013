"""Rules of operators that sum over channels or take statistics.

Convolutions, Linear and matrix products read channels; the former two and embeddings create them. A statistic over
positions treats each channel by itself; one over channels ties them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from redpp_serve.channels.labels import once
from redpp_serve.channels.walk import Produced, Read, Walk, join, op_name, tensors_in, unknown
from redpp_serve.graph.graph import Node, Ref
from redpp_serve.graph.operators import resolve

_DEPTHWISE = "depthwise: its channels are those of its input"
_GROUPED = "grouped: a group of its channels goes with that of its input"


def spatial(walk: Walk, node: Node) -> Any:
    """Treat each channel's plane by itself, along axis 1 of (N, C, ...): pooling, with indices or not, and resizing."""
    labels = walk.value(node.args[0])
    for axis in range(2, labels.dim()):
        walk.labels.tie(labels, axis, f"is mixed over positions by {op_name(node)} ({node.name})")
    corner = labels[(slice(None), slice(None), *[slice(0, 1)] * (labels.dim() - 2))]
    if node.name in walk.shapes:
        return corner.expand(walk.shapes[node.name])
    pooled = resolve(node.op)(torch.empty(labels.shape, device="meta"), *node.args[1:])
    return [corner.expand(result.shape) for result in pooled]


def reduce(walk: Walk, node: Node) -> Any:
    """Tie the channels that lie along the axes of a statistic."""
    labels = walk.value(node.args[0])
    dims = node.argument(2 if node.op.startswith(("aten.norm.", "aten.linalg_vector_norm")) else 1)
    dims = [dims] if isinstance(dims, int) else dims
    dims = [d % labels.dim() for d in dims] if dims else list(range(labels.dim()))
    for axis in dims:
        walk.labels.tie(labels, axis, f"is summed over channels by {op_name(node)} ({node.name})")
    kept = labels[tuple(slice(0, 1) if d in dims else slice(None) for d in range(labels.dim()))]
    if len(walk.shapes[node.name]) != kept.dim():
        for axis in sorted(dims, reverse=True):
            kept = kept.select(axis, 0)
    return kept


def along_axis(walk: Walk, node: Node) -> Any:
    """Tie the channels that lie along the axis of a softmax or running sum."""
    labels = walk.value(node.args[0])
    walk.labels.tie(labels, node.args[1] % labels.dim(), f"goes through a {op_name(node)} over channels ({node.name})")
    return labels


def layer_norm(walk: Walk, node: Node) -> Any:
    """Tie the channels along the axes that are normalized together."""
    labels = walk.value(node.args[0])
    for axis in range(labels.dim() - len(node.args[1]), labels.dim()):
        walk.labels.tie(labels, axis, f"is normalised across channels ({node.name})")
    return labels


def group_norm(walk: Walk, node: Node) -> Any:
    """Tie the channels of each group, which are normalized together."""
    labels, groups = walk.value(node.args[0]), node.args[1]
    if not walk.flat_over(labels, 1):
        return unknown(walk, node)
    row = walk.along(labels, 1)
    walk.labels.tie(row.view(groups, -1), 1, f"is normalised across channels ({node.name})")
    for parameter in node.args[2:4]:
        if not walk.use(parameter, 0, row):
            walk.labels.close(row, f"its norm is computed or shared ({node.name})")
    return labels


def channel_norm(walk: Walk, node: Node) -> Any:
    """Treat each channel along axis 1 by itself: batch norm and instance norm."""
    labels = walk.value(node.args[0])
    for axis in walk.varying(labels):
        if axis != 1:
            walk.labels.tie(labels, axis, f"is normalised across channels ({node.name})")
    row = walk.along(labels, 1)
    if node.op == "aten.batch_norm.default" and node.args[5]:
        walk.labels.close(row, f"its batch norm uses the batch's own statistics ({node.name})")
    for parameter in node.args[1:5]:
        if not walk.use(parameter, 0, row):
            walk.labels.close(row, f"its batch norm is shared or computed ({node.name})")
    return labels


def prelu(walk: Walk, node: Node) -> Any:
    """Bind a slope for each channel along axis 1; a single slope for all binds none."""
    labels, slope = walk.value(node.args[0]), node.args[1]
    stored = walk.graph.tensors.get(slope.name)
    if stored is not None and math.prod(stored.shape) == 1:
        return labels
    if not walk.flat_over(labels, 1) or not walk.use(slope, 0, walk.along(labels, 1)):
        return unknown(walk, node)
    return labels


def layer_name(node: Node) -> str:
    """Return a layer's name: that of its weight without the ending, or of the call if the weight is computed."""
    weight = node.argument(1)
    return weight.name.removesuffix(".weight") if isinstance(weight, Ref) else node.name


def groups_at(node: Node) -> int:
    """Return the position of the number of groups among a convolution's arguments."""
    return 8 if node.op == "aten.convolution.default" else 6


def conv(walk: Walk, node: Node) -> Any:
    """Read the input's channels and create the output's; with groups, a group is one channel of both."""
    labels, weight, bias = walk.value(node.args[0]), node.args[1], node.argument(2)
    shape, groups = walk.shapes[node.name], node.argument(groups_at(node), 1)
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
    """Read and create channels along the last axis; a Linear over positions leaves the channels as they are."""
    labels, weight, bias = walk.value(node.args[0]), node.args[1], node.argument(2)
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


def embedding(walk: Walk, node: Node) -> Any:
    """Create the channels along the last axis: the columns of the table."""
    table, shape = node.args[0], walk.shapes[node.name]
    for labels in tensors_in(walk.value(node.args[1])):
        walk.labels.close(labels, f"is looked up ({node.name})")
    if not walk.is_own(table):
        return unknown(walk, node)
    created = walk.rows(table, 1, shape[-1])
    walk.use(table, 1, created)
    walk.produced.append(Produced(table.name.removesuffix(".weight"), created))
    return walk.spread(created, len(shape) - 1, shape)


def recurrent(walk: Walk, node: Node) -> Any:
    """Close what a recurrent operator reads, and all of its own channels."""
    for name in node.refs():
        for labels in tensors_in(walk.value(Ref(name))):
            walk.labels.close(labels, f"is read by {op_name(node)} ({node.name}), which stays whole")
        if name in walk.graph.tensors and walk.graph.tensors[name].dim() > 1:
            walk.refused[name.removesuffix(".weight")] = "a recurrent operator stays whole"
    return walk.opaque(node)


def _refuse(walk: Walk, node: Node, reason: str) -> Tensor:
    """Close the layer and all that it reads."""
    name = layer_name(node)
    walk.refused[name] = reason
    for labels in tensors_in([walk.value(a) for a in node.args[:3]]):
        walk.labels.close(labels, f"is read by {name}: {reason}")
    for tensor in node.args[1:3]:
        if isinstance(tensor, Ref) and walk.is_own(tensor):
            for dim, size in enumerate(walk.graph.tensors[tensor.name].shape):
                walk.use(tensor, dim, walk.none(size))
    return walk.none(*walk.shapes[node.name])


def _read(walk: Walk, node: Node, row: Tensor, axis: int, into: int, count: int) -> Tensor:
    """Read the channels ``row`` by dimension ``into`` of the weight, and create ``count`` by the other one."""
    weight = node.args[1]
    walk.reads.append(Read(node.name, weight.name, into, node.args[0].name, axis, row))
    walk.use(weight, into, row)
    created = walk.rows(weight, 1 - into, count)
    walk.use(weight, 1 - into, created)
    walk.use(node.argument(2), 0, created)
    walk.produced.append(Produced(layer_name(node), created))
    return created


def _grouped(walk: Walk, node: Node, row: Tensor, groups: int, count: int, transposed: bool) -> Tensor:
    """Make each group of input channels one channel, together with the group's output channels."""
    name = layer_name(node)
    if bool((row == walk.labels.NONE).any()):
        walk.labels.close(row, f"is read by {name} in groups with values that are no channels")
    walk.labels.tie(row.view(groups, -1), 1, f"is read by a grouped convolution ({name})")
    created = row.view(groups, -1)[:, :1].expand(groups, count // groups).reshape(-1)
    walk.use(node.args[1], 0, row if transposed else created)
    walk.use(node.argument(2), 0, created)
    walk.refused[name] = _DEPTHWISE if groups == count == len(row) else _GROUPED
    return created


def matmul(walk: Walk, node: Node) -> Any:
    """Tie what a product of two computed values sums over, and join heads: batch axes with channels."""
    a, b = (walk.value(x) for x in node.args[:2])
    if min(a.dim(), b.dim()) < 2:
        return unknown(walk, node)
    why, shape = f"is contracted with another value ({node.name})", walk.shapes[node.name]
    walk.labels.tie(a, a.dim() - 1, why)
    walk.labels.tie(b, b.dim() - 2, why)
    if any(d < t.dim() - 2 for t in (a, b) for d in walk.varying(t)):
        return _joined_heads(walk, [a, b], node)
    if a.dim() - 2 in walk.varying(a):
        if b.dim() - 1 in walk.varying(b):
            for labels in (a, b):
                walk.labels.close(labels, why)
            return walk.none(*shape)
        return a.narrow(-1, 0, 1).expand(shape)
    return b.narrow(-2, 0, 1).expand(shape)


def _joined_heads(walk: Walk, operands: list[Tensor], node: Node) -> Tensor:
    """Make each head one channel, the same in all operands."""
    for labels in operands:
        for d in (labels.dim() - 1, labels.dim() - 2):
            walk.labels.tie(labels, d, f"belongs to a head ({node.name})")
    heads = operands[0][..., :1, :1]
    for labels in operands[1:]:
        heads = join(walk, heads, labels[..., :1, :1], node)
    return heads.expand(walk.shapes[node.name])


def attention(walk: Walk, node: Node) -> Any:
    """Join the heads of scaled dot-product attention, also with a mask or bias that differs between them."""
    if node.kwargs.get("enable_gqa") or len(node.args) > 7:
        return unknown(walk, node)
    return _joined_heads(walk, tensors_in([walk.value(a) for a in (*node.args[:4], *node.kwargs.values())]), node)


def glu(walk: Walk, node: Node) -> Any:
    """Join each entry of the first half with its gate in the second half."""
    labels, axis = walk.value(node.args[0]), node.argument(1, -1)
    half = labels.shape[axis] // 2
    return join(walk, labels.narrow(axis, 0, half), labels.narrow(axis, half, half), node)
