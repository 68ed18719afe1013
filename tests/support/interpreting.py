"""Kernels in Triton's interpreter: a child process to run them in, and the rule by which their results are judged.

The interpreter is a property of the process (triton reads its switch at import), so a test file runs itself again as a
child, which prints its numbers as JSON, and judges those.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


def run_child(file: str, *what: str, **environment: str) -> dict[str, Any]:
    """Run ``python FILE WHAT`` with a fresh cache of Triton's; return the last line of its output, read as JSON."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, file, *what],
            env=os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill whatever torch allocates without values with NaN (integers: their largest value).

    An element that is never written then shows.
    """
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def errors(found: Tensor, in_torch: Tensor, exact: Tensor) -> dict[str, float]:
    """Measure the largest errors of a kernel and of torch in the same precision, and one rounding of the largest."""
    if exact.numel() == 0 or found.shape != exact.shape:
        return {"error": float(found.shape != exact.shape), "torch_error": 0.0, "rounding": 0.0}
    return {
        "error": (found.double() - exact).abs().max().item(),
        "torch_error": (in_torch.double() - exact).abs().max().item(),
        "rounding": torch.finfo(found.dtype).eps * exact.abs().max().item(),
    }


def assert_as_good_as_torch(result: dict[str, float]) -> None:
    """Demand at most twice torch's own error in the same precision, plus one rounding of the largest value."""
    assert result["error"] <= 2 * result["torch_error"] + result["rounding"], result
