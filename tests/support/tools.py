"""Programs of the system that some tests need: in continuous integration they must be there, elsewhere they may be missing."""

import os
from pathlib import Path

import pytest

from redpp_serve.errors import RedppError
from redpp_serve.serving.tools import find_tool
from redpp_serve.serving.triton_binary import TritonBinary, find_triton

REQUIRED = "REDPP_TOOLS_REQUIRED"  # set by .ci/run, which installs them


def tool(name: str) -> Path:
    """The program's path; without it the test is skipped with the reason, or fails where `REQUIRED` is set."""
    try:
        return find_tool(name)
    except RedppError as error:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{error} ({REQUIRED} is set)")
        pytest.skip(str(error))


def triton() -> TritonBinary:
    """A real tritonserver; where none can be had the test is skipped with the reason, or fails where `REQUIRED` is set."""
    try:
        return find_triton(print)
    except RedppError as error:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{error} ({REQUIRED} is set)")
        pytest.skip(str(error))
