"""Rules of operators that take statistics: over positions, channel by channel, or over channels, which ties them."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..runtime.graph import Node
from ..runtime.ops import resolve
from .joining import unknown
from .walk import Walk


def spatial(walk: Walk, node: Node) -> Any:
    """Each channel's plane by itself (pooling, resizing): axis 1 of (N, C, ...)."""
    labels, shape = walk.value(node.args[0]), walk.shapes[node.name]
    for axis in range(2, labels.dim()):
        walk.labels.tie(labels, axis, f"is mixed over positions by {node.op.split('.')[1]} ({node.name})")
    return labels[(slice(None), slice(None), *[slice(0, 1)] * (labels.dim() - 2))].expand(shape)


def spatial_with_indices(walk: Walk, node: Node) -> Any:
    """Pooling that also gives the positions it took."""
    source = walk.value(node.args[0])
    for axis in range(2, source.dim()):
        walk.labels.tie(source, axis, f"is mixed over positions by {node.op.split('.')[1]} ({node.name})")
    pooled = resolve(node.op)(torch.empty(source.shape, device="meta"), *node.args[1:])[0].shape
    labels = source[(slice(None), slice(None), *[slice(0, 1)] * (source.dim() - 2))].expand(pooled)
    return [labels, labels]


def reduce(walk: Walk, node: Node) -> Any:
    """A statistic over some axes: channels that lie along them are tied."""
    labels = walk.value(node.args[0])
    at = 2 if node.op.startswith(("aten.norm.", "aten.linalg_vector_norm")) else 1
    dims = node.args[at] if len(node.args) > at else None
    dims = [dims] if isinstance(dims, int) else dims
    dims = [d % labels.dim() for d in dims] if dims else list(range(labels.dim()))
    for axis in dims:
        walk.labels.tie(labels, axis, f"is summed over channels by {node.op.split('.')[1]} ({node.name})")
    kept = labels[tuple(slice(0, 1) if d in dims else slice(None) for d in range(labels.dim()))]
    if len(walk.shapes[node.name]) != kept.dim():
        for axis in sorted(dims, reverse=True):
            kept = kept.select(axis, 0)
    return kept


def along_axis(walk: Walk, node: Node) -> Any:
    """A softmax or running sum along one axis."""
    labels = walk.value(node.args[0])
    reason = f"goes through a {node.op.split('.')[1]} over channels ({node.name})"
    walk.labels.tie(labels, node.args[1] % labels.dim(), reason)
    return labels


def layer_norm(walk: Walk, node: Node) -> Any:
    """The axes that are normalised together hold one channel."""
    labels = walk.value(node.args[0])
    for axis in range(labels.dim() - len(node.args[1]), labels.dim()):
        walk.labels.tie(labels, axis, f"is normalised across channels ({node.name})")
    return labels


def group_norm(walk: Walk, node: Node) -> Any:
    """The channels of one group are normalised together: they are one channel."""
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
    """Batch norm and instance norm: each channel by itself, along axis 1."""
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
    """A slope for each channel along axis 1, or one for all."""
    labels, slope = walk.value(node.args[0]), node.args[1]
    stored = walk.graph.tensors.get(slope.name)
    if stored is not None and math.prod(stored.shape) == 1:
        return labels
    if not walk.flat_over(labels, 1) or not walk.use(slope, 0, walk.along(labels, 1)):
        return unknown(walk, node)
    return labels
