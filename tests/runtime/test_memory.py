"""A worker keeps the blocks of its values between requests, as far as its C library can, and never fails for it."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from redpp_serve.runtime import memory

FAULTS = """
import resource, sys
import numpy
from redpp_serve.runtime.memory import free_memory, keep_blocks
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.empty(48 << 20, numpy.uint8).fill(1)  # freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), keep_blocks(), end=" ")
faults()
print(faults(), end=" ")
free_memory()
print(faults())
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


@glibc
def test_a_freed_block_is_there_for_the_next_value_and_can_be_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, kept, after, given_back = done.stdout.split()
    assert kept == "True" and int(after) < int(before) / 10 < int(given_back)


@pytest.mark.parametrize("found", [("", ""), ("musl", "1.2")])
def test_another_c_library_is_left_alone(found: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    memory._glibc.cache_clear()
    monkeypatch.setattr(platform, "libc_ver", lambda: found)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda *_: pytest.fail("it was opened"))
    assert memory.keep_blocks() is False
    memory.free_memory()
    memory._glibc.cache_clear()


def test_a_library_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: SimpleNamespace(mallopt=lambda *_: 0))
    assert memory.keep_blocks() is False
