"""Network inputs as the user writes them (``3x224x224:float16``, ``20:int64:0..999``) and random samples of them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec, Ranges, Size
from redpp_serve.graph.ranges import random_integers
from redpp_serve.graph.sizes import sizes_of

DTYPES = ("float32", "float16", "float64", "bfloat16", "int64", "int32", "uint8", "bool")
ALIASES = {
    **{"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"},
    **{"fp64": "float64", "double": "float64", "int": "int64", "long": "int64"},
}
_LARGEST = 1 << 62  # of a range, whose width must be an int64 too
_SINGLE = "scalar"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
MAX_ELEMENTS = 1 << 27  # per request: 512 MiB of float32, of which capture holds several


def parse_input(text: str, index: int, sizes: Mapping[str, Size] | None = None) -> InputSpec:
    """Parse ``[name=]shape[:dtype[:ranges]]``: one input without batch, by default of float32, as in ``3x224x224``.

    Integers may have a range, as in ``20:int64:0..999``, or several: one for each place of the last dimension, or of
    the last ones, as in ``2:int64:0..9,0..99``. Inputs of one number each, a batch of which has the shape (N,), have no
    sizes: ``:int64:0..9``, or ``scalar``. A letter stands for a size that differs between requests, as in
    ``3xHxW``; the shape then holds the size nearest to the geometric mean of the smallest and the largest.

    Args:
        text: what the user wrote.
        index: position among the network's inputs; an input without a name is called ``input_<index>``.
        sizes: what letters stand for, see `parse_sizes`.

    Raises:
        RedppError: not sizes joined by ``x``, a size of zero, too many elements, an unknown dtype, wrong ranges, or no
            name.
    """
    name, equals, described = text.strip().rpartition("=")
    if equals and not NAME.fullmatch(name):
        raise _bad(text, f"{name!r} is not a name", "letters, digits, _ and -, with a dot before what lies inside")
    shape_text, colon, rest = described.lower().partition(":")
    dtype, ranged, ranges = rest.partition(":")
    dtype = ALIASES.get(dtype, dtype) if colon else "float32"
    if dtype not in DTYPES:
        raise _bad(text, f"its dtype {dtype!r} is not known", f"one of {', '.join(DTYPES)}")
    single = shape_text == _SINGLE or (colon and not shape_text)
    if not single and not re.fullmatch(r"([0-9]{1,10}|[a-wyz])(x([0-9]{1,10}|[a-wyz]))*", shape_text):
        expected = f"positive whole numbers, or letters but x, joined by x; {_SINGLE} for one number without dimensions"
        raise _bad(text, f"{shape_text!r} is not a shape", expected)
    parts = [] if single else shape_text.upper().split("X")
    if unknown := [part for part in parts if part.isalpha() and part not in (sizes or {})]:
        raise _bad(text, f"nothing says which sizes {unknown[0]} stands for", f"--range {unknown[0]}=LOW..HIGH")
    varying = tuple((axis, (sizes or {})[part]) for axis, part in enumerate(parts) if part.isalpha())
    shape = tuple(_middle((sizes or {})[part]) if part.isalpha() else int(part) for part in parts)
    if 0 in shape:
        raise _bad(text, "a size is zero", "sizes of at least 1, without the batch dimension")
    elements = math.prod(dict(varying)[axis].high if axis in dict(varying) else n for axis, n in enumerate(shape))
    if elements > MAX_ELEMENTS:
        raise _bad(text, f"it has {elements} elements", f"at most {MAX_ELEMENTS}")
    found = _ranges(text, ranges, shape, dtype) if ranged else ()
    return InputSpec(name or numbered_name(index), shape, dtype, found, varying=varying)


def numbered_name(index: int) -> str:
    """Return the name of an input that the user gave none."""
    return f"input_{index}"


def are_numbered(inputs: Sequence[InputSpec]) -> bool:
    """Return whether the user named no input."""
    return all(_numbered(inputs))


def _numbered(inputs: Sequence[InputSpec]) -> list[bool]:
    return [spec.name in ("", numbered_name(index)) for index, spec in enumerate(inputs)]


def require_names(inputs: Sequence[InputSpec], known: Collection[str]) -> None:
    """Refuse inputs of which some have names and some have not, unless ``known`` are all of their names.

    An ONNX model may well call one of its inputs as an input without a name is called here.
    """
    numbered = _numbered(inputs)
    if any(numbered) and not all(numbered) and not {spec.name for spec in inputs} <= set(known):
        bare = "x".join(map(str, inputs[numbered.index(True)].shape))
        raise RedppError(
            f"--input {bare} has no name, and others have",
            "a name for each input or for none",
            f"write --input NAME={bare}",
        )


def parse_sizes(texts: Sequence[str]) -> dict[str, Size]:
    """Parse ``H=224..1024/32``: the sizes that a letter stands for, by letter.

    Raises:
        RedppError: none, twice the same letter, or sizes that are none.
    """
    found: dict[str, Size] = {}
    for text in texts:
        match = re.fullmatch(r"([A-WYZ])=([0-9]{1,10})\.\.([0-9]{1,10})(?:/([0-9]{1,10}))?", text.strip().upper())
        size = Size(match[1], int(match[2]), int(match[3]), int(match[4] or 1)) if match else None
        if size is None or not 0 < size.low <= size.high or size.step < 1 or size.symbol in found:
            raise RedppError(
                f"--range {text}",
                "a letter but X, once, with its smallest and largest size and the step between them: H=224..1024/32",
                "correct it",
            )
        last = size.high - (size.high - size.low) % size.step
        found[size.symbol] = replace(size, high=last)
    return found


def require_used(sizes: Mapping[str, Size], inputs: Sequence[InputSpec]) -> None:
    """Refuse sizes of a letter that no input has."""
    if unused := sizes.keys() - sizes_of(inputs).keys():
        letter = min(unused)
        raise RedppError(
            f"--range {letter}={sizes[letter]}, and no --input has {letter}",
            "letters of --input",
            "correct one of them",
        )


def _middle(size: Size) -> int:
    """Return the size nearest to the geometric mean of the smallest and the largest one."""
    return size.low + size.step * round((math.sqrt(size.low * size.high) - size.low) / size.step)


def _ranges(text: str, ranges: str, shape: tuple[int, ...], dtype: str) -> Ranges:
    """Parse ``0..9`` or ``0..9,0..99``, of an input that is known but for them."""
    if dtype not in ("int64", "int32", "uint8"):
        raise _bad(text, f"a range for {dtype}", "a range for int64, int32 or uint8 alone")
    found = [re.fullmatch(r"(-?[0-9]{1,19})\.\.(-?[0-9]{1,19})", part) for part in ranges.split(",")]
    pairs = tuple((int(match[1]), int(match[2])) for match in found if match)
    limits = torch.iinfo(getattr(torch, dtype))
    least, most = max(limits.min, -_LARGEST), min(limits.max, _LARGEST)
    if len(pairs) < len(found) or not all(least <= low <= high <= most for low, high in pairs):
        raise _bad(text, f"{ranges!r} is no range of {dtype}", "the lowest and the highest value, as in 0..999")
    parts = [math.prod(shape[axis:]) for axis in range(len(shape) + 1)]
    if len(pairs) not in parts:
        raise _bad(
            text, f"it has {len(pairs)} ranges", f"one, or one for each of the last {(shape or (1,))[-1]} places"
        )
    return pairs


def sample(specs: Sequence[InputSpec], batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Draw random inputs of shape ``(batch, *spec.shape)`` on the CPU, the same for the same generator state.

    Floating-point inputs are standard normal; integers are uniform over their range; booleans are fair coins.
    """
    if batch < 1:
        raise RedppError(f"a batch of {batch} inputs", "at least 1", "ask for a batch size of 1 or more")
    return tuple(_sample(spec, batch, generator) for spec in specs)


def _sample(spec: InputSpec, batch: int, generator: torch.Generator) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        drawn = torch.float64 if dtype is torch.float64 else torch.float32
        return torch.randn((batch, *spec.shape), generator=generator, dtype=drawn).to(dtype)
    return random_integers(spec, batch, generator)


def _bad(text: str, found: str, expected: str) -> RedppError:
    return RedppError(f"--input {text}: {found}", expected, "write the shape of one input, as in --input 3x224x224")
