"""A worker keeps the blocks of its values between requests, as far as its C library can, and never fails for it."""

import mmap
import os
import platform
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import parse as version

from redpp_serve.runtime import memory
from redpp_serve.runtime.engine_network import EngineRun

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
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
THP = _SWITCH.read_text() if _SWITCH.exists() else ""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


@glibc
def test_a_freed_block_is_there_for_the_next_value_and_can_be_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, kept, after, given_back = done.stdout.split()
    assert kept == "True" and int(after) < int(before) / 10 < int(given_back)


def resident(path: Path) -> int:
    """KiB of a file's mappings that are in this process's memory."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return sum(int(found[1]) for text in mappings if str(path) in text and (found := re.search(r"Rss: +(\d+)", text)))


@pytest.mark.skipif(sys.platform != "linux", reason="another system")
def test_what_is_mapped_to_read_is_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "in2"  # whose name begins alike
    content = os.urandom(1 << 20)
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "weights 1").write_bytes(content)
    with ExitStack() as stack:
        files = [stack.enter_context((folder / "weights 1").open("r+b")) for folder in (inside, outside)]
        maps = [stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) for file in files]
        own = stack.enter_context(mmap.mmap(files[0].fileno(), 0, access=mmap.ACCESS_COPY))
        own[:4] = b"mine"
        assert all(map_[:] == content for map_ in maps)
        (inside / "weights 1").unlink()
        before = resident(inside / "weights 1")
        memory.forget_mapped(inside)
        assert before >= 1024 and resident(inside / "weights 1") <= before - 1024
        assert resident(outside / "weights 1") >= 1024 and own[:4] == b"mine"
        assert maps[0][:] == content and own[4:] == content[4:]


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


_HUGE = """
import ctypes
from pathlib import Path
from redpp_serve.runtime.memory import keep_blocks
keep_blocks()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
ctypes.memset(library.malloc(ctypes.c_size_t(64 << 20)), 1, 64 << 20)
found = [line.split() for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("AnonHugePages")]
print(sum(int(words[1]) for words in found) >> 10)
"""


@glibc
@pytest.mark.skipif(version(platform.libc_ver()[1] or "0") < version("2.35"), reason="a glibc of before")
@pytest.mark.skipif("[madvise]" not in THP, reason="a kernel that gives huge pages to all or none")
def test_values_lie_in_huge_pages_where_they_are_asked_for() -> None:
    found = {}
    for name, environment in (("plain", dict(os.environ)), ("huge", memory.with_huge_pages(os.environ))):
        done = subprocess.run(
            [sys.executable, "-c", _HUGE], capture_output=True, text=True, check=True, env=environment
        )
        found[name] = int(done.stdout)
    assert found["plain"] < 16 < 32 < found["huge"], f"MiB of 64: {found}"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
    ],
)
def test_what_users_say_of_huge_pages_stays(given: dict[str, str], wanted: str) -> None:
    assert memory.with_huge_pages({"A": "b", **given}) == {"A": "b", "GLIBC_TUNABLES": wanted}


def test_an_engines_file_is_given_back_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Path] = []
    monkeypatch.setattr("redpp_serve.runtime.engine_network.forget_mapped", given.append)
    engine: Any = SimpleNamespace(session=lambda *_: lambda inputs: inputs)
    run, x = EngineRun(engine, "fp32", tmp_path / "floats/model.onnx", 1), torch.ones(2, 3)
    assert not given
    assert all(torch.equal(run((x,))[0], x) for _ in range(2)) and given == [tmp_path / "floats"]
