"""One call of an ONNX operator with its values, as rules see it, and the arithmetic of sizes.

A value is a tensor, or an array of NumPy where it is known without the network's inputs: stored constants, and the
sizes that ``Shape`` gives. An array of sizes holds a symbol where the size is that of the batch, and has dtype object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from redpp_serve.capture.onnx_file import TYPES, Array, OnnxNode

Value = Tensor | Array
Size = Any  # an int, or a torch.SymInt while the network is captured


class UnsupportedError(Exception):
    """A use of an operator that has no rule; the text completes 'operator X ...'."""


class Store(Protocol):
    """Keeps the constants that become tensors of the network."""

    def tensor(self, name: str, array: Array, *, trained: bool) -> Tensor:
        """Return the tensor of a constant, which is a parameter where ``trained``."""


@dataclass(frozen=True)
class Call:
    """A call.

    Attributes:
        node: the operator with its names and attributes.
        values: its inputs, None where one is left out.
        opset: the version of the operators.
        store: where constants become tensors.
        batch: what the batch of a file that fixes it is multiplied by; None where the file leaves it free.
    """

    node: OnnxNode
    values: Sequence[Value | None]
    opset: int
    store: Store
    batch: Size | None = None

    def has(self, at: int) -> bool:
        """Return whether an input is given."""
        return len(self.values) > at and self.values[at] is not None

    def value(self, at: int) -> Value:
        """Return an input as it is."""
        if not self.has(at):
            raise UnsupportedError(f"lacks its input {at}")
        found = self.values[at]
        assert found is not None
        return found

    def x(self, at: int = 0, *, trained: bool = True) -> Tensor:
        """Return an input as a tensor; a constant of floating point is a parameter where ``trained``."""
        found = self.value(at)
        if isinstance(found, Tensor):
            return found
        if found.dtype == object:
            raise UnsupportedError("computes with the size of the batch")
        return self.store.tensor(self.node.inputs[at], found, trained=trained)

    def operand(self, at: int) -> Tensor | float | int | bool:
        """Return an input of an elementwise operator: a constant of one element as a number."""
        found = self.value(at)
        if isinstance(found, np.ndarray) and found.size == 1 and found.dtype != object and found.ndim <= 1:
            number: float | int | bool = found.reshape(()).item()
            return number
        return self.x(at)

    def known(self, at: int) -> Array:
        """Return an input that must not depend on the network's inputs."""
        found = self.value(at)
        if isinstance(found, Tensor):
            raise UnsupportedError(f"computes its input {at} from the network's inputs")
        return found

    def ints(self, at: int) -> list[Size]:
        """Return a known input of whole numbers or sizes."""
        return [size if isinstance(size, torch.SymInt) else int(size) for size in self.known(at).reshape(-1)]

    def number(self, at: int, default: float | int) -> float | int:
        """Return a known input of one element, or the default where it is left out."""
        if not self.has(at):
            return default
        found = self.known(at)
        if found.size != 1:
            raise UnsupportedError(f"takes {found.size} numbers as its input {at}")
        number: float | int = found.reshape(()).item()
        return number

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the default."""
        return self.node.attributes.get(name, default)

    def axes(self, rank: int, at: int = 1, name: str = "axes") -> list[int] | None:
        """Return axes from 0 to rank - 1, which earlier opsets give as an attribute and later ones as an input."""
        found = self.ints(at) if self.has(at) else self.attribute(name)
        return None if found is None else [axis % rank for axis in found]


def like(array: Array, x: Tensor) -> Tensor:
    """Return numbers that a rule has computed as a tensor beside ``x``, which has no memory in a probe."""
    found = torch.from_numpy(np.array(array))
    return found if x.device.type == "cpu" else found.to(x.device)


def as_sizes(sizes: Sequence[Size]) -> Array:
    """Return sizes as an array: of int64 where all are numbers."""
    if any(isinstance(size, torch.SymInt) for size in sizes):
        found = np.empty(len(sizes), dtype=object)
        for at, size in enumerate(sizes):
            found[at] = size
        return found
    return np.array(list(sizes), dtype=np.int64)


def tidy(found: Any) -> Array:
    """Return an array, of numbers where no element is a symbol."""
    array = np.asarray(found)
    if array.dtype == object and not any(isinstance(size, torch.SymInt) for size in array.reshape(-1)):
        return array.astype(np.int64)
    return array


def _arrays(call: Call) -> list[Array]:
    """Return all inputs, as objects where one of them holds a symbol."""
    arrays = [call.known(at) for at in range(len(call.values))]
    return [array.astype(object) for array in arrays] if any(array.dtype == object for array in arrays) else arrays


def _elementwise(function: Callable[..., Any]) -> Callable[[Call], Array]:
    """Make a rule of a function of numbers; with symbols it is applied to one element at a time."""

    def rule(call: Call) -> Array:
        arrays = _arrays(call)
        if arrays[0].dtype == object:
            return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), dtype=object)
        return np.asarray(function(*arrays))

    return rule


def _divide(a: Any, b: Any) -> Any:
    """Divide; whole numbers, which are sizes and not negative, to a whole number."""
    whole = all(isinstance(x, (int, torch.SymInt)) or getattr(x, "dtype", np.dtype(float)).kind in "iu" for x in (a, b))
    return a // b if whole else a / b


def _where(call: Call) -> Array:
    condition, a, b = _arrays(call)
    return np.where(condition.astype(bool), a, b)


def _cast(call: Call) -> Array:
    """Convert numbers; a symbol stays whole, whatever type it passes through."""
    array = call.known(0)
    return array if array.dtype == object else array.astype(TYPES[call.attribute("to")])


def _whole(call: Call, function: Callable[[Array], Array]) -> Array:
    array = call.known(0)
    return function(array) if array.dtype.kind == "f" else array


def _clip(call: Call) -> Array:
    low, high = (call.number(at, call.attribute(name, end)) for at, name, end in _LIMITS)
    return np.clip(call.known(0), low, high)


def _gather(call: Call) -> Array:
    return np.asarray(np.take(call.known(0), call.known(1).astype(np.int64), axis=call.attribute("axis", 0)))


def _slice(call: Call) -> Array:
    sizes = call.known(0)
    cuts: list[slice] = [slice(None)] * sizes.ndim
    for axis, cut in slices(call, sizes.shape):
        cuts[axis] = cut
    return sizes[tuple(cuts)]


def slices(call: Call, shape: Sequence[Size]) -> list[tuple[int, slice]]:
    """Return what Slice cuts of a value of that shape: axes from 0, and slices as Python means them."""
    names = ((1, "starts"), (2, "ends"), (3, "axes"))
    starts, ends, axes = (call.ints(at) if call.has(at) else call.attribute(name) for at, name in names)
    steps = call.ints(4) if call.has(4) else [1] * len(starts)
    found = []
    for axis, start, end, step in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        backwards = isinstance(step, int) and step < 0
        found.append((axis % len(shape), slice(start, None if backwards and end < -shape[axis] else end, step)))
    return found


def _reshape(call: Call) -> Array:
    return call.known(0).reshape(call.ints(1))


def _squeeze(call: Call) -> Array:
    axes = call.axes(max(1, call.known(0).ndim))
    return np.squeeze(call.known(0), None if axes is None else tuple(axes))


def _unsqueeze(call: Call) -> Array:
    axes = call.ints(1) if call.has(1) else call.attribute("axes")
    return np.expand_dims(call.known(0), tuple(axes))


def _concat(call: Call) -> Array:
    return np.concatenate([np.atleast_1d(x) for x in _arrays(call)], axis=call.attribute("axis", 0))


def _filled(call: Call) -> Array:
    value, shape = call.attribute("value"), call.ints(0)
    _check_few(*shape)
    return np.full(shape, np.float32(0) if value is None else value.reshape(-1)[0])


def _expand(call: Call) -> Array:
    shape = call.ints(1)
    _check_few(*shape)
    return np.broadcast_to(call.known(0), np.broadcast_shapes(call.known(0).shape, tuple(shape)))


def _range(call: Call) -> Array:
    start, limit, step = (call.number(at, 0) for at in range(3))
    _check_few((limit - start) // step)
    return np.arange(start, limit, step, dtype=call.known(0).dtype)


def _check_few(*shape: Size) -> None:
    """Refuse a list that is long or as long as the batch: that is a tensor."""
    if any(isinstance(size, torch.SymInt) for size in shape) or math.prod(shape) > MOST_SIZES:
        raise UnsupportedError("makes a long list of sizes")


def _product(call: Call) -> Array:
    kept = (1,) if call.attribute("keepdims", 1) else ()
    found = np.empty(kept, dtype=object)
    found[...] = math.prod(call.known(0).reshape(-1).tolist())
    return found


MOST_SIZES = 4096
_LIMITS = ((1, "min", -math.inf), (2, "max", math.inf))
SIZE_RULES: dict[str, Callable[[Call], Array]] = {
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Div": _elementwise(_divide),
    "Mod": _elementwise(lambda a, b: a % b),
    "Neg": _elementwise(lambda a: -a),
    "Equal": _elementwise(lambda a, b: a == b),
    "Less": _elementwise(lambda a, b: a < b),
    "Greater": _elementwise(lambda a, b: a > b),
    "Pow": _elementwise(lambda a, b: a**b),
    "Where": _where,
    "Cast": _cast,
    "Identity": lambda call: call.known(0),
    "Floor": lambda call: _whole(call, np.floor),
    "Ceil": lambda call: _whole(call, np.ceil),
    "Clip": _clip,
    "Sqrt": _elementwise(np.sqrt),
    "Reciprocal": _elementwise(np.reciprocal),
    "Gather": _gather,
    "Slice": _slice,
    "Transpose": lambda call: np.transpose(call.known(0), call.attribute("perm")),
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Expand": _expand,
    "Range": _range,
    "ReduceProd": _product,
}
