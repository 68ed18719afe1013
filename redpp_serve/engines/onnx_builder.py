"""The rules that translate a graph's operators to ONNX, and `to_onnx`, which runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from redpp_serve.engines.onnx_writer import WEIGHTS, UntranslatableError, Writer
from redpp_serve.engines.sessions import import_openvino
from redpp_serve.graph.graph import Graph, Node, Ref
from redpp_serve.graph.operators import INT8_VALUES

if TYPE_CHECKING:
    import onnx
    import openvino

Rule = Callable[..., str | Sequence[str]]
F = TypeVar("F", bound=Rule)
RULES: dict[str, Rule] = {}
_END = 2**63 - 1  # a slice that ends where the axis does


def to_onnx(graph: Graph) -> onnx.ModelProto:
    """Build an ONNX model of a graph on the CPU, with a dynamic batch, inputs by their names and outputs in order.

    Args:
        graph: a network in float32 or float64; served ones are folded and fused first (`runtime.serving_graph`).

    Raises:
        UntranslatableError: an operator, or a use of one, that no rule covers.
        ImportError: onnx is not installed.
    """
    return Writer(graph).build(RULES)


def write_onnx(graph: Graph, folder: Path, signed: bool = False) -> Path:
    """Write `to_onnx` of a graph to a folder, with large constants in a file of their own that engines map.

    Args:
        graph: as for `to_onnx`.
        folder: where to write.
        signed: write the levels of eight bits from -128 on.

    Returns:
        The model's file.

    Raises:
        UntranslatableError: as for `to_onnx`.
        ImportError: onnx is not installed.
        OSError: the folder cannot be written to.
    """
    path = folder / "model.onnx"
    with open(folder / WEIGHTS, "wb") as weights:
        path.write_bytes(Writer(graph, weights, signed).build(RULES).SerializeToString())
    return path


def to_openvino(graph: Graph) -> openvino.Model:
    """Build an OpenVINO model of a graph, by way of `to_onnx`.

    Raises:
        UntranslatableError: as for `to_onnx`.
        ImportError: openvino or onnx is not installed.
    """
    return import_openvino().Core().read_model(to_onnx(graph).SerializeToString(), b"")


def _rule(*names: str) -> Callable[[F], F]:
    """Register a function as the rule of some operators; names without a family are aten's."""

    def register(rule: F) -> F:
        RULES.update(
            {name if name.split(".")[0] in ("fused", "int8", "py") else f"aten.{name}": rule for name in names}
        )
        return rule

    return register


# Elementwise functions of one value.

_UNARY = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "abs": "Abs",
    "neg": "Neg",
    "floor": "Floor",
    "sign": "Sign",
    "sin": "Sin",
    "cos": "Cos",
    "tan": "Tan",
    "erf": "Erf",
    "reciprocal": "Reciprocal",
    "round": "Round",
    "hardswish": "HardSwish",
    "mish": "Mish",
    "selu": "Selu",
    "logical_not": "Not",
}


def _unary(op: str, w: Writer, x: Ref) -> str:
    wanted = w.dtype(w.node.name)
    return w.emit(op, w.cast(w.tensor(x), w.dtype(x), torch.bool if op == "Not" else wanted))


for _name, _op in _UNARY.items():
    RULES[f"aten.{_name}.default"] = partial(_unary, _op)


@_rule("bitwise_not.default")
def _bitwise_not(w: Writer, x: Ref) -> str:
    return w.emit("Not" if w.dtype(x) == torch.bool else "BitwiseNot", w.tensor(x))


@_rule(
    "clone.default", "contiguous.default", "lift_fresh_copy.default", "reshape.default", "flatten.using_ints",
    "unflatten.int", "squeeze.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default", "reshape_as.default",
)  # fmt: skip
def _reshape(w: Writer, x: Ref, *_: Any, **__: Any) -> str:
    return w.tensor(x) if w.shapes(x) == w.shapes(w.node.name) else w.reshape(w.tensor(x))


@_rule("to.dtype", "_to_copy.default", "type_as.default")
def _to(w: Writer, x: Ref, *_: Any, **__: Any) -> str:
    return w.cast(w.tensor(x), w.dtype(x), w.dtype(w.node.name))


@_rule("relu6.default")
def _relu6(w: Writer, x: Ref) -> str:
    return _clip(w, w.tensor(x), w.dtype(x), 0.0, 6.0)


@_rule("hardtanh.default")
def _hardtanh(w: Writer, x: Ref, low: float = -1.0, high: float = 1.0) -> str:
    return _clip(w, w.tensor(x), w.dtype(x), low, high)


@_rule("clamp.default")
def _clamp(w: Writer, x: Ref, low: Any = None, high: Any = None, **named: Any) -> str:
    return _clip(w, w.tensor(x), w.dtype(x), named.get("min", low), named.get("max", high))


@_rule("clamp_min.default")
def _clamp_min(w: Writer, x: Ref, low: float) -> str:
    return _clip(w, w.tensor(x), w.dtype(x), low, None)


@_rule("clamp_max.default")
def _clamp_max(w: Writer, x: Ref, high: float) -> str:
    return _clip(w, w.tensor(x), w.dtype(x), None, high)


def _clip(w: Writer, x: str, dtype: torch.dtype, low: float | None, high: float | None) -> str:
    limits = ["" if limit is None else w.tensor(limit, dtype) for limit in (low, high)]
    return w.emit("Clip", x, *(limits if limits[1] else limits[:1]))


@_rule("gelu.default")
def _gelu(w: Writer, x: Ref, approximate: str = "none") -> str:
    return w.emit("Gelu", w.tensor(x), approximate=approximate)


@_rule("silu.default")
def _silu(w: Writer, x: Ref) -> str:
    return _activate(w, w.tensor(x), "silu")


@_rule("hardsigmoid.default")
def _hardsigmoid(w: Writer, x: Ref) -> str:
    return _activate(w, w.tensor(x), "hardsigmoid")


@_rule("elu.default")
def _elu(w: Writer, x: Ref, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> str:
    if (scale, input_scale) != (1.0, 1.0):
        raise UntranslatableError(f"an ELU with scales {scale} and {input_scale} ({w.node.name})")
    return w.emit("Elu", w.tensor(x), alpha=float(alpha))


@_rule("leaky_relu.default")
def _leaky_relu(w: Writer, x: Ref, slope: float = 0.01) -> str:
    return w.emit("LeakyRelu", w.tensor(x), alpha=float(slope))


@_rule("prelu.default")
def _prelu(w: Writer, x: Ref, slope: Ref) -> str:
    known = w.known(slope)
    if known is None:
        raise UntranslatableError(f"a PReLU with a computed slope ({w.node.name})")
    after = [1] * max(0, w.rank(x) - 2)
    return w.emit("PRelu", w.tensor(x), w.constant(known.view(-1, *after) if known.numel() > 1 else known))


@_rule("softplus.default")
def _softplus(w: Writer, x: Ref, beta: float = 1.0, threshold: float = 20.0) -> str:
    factor = w.tensor(float(beta), w.dtype(x))
    scaled = w.tensor(x) if beta == 1.0 else w.emit("Mul", w.tensor(x), factor)
    soft = w.emit("Softplus", scaled)
    soft = soft if beta == 1.0 else w.emit("Div", soft, factor)
    if threshold >= 20.0:  # beyond, both are the same number
        return soft
    return w.emit("Where", w.emit("Greater", scaled, w.tensor(float(threshold), w.dtype(x))), w.tensor(x), soft)


@_rule("square.default")
def _square(w: Writer, x: Ref) -> str:
    return w.emit("Mul", w.tensor(x), w.tensor(x))


@_rule("rsqrt.default")
def _rsqrt(w: Writer, x: Ref) -> str:
    return w.emit("Reciprocal", w.emit("Sqrt", w.tensor(x)))


@_rule("glu.default")
def _glu(w: Writer, x: Ref, dim: int = -1) -> str:
    axis = w.axis(x, dim)
    (size,) = w.static(x, axis)
    first, second = w.emit_parts("Split", w.tensor(x), w.integers([size // 2] * 2), outputs=2, axis=axis)
    return w.emit("Mul", first, w.emit("Sigmoid", second))


_ACTIVATIONS: dict[str, Callable[[Writer, str], str]] = {
    "none": lambda w, x: x,
    "relu": lambda w, x: w.emit("Relu", x),
    "relu6": lambda w, x: _clip(w, x, torch.float32, 0.0, 6.0),
    "silu": lambda w, x: w.emit("Mul", x, w.emit("Sigmoid", x)),
    "gelu": lambda w, x: w.emit("Gelu", x, approximate="none"),
    "gelu_tanh": lambda w, x: w.emit("Gelu", x, approximate="tanh"),
    "sigmoid": lambda w, x: w.emit("Sigmoid", x),
    "hardswish": lambda w, x: w.emit("HardSwish", x),
    "hardsigmoid": lambda w, x: w.emit("HardSigmoid", x, alpha=1 / 6, beta=0.5),
}


def _activate(w: Writer, x: str, activation: str) -> str:
    return _ACTIVATIONS[activation](w, x)


# Elementwise functions of two values.


def _binary(op: str, w: Writer, a: Any, b: Any, **named: Any) -> str:
    wanted = w.dtype(w.node.name)
    right = _operand(w, b, wanted)
    if named.get("alpha", 1) != 1:
        right = w.emit("Mul", right, w.tensor(named["alpha"], wanted))
    return w.emit(op, _operand(w, a, wanted), right)


def _operand(w: Writer, value: Any, wanted: torch.dtype) -> str:
    """Return a tensor or number in the dtype in which torch computes."""
    if isinstance(value, Ref) and w.is_tensor(value):
        return w.cast(w.tensor(value), w.dtype(value), wanted)
    if isinstance(value, Ref) and not w.is_constant(value):
        return w.cast(w.whole(value), torch.int64, wanted)
    return w.tensor(w.number(value), wanted)


for _name, _op in {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}.items():
    RULES |= {f"aten.{_name}.{overload}": partial(_binary, _op) for overload in ("Tensor", "Scalar")}
for _name, _op in {
    "pow.Tensor_Scalar": "Pow", "pow.Tensor_Tensor": "Pow", "pow.Scalar": "Pow", "maximum.default": "Max",
    "max.other": "Max", "minimum.default": "Min", "min.other": "Min", "logical_and.default": "And",
    "logical_or.default": "Or", "bitwise_and.Tensor": "And", "bitwise_or.Tensor": "Or",
}.items():  # fmt: skip
    RULES[f"aten.{_name}"] = partial(_binary, _op)


@_rule("rsub.Scalar")
def _rsub(w: Writer, a: Ref, b: Any, alpha: float = 1) -> str:
    return _binary("Sub", w, b, a, alpha=alpha)


@_rule("div.Tensor_mode")
def _div_mode(w: Writer, a: Any, b: Any, rounding_mode: str | None = None) -> str:
    if rounding_mode == "floor":
        return _floor_divide(w, a, b)
    if rounding_mode is not None:
        raise UntranslatableError(f"a division rounded by {rounding_mode} ({w.node.name})")
    return _binary("Div", w, a, b)


@_rule("floor_divide.default")
def _floor_divide(w: Writer, a: Any, b: Any) -> str:
    wanted = w.dtype(w.node.name)
    if wanted.is_floating_point:  # torch corrects the rounded quotient
        raise UntranslatableError(f"a floored division of {wanted} ({w.node.name})")
    exact = torch.float64
    found = w.emit("Floor", w.emit("Div", _operand(w, a, exact), _operand(w, b, exact)))
    return w.cast(found, exact, wanted)


@_rule("addcmul.default")
def _addcmul(w: Writer, x: Ref, a: Ref, b: Ref, value: float = 1.0) -> str:
    wanted = w.dtype(w.node.name)
    product = w.emit("Mul", _operand(w, a, wanted), _operand(w, b, wanted))
    product = product if value == 1 else w.emit("Mul", product, w.tensor(value, wanted))
    return w.emit("Add", _operand(w, x, wanted), product)


def _compare(op: str, negate: bool, w: Writer, a: Ref, b: Any) -> str:
    other = w.dtype(b) if isinstance(b, Ref) and w.is_tensor(b) else None
    number = None if other else w.number(b)
    wanted = torch.promote_types(w.dtype(a), other or (torch.float32 if isinstance(number, float) else w.dtype(a)))
    if wanted == torch.bool and op != "Equal":
        wanted = torch.int32
    found = w.emit(op, _operand(w, a, wanted), _operand(w, b, wanted))
    return w.emit("Not", found) if negate else found


for _name, (_op, _negate) in {
    "eq": ("Equal", False), "ne": ("Equal", True), "lt": ("Less", False), "gt": ("Greater", False),
    "le": ("LessOrEqual", False), "ge": ("GreaterOrEqual", False),
}.items():  # fmt: skip
    RULES |= {f"aten.{_name}.{overload}": partial(_compare, _op, _negate) for overload in ("Tensor", "Scalar")}


@_rule("where.self", "where.ScalarOther", "where.ScalarSelf")
def _where(w: Writer, condition: Ref, a: Any, b: Any) -> str:
    wanted = w.dtype(w.node.name)
    return w.emit("Where", w.tensor(condition), _operand(w, a, wanted), _operand(w, b, wanted))


@_rule("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(w: Writer, x: Ref, mask: Ref, value: Any) -> str:
    return w.emit("Where", w.tensor(mask), _operand(w, value, w.dtype(x)), w.tensor(x))


# Layers with weights.


@_rule("fused.conv2d")
def _fused_conv2d(w: Writer, x: Ref, other: Ref | None, weight: Ref, bias: Ref | None, *rest: Any) -> str:
    stride, padding, dilation, groups, activation = rest
    source, zeros = _before_padding(w, x)
    y = _convolve(w, source, weight, bias, stride, padding, dilation, groups, zeros)
    return _epilogue(w, y, other, activation)


def _before_padding(w: Writer, x: Ref) -> tuple[str, list[int]]:
    """Return what a convolution in eight bits reads without the zeros that a node puts around it, and their numbers.

    They are those in front for each axis behind the channels, then those at the end; none where no such node is. Zero
    is one of the levels, so that rounding leaves the zeros as they are. In floats they stay a node: OpenVINO takes them
    into the convolution by itself, and ONNX Runtime is slower with them (EfficientNet-Lite0: 1.7 times).
    """
    rounded, axes = w.maker(x), w.rank(x) - 2
    padding = w.maker(rounded.args[0]) if rounded and rounded.op == INT8_VALUES else None
    sizes = _zeros_around(padding, axes) if padding else None
    if rounded is None or padding is None or sizes is None:
        return w.tensor(x), [0] * 2 * axes
    return _int8_values(w, padding.args[0], *rounded.args[1:]), sizes


def _zeros_around(node: Node, axes: int) -> list[int] | None:
    """Return how many zeros a node puts in front of each of the last axes, and behind; None where it does not."""
    if node.op not in ("aten.pad.default", "aten.constant_pad_nd.default") or node.kwargs:
        return None
    sizes, *rest = node.args[1:]
    mode = "constant" if node.op.startswith("aten.constant") or not rest else rest.pop(0)
    known = all(isinstance(size, int) and size >= 0 for size in sizes)
    if mode != "constant" or any(rest) or not known or len(sizes) > 2 * axes:
        return None
    pairs = [*zip(sizes[::2], sizes[1::2], strict=True), *[(0, 0)] * axes][:axes]
    return [pair[end] for end in (0, 1) for pair in reversed(pairs)]


@_rule("fused.linear")
def _fused_linear(w: Writer, x: Ref, other: Ref | None, weight: Ref, bias: Ref | None, activation: str) -> str:
    return _epilogue(w, _affine(w, x, weight, bias), other, activation)


def _epilogue(w: Writer, y: str, other: Ref | None, activation: str) -> str:
    return _activate(w, y if other is None else w.emit("Add", y, w.tensor(other)), activation)


@_rule("linear.default")
def _linear(w: Writer, x: Ref, weight: Ref, bias: Ref | None = None) -> str:
    return _affine(w, x, weight, bias)


def _affine(w: Writer, x: Ref, weight: Ref, bias: Ref | None) -> str:
    y = w.emit("MatMul", w.tensor(x), w.weight(weight, transposed=True))
    return y if bias is None else w.emit("Add", y, w.tensor(bias))


@_rule("conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding", "conv2d.padding")
def _conv(w: Writer, x: Ref, weight: Ref, bias: Ref | None = None, *geometry: Any, **named: Any) -> str:
    given = (*geometry, *(1, 0, 1, 1)[len(geometry) :])
    names = ("stride", "padding", "dilation", "groups")
    return _convolve(w, w.tensor(x), weight, bias, *(named.get(n, g) for n, g in zip(names, given, strict=True)))


@_rule("convolution.default")
def _convolution(w: Writer, x: Ref, weight: Ref, bias: Ref | None, *rest: Any) -> str:
    stride, padding, dilation, transposed, output_padding, groups = rest
    if transposed:
        return _transposed(w, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _convolve(w, w.tensor(x), weight, bias, stride, padding, dilation, groups)


def _convolve(  # noqa: PLR0913 - the arguments of a convolution
    w: Writer,
    x: str,
    weight: Ref,
    bias: Ref | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    more: Sequence[int] = (),
) -> str:
    kernel = w.static(weight, *range(2, w.rank(weight)))
    rank = len(kernel)
    steps, spaces = _each(stride, rank), _each(dilation, rank)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(spaces, kernel, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = _each(padding, rank) * 2
    pads = [a + b for a, b in zip(pads, more, strict=True)] if more else pads
    inputs = [x, w.weight(weight), *([] if bias is None else [w.tensor(bias)])]
    return w.emit("Conv", *inputs, kernel_shape=kernel, strides=steps, dilations=spaces, pads=pads, group=groups)


@_rule("conv_transpose1d.default", "conv_transpose2d.input")
def _transposed(  # noqa: PLR0913 - the arguments of a transposed convolution
    w: Writer, x: Ref, weight: Ref, bias: Ref | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> str:  # fmt: skip
    kernel = w.static(weight, *range(2, w.rank(weight)))
    steps, pads, more, spaces = (_each(v, len(kernel)) for v in (stride, padding, output_padding, dilation))
    inputs = [w.tensor(x), w.tensor(weight), *([] if bias is None else [w.tensor(bias)])]
    return w.emit(
        "ConvTranspose", *inputs, kernel_shape=kernel, strides=steps, dilations=spaces, pads=pads * 2,
        output_padding=more, group=groups,
    )  # fmt: skip


def _each(value: Any, rank: int) -> list[int]:
    """Return one number for each of ``rank`` axes."""
    if isinstance(value, int):
        return [value] * rank
    return [int(v) for v in value] * (rank if len(value) == 1 else 1)


@_rule("int8.values")
def _int8_values(w: Writer, x: Ref, scale: float, zero: int) -> str:
    zero_level = torch.tensor(zero - 128, dtype=torch.int8) if w.signed else torch.tensor(zero, dtype=torch.uint8)
    step, level = w.tensor(scale, torch.float32), w.constant(zero_level)
    return w.emit("DequantizeLinear", w.emit("QuantizeLinear", w.tensor(x), step, level), step, level)


@_rule("embedding.default")
def _embedding(w: Writer, weight: Ref, indices: Ref, *_: Any) -> str:
    return w.emit("Gather", w.tensor(weight), _from_the_front(w, indices), axis=0)


def _from_the_front(w: Writer, indices: Ref) -> str:
    """Return indices of which ONNX refuses negative ones, as torch does, instead of counting them from the end."""
    if w.known(indices) is not None:
        return w.tensor(indices)
    dtype = w.dtype(indices)
    negative = w.emit("Less", w.tensor(indices), w.tensor(0, dtype))
    return w.emit("Where", negative, w.tensor(torch.iinfo(dtype).max, dtype), w.tensor(indices))


# Products.


@_rule("matmul.default", "mm.default", "bmm.default")
def _matmul(w: Writer, a: Ref, b: Ref) -> str:
    return w.emit("MatMul", w.tensor(a), w.tensor(b))


@_rule("addmm.default", "baddbmm.default")
def _addmm(w: Writer, x: Ref, a: Ref, b: Ref, *, beta: float = 1, alpha: float = 1) -> str:
    wanted = w.dtype(w.node.name)
    product = w.emit("MatMul", w.tensor(a), w.tensor(b))
    product = product if alpha == 1 else w.emit("Mul", product, w.tensor(alpha, wanted))
    summand = w.tensor(x) if beta == 1 else w.emit("Mul", w.tensor(x), w.tensor(beta, wanted))
    return w.emit("Add", product, summand)


@_rule("einsum.default")
def _einsum(w: Writer, equation: str, values: Sequence[Ref], **_: Any) -> str:
    return w.emit("Einsum", *map(w.tensor, values), equation=equation)


@_rule("scaled_dot_product_attention.default")
def _attention(  # noqa: PLR0913 - torch's signature
    w: Writer, query: Ref, key: Ref, value: Ref, mask: Ref | None = None, dropout: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> str:  # fmt: skip
    if dropout or enable_gqa:
        raise UntranslatableError(f"attention with dropout or grouped queries ({w.node.name})")
    dtype, rank = w.dtype(query), w.rank(query)
    (width,) = w.static(query, rank - 1)
    factor = w.tensor(1 / math.sqrt(width) if scale is None else scale, dtype)
    axes = [*range(rank - 2), rank - 1, rank - 2]
    scores = w.emit("MatMul", w.emit("Mul", w.tensor(query), factor), w.emit("Transpose", w.tensor(key), perm=axes))
    if is_causal:
        square = w.joined([w.size(query, rank - 2), w.size(key, rank - 2)])
        allowed = w.emit("Trilu", w.emit("Expand", w.tensor(1, torch.int64), square), upper=0)
        allowed = w.cast(allowed, torch.int64, torch.bool)
        scores = w.emit("Where", allowed, scores, w.tensor(-math.inf, dtype))
    elif mask is not None and w.dtype(mask) == torch.bool:  # a row without any key is zero
        scores = w.emit("Where", w.tensor(mask), scores, w.tensor(torch.finfo(dtype).min, dtype))
        shares = w.emit("Where", w.tensor(mask), w.emit("Softmax", scores, axis=-1), w.tensor(0.0, dtype))
        return w.emit("MatMul", shares, w.tensor(value))
    elif mask is not None:
        return _with_added_mask(w, scores, mask, value)
    return w.emit("MatMul", w.emit("Softmax", scores, axis=-1), w.tensor(value))


def _with_added_mask(w: Writer, scores: str, mask: Ref, value: Ref) -> str:
    """Attend with a mask that is added to the scores; a row of which it leaves no key is zero, as torch has it."""
    dtype = w.dtype(mask)
    known = w.known(mask)
    if known is not None and bool((known.amax(-1) > -math.inf).all()):
        return w.emit("MatMul", w.emit("Softmax", w.emit("Add", scores, w.tensor(mask)), axis=-1), w.tensor(value))
    hidden = w.cast(w.emit("Less", w.tensor(mask), w.tensor(torch.finfo(dtype).min, dtype)), torch.bool, dtype)
    fewest = w.emit("ReduceMin", hidden, w.integers([-1]), keepdims=1)  # OpenVINO's maximum of infinities is finite
    live, zero = w.emit("Less", fewest, w.tensor(0.5, dtype)), w.tensor(0.0, dtype)
    scores = w.emit("Add", scores, w.emit("Where", live, w.tensor(mask), zero))
    found = w.emit("MatMul", w.emit("Softmax", scores, axis=-1), w.tensor(value))
    return w.emit("Where", live, found, zero)


# Norms.


@_rule("batch_norm.default")
def _batch_norm(w: Writer, x: Ref, *rest: Any) -> str:
    weight, bias, mean, variance, training, _, eps, *_ = rest
    known_mean, known_variance = w.known(mean), w.known(variance)
    if training or known_mean is None or known_variance is None:
        raise UntranslatableError(f"a batch norm by the statistics of the batch ({w.node.name})")
    parts = [
        w.constant(torch.ones_like(known_mean)) if weight is None else w.tensor(weight),
        w.constant(torch.zeros_like(known_mean)) if bias is None else w.tensor(bias),
        w.tensor(mean),
        w.tensor(variance),
    ]
    return w.emit("BatchNormalization", w.tensor(x), *parts, epsilon=float(eps))


@_rule("layer_norm.default", "native_layer_norm.default")
def _layer_norm(w: Writer, x: Ref, shape: Sequence[int], *rest: Any) -> str | Sequence[str]:
    defaults: tuple[Any, ...] = (None, None, 1e-5)
    weight, bias, eps, *_ = (*rest, *defaults[len(rest) :])
    sizes = [int(w.number(size)) for size in shape]
    scale = w.constant(torch.ones(sizes, dtype=w.dtype(x))) if weight is None else w.tensor(weight)
    inputs = [w.tensor(x), scale, *([] if bias is None else [w.tensor(bias)])]
    made = w.emit("LayerNormalization", *inputs, axis=-len(sizes), epsilon=float(eps))
    return [made] if w.node.op.startswith("aten.native") else made


@_rule("rms_norm.default")
def _rms_norm(w: Writer, x: Ref, shape: Sequence[int], weight: Ref | None = None, eps: float | None = None) -> str:
    dtype = w.dtype(x)
    axes = w.integers(range(-len(shape), 0))
    squares = w.emit("ReduceMean", w.emit("Mul", w.tensor(x), w.tensor(x)), axes, keepdims=1)
    least = w.tensor(torch.finfo(dtype).eps if eps is None else eps, dtype)
    found = w.emit("Div", w.tensor(x), w.emit("Sqrt", w.emit("Add", squares, least)))
    return found if weight is None else w.emit("Mul", found, w.tensor(weight))


@_rule("group_norm.default")
def _group_norm(
    w: Writer, x: Ref, groups: int, weight: Ref | None = None, bias: Ref | None = None, eps: float = 1e-5, *_: Any
) -> str:
    ones, zeros = (w.constant(torch.full((groups,), v, dtype=w.dtype(x))) for v in (1.0, 0.0))
    flat = w.emit("Reshape", w.tensor(x), w.integers([0, groups, -1]))
    normal = w.reshape(w.emit("InstanceNormalization", flat, ones, zeros, epsilon=float(eps)))
    return _scaled(w, normal, weight, bias, w.rank(x) - 2)


@_rule("instance_norm.default")
def _instance_norm(w: Writer, x: Ref, weight: Ref | None, bias: Ref | None, *rest: Any) -> str:
    _, _, by_input, _, eps, *_ = rest
    if not by_input:
        raise UntranslatableError(f"an instance norm by stored statistics ({w.node.name})")
    channels = w.static(x, 1)
    ones, zeros = (w.constant(torch.full(channels, v, dtype=w.dtype(x))) for v in (1.0, 0.0))
    normal = w.emit("InstanceNormalization", w.tensor(x), ones, zeros, epsilon=float(eps))
    return _scaled(w, normal, weight, bias, w.rank(x) - 2)


def _scaled(w: Writer, x: str, weight: Ref | None, bias: Ref | None, after: int) -> str:
    """Multiply channels by a weight and add a bias, each (channels,) and followed by ``after`` axes."""
    for op, parameter in (("Mul", weight), ("Add", bias)):
        if parameter is not None:
            known = w.known(parameter)
            if known is None:
                raise UntranslatableError(f"a norm with computed parameters ({w.node.name})")
            x = w.emit(op, x, w.constant(known.view(-1, *[1] * after)))
    return x


# Sums along axes.


@_rule("softmax.int", "_softmax.default")
def _softmax(w: Writer, x: Ref, dim: int, *_: Any) -> str:
    return w.emit("Softmax", w.cast(w.tensor(x), w.dtype(x), w.dtype(w.node.name)), axis=w.axis(x, dim))


@_rule("log_softmax.int", "_log_softmax.default")
def _log_softmax(w: Writer, x: Ref, dim: int, *_: Any) -> str:
    return w.emit("LogSoftmax", w.cast(w.tensor(x), w.dtype(x), w.dtype(w.node.name)), axis=w.axis(x, dim))


def _reduce(op: str, w: Writer, x: Ref, dims: Any = None, keep: bool = False, **_: Any) -> str:
    wanted = w.dtype(w.node.name)
    return _reduced(w, op, w.cast(w.tensor(x), w.dtype(x), wanted), _axes(w, x, dims), keep)


def _axes(w: Writer, x: Ref, dims: Any) -> list[int]:
    if dims is None or dims == []:
        return list(range(w.rank(x)))
    return [w.axis(x, dim) for dim in ([dims] if isinstance(dims, int) else dims)]


def _reduced(w: Writer, op: str, x: str, axes: Sequence[int], keep: bool) -> str:
    return w.emit(op, x, w.integers(axes), keepdims=int(keep))


for _name, _op in {
    "mean.dim": "ReduceMean", "sum.dim_IntList": "ReduceSum", "amax.default": "ReduceMax", "amin.default": "ReduceMin",
    "logsumexp.default": "ReduceLogSumExp",
}.items():  # fmt: skip
    RULES[f"aten.{_name}"] = partial(_reduce, _op)
for _name, _op in {
    "mean.default": "ReduceMean", "sum.default": "ReduceSum", "max.default": "ReduceMax", "min.default": "ReduceMin",
}.items():  # fmt: skip
    RULES[f"aten.{_name}"] = lambda w, x, _op=_op, **_: _reduce(_op, w, x)


@_rule("max.dim", "min.dim")
def _extreme(w: Writer, x: Ref, dim: int, keep: bool = False) -> Sequence[str]:
    axis, best = w.axis(x, dim), w.node.op.split(".")[1]
    values = _reduced(w, f"Reduce{best.title()}", w.tensor(x), [axis], keep)
    return values, w.emit(f"Arg{best.title()}", w.tensor(x), axis=axis, keepdims=int(keep))


@_rule("argmax.default")
def _argmax(w: Writer, x: Ref, dim: int | None = None, keep: bool = False) -> str:
    if dim is None:
        raise UntranslatableError(f"an argmax over all axes ({w.node.name})")
    return w.emit("ArgMax", w.tensor(x), axis=w.axis(x, dim), keepdims=int(keep))


@_rule("var.correction", "std.correction", "var.dim", "std.dim", "var_mean.correction")
def _variance(w: Writer, x: Ref, dims: Any = None, unbiased: bool = True, keepdim: bool = False, **named: Any) -> Any:
    axes, keep = _axes(w, x, dims), named.get("keepdim", keepdim)
    correction = named.get("correction", 1 if unbiased else 0)
    correction = 1 if correction is None else correction
    mean = _reduced(w, "ReduceMean", w.tensor(x), axes, True)
    centred = w.emit("Sub", w.tensor(x), mean)
    squares = _reduced(w, "ReduceMean", w.emit("Mul", centred, centred), axes, keep)
    found = w.emit("Mul", squares, _unbiased(w, x, axes, correction)) if correction else squares
    if ".std." in w.node.op:
        return w.emit("Sqrt", found)
    if ".var_mean." in w.node.op:
        return found, mean if keep else _reduced(w, "ReduceMean", w.tensor(x), axes, False)
    return found


def _unbiased(w: Writer, x: Ref, axes: Sequence[int], correction: float) -> str:
    """Return the number of values along some axes, over that number less a correction."""
    dtype = w.dtype(x)
    if None not in (dims := [w.dims(x)[axis] for axis in axes]):
        count = math.prod(size for size in dims if size is not None)
        return w.tensor(count / (count - correction), dtype)
    each = reduce(partial(w.emit, "Mul"), [w.size(x, axis) for axis in axes])
    many = w.emit("Squeeze", w.cast(each, torch.int64, dtype), w.integers([0]))
    return w.emit("Div", many, w.emit("Sub", many, w.tensor(correction, dtype)))


@_rule("linalg_vector_norm.default", "norm.ScalarOpt_dim")
def _vector_norm(w: Writer, x: Ref, order: float | None = 2, dims: Any = None, keep: bool = False, **_: Any) -> str:
    if order not in (None, 1, 2):
        raise UntranslatableError(f"a norm of order {order} ({w.node.name})")
    return _reduced(w, "ReduceL1" if order == 1 else "ReduceL2", w.tensor(x), _axes(w, x, dims), keep)


@_rule("cumsum.default")
def _cumsum(w: Writer, x: Ref, dim: int, **_: Any) -> str:
    value = w.cast(w.tensor(x), w.dtype(x), w.dtype(w.node.name))
    return w.emit("CumSum", value, w.constant(torch.tensor(w.axis(x, dim))))


@_rule("topk.default")
def _topk(w: Writer, x: Ref, k: int, dim: int = -1, largest: bool = True, sort: bool = True) -> Sequence[str]:
    count = w.integers([w.number(k)])
    return w.emit_parts(
        "TopK", w.tensor(x), count, outputs=2, axis=w.axis(x, dim), largest=int(largest), sorted=int(sort)
    )


# Pooling and resizing.


@_rule("max_pool1d.default", "max_pool2d.default", "max_pool3d.default", "max_pool2d_with_indices.default")
def _max_pool(
    w: Writer, x: Ref, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> str | Sequence[str]:
    rank = w.rank(x) - 2
    sizes = _each(kernel, rank)
    made = w.emit(
        "MaxPool", w.tensor(x), kernel_shape=sizes, strides=_each(stride, rank) if stride else sizes,
        pads=_each(padding, rank) * 2, dilations=_each(dilation, rank), ceil_mode=int(ceil),
    )  # fmt: skip
    return [made] if "indices" in w.node.op else made


@_rule("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default")
def _avg_pool(  # noqa: PLR0913 - torch's signature
    w: Writer, x: Ref, kernel: Any, stride: Any = None, padding: Any = 0, ceil: bool = False, count: bool = True,
    divisor: int | None = None,
) -> str:  # fmt: skip
    if divisor is not None:
        raise UntranslatableError(f"an average pooling with a divisor of its own ({w.node.name})")
    rank = w.rank(x) - 2
    sizes = _each(kernel, rank)
    return w.emit(
        "AveragePool", w.tensor(x), kernel_shape=sizes, strides=_each(stride, rank) if stride else sizes,
        pads=_each(padding, rank) * 2, ceil_mode=int(ceil), count_include_pad=int(count),
    )  # fmt: skip


@_rule(
    "adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default",
    "adaptive_avg_pool3d.default",
)  # fmt: skip
def _adaptive_avg_pool(w: Writer, x: Ref, _: Any) -> str:
    rank = w.rank(x)
    spatial = range(2, rank)
    found, wanted = w.dims(x)[2:], w.static(w.node.name, *spatial)
    if wanted == [1] * len(wanted):
        return w.emit("GlobalAveragePool", w.tensor(x))
    sizes = [a // b for a, b in zip(found, wanted, strict=True) if a is not None and a % b == 0]
    if len(sizes) == len(wanted):
        return w.emit("AveragePool", w.tensor(x), kernel_shape=sizes, strides=sizes)
    y = w.tensor(x)  # bins of unequal sizes: a product with their averages along each axis
    for axis, (a, b) in zip(spatial, zip(found, wanted, strict=True), strict=True):
        moved = [*(k for k in range(rank) if k != axis), axis]
        y = w.emit("MatMul", w.emit("Transpose", y, perm=moved), _means(w, x, axis, b) if a is None else _bins(w, a, b))
        y = w.emit("Transpose", y, perm=[moved.index(k) for k in range(rank)])
    return y


def _bins(w: Writer, size: int, count: int) -> str:
    """Return the matrix (size, count) that averages bins of one size."""
    dtype = w.dtype(w.node.name)
    return w.constant(torch.nn.functional.adaptive_avg_pool1d(torch.eye(size, dtype=dtype)[None], count)[0])


def _means(w: Writer, x: Ref, axis: int, count: int) -> str:
    """Return the matrix (size, count) that averages bins along an axis whose size depends on the inputs'."""
    size, first = w.size(x, axis), torch.arange(count)
    many, scalar = w.constant(torch.tensor(count)), w.emit("Squeeze", size, w.integers([0]))
    low = w.emit("Div", w.emit("Mul", w.constant(first), size), many)
    more = w.emit("Add", w.emit("Mul", w.constant(first + 1), size), w.constant(torch.tensor(count - 1)))
    place = w.emit("Range", w.tensor(0, torch.int64), scalar, w.tensor(1, torch.int64))
    place = w.emit("Unsqueeze", place, w.integers([1]))
    inside = w.emit("And", w.emit("GreaterOrEqual", place, low), w.emit("Less", place, w.emit("Div", more, many)))
    weight = w.cast(inside, torch.bool, w.dtype(x))
    return w.emit("Div", weight, w.emit("ReduceSum", weight, w.integers([0]), keepdims=1))


@_rule("adaptive_max_pool2d.default")
def _adaptive_max_pool(w: Writer, x: Ref, size: Sequence[int]) -> Sequence[str]:
    found, wanted = w.static(x, 2, 3), _each(size, 2)
    if any(a % b for a, b in zip(found, wanted, strict=True)):
        raise UntranslatableError(f"an adaptive max pooling of {found} to {wanted} ({w.node.name})")
    sizes = [a // b for a, b in zip(found, wanted, strict=True)]
    return [w.emit("MaxPool", w.tensor(x), kernel_shape=sizes, strides=sizes)]


@_rule("upsample_nearest2d.vec", "upsample_bilinear2d.vec", "upsample_bicubic2d.vec")
def _upsample(w: Writer, x: Ref, size: Any = None, *rest: Any) -> str:
    kind = w.node.op.split(".")[1].removeprefix("upsample_").removesuffix("2d")
    given = rest[-1] if rest else None
    for before, after in zip(w.shapes(x), w.shapes(w.node.name), strict=True):
        ratios = [b / a for a, b in zip(before[2:], after[2:], strict=True)]
        if given is not None and any(
            abs(a * s - b) > 1e-6 for a, s, b in zip(before[2:], given, after[2:], strict=True)
        ):
            raise UntranslatableError(f"a resize by factors {given} to {list(after[2:])} ({w.node.name})")
    if given is not None or None not in (*w.dims(x)[2:], *w.dims(w.node.name)[2:]):
        wanted = [w.constant(torch.tensor([1.0, 1.0, *(given or ratios)]))]
    else:
        wanted = ["", w.joined([w.size(x, 0), w.size(x, 1), w.size(w.node.name, 2), w.size(w.node.name, 3)])]
    how: dict[str, Any]
    if kind == "nearest":
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    else:
        aligned = "align_corners" if rest[0] else "half_pixel"
        how = {"mode": "linear" if kind == "bilinear" else "cubic", "coordinate_transformation_mode": aligned}
        how["cubic_coeff_a"] = -0.75 if kind == "bicubic" else None
    return w.emit("Resize", w.tensor(x), "", *wanted, **how)


@_rule("pixel_shuffle.default")
def _pixel_shuffle(w: Writer, x: Ref, factor: int) -> str:
    return w.emit("DepthToSpace", w.tensor(x), blocksize=factor, mode="CRD")


@_rule("pixel_unshuffle.default")
def _pixel_unshuffle(w: Writer, x: Ref, factor: int) -> str:
    each = w.integers([factor])
    parts = [(w.emit("Div", w.size(x, axis), each), each) for axis in (2, 3)]
    apart = w.joined([w.size(x, 0), w.size(x, 1), *(part for pair in parts for part in pair)])
    moved = w.emit("Transpose", w.emit("Reshape", w.tensor(x), apart), perm=[0, 1, 3, 5, 2, 4])
    return w.reshape(moved)


@_rule("channel_shuffle.default")
def _channel_shuffle(w: Writer, x: Ref, groups: int) -> str:
    (channels,), rank = w.static(x, 1), w.rank(x)
    sizes = [w.size(x, axis) for axis in range(2, rank)]
    shape = w.joined([w.integers([-1]), w.integers([groups]), w.integers([channels // groups]), *sizes])
    apart = w.emit("Reshape", w.tensor(x), shape)
    return w.reshape(w.emit("Transpose", apart, perm=[0, 2, 1, *range(3, 1 + rank)]))


# Shapes.


@_rule("permute.default")
def _permute(w: Writer, x: Ref, dims: Sequence[int]) -> str:
    return w.emit("Transpose", w.tensor(x), perm=[w.axis(x, dim) for dim in dims])


@_rule("transpose.int", "swapaxes.default")
def _transpose(w: Writer, x: Ref, first: int, second: int) -> str:
    order, a, b = list(range(w.rank(x))), w.axis(x, first), w.axis(x, second)
    order[a], order[b] = b, a
    return w.emit("Transpose", w.tensor(x), perm=order)


@_rule("t.default")
def _t(w: Writer, x: Ref) -> str:
    return w.emit("Transpose", w.tensor(x), perm=[1, 0]) if w.rank(x) == 2 else w.tensor(x)


@_rule("expand.default", "expand_as.default")
def _expand(w: Writer, x: Ref, *_: Any, **__: Any) -> str:
    if w.shapes(x) == w.shapes(w.node.name):
        return w.tensor(x)
    return w.emit("Expand", w.tensor(x), w.shape())


@_rule("repeat.default")
def _repeat(w: Writer, x: Ref, repeats: Sequence[Any]) -> str:
    value, missing = w.tensor(x), len(repeats) - w.rank(x)
    if missing:
        value = w.emit("Unsqueeze", value, w.integers(range(missing)))
    sizes = (1,) * missing + w.dims(x)
    if all(size == 1 for size, count in zip(sizes, repeats, strict=True) if count != 1):
        return w.emit("Expand", value, w.shape())
    return w.emit("Tile", value, w.wholes(repeats))


@_rule("cat.default", "concat.default")
def _cat(w: Writer, values: Sequence[Ref], dim: int = 0) -> str:
    wanted, rank = w.dtype(w.node.name), w.rank(w.node.name)
    kept = [v for v in values if w.dims(v) != (0,)]
    return w.emit("Concat", *(w.cast(w.tensor(v), w.dtype(v), wanted) for v in kept), axis=int(dim) % rank)


@_rule("stack.default")
def _stack(w: Writer, values: Sequence[Ref], dim: int = 0) -> str:
    axis = int(dim) % w.rank(w.node.name)
    return w.emit("Concat", *(w.emit("Unsqueeze", w.tensor(v), w.integers([axis])) for v in values), axis=axis)


@_rule("split.Tensor", "chunk.default")
def _split(w: Writer, x: Ref, count: int, dim: int = 0) -> Sequence[str]:
    axis = w.axis(x, dim)
    (size,) = w.static(x, axis)
    step = -(-size // count) if "chunk" in w.node.op else int(w.number(count))
    return _pieces(w, x, axis, [min(step, size - start) for start in range(0, size, step)])


@_rule("split.sizes", "split_with_sizes.default")
def _split_sizes(w: Writer, x: Ref, sizes: Sequence[Any], dim: int = 0) -> Sequence[str]:
    return _pieces(w, x, w.axis(x, dim), [int(w.number(size)) for size in sizes])


def _pieces(w: Writer, x: Ref, axis: int, sizes: Sequence[int]) -> Sequence[str]:
    return w.emit_parts("Split", w.tensor(x), w.integers(sizes), outputs=len(sizes), axis=axis)


@_rule("unbind.int")
def _unbind(w: Writer, x: Ref, dim: int = 0) -> Sequence[str]:
    axis = w.axis(x, dim)
    (size,) = w.static(x, axis)
    pieces = _pieces(w, x, axis, [1] * size)
    return [w.emit("Squeeze", piece, w.integers([axis])) for piece in pieces]


@_rule("py.getitem")
def _getitem(w: Writer, x: Ref, index: int) -> str:
    return w.parts(x)[index]


@_rule("select.int")
def _select(w: Writer, x: Ref, dim: int, index: Any) -> str:
    place = w.constant(torch.tensor(int(w.number(index)), dtype=torch.int64))
    return w.emit("Gather", w.tensor(x), place, axis=w.axis(x, dim))


@_rule("slice.Tensor")
def _slice(w: Writer, x: Ref, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> str:
    if w.shapes(x) == w.shapes(w.node.name) and step == 1:
        return w.tensor(x)
    limits = [0 if start is None else start, _END if end is None else end, w.axis(x, dim), step]
    return w.emit("Slice", w.tensor(x), *map(w.whole, limits))


@_rule("narrow.default")
def _narrow(w: Writer, x: Ref, dim: int, start: Any, length: Any) -> str:
    first, count = w.whole(start), w.whole(length)
    return w.emit("Slice", w.tensor(x), first, w.emit("Add", first, count), w.integers([w.axis(x, dim)]))


@_rule("index_select.default")
def _index_select(w: Writer, x: Ref, dim: int, indices: Ref) -> str:
    return w.emit("Gather", w.tensor(x), _from_the_front(w, indices), axis=w.axis(x, dim))


@_rule("gather.default")
def _gather(w: Writer, x: Ref, dim: int, indices: Ref, **_: Any) -> str:
    return w.emit("GatherElements", w.tensor(x), _from_the_front(w, indices), axis=w.axis(x, dim))


@_rule("index.Tensor")
def _index(w: Writer, x: Ref, indices: Sequence[Ref | None]) -> str:
    used = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(used) != 1 or w.dtype(used[0][1]) == torch.bool:
        raise UntranslatableError(f"an index by a mask or by several tensors ({w.node.name})")
    ((axis, index),) = used
    return w.emit("Gather", w.tensor(x), w.tensor(index), axis=axis)


@_rule("flip.default")
def _flip(w: Writer, x: Ref, dims: Sequence[int]) -> str:
    axes = [w.axis(x, dim) for dim in dims]
    limits = [[-1] * len(axes), [-_END] * len(axes), axes, [-1] * len(axes)]
    return w.emit("Slice", w.tensor(x), *map(w.integers, limits))


@_rule("roll.default")
def _roll(w: Writer, x: Ref, shifts: Any, dims: Any = ()) -> str:
    y, axes = w.tensor(x), _axes(w, x, dims)
    if not dims:
        raise UntranslatableError(f"a roll over all axes at once ({w.node.name})")
    for shift, axis in zip([shifts] if isinstance(shifts, int) else shifts, axes, strict=True):
        cut, at = w.emit("Mod", w.integers([-shift]), w.size(x, axis)), w.integers([axis])
        tail = w.emit("Slice", y, cut, w.integers([_END]), at)
        y = w.emit("Concat", tail, w.emit("Slice", y, w.integers([0]), cut, at), axis=axis)
    return y


@_rule("pad.default", "constant_pad_nd.default")
def _pad(w: Writer, x: Ref, sizes: Sequence[Any], *rest: Any, **named: Any) -> str:
    constant = w.node.op.startswith("aten.constant")
    mode = "constant" if constant else (rest[0] if rest else named.get("mode", "constant"))
    value = named.get("value", (rest[0] if rest else 0) if constant else (rest[1] if len(rest) > 1 else 0))
    return _padded(w, x, sizes, mode, value or 0)


@_rule("reflection_pad2d.default")
def _reflection_pad(w: Writer, x: Ref, sizes: Sequence[Any]) -> str:
    return _padded(w, x, sizes, "reflect")


@_rule("replication_pad2d.default")
def _replication_pad(w: Writer, x: Ref, sizes: Sequence[Any]) -> str:
    return _padded(w, x, sizes, "replicate")


def _padded(w: Writer, x: Ref, sizes: Sequence[Any], mode: str, value: float = 0) -> str:
    """Pad as torch does: pairs of sizes, from the last axis backwards."""
    rank, (*before,), (*after,) = w.rank(x), *[[0] * w.rank(x)] * 2
    for k in range(len(sizes) // 2):
        before[rank - 1 - k], after[rank - 1 - k] = sizes[2 * k], sizes[2 * k + 1]
    names = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in names:
        raise UntranslatableError(f"a padding of mode {mode} ({w.node.name})")
    filling = [w.tensor(value, w.dtype(x))] if mode == "constant" else []
    return w.emit("Pad", w.tensor(x), w.wholes([*before, *after]), *filling, mode=names[mode])


@_rule("tril.default", "triu.default")
def _triangle(w: Writer, x: Ref, diagonal: int = 0) -> str:
    return w.emit("Trilu", w.tensor(x), w.tensor(diagonal, torch.int64), upper=int("triu" in w.node.op))


@_rule(
    "full.default", "zeros.default", "ones.default", "full_like.default", "zeros_like.default", "ones_like.default",
    "new_full.default", "new_zeros.default", "new_ones.default", "zero.default", "fill.Scalar", "fill.Tensor",
)  # fmt: skip
def _filled(w: Writer, *args: Any, **_: Any) -> str:
    kind = w.node.op.split(".")[1]
    value = 0 if "zero" in kind else 1 if "ones" in kind else args[-1]
    return w.emit("Expand", _operand(w, value, w.dtype(w.node.name)), w.shape())


@_rule("arange.default", "arange.start", "arange.start_step")
def _arange(w: Writer, *limits: Any, **_: Any) -> str:
    dtype = w.dtype(w.node.name)
    start, end, step = (0, *limits, 1) if len(limits) == 1 else (*limits, 1)[:3]
    if dtype != torch.int64:
        raise UntranslatableError(f"numbers in a row of {dtype} ({w.node.name})")
    return w.emit("Range", *(w.emit("Squeeze", w.whole(v), w.integers([0])) for v in (start, end, step)))
