"""Calls of every operator of `kernels`, with the same by torch's own layers: odd, empty, strided and large shapes.

To add an operator, add a function that yields its calls to `CALLS`, and its launcher to `LAUNCHERS`.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve import kernels
from redpp_serve.kernels.epilogue import ACTIVATIONS
from redpp_serve.kernels.shapes import conv_output_size

Move = Callable[[Any], Any]  # a tensor to a device or a precision; everything else as it is
LAST = torch.channels_last


class Call(NamedTuple):
    """One call of an operator.

    Attributes:
        arguments: the arguments in the order of the schema.
        dense: computes the same by torch's own layers, whose tensors it passes through its argument first.
        terms: the number of products that an element of the result is a sum of.
    """

    arguments: tuple[Any, ...]
    dense: Callable[[Move], Tensor]
    terms: int

    def moved(self, move: Move) -> tuple[Any, ...]:
        """Return the arguments after `move`."""
        return tuple(map(move, self.arguments))

    def changed(self, at: int, value: Any) -> "Call":
        """Return the call with another argument at a place; `dense` stays."""
        return self._replace(arguments=(*self.arguments[:at], value, *self.arguments[at + 1 :]))


def mover(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Move:
    """Move tensors to a device, and those of floating-point numbers to a precision; strides are kept."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() and dtype else value.dtype)

    return move


def operator(name: str) -> Any:
    """Return the operator as torch calls it, without defaults."""
    return getattr(torch.ops.redpp, name).default


def launcher(name: str) -> Callable[..., Tensor]:
    """Return the function that launches an operator's kernels; it needs triton."""
    module, function = LAUNCHERS[name]
    return getattr(importlib.import_module(f"redpp_serve.kernels.{module}"), function)


class Random:
    """Normal random tensors in one precision, the same in each run."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)


# --- fused_conv2d and depthwise_conv2d ---


class Conv(NamedTuple):
    """One convolution; `extras`: b bias, r residual. The weight of a depthwise one is (channels, 1, kh, kw)."""

    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    activation: str = "none"
    extras: str = "b"

    @property
    def window(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation


CONVOLUTIONS = {
    "3x3": Conv((2, 20, 7, 6), (13, 20, 3, 3), padding=(1, 1), activation="relu", extras="br"),
    "3x3 stride 2": Conv((2, 24, 9, 8), (40, 24, 3, 3), (2, 2), (1, 1), activation="hardswish"),
    "1x1": Conv((2, 20, 7, 6), (24, 20, 1, 1), extras=""),
    "1x1 many programs": Conv((2, 17, 40, 41), (70, 17, 1, 1), activation="relu", extras="r"),
    "1x1 stride 2": Conv((2, 16, 7, 7), (33, 16, 1, 1), (2, 2), extras="br"),
    "1x1 padded": Conv((1, 16, 3, 3), (8, 16, 1, 1), padding=(1, 2), activation="sigmoid"),
    "5x5": Conv((2, 9, 6, 7), (7, 9, 5, 5), padding=(2, 2), activation="silu"),
    "7x7 stride 2, flat": Conv((2, 3, 19, 18), (11, 3, 7, 7), (2, 2), (3, 3), activation="relu6"),
    "3x3 flat": Conv((1, 5, 6, 6), (18, 5, 3, 3), padding=(1, 1), activation="hardsigmoid", extras="br"),
    "rectangular, dilated, asymmetric": Conv((1, 20, 9, 8), (13, 20, 2, 3), (1, 2), (1, 0), (2, 1), "gelu", "br"),
    "shared reduction": Conv((1, 64, 7, 7), (32, 64, 3, 3), padding=(1, 1), activation="gelu_tanh", extras="br"),
    "shared reduction, odd": Conv((1, 70, 5, 4), (9, 70, 3, 3), padding=(1, 1), activation="relu", extras="br"),
    "one pixel": Conv((3, 40, 1, 1), (10, 40, 1, 1), activation="relu"),
    "no images": Conv((0, 8, 5, 5), (4, 8, 3, 3), extras="br"),
    "no inputs": Conv((2, 0, 5, 5), (4, 0, 3, 3), activation="relu", extras="br"),
    "no outputs": Conv((2, 8, 5, 5), (0, 8, 3, 3)),
}
DEPTHWISE = {
    "3x3": Conv((2, 20, 5, 6), (20, 1, 3, 3), padding=(1, 1), activation="relu6"),
    "3x3 stride 2": Conv((1, 13, 9, 8), (13, 1, 3, 3), (2, 2), (1, 1), activation="hardswish"),
    "3x3 many channels": Conv((1, 70, 4, 5), (70, 1, 3, 3), padding=(1, 1), activation="relu", extras=""),
    "3x3 wide rows": Conv((1, 3, 3, 150), (3, 1, 3, 3), padding=(1, 1)),
    "5x5": Conv((1, 8, 6, 5), (8, 1, 5, 5), padding=(2, 2), activation="silu"),
    "5x5 stride 2": Conv((1, 24, 5, 7), (24, 1, 5, 5), (2, 2), (2, 2), activation="gelu"),
    "7x7 stride 2": Conv((1, 5, 5, 6), (5, 1, 7, 7), (2, 2), (3, 3), activation="sigmoid"),
    "1x1": Conv((2, 9, 4, 5), (9, 1, 1, 1), activation="hardsigmoid"),
    "rectangular, asymmetric": Conv((1, 12, 9, 8), (12, 1, 2, 4), (1, 3), (0, 2), activation="gelu_tanh"),
    "stride beyond the kernel": Conv((1, 6, 17, 5), (6, 1, 2, 1), (4, 1)),
    "dilated": Conv((1, 16, 7, 8), (16, 1, 3, 3), padding=(2, 2), dilation=(2, 2), activation="relu"),
    "dilated across": Conv((1, 16, 6, 9), (16, 1, 3, 3), padding=(1, 3), dilation=(1, 3), activation="relu"),
    "one channel": Conv((2, 1, 4, 7), (1, 1, 3, 3), padding=(1, 1)),
    "one pixel": Conv((1, 40, 1, 1), (40, 1, 3, 3), padding=(1, 1)),
    "no images": Conv((0, 8, 5, 5), (8, 1, 3, 3)),
    "no channels": Conv((2, 0, 5, 5), (0, 1, 3, 3)),
}


def fused_conv2d_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, case in CONVOLUTIONS.items():
        yield name, _conv_call(case, dtype)
    call = _conv_call(CONVOLUTIONS["3x3"], dtype)
    x, weight, *_ = call.arguments
    for name, form in _layouts(x).items():
        yield name, _conv_call(CONVOLUTIONS["3x3"], dtype, x=form)
    yield "strided weight", call.changed(1, weight.repeat_interleave(2, 3)[..., ::2])


def depthwise_conv2d_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, case in DEPTHWISE.items():
        yield name, _conv_call(case, dtype)
    call = _conv_call(DEPTHWISE["3x3"], dtype)
    x, weight, *_ = call.arguments
    for name, form in _layouts(x).items():
        yield name, _conv_call(DEPTHWISE["3x3"], dtype, x=form)
    yield "weight by taps", call.changed(1, weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))


def _conv_call(case: Conv, dtype: torch.dtype, x: Tensor | None = None) -> Call:
    random = Random(sum(case.x) + sum(case.weight), dtype)
    made, weight = random(*case.x), random(*case.weight)
    x = made if x is None else x
    bias = random(case.weight[0]) if "b" in case.extras else None
    depthwise = case.weight[0] == case.x[1] and case.weight[1] == 1
    size = conv_output_size(case.x[2:], case.weight[2:], *case.window)
    residual = random(case.x[0], case.weight[0], *size) if "r" in case.extras else None
    empty = 0 in (*case.x, *case.weight)  # torch refuses a convolution without channels

    def dense(move: Move) -> Tensor:
        if empty:
            total = move(x.new_zeros(case.x[0], case.weight[0], *size))
        else:
            total = F.conv2d(move(x), move(weight), None, *case.window, case.x[1] if depthwise else 1)
        total = total if bias is None else total + move(bias).view(1, -1, 1, 1)
        return ACTIVATIONS[case.activation](total if residual is None else total + move(residual))

    rest = (case.activation, *case.window) if depthwise else (residual, case.activation, *case.window)
    return Call((x, weight, bias, *rest), dense, math.prod(case.weight[1:]))


def _layouts(x: Tensor) -> dict[str, Tensor]:
    return {
        "channels_last": x.to(memory_format=LAST),
        "sliced": torch.cat([x, x], 3)[..., : x.shape[3]],
        "expanded": x[:1].expand_as(x),
    }


# --- fused_linear: rows of x, n_in, n_out, activation, extras (b bias, r residual) ---

LINEARS: dict[str, tuple[tuple[int, ...], int, int, str, str]] = {
    f"activation {name}": ((3,), 20, 13, name, "br") for name in ACTIVATIONS
} | {
    "no rows": ((0,), 8, 5, "relu", "br"),
    "one row": ((1,), 33, 17, "none", "b"),
    "17 rows": ((17,), 40, 24, "relu", ""),
    "64 rows": ((64,), 48, 40, "silu", "br"),
    "no inputs": ((3,), 0, 5, "none", "br"),
    "one input": ((3,), 1, 5, "none", "b"),
    "3-d": ((2, 3), 24, 9, "relu", "b"),
    "shared reduction": ((3,), 1030, 20, "gelu", "br"),
}


def fused_linear_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, (rows, n_in, n_out, activation, extras) in LINEARS.items():
        random = Random(n_in + n_out, dtype)
        tensors = random(*rows, n_in), random(n_out, n_in), random(n_out) if "b" in extras else None
        residual = random(*rows, n_out) if "r" in extras else None

        def dense(move: Move, tensors=tensors, residual=residual, activation=activation) -> Tensor:
            total = F.linear(*map(move, tensors))
            return ACTIVATIONS[activation](total if residual is None else total + move(residual))

        call = Call((*tensors, residual, activation), dense, n_in)
        yield name, call
        if name == "17 rows":
            yield "transposed", call.changed(0, tensors[0].T.contiguous().T)


# --- codebook_linear: shape of x, outputs, values, activation, bias ---

CODEBOOKS: dict[str, tuple[tuple[int, ...], int, int, str, bool]] = {
    "one row": ((1, 300), 133, 16, "none", True),
    "five rows": ((5, 1025), 65, 16, "relu", True),
    "sixteen rows, shares": ((16, 2100), 40, 4, "silu", False),
    "forty rows": ((40, 130), 17, 7, "gelu", True),
    "many programs": ((70, 257), 130, 16, "hardswish", True),
    "one input": ((3, 1), 5, 1, "sigmoid", False),
    "3-d": ((2, 3, 200), 9, 9, "gelu_tanh", True),
    "whole groups": ((8, 1024), 64, 8, "relu6", True),
    "no rows": ((0, 40), 8, 3, "relu", True),
    "no inputs": ((4, 0), 6, 2, "none", True),
    "no outputs": ((4, 30), 0, 2, "none", False),
}


def codebook_linear_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Yield every case with every strategy of decoding that fits."""
    for name, (shape, n_out, values, activation, has_bias) in CODEBOOKS.items():
        random = Random(sum(shape), dtype)
        x, codebook = random(*shape), random(values)
        index = torch.randint(0, values, (n_out, shape[-1]), generator=random.generator)
        bias = random(n_out) if has_bias else None

        def dense(move: Move, x=x, codebook=codebook, index=index, bias=bias, activation=activation) -> Tensor:
            return ACTIVATIONS[activation](F.linear(move(x), move(codebook[index]), move(bias)))

        half = ("prmt16", "pair", *(("prmt8",) if values <= 8 else ())) if dtype.itemsize == 2 else ()
        for decode in ("auto", "pointer", *half):
            arguments = x, kernels.pack_indices(index), codebook, bias, activation, decode
            yield f"{name}, {decode}", Call(arguments, dense, shape[-1])
            if name == "3-d" and decode == "auto":
                strided = x.transpose(0, 2).contiguous().transpose(0, 2)
                yield f"strided, {decode}", Call((strided, *arguments[1:]), dense, shape[-1])


# --- split_conv2d and split_linear ---


class Split(NamedTuple):
    """A weight as its unique kernels: what the split operators take."""

    kernels: Tensor
    channel: Tensor
    index: Tensor
    sign: Tensor


def quantised_weight(shape: tuple[int, ...], generator: torch.Generator, step: float = 1.0) -> Tensor:
    """Make a weight of few distinct values; some kernels are zero, and many of the rest are equal up to their sign."""
    return (torch.randn(shape, generator=generator, dtype=torch.float64) / step).round() * step * 0.375


def build_split(weight: Tensor, groups: int = 1) -> Split:
    """Find the unique kernels of every input channel of (n_out, n_in / groups, kh, kw), first non-zero value > 0."""
    n_out, per_group = weight.shape[:2]
    index = torch.full((n_out, per_group), -1, dtype=torch.int32)
    sign = torch.zeros((n_out, per_group), dtype=torch.int8)
    found, channel = [], []
    for c in range(per_group * groups):
        group, i = divmod(c, per_group)
        seen: dict[tuple[float, ...], int] = {}
        for o in range(group * n_out // groups, (group + 1) * n_out // groups):
            values = weight[o, i].flatten()
            if not values.any():
                continue
            factor = int(values[values != 0][0].sign())
            key = tuple((values * factor + 0.0).tolist())
            if key not in seen:
                seen[key] = len(found)
                found.append(weight[o, i] * factor)
                channel.append(c)
            index[o, i], sign[o, i] = seen[key], factor
    stacked = torch.stack(found) if found else weight.new_empty((0, *weight.shape[2:]))
    return Split(stacked, torch.tensor(channel, dtype=torch.int64), index, sign)


# x shape, weight shape (n_out, n_in / groups, kh, kw), stride, padding, dilation, groups
SPLIT_CONVOLUTIONS = {
    "plain": ((2, 3, 7, 9), (5, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "pointwise": ((3, 8, 5, 5), (11, 8, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "strided": ((2, 4, 9, 8), (6, 4, 3, 3), (2, 3), (1, 0), (1, 1), 1),
    "dilated": ((1, 3, 11, 12), (4, 3, 3, 2), (1, 2), (2, 1), (2, 3), 1),
    "groups": ((2, 6, 6, 6), (9, 2, 3, 3), (1, 1), (1, 1), (1, 1), 3),
    "depthwise": ((2, 7, 6, 5), (7, 1, 3, 3), (2, 2), (1, 1), (1, 1), 7),
    "depthwise multiplier": ((1, 3, 6, 5), (6, 1, 5, 5), (1, 1), (2, 2), (1, 1), 3),
    "one pixel": ((1, 17, 1, 1), (33, 17, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "empty batch": ((0, 3, 4, 4), (5, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
}
SPLIT_LINEARS = {"row": (1, 40), "rows": (5, 40), "sequence": (2, 3, 40), "vector": (16,), "empty": (0, 40)}


def split_conv2d_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Yield every case, with and without a bias in turns."""
    for name in SPLIT_CONVOLUTIONS:
        yield name, _split_conv2d_call(name, dtype)
    x = _split_conv2d_call("plain", dtype).arguments[0]
    for name, form in _layouts(x).items():
        yield name, _split_conv2d_call("plain", dtype, form)


def _split_conv2d_call(name: str, dtype: torch.dtype, x: Tensor | None = None) -> Call:
    x_shape, w_shape, *window, groups = SPLIT_CONVOLUTIONS[name]
    random = Random(len(name), dtype)
    made, weight = random(*x_shape), quantised_weight(w_shape, random.generator)
    x = made if x is None else x
    bias = random(w_shape[0]) if len(name) % 2 else None
    kernel, *rest = build_split(weight, groups)
    weight = weight.to(dtype)
    return Call(
        (x, kernel.to(dtype), *rest, bias, *window, groups),
        lambda move: F.conv2d(move(x), move(weight), move(bias), *window, groups),
        weight[:1].numel(),
    )


def split_linear_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, shape in SPLIT_LINEARS.items():
        random = Random(len(shape), dtype)
        x, bias = random(*shape), random(13) if name != "sequence" else None
        exact = quantised_weight((13, shape[-1]), random.generator)
        values, *rest = build_split(exact[:, :, None, None])

        weight = exact.to(dtype)

        def dense(move: Move, x: Tensor = x, weight: Tensor = weight, bias: Tensor | None = bias) -> Tensor:
            return F.linear(move(x), move(weight), move(bias))

        yield name, Call((x, values.flatten().to(dtype), *rest, bias), dense, shape[-1])


CALLS: dict[str, Callable[[torch.dtype], Iterator[tuple[str, Call]]]] = {
    "codebook_linear": codebook_linear_calls,
    "depthwise_conv2d": depthwise_conv2d_calls,
    "fused_conv2d": fused_conv2d_calls,
    "fused_linear": fused_linear_calls,
    "split_conv2d": split_conv2d_calls,
    "split_linear": split_linear_calls,
}
LAUNCHERS = {
    "codebook_linear": ("codebook_linear.kernel", "launch_codebook_linear"),
    "depthwise_conv2d": ("depthwise_conv2d.kernel", "launch_depthwise_conv2d"),
    "fused_conv2d": ("fused_conv2d.kernel", "launch_fused_conv2d"),
    "fused_linear": ("fused_linear.operator", "launch_fused_linear"),
    "split_conv2d": ("split.kernel", "launch_split_conv2d"),
    "split_linear": ("split.kernel", "launch_split_linear"),
}
