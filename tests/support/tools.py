"""Programs of the system that some tests need; only continuous integration must have them."""

import os
from pathlib import Path

import pytest

from redpp_serve.errors import RedppError
from redpp_serve.processes import find_program
from redpp_serve.serving.triton_binary import TritonBinary, find_triton

REQUIRED = "REDPP_TOOLS_REQUIRED"  # set by .ci/run, which installs them


def tool(name: str) -> Path:
    """The program's path; without it the test is skipped with the reason, or fails where `REQUIRED` is set."""
    try:
        return find_program(name)
    except RedppError as error:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{error} ({REQUIRED} is set)")
        pytest.skip(str(error))


def triton() -> TritonBinary:
    """A real tritonserver; without one the test is skipped with the reason, or fails where `REQUIRED` is set."""
    try:
        return find_triton(print)
    except RedppError as error:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{error} ({REQUIRED} is set)")
        pytest.skip(str(error))
