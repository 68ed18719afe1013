"""Network inputs as the user writes them (``3x224x224:float16``) and random samples of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec

DTYPES = ("float32", "float16", "float64", "bfloat16", "int64", "int32", "uint8", "bool")
ALIASES = {
    **{"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"},
    **{"fp64": "float64", "double": "float64", "int": "int64", "long": "int64"},
}
MAX_ELEMENTS = 1 << 30  # per request: 4 GiB of float32


def parse_input(text: str, index: int) -> InputSpec:
    """Parse ``3x224x224`` or ``3x224x224:dtype``: the shape of one input without batch, by default of float32.

    Args:
        text: what the user wrote.
        index: position among the network's inputs; the input is named ``input_<index>``.

    Raises:
        RedppError: not sizes joined by ``x``, a size of zero, too many elements, or an unknown dtype.
    """
    shape_text, colon, dtype = text.strip().lower().partition(":")
    dtype = ALIASES.get(dtype, dtype) if colon else "float32"
    if dtype not in DTYPES:
        raise _bad(text, f"its dtype {dtype!r} is not known", f"one of {', '.join(DTYPES)}")
    if not re.fullmatch(r"[0-9]{1,10}(x[0-9]{1,10})*", shape_text):
        raise _bad(text, f"{shape_text!r} is not a shape", "positive whole numbers joined by x")
    shape = tuple(int(size) for size in shape_text.split("x"))
    if 0 in shape:
        raise _bad(text, "a size is zero", "sizes of at least 1, without the batch dimension")
    if math.prod(shape) > MAX_ELEMENTS:
        raise _bad(text, f"it has {math.prod(shape)} elements", f"at most {MAX_ELEMENTS}")
    return InputSpec(f"input_{index}", shape, dtype)


def sample(
    specs: Sequence[InputSpec], batch: int, generator: torch.Generator, *, largest: int = 1
) -> tuple[Tensor, ...]:
    """Draw random inputs of shape ``(batch, *spec.shape)`` on the CPU, the same for the same generator state.

    Floating-point inputs are standard normal; integers are uniform over 0..``largest``; booleans are fair coins.
    """
    if batch < 1:
        raise RedppError(f"a batch of {batch} inputs", "at least 1", "ask for a batch size of 1 or more")
    return tuple(_sample(spec, (batch, *spec.shape), generator, largest) for spec in specs)


def _sample(spec: InputSpec, shape: tuple[int, ...], generator: torch.Generator, largest: int) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        drawn = torch.float64 if dtype is torch.float64 else torch.float32
        return torch.randn(shape, generator=generator, dtype=drawn).to(dtype)
    high = 1 if dtype is torch.bool else largest
    return torch.randint(0, high + 1, shape, generator=generator).to(dtype)


def _bad(text: str, found: str, expected: str) -> RedppError:
    return RedppError(f"--input {text}: {found}", expected, "write the shape of one input, as in --input 3x224x224")
