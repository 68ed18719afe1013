"""Inputs as a package keeps them and as requests carry them: .npy for one input, .npz by name for several."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from redpp_serve.graph.graph import InputSpec

INPUTS = "inputs.npz"  # the file of a package that holds some inputs, each with a batch dimension


def sample_name(inputs: Sequence[InputSpec]) -> str:
    """Return the name of the file in a package that holds one request."""
    return "sample.npy" if len(inputs) == 1 else "sample.npz"


def request_body(inputs: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Write one input without batch dimension as the body of a request."""
    stream = io.BytesIO()
    if len(inputs) == 1:
        np.save(stream, next(iter(inputs.values())))
    else:
        np.savez(stream, **inputs)  # type: ignore[arg-type]
    return stream.getvalue()


def as_array(x: torch.Tensor) -> np.ndarray[Any, Any]:
    """Convert a tensor; NumPy has no bfloat16, and the handlers take float32 for it."""
    found: np.ndarray[Any, Any] = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return found
