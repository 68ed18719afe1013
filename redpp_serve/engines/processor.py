"""What the processor can do, and how many threads a worker may use; needs the standard library alone."""

from __future__ import annotations

import math
import os
import platform
from functools import cache
from pathlib import Path

_FLAGS = ("flags", "Features")  # as x86 and ARM call the line
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_QUOTA_V1 = Path("/sys/fs/cgroup/cpu")


@cache
def flags() -> frozenset[str]:
    """Return the instruction sets that the processor names, such as ``avx512_vnni``; none where it names none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith(_FLAGS)), frozenset())


def int8_pays() -> bool:
    """Tell whether the processor has instructions that sum products of eight-bit numbers."""
    return bool(flags() & {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"})


def bf16_pays() -> bool:
    """Tell whether the processor has instructions for products of bfloat16 numbers."""
    return bool(flags() & {"amx_bf16", "avx512_bf16", "bf16"})


def describe() -> str:
    """Name the instruction sets that decide over precisions, for keys of measured times."""
    deciding = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm")
    limited = os.environ.get("ONEDNN_MAX_CPU_ISA", "")  # oneDNN then uses fewer
    return " ".join([platform.machine(), *(f for f in deciding if f in flags()), limited]).strip()


def usable_threads(wanted: int) -> int:
    """Return the number of threads, of those wanted, that this process's affinity and its container's quota allow."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(wanted, affinity, _quota()))


def _quota() -> int:
    """Return the processors of the container's quota, rounded up; many where there is no quota."""
    try:
        if _QUOTA.exists():
            most, period = _QUOTA.read_text(encoding="utf-8").split()
        else:
            most = (_QUOTA_V1 / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (_QUOTA_V1 / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        return math.ceil(int(most) / int(period)) if most not in ("max", "-1") else 1 << 20
    except (OSError, ValueError, ZeroDivisionError):
        return 1 << 20
