"""Calls of every operator of `kernels`, for tests that hold for all of them: the cases of the operators' own tests."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redpp_serve.kernels.split.reference import conv_output_size
from tests.kernels import test_codebook_linear as codebook
from tests.kernels import test_depthwise_conv2d_triton as depthwise
from tests.kernels import test_fused_conv2d_triton as conv
from tests.kernels import test_fused_linear as linear
from tests.kernels import test_split_triton as split

Move = Callable[[Any], Any]  # a tensor to a device or a precision; everything else as it is


class Call(NamedTuple):
    """One call of an operator.

    `dense(move)`: the same by torch's own layers, whose tensors went through `move`. `terms`: the products that an
    element of the result is a sum of.
    """

    arguments: tuple[Any, ...]
    dense: Callable[[Move], Tensor]
    terms: int

    def moved(self, move: Move) -> tuple[Any, ...]:
        """The arguments after `move`."""
        return tuple(map(move, self.arguments))


def mover(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Move:
    """Tensors to a device, and those of floating-point numbers to a precision; strides are kept."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() and dtype else value.dtype)

    return move


def fused_conv2d_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, case in conv.CASES.items():
        yield name, _conv_call(conv.make_call(case, dtype))
    given = conv.make_call(conv.CASES["3x3"], dtype)
    for name, form in _layouts(given.x).items():
        yield name, _conv_call(given._replace(x=form))


def depthwise_conv2d_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, case in depthwise.CASES.items():
        yield name, _depthwise_call(depthwise.make_call(case, dtype))
    given = depthwise.make_call(depthwise.CASES["3x3"], dtype)
    for name, form in _layouts(given.x).items():
        yield name, _depthwise_call(given._replace(x=form))


def fused_linear_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name in linear.CASES:
        given = linear.arguments(name, dtype)

        def dense(move: Move, given: dict[str, Any] = given) -> Tensor:
            moved = {key: move(value) for key, value in given.items()}
            return linear.in_torch(moved, moved["x"].dtype)

        yield name, Call(tuple(given.values()), dense, given["x"].shape[-1])


def codebook_linear_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """With every strategy of decoding that fits."""
    for name, (*_, values, _, _) in codebook.CASES.items():
        given = codebook.arguments(dtype, name)

        def dense(move: Move, given: dict[str, Any] = given) -> Tensor:
            moved = {key: move(value) for key, value in given.items()}
            return codebook.in_torch(moved, moved["x"].dtype)

        arguments = tuple(value for key, value in given.items() if key != "index")
        half = ("prmt16", "pair", *(("prmt8",) if values <= 8 else ())) if dtype.itemsize == 2 else ()
        for decode in ("auto", "pointer", *half):
            yield f"{name}, {decode}", Call((*arguments, decode), dense, given["x"].shape[-1])


def split_conv2d_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name in split.CONV_CASES:
        yield name, _split_call(split.conv_layer(name, dtype))
    given = split.conv_layer("plain", dtype)
    for name, form in _layouts(given.x).items():
        yield name, _split_call(given._replace(x=form))


def split_linear_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, shape in split.LINEAR_SHAPES.items():
        yield name, _split_call(split.linear_layer(shape, dtype))


CALLS: dict[str, Callable[[torch.dtype], Iterator[tuple[str, Call]]]] = {
    "codebook_linear": codebook_linear_calls,
    "depthwise_conv2d": depthwise_conv2d_calls,
    "fused_conv2d": fused_conv2d_calls,
    "fused_linear": fused_linear_calls,
    "split_conv2d": split_conv2d_calls,
    "split_linear": split_linear_calls,
}


def operator(name: str) -> Any:
    """The operator as torch calls it, without defaults."""
    return getattr(torch.ops.redpp, name).default


def _layouts(x: Tensor) -> dict[str, Tensor]:
    return {"channels_last": x.to(memory_format=torch.channels_last), "sliced": torch.cat([x, x], 3)[..., : x.shape[3]]}


def _conv_call(given: conv.Call) -> Call:
    return Call(tuple(given), lambda move: conv.in_torch(conv.Call(*map(move, given))), given.weight[:1].numel())


def _depthwise_call(given: depthwise.Call) -> Call:
    def dense(move: Move) -> Tensor:
        if given.x.shape[1]:
            return depthwise.in_torch(depthwise.Call(*map(move, given)))
        size = conv_output_size(given.x.shape[2:], given.weight.shape[2:], *given[4:])
        return move(given.x.new_zeros(*given.x.shape[:2], *size))  # torch refuses a convolution without channels

    return Call(tuple(given), dense, math.prod(given.weight.shape[2:]))


def _split_call(given: split.Layer) -> Call:
    def dense(move: Move) -> Tensor:
        moved = given._replace(x=move(given.x), weight=move(given.weight), bias=move(given.bias))
        return split.in_torch(moved, moved.x.dtype)

    rest = () if given.groups is None else (*given.window, given.groups)
    return Call((given.x, *given.split, given.bias, *rest), dense, given.weight[:1].numel())
