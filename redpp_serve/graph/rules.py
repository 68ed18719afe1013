"""How channels pass through each operator: which of its entries are joined, tied together, created, read or closed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..runtime.graph import Node, Ref
from ..runtime.ops import resolve
from .walk import Produced, Read, Walk

Rule = Callable[[Walk, Node], Any]


def layer_name(node: Node) -> str:
    """A layer's name: that of its weight without the ending, or of the call where the weight is computed."""
    weight = node.args[1] if len(node.args) > 1 else None
    return weight.name.removesuffix(".weight") if isinstance(weight, Ref) else node.name


def unknown(walk: Walk, node: Node) -> Any:
    """An operator without a rule closes whatever channels it reads."""
    for name in node.refs():
        for labels in _tensors(walk.value(Ref(name))):
            walk.labels.close(labels, f"is read by {node.op.split('.')[1]} ({node.name}), whose coupling is not known")
    return walk.opaque(node)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _same(walk: Walk, node: Node) -> Any:
    return walk.value(node.args[0])


def _number(walk: Walk, node: Node) -> Any:
    """Sizes and arithmetic on them, at batch size 1."""
    args = [list(a.shape) if isinstance(a, Tensor) else a for a in (walk.value(a) for a in node.args)]
    if node.op == "aten.sym_size.int":
        return args[0][args[1]]
    return resolve(node.op)(*args)


def _getitem(walk: Walk, node: Node) -> Any:
    value = walk.value(node.args[0])
    return walk.opaque(node) if value is None else value[node.args[1]]


def _elementwise(walk: Walk, node: Node) -> Any:
    """Entries that meet belong to one channel."""
    operands = _tensors([walk.value(a) for a in node.args])
    result = operands[0]
    for other in operands[1:]:
        result = join(walk, result, other, node)
    return result


def join(walk: Walk, a: Tensor, b: Tensor, node: Node) -> Tensor:
    """Join the labels of two broadcast operands and return those of the result."""
    dims = max(a.dim(), b.dim())
    a, b = (t.reshape([1] * (dims - t.dim()) + list(t.shape)) if t.dim() < dims else t for t in (a, b))
    shape = torch.broadcast_shapes(a.shape, b.shape)
    moves_a, moves_b = set(walk.varying(a)), set(walk.varying(b))
    over_b = {d for d in moves_b if a.shape[d] == 1 < b.shape[d]}  # a is one for all channels of b there
    over_a = {d for d in moves_a if b.shape[d] == 1 < a.shape[d]}
    where = f"is broadcast over other channels ({node.name})"
    if over_a and over_b:
        walk.labels.close(a, where)
        walk.labels.close(b, where)
        return walk.none(*shape)
    for one, many, moves, over in ((a, b, moves_a, over_b), (b, a, moves_b, over_a)):
        if over and not moves:
            walk.labels.close(one, where)
            return many.expand(shape)
        for d in over:
            walk.labels.tie(many, d, where)
    if not (moves_a and moves_b) and (bool((a == 0).all()) and not moves_b or bool((b == 0).all()) and not moves_a):
        return (a if bool((b == 0).all()) else b).expand(shape)
    walk.labels.union(a, b, f"meets values that are no channels ({node.name})")
    return (a if len(moves_a) >= len(moves_b) and not over_b else b).expand(shape)


def _move(walk: Walk, node: Node) -> Any:
    """Operators that only move entries do the same to the labels."""
    args = [walk.value(a) for a in node.args]
    return resolve(node.op)(*args)


def _pick(axis_at: int, default: int) -> Rule:
    """Taking entries of one axis by number: along it all channels stay or go together."""

    def rule(walk: Walk, node: Node) -> Any:
        labels = walk.value(node.args[0])
        axis = node.args[axis_at] if len(node.args) > axis_at else default
        walk.tie_later(labels, axis % labels.dim(), f"is taken apart by {node.op.split('.')[1]} ({node.name})")
        return _move(walk, node)

    return rule


def _slice(walk: Walk, node: Node) -> Any:
    labels = walk.value(node.args[0])
    if len(node.args) > 4 and node.args[4] != 1:
        axis = node.args[1] % labels.dim()
        walk.tie_later(labels, axis, f"is read in steps ({node.name})")
    return _move(walk, node)


def _whole(dims_at: int | None) -> Rule:
    """Moving entries along an axis (roll, flip): the channels there are tied."""

    def rule(walk: Walk, node: Node) -> Any:
        labels = walk.value(node.args[0])
        for axis in node.args[dims_at] if dims_at is not None and len(node.args) > dims_at else range(labels.dim()):
            walk.labels.tie(labels, axis % labels.dim(), f"is moved among channels by {node.op.split('.')[1]} ({node.name})")
        return labels

    return rule


def _index(walk: Walk, node: Node) -> Any:
    """Indexing by stored indices; along the indexed axes the channels are tied."""
    labels, indices = walk.value(node.args[0]), node.args[1]
    indices = indices if isinstance(indices, list) else [indices]
    if any(i is not None and (not isinstance(i, Ref) or i.name not in walk.graph.tensors) for i in indices):
        return unknown(walk, node)
    for axis, index in enumerate(indices):
        if index is not None:
            walk.labels.tie(labels, axis, f"is indexed ({node.name})")
    return resolve(node.op)(labels, [None if i is None else walk.graph.tensors[i.name] for i in indices])


def _pad(walk: Walk, node: Node) -> Any:
    labels, amounts = walk.value(node.args[0]), walk.value(node.args[1])
    if not all(isinstance(n, int) for n in amounts):
        return unknown(walk, node)
    moves = walk.varying(labels)
    for k in range(len(amounts) // 2):
        axis, (front, back) = labels.dim() - 1 - k, amounts[2 * k : 2 * k + 2]
        if not front and not back:
            continue
        if axis not in moves:
            size = [-1] * labels.dim()
            size[axis] = labels.shape[axis] + front + back
            labels = labels.narrow(axis, 0, 1).expand(size)
        elif moves == [axis] and min(front, back) >= 0:
            row = torch.cat([walk.labels.fresh(front), walk.along(labels, axis), walk.labels.fresh(back)])
            labels = walk.spread(row, axis, (*labels.shape[:axis], len(row), *labels.shape[axis + 1 :]))
        else:
            return unknown(walk, node)
    return labels


def _spatial(walk: Walk, node: Node) -> Any:
    """Operators that treat each channel's plane by itself (pooling, resizing)."""
    labels, shape = walk.value(node.args[0]), walk.shapes[node.name]
    for axis in range(2, labels.dim()):
        walk.labels.tie(labels, axis, f"is mixed over positions by {node.op.split('.')[1]} ({node.name})")
    return labels[(slice(None), slice(None), *[slice(0, 1)] * (labels.dim() - 2))].expand(shape)


def _reduce(walk: Walk, node: Node) -> Any:
    """A statistic over some axes: channels that lie along them are tied."""
    labels = walk.value(node.args[0])
    dims = node.args[1] if len(node.args) > 1 else None
    if isinstance(dims, int):
        dims = [dims]
    if node.op.startswith(("aten.norm.", "aten.linalg_vector_norm")):
        dims = node.args[2] if len(node.args) > 2 else None
    dims = [d % labels.dim() for d in dims] if dims else list(range(labels.dim()))
    for axis in dims:
        walk.labels.tie(labels, axis, f"is summed over channels by {node.op.split('.')[1]} ({node.name})")
    kept = labels[tuple(slice(0, 1) if d in dims else slice(None) for d in range(labels.dim()))]
    shape = walk.shapes[node.name]
    if len(shape) != kept.dim():
        for axis in sorted(dims, reverse=True):
            kept = kept.select(axis, 0)
    return kept


def _softmax(walk: Walk, node: Node) -> Any:
    labels = walk.value(node.args[0])
    walk.labels.tie(labels, node.args[1] % labels.dim(), f"goes through a softmax over channels ({node.name})")
    return labels


def _layer_norm(walk: Walk, node: Node) -> Any:
    labels = walk.value(node.args[0])
    for axis in range(labels.dim() - len(node.args[1]), labels.dim()):
        walk.labels.tie(labels, axis, f"is normalised across channels ({node.name})")
    return labels


def _group_norm(walk: Walk, node: Node) -> Any:
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


def _channel_norm(walk: Walk, node: Node) -> Any:
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


def _prelu(walk: Walk, node: Node) -> Any:
    labels, weight = walk.value(node.args[0]), node.args[1]
    if math.prod(walk.graph.tensors[weight.name].shape if isinstance(weight, Ref) and weight.name in walk.graph.tensors else (2,)) == 1:
        return labels
    if not walk.flat_over(labels, 1) or not walk.use(weight, 0, walk.along(labels, 1)):
        return unknown(walk, node)
    return labels


def _conv(walk: Walk, node: Node) -> Any:
    """A convolution reads its input's channels and creates its output's; with groups, a group is one channel of both."""
    labels, weight = walk.value(node.args[0]), node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    name, shape = layer_name(node), walk.shapes[node.name]
    transposed = "transpose" in node.op
    groups = node.args[6] if len(node.args) > 6 else 1
    if not walk.has_role(weight) or (bias is not None and not walk.has_role(bias)):
        walk.refused[name] = "its weight is computed or used elsewhere"
        walk.labels.close(labels, f"is read by {name}, whose weight is computed or used elsewhere")
        return walk.none(*shape)
    if not walk.flat_over(labels, 1):
        walk.labels.close(labels, f"is read by {name} along another axis")
        walk.refused[name] = "reads channels along another axis"
        return walk.none(*shape)
    row = walk.along(labels, 1)
    if groups > 1:
        out = _grouped(walk, node, row, weight, bias, groups, shape[1])
        return walk.spread(out, 1, shape)
    into, outof = (0, 1) if transposed else (1, 0)
    walk.reads.append(Read(node.name, weight.name, into, node.args[0].name, 1, row))
    walk.use(weight, into, row)
    return walk.spread(_create(walk, node, name, weight, bias, outof, shape[1]), 1, shape)


def _create(walk: Walk, node: Node, name: str, weight: Ref, bias: Ref | None, dim: int, count: int) -> Tensor:
    out = walk.rows(weight, dim, count)
    walk.use(weight, dim, out)
    walk.use(bias, 0, out)
    walk.produced.append(Produced(name, node.name, out))
    return out


def _grouped(walk: Walk, node: Node, row: Tensor, weight: Ref, bias: Ref | None, groups: int, n_out: int) -> Tensor:
    name = layer_name(node)
    walk.labels.tie(row.view(groups, -1), 1, f"is read by a grouped convolution ({name})")
    if bool((row == 0).any()):  # the network's input: the groups cannot go
        walk.refused[name] = "a grouped convolution of values that are no channels"
        return torch.zeros(n_out, dtype=torch.int64)
    out = row.view(groups, -1)[:, :1].expand(groups, n_out // groups).reshape(-1)
    walk.use(weight, 0, row if "transpose" in node.op else out)
    walk.use(bias, 0, out)
    walk.refused[name] = "depthwise: its channels are those of its input" if groups == n_out == len(row) else "grouped: a group of its channels goes with that of its input"
    return out


def _linear(walk: Walk, node: Node) -> Any:
    labels, weight = walk.value(node.args[0]), node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    name, shape, last = layer_name(node), walk.shapes[node.name], labels.dim() - 1
    if not walk.has_role(weight) or (bias is not None and not walk.has_role(bias)):
        walk.refused[name] = "its weight is computed or used elsewhere"
        walk.labels.close(labels, f"is read by {name}, whose weight is computed or used elsewhere")
        return walk.none(*shape)
    if not walk.flat_over(labels, last):
        if last not in walk.varying(labels):  # mixes positions, channel by channel
            walk.refused[name] = "mixes positions, not channels"
            return labels.narrow(last, 0, 1).expand(shape)
        walk.labels.close(labels, f"is read by {name} along another axis")
        walk.refused[name] = "reads channels along another axis"
        return walk.none(*shape)
    row = walk.along(labels, last)
    walk.reads.append(Read(node.name, weight.name, 1, node.args[0].name, last, row))
    walk.use(weight, 1, row)
    return walk.spread(_create(walk, node, name, weight, bias, 0, shape[-1]), last, shape)


def _matmul(walk: Walk, node: Node) -> Any:
    """A product of two computed values: what is summed over is tied, heads (batch axes that carry channels) are joined."""
    a, b = (walk.value(x) for x in node.args[:2])
    if min(a.dim(), b.dim()) < 2:
        return unknown(walk, node)
    why = f"is contracted with another value ({node.name})"
    walk.labels.tie(a, a.dim() - 1, why)
    walk.labels.tie(b, b.dim() - 2, why)
    shape = walk.shapes[node.name]
    rows, columns = a.dim() - 2 in walk.varying(a), b.dim() - 1 in walk.varying(b)
    heads = any(d < t.dim() - 2 for t in (a, b) for d in walk.varying(t))
    if heads:
        return _joined_heads(walk, [a, b], node, shape)
    if rows and columns:
        walk.labels.close(a, why)
        walk.labels.close(b, why)
        return walk.none(*shape)
    if rows:
        return a.narrow(-1, 0, 1).expand(*shape[:-2], *a.shape[-2:-1], shape[-1])
    return b.narrow(-2, 0, 1).expand(shape)


def _joined_heads(walk: Walk, operands: list[Tensor], node: Node, shape: tuple[int, ...]) -> Tensor:
    heads: Tensor | None = None
    for labels in operands:
        for d in (labels.dim() - 1, labels.dim() - 2):
            walk.labels.tie(labels, d, f"belongs to a head ({node.name})")
        mine = labels[..., :1, :1]
        heads = mine if heads is None else join(walk, heads, mine, node)
    assert heads is not None
    return heads.expand(shape)


def _attention(walk: Walk, node: Node) -> Any:
    if any(node.kwargs.get(key) for key in ("enable_gqa",)):
        return unknown(walk, node)
    operands = _tensors([walk.value(a) for a in (*node.args[:4], *node.kwargs.values())])
    return _joined_heads(walk, operands, node, walk.shapes[node.name])


def _glu(walk: Walk, node: Node) -> Any:
    labels = walk.value(node.args[0])
    axis = node.args[1] if len(node.args) > 1 else -1
    half = labels.shape[axis] // 2
    first, second = labels.narrow(axis, 0, half), labels.narrow(axis, half, half)
    return join(walk, first, second, node)


def _chained_reshape(walk: Walk, node: Node) -> Any:
    """A reshape; at the end of a channel shuffle the channels are those of its start, in another order."""
    chain = walk.permutes.get(node.name)
    if chain:
        return walk.value(Ref(chain.source)).index_select(chain.axis, chain.order)
    return _move(walk, node)


def _channel_shuffle(walk: Walk, node: Node) -> Any:
    labels, groups = walk.value(node.args[0]), node.args[1]
    order = torch.arange(labels.shape[1]).view(groups, -1).t().reshape(-1)
    return labels.index_select(1, order)


def _aten(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


RULES: dict[str, Rule] = {
    **_aten(_same, """
        relu.default relu6.default hardtanh.default silu.default gelu.default hardswish.default hardsigmoid.default
        sigmoid.default tanh.default leaky_relu.default elu.default selu.default mish.default softplus.default
        clone.default contiguous.default to.dtype _to_copy.default neg.default abs.default exp.default expm1.default
        log.default log1p.default sqrt.default rsqrt.default reciprocal.default pow.Tensor_Scalar clamp.default
        clamp_min.default clamp_max.default erf.default sin.default cos.default tan.default sign.default floor.default
        round.default add.Scalar sub.Scalar mul.Scalar div.Scalar rsub.Scalar zeros_like.default ones_like.default
        full_like.default ne.Scalar eq.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar logical_not.default
        bitwise_not.default type_as.default remainder.Scalar lift_fresh_copy.default zero.default fill.Scalar pow.Scalar
    """),
    **_aten(_elementwise, """
        add.Tensor sub.Tensor mul.Tensor div.Tensor div.Tensor_mode maximum.default minimum.default where.self
        where.ScalarOther where.ScalarSelf pow.Tensor_Tensor masked_fill.Scalar masked_fill.Tensor eq.Tensor ne.Tensor
        lt.Tensor le.Tensor gt.Tensor ge.Tensor logical_and.default logical_or.default max.other min.other
        bitwise_and.Tensor bitwise_or.Tensor clamp.Tensor fill.Tensor
    """),
    **_aten(_move, """
        permute.default transpose.int swapaxes.default t.default unsqueeze.default squeeze.default squeeze.dim
        squeeze.dims flatten.using_ints unflatten.int expand.default expand_as.default cat.default concat.default stack.default
        split.Tensor split.sizes split_with_sizes.default chunk.default repeat.default narrow.default
    """),
    **_aten(_pick(1, 0), "select.int unbind.int"),
    **_aten(_whole(2), "roll.default"), **_aten(_whole(1), "flip.default"),
    **_aten(_spatial, """
        max_pool1d.default max_pool2d.default max_pool3d.default avg_pool1d.default avg_pool2d.default avg_pool3d.default
        adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default
        _adaptive_avg_pool2d.default upsample_bilinear2d.vec upsample_nearest2d.vec
        upsample_bicubic2d.vec reflection_pad2d.default replication_pad2d.default
    """),
    **_aten(_reduce, """
        mean.default mean.dim sum.default sum.dim_IntList amax.default amin.default var.correction var.dim std.correction
        std.dim linalg_vector_norm.default norm.ScalarOpt_dim logsumexp.default
    """),
    **_aten(_softmax, "softmax.int _softmax.default log_softmax.int _log_softmax.default"),
    **_aten(_layer_norm, "layer_norm.default rms_norm.default"),
    **_aten(_channel_norm, "batch_norm.default instance_norm.default"),
    **_aten(_conv, """
        conv1d.default conv2d.default conv3d.default conv1d.padding conv2d.padding conv_transpose2d.input
    """),
    **_aten(_matmul, "matmul.default bmm.default mm.default"),
    "aten.reshape.default": _chained_reshape, "aten.channel_shuffle.default": _channel_shuffle,
    "aten.slice.Tensor": _slice, "aten.index.Tensor": _index, "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad, "aten.linear.default": _linear, "aten.prelu.default": _prelu,
    "aten.group_norm.default": _group_norm, "aten.scaled_dot_product_attention.default": _attention,
    "aten.glu.default": _glu, "aten.sym_size.int": _number, "py.getitem": _getitem,
    **{f"py.{name}": _number for name in "add sub mul floordiv truediv mod neg eq ne lt le gt ge".split()},
}  # fmt: skip
