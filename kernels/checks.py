"""Refusals that the operators share. Each names the operator, the argument, what it should be and what it is."""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from redpp_serve.kernels.epilogue import ACTIVATIONS
from redpp_serve.kernels.shapes import conv_output_size

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INT32 = 1 << 31

# First tensor of a check -> the check it passed: its key, versions of all tensors, weak references to the others.
_passed: MutableMapping[Tensor, tuple[Any, list[TensorWeakRef]]] = WeakTensorKeyDictionary()


def check_input(op: str, x: Tensor, shape: str, fits: bool) -> None:
    """Refuse an input that is not floating-point, or whose shape does not fit.

    Args:
        op: name of the operator.
        x: the input.
        shape: the expected shape in words, for the message.
        fits: whether the input has that shape.

    Raises:
        ValueError: see above.
    """
    if not fits or x.dtype not in FLOATS:
        found = f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"{op}: x must be {shape} in fp32, fp16, bf16 or fp64, found {found}")


def expect(op: str, name: str, tensor: Tensor | None, like: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Refuse a tensor of another dtype or shape, or on another device than `like`; None is an argument left out.

    Raises:
        ValueError: see above.
    """
    if tensor is not None and (tensor.device != like.device or tensor.dtype != dtype or tensor.shape != shape):
        raise ValueError(
            f"{op}: {name} must be {dtype} of shape {tuple(shape)} on {like.device}, "
            f"found {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def check_activation(op: str, activation: str) -> None:
    """Refuse an activation that no kernel knows.

    Raises:
        ValueError: see above.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, found {activation!r}")


def check_window(
    op: str, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Refuse a window that makes no output of the images in `x` (n, channels, h, w).

    Args:
        op: name of the operator.
        x: the images.
        kernel: (kh, kw).
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        dilation: (vertical, horizontal).

    Returns:
        Height and width of the output.

    Raises:
        ValueError: see above.
    """
    pairs = all(len(value) == 2 for value in (stride, padding, dilation))
    if not pairs or min(stride) <= 0 or min(dilation) <= 0 or min(padding) < 0:
        raise ValueError(
            f"{op}: stride and dilation must be positive and padding not negative, each (vertical, horizontal), "
            f"found {tuple(stride)}, {tuple(dilation)} and {tuple(padding)}"
        )
    out_h, out_w = conv_output_size(x.shape[2:], kernel, stride, padding, dilation)
    if out_h <= 0 or out_w <= 0:
        raise ValueError(
            f"{op}: the kernel {tuple(kernel)} with dilation {tuple(dilation)} does not fit into the input "
            f"{tuple(x.shape[2:])} with padding {tuple(padding)}"
        )
    return out_h, out_w


def check_conv_weight(op: str, weight: Tensor) -> None:
    """Refuse a weight that is not (outputs, inputs, kh, kw) with a kernel of at least one value.

    Raises:
        ValueError: see above.
    """
    if weight.dim() != 4 or min(weight.shape[2:]) <= 0:
        raise ValueError(f"{op}: weight must be (outputs, inputs, kh, kw), found {tuple(weight.shape)}")


def check_extent(op: str, shape: Sequence[int], padding: Sequence[int]) -> None:
    """Refuse images too large for the int32 arithmetic that the GPU kernels do inside of one image.

    Raises:
        ValueError: one padded image has 2^31 elements or more.
    """
    _, n_in, h, w = shape
    elements = max(1, n_in) * (h + 2 * padding[0]) * (w + 2 * padding[1])
    if elements >= _INT32:
        raise ValueError(f"{op}: x must have less than 2^31 elements per padded image on a GPU, found {elements}")


def check_programs(op: str, programs: int) -> None:
    """Refuse more programs than one launch can have.

    Raises:
        ValueError: 2^31 programs or more.
    """
    if programs >= _INT32:
        raise ValueError(f"{op}: x must need less than 2^31 tiles of output on a GPU, found {programs}")


def version(tensor: Tensor) -> int:
    """Return a number that changes with each change in place; 0 for a tensor made under `torch.inference_mode`."""
    return 0 if tensor.is_inference() else tensor._version


def check_once(check: Callable[..., None], key: tuple[Any, ...], *tensors: Tensor) -> None:
    """Call `check(*key, *tensors)`, unless these tensors passed it for this key and have not changed since.

    A check of values reads the tensors, which on CUDA waits for the device. Tensors made under `torch.inference_mode`
    keep no version: changes to them go unseen.
    """
    first, *others = tensors
    current = (check, key, [version(tensor) for tensor in tensors])
    known = _passed.get(first)
    if known is not None and known[0] == current and all(r() is t for r, t in zip(known[1], others, strict=True)):
        return
    check(*key, *tensors)
    _passed[first] = (current, [TensorWeakRef(tensor) for tensor in others])
