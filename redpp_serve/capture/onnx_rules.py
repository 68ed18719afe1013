"""Rules for ONNX's operators without windows: arithmetic, shapes, reductions, and those of ai.onnx.ml for pipelines."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.capture.onnx_call import (
    MOST_SIZES,
    SIZE_RULES,
    Call,
    Size,
    UnsupportedError,
    as_sizes,
    like,
    slices,
    tidy,
)
from redpp_serve.capture.onnx_file import ML, TYPES, Array
from redpp_serve.capture.onnx_layers import RULES as LAYER_RULES
from redpp_serve.capture.onnx_recurrent import RULES as RECURRENT_RULES

Rule = Callable[[Call], Any]


def _unary(function: Callable[[Tensor], Tensor]) -> Rule:
    return lambda call: function(call.x())


def _binary(function: Callable[[Any, Any], Tensor]) -> Rule:
    """Make a rule of two operands, of which one may be a number."""

    def rule(call: Call) -> Tensor:
        a, b = call.operand(0), call.operand(1)
        return function(a, b) if isinstance(a, Tensor) or isinstance(b, Tensor) else function(call.x(0), b)

    return rule


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    return lambda call: reduce(function, (call.x(at) for at in range(len(call.values))))


def _mean(call: Call) -> Tensor:
    total: Tensor = reduce(torch.add, (call.x(at) for at in range(len(call.values))))
    return total / len(call.values)


def _divide(a: Any, b: Any) -> Tensor:
    whole = all(not x.is_floating_point() if isinstance(x, Tensor) else isinstance(x, int) for x in (a, b))
    return torch.div(a, b, rounding_mode="trunc") if whole else torch.div(a, b)


def _subtract(a: Any, b: Any) -> Tensor:
    return torch.sub(a, b) if isinstance(a, Tensor) else torch.rsub(b, a)


def _power(call: Call) -> Tensor:
    base, exponent = call.operand(0), call.operand(1)
    if isinstance(base, Tensor) and base.is_floating_point() and isinstance(exponent, int):
        exponent = float(exponent)
    return torch.pow(base, exponent) if isinstance(exponent, Tensor) else torch.pow(call.x(), exponent)


def _modulo(call: Call) -> Tensor:
    remainder = torch.fmod if call.attribute("fmod", 0) else torch.remainder
    return remainder(call.x(), call.operand(1))


def _clip(call: Call) -> Tensor:
    x, bounds = call.x(), []
    for at, name in ((1, "min"), (2, "max")):
        bounds.append(call.number(at, math.nan) if call.has(at) else call.attribute(name, math.nan))
    low, high = (None if math.isnan(bound) else bound for bound in bounds)
    if low is None and high is None:
        return x
    if low is not None and high is not None and x.is_floating_point():
        return F.hardtanh(x, float(low), float(high)) if low < high else torch.clamp(x, low, high)
    return F.relu(x) if low == 0 and high is None else torch.clamp(x, low, high)


def _prelu(call: Call) -> Tensor:
    x, slope = call.x(), call.x(1)
    if x.dim() > 1 and slope.dim() == x.dim() - 1 and slope.numel() == slope.shape[0] == x.shape[1]:
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


def _hard_sigmoid(call: Call) -> Tensor:
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(call.x())
    return torch.clamp(call.x() * alpha + beta, 0.0, 1.0)


def _celu(call: Call) -> Tensor:
    x, alpha = call.x(), call.attribute("alpha", 1.0)
    return F.relu(x) + torch.clamp(alpha * torch.expm1(x / alpha), max=0.0)


def _softmax(function: Callable[..., Tensor]) -> Rule:
    def rule(call: Call) -> Tensor:
        x = call.x()
        axis = call.attribute("axis", 1 if call.opset < 13 else -1) % x.dim()
        if call.opset >= 13 or axis == x.dim() - 1:
            return function(x, axis)
        return function(x.flatten(axis), axis).reshape(x.shape)

    return rule


def _cast(call: Call) -> Tensor:
    kind = call.attribute("to")
    dtype = TYPES.get(int(kind)) if not isinstance(kind, str) else None
    if dtype is None:
        raise UnsupportedError(f"converts to type {kind}")
    return call.x().to(getattr(torch, dtype.name))


def _shape(call: Call) -> Array:
    sizes = call.x().shape if isinstance(call.value(0), Tensor) else call.known(0).shape
    return as_sizes(list(sizes)[call.attribute("start", 0) : call.attribute("end")])


def _size(call: Call) -> Array:
    return as_sizes([math.prod(call.x().shape)]).reshape(())


def _reshape(call: Call) -> Tensor:
    x = call.x()
    shape = call.ints(1) if call.has(1) else call.attribute("shape")
    if not call.attribute("allowzero", 0):
        shape = [x.shape[at] if isinstance(size, int) and size == 0 else size for at, size in enumerate(shape)]
    return x.reshape(shape)


def _flatten(call: Call) -> Tensor:
    x, axis = call.x(), call.attribute("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1:
        return x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(call: Call) -> Tensor:
    x = call.x()
    return x.permute(call.attribute("perm") or list(reversed(range(x.dim()))))


def _squeeze(call: Call) -> Tensor:
    x = call.x()
    axes = call.axes(x.dim())
    if axes is None:
        axes = [at for at, size in enumerate(x.shape) if isinstance(size, int) and size == 1 and at]
    return x.squeeze(axes) if len(axes) != 1 else x.squeeze(axes[0])


def _unsqueeze(call: Call) -> Tensor:
    x = call.x()
    axes = call.ints(1) if call.has(1) else call.attribute("axes")
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _expand(call: Call) -> Tensor:
    x, shape = call.x(), call.ints(1)
    sizes: list[Size] = list(x.shape)
    rank = max(len(sizes), len(shape))
    sizes, shape = [1] * (rank - len(sizes)) + sizes, [1] * (rank - len(shape)) + shape
    return x.expand([own if isinstance(new, int) and new == 1 else new for own, new in zip(sizes, shape, strict=True)])


def _tile(call: Call) -> Tensor:
    return call.x().repeat(call.ints(1))


def _concat(call: Call) -> Tensor:
    tensors = [call.x(at) for at in range(len(call.values))]
    axis = call.attribute("axis") % tensors[0].dim()
    if call.batch is not None and axis:  # a stored row, as of a class token, stands for one in each item
        rows = next((x.shape[0] for x in tensors if not isinstance(x.shape[0], int) or x.shape[0] > 1), 1)
        tensors = [
            x.expand(rows, *x.shape[1:]) if isinstance(x.shape[0], int) and x.shape[0] == 1 else x for x in tensors
        ]
    return torch.cat(tensors, axis)


def _split(call: Call) -> tuple[Tensor, ...]:
    x, axis, parts = call.x(), call.attribute("axis", 0), len(call.node.outputs)
    sizes = call.ints(1) if call.has(1) else call.attribute("split")
    if sizes is None:
        each = -(-int(x.shape[axis]) // call.attribute("num_outputs", parts))
        sizes = [each] * (parts - 1) + [int(x.shape[axis]) - each * (parts - 1)]
    return tuple(torch.split(x, sizes, axis))


def _slice(call: Call) -> Tensor:
    x = call.x()
    for axis, cut in slices(call, x.shape):
        if isinstance(cut.step, int) and cut.step < 0:
            places = np.arange(int(x.shape[axis]))[cut]
            x = x.index_select(axis, like(places, x))
        else:
            x = x[(slice(None),) * axis + (cut,)]
    return x


def _gather(call: Call) -> Tensor:
    x, places, axis = call.value(0), call.value(1), call.attribute("axis", 0)
    if isinstance(places, np.ndarray) and places.dtype != object:
        x = call.x()
        places = np.where(places < 0, places + int(x.shape[axis]), places) if (places < 0).any() else places
        if places.ndim == 0:
            return x.select(axis, int(places))
        steps = np.diff(places.reshape(-1))
        if places.ndim == 1 and places.size and (steps == 1).all():
            return x.narrow(axis, int(places[0]), len(places))
        picked = x.index_select(axis, like(places.reshape(-1), x))
        return picked.unflatten(axis, places.shape) if places.ndim != 1 else picked
    index = call.x(1)
    if isinstance(x, np.ndarray) and x.ndim == 2 and axis == 0 and x.dtype.kind == "f":
        return F.embedding(index, call.x())
    table = call.x()
    return table.index_select(axis, index.reshape(-1)).reshape(
        [*table.shape[: axis % table.dim()], *index.shape, *table.shape[axis % table.dim() + 1 :]]
    )


def _gather_elements(call: Call) -> Tensor:
    return torch.gather(call.x(), call.attribute("axis", 0), call.x(1))


def _gather_nd(call: Call) -> Tensor:
    if call.attribute("batch_dims", 0):
        raise UnsupportedError("has batch dimensions")
    return call.x()[_places(call.x(), call.x(1))]


def _scatter_nd(call: Call) -> Tensor:
    if call.attribute("reduction", "none") != "none":
        raise UnsupportedError("adds up what it writes")
    return torch.index_put(call.x(), _places(call.x(), call.x(1)), call.x(2))


def _places(x: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    return tuple(index % size for index, size in zip(indices.unbind(-1), x.shape, strict=False))


def _constant_of_shape(call: Call) -> Tensor:
    value = call.attribute("value", np.zeros(1, np.float32)).reshape(-1)[0]
    return torch.full(call.ints(0), value.item(), dtype=getattr(torch, value.dtype.name))


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Rule:
    def rule(call: Call) -> Tensor:
        x = call.x()
        axes = call.axes(x.dim())
        if not axes and call.attribute("noop_with_empty_axes", 0):
            return x
        return function(x, axes or list(range(x.dim())), bool(call.attribute("keepdims", 1)))

    return rule


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep)
    return x


def _extreme(function: Callable[..., Tensor]) -> Rule:
    def rule(call: Call) -> Tensor:
        x = call.x()
        if call.attribute("select_last_index", 0):
            raise UnsupportedError("returns the last of equal places")
        return function(x, call.attribute("axis", 0), bool(call.attribute("keepdims", 1)))

    return rule


def _top_k(call: Call) -> tuple[Tensor, ...]:
    count = int(call.number(1, 0)) if call.has(1) else call.attribute("k")
    axis, largest = call.attribute("axis", -1), bool(call.attribute("largest", 1))
    return tuple(torch.topk(call.x(), count, axis, largest, bool(call.attribute("sorted", 1))))


def _cumulative_sum(call: Call) -> Tensor:
    if call.attribute("exclusive", 0) or call.attribute("reverse", 0):
        raise UnsupportedError("sums backwards or without the element itself")
    return torch.cumsum(call.x(), int(call.number(1, 0)))


def _where(call: Call) -> Tensor:
    a, b = call.operand(1), call.operand(2)
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        a = call.x(1)
    return torch.where(call.x(), a, b)


def _depth_to_space(call: Call) -> Tensor:
    x, block = call.x(), call.attribute("blocksize")
    if call.attribute("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    channels, height, width = x.shape[1:]
    x = x.reshape(-1, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(-1, channels // block**2, height * block, width * block)


def _space_to_depth(call: Call) -> Tensor:
    x, block = call.x(), call.attribute("blocksize")
    channels, height, width = x.shape[1:]
    x = x.reshape(-1, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(-1, channels * block**2, height // block, width // block)


def _einsum(call: Call) -> Tensor:
    operands = [call.x(at) for at in range(len(call.values))]
    found: Tensor = torch.einsum(call.attribute("equation").replace(" ", ""), *operands)
    return found


def _triangle(call: Call) -> Tensor:
    return (torch.triu if call.attribute("upper", 1) else torch.tril)(call.x(), int(call.number(1, 0)))


def _gemm(call: Call) -> Tensor:
    """Compute Gemm with a computed weight; a stored one makes it `linear`."""
    a, b = call.x(), call.x(1)
    a, b = a.t() if call.attribute("transA", 0) else a, b.t() if call.attribute("transB", 0) else b
    y: Tensor = torch.matmul(a, b) * call.attribute("alpha", 1.0)
    return y + call.x(2) * call.attribute("beta", 1.0) if call.has(2) else y


def _linear(call: Call) -> Tensor:
    """Compute what the network's reader made of Gemm, or of MatMul and Add, with a stored weight (n_out, n_in)."""
    found: Tensor = F.linear(call.x(), call.x(1), call.x(2) if call.has(2) else None)
    return found


def _scaler(call: Call) -> Tensor:
    x = call.x().float()
    offset, scale = (np.array(call.attribute(n, [d]), np.float32) for n, d in (("offset", 0.0), ("scale", 1.0)))
    return (x - like(offset, x)) * like(scale, x)


def _array_features(call: Call) -> Tensor:
    return call.x().index_select(-1, call.x(1).reshape(-1))


def _normalizer(call: Call) -> Tensor:
    x = call.x().float()
    norm = {"L1": lambda: x.abs().sum(-1, keepdim=True), "L2": lambda: x.square().sum(-1, keepdim=True).sqrt()}
    norm["MAX"] = lambda: x.abs().amax(-1, keepdim=True)
    return x / norm[call.attribute("norm", "MAX")]()


RULES: dict[str, Rule] = {
    **LAYER_RULES,
    **RECURRENT_RULES,
    "Add": _binary(torch.add),
    "Sub": _binary(_subtract),
    "Mul": _binary(torch.mul),
    "Div": _binary(_divide),
    "Pow": _power,
    "Mod": _modulo,
    "Sum": _many(torch.add),
    "Mean": _mean,
    "Min": _many(torch.minimum),
    "Max": _many(torch.maximum),
    "Abs": _unary(torch.abs),
    "Neg": _unary(torch.neg),
    "Sqrt": _unary(torch.sqrt),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Floor": _unary(torch.floor),
    "Ceil": _unary(lambda x: -torch.floor(-x)),
    "Round": _unary(torch.round),
    "Sign": _unary(torch.sign),
    "Reciprocal": _unary(torch.reciprocal),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Tan": _unary(torch.tan),
    "Erf": _unary(torch.erf),
    "Relu": _unary(F.relu),
    "LeakyRelu": lambda call: F.leaky_relu(call.x(), call.attribute("alpha", 0.01)),
    "ThresholdedRelu": lambda call: torch.where(call.x() > call.attribute("alpha", 1.0), call.x(), 0.0),
    "PRelu": _prelu,
    "Elu": lambda call: F.elu(call.x(), call.attribute("alpha", 1.0)),
    "Selu": _unary(F.selu),
    "Celu": _celu,
    "Sigmoid": _unary(torch.sigmoid),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "Mish": _unary(F.mish),
    "Gelu": lambda call: F.gelu(call.x(), approximate=call.attribute("approximate", "none")),
    "Silu": _unary(F.silu),  # what the network's reader makes of x * sigmoid(x)
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(lambda x: x / (1 + x.abs())),
    "Tanh": _unary(torch.tanh),
    "Clip": _clip,
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": lambda call: torch.matmul(call.x(), call.x(1)),
    "Gemm": _gemm,
    "Linear": _linear,
    "Einsum": _einsum,
    "GlobalMaxPool": lambda call: call.x().amax(list(range(2, call.x().dim())), keepdim=True),
    **dict.fromkeys(("Identity", "Dropout", f"{ML}.ZipMap"), lambda call: call.x()),
    "Cast": _cast,
    "CastLike": lambda call: call.x().to(call.x(1).dtype),
    "Shape": _shape,
    "Size": _size,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Tile": _tile,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "ConstantOfShape": _constant_of_shape,
    "Range": lambda call: torch.arange(
        *(call.number(at, 0) for at in range(3)), dtype=getattr(torch, call.known(0).dtype.name)
    ),
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Trilu": _triangle,
    "CumSum": _cumulative_sum,
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceProd": _reduce(_product),
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
    "ReduceLogSum": _reduce(lambda x, axes, keep: x.sum(axes, keep).log()),
    "ReduceLogSumExp": _reduce(lambda x, axes, keep: x.logsumexp(axes, keep)),
    "ArgMax": _extreme(torch.argmax),
    "ArgMin": _extreme(torch.argmin),
    "TopK": _top_k,
    "Where": _where,
    "Equal": _binary(lambda a, b: torch.eq(a, b) if isinstance(a, Tensor) else torch.eq(b, a)),
    "Greater": _binary(lambda a, b: a > b),
    "GreaterOrEqual": _binary(lambda a, b: a >= b),
    "Less": _binary(lambda a, b: a < b),
    "LessOrEqual": _binary(lambda a, b: a <= b),
    "And": _binary(torch.logical_and),
    "Or": _binary(torch.logical_or),
    "Xor": _binary(torch.ne),
    "Not": _unary(torch.logical_not),
    f"{ML}.Scaler": _scaler,
    f"{ML}.ArrayFeatureExtractor": _array_features,
    f"{ML}.Normalizer": _normalizer,
}


def apply(call: Call) -> Any:
    """Compute a call: on sizes and small constants alone as numbers, else by its rule."""
    known = [value for value in call.values if value is not None]
    sizes = known and all(isinstance(value, np.ndarray) and value.size <= MOST_SIZES for value in known)
    if sizes and call.node.op in SIZE_RULES:
        with suppress(UnsupportedError):
            return tidy(SIZE_RULES[call.node.op](call))
    return RULES[call.node.op](call)
