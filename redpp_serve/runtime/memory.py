"""A worker's memory: what of the C library's heap it keeps between requests, and what it gives back after loading.

A value of a large batch is tens of megabytes. By default glibc maps each such block afresh and unmaps it when it is
freed, so every layer of every request pays for page faults (EfficientNet-Lite0 at batch 8: a third of the time). A
worker needs the same blocks at the next request, so it keeps them. Other C libraries are left as they are.

In huge pages such blocks take a processor fewer entries of its page table (the same network at batch 8 in ONNX Runtime:
9 % less time). glibc asks for them where a variable says so as a process starts.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEPT_BYTES = 1 << 30  # the most that stays at the top of the heap when it is free
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"  # glibc 2.35 on; others take no notice
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h's names for what `mallopt` sets


def keep_blocks() -> bool:
    """Have this process keep freed blocks for later ones; tell whether the C library is one that can.

    The process then stays as large as its largest batch made it; of what is free at the heap's end, at most
    `KEPT_BYTES` are kept. Blocks of threads other than the main one are mapped as before.
    """
    library = _glibc()
    return bool(library and library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment whose processes ask for huge pages, unless it says something of them itself."""
    given = environment.get(_TUNABLES, "")
    if _HUGE_PAGES in given:
        return dict(environment)
    return {**environment, _TUNABLES: ":".join(filter(None, (given, f"{_HUGE_PAGES}=1")))}


def free_memory() -> None:
    """Give memory that nobody uses back to the system, where the C library can."""
    gc.collect()
    if library := _glibc():
        library.malloc_trim(0)


def forget_mapped(folder: Path) -> None:
    """Give back the memory of files in a folder that this process has mapped to read, also where they are removed.

    The pages come back from the file, or from the system's cache of it, if anybody reads them again.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, modes, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith(f"{folder}{os.sep}") and "w" not in modes:
            start, stop = (int(address, 16) for address in addresses.split("-"))
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


@functools.cache
def _glibc() -> Any:
    """Return glibc; None where this process has another C library."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)
