"""Programs of the system that some tests need; only continuous integration must have them."""

import os
import re
import subprocess
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


def kubectl(least: tuple[int, int] = (0, 0)) -> Path:
    """The path of kubectl, as for `tool`; one with a kustomize before ``least`` counts as missing."""
    path = tool("kubectl")
    told = subprocess.run([path, "version", "--client"], capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"Kustomize Version: v(\d+)\.(\d+)", told)
    if not found or (int(found[1]), int(found[2])) < least:
        text = f"{path} has {found[0] if found else 'no kustomize'}, expected at least {least[0]}.{least[1]}"
        pytest.fail(text) if os.environ.get(REQUIRED) else pytest.skip(text)
    return path


def triton() -> TritonBinary:
    """A real tritonserver; without one the test is skipped with the reason, or fails where `REQUIRED` is set."""
    try:
        return find_triton(print)
    except RedppError as error:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{error} ({REQUIRED} is set)")
        pytest.skip(str(error))
