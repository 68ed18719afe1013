"""The device that a user names, and the name that its maker gives it."""

from __future__ import annotations

import contextlib
import platform
from functools import cache
from pathlib import Path

import torch

from redpp_serve.errors import RedppError


def parse_device(text: str | None) -> torch.device:
    """Return the device that ``--device`` names; without a name, the first GPU where there is one, else the CPU.

    Args:
        text: ``cpu``, ``cuda`` (the first GPU) or ``cuda:N``; None for no choice.

    Raises:
        RedppError: the text names no device, or one that this machine lacks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text is None:
        text = "cuda" if gpus else "cpu"
    kind, colon, index = text.partition(":")
    if text == "cpu":
        return torch.device("cpu")
    number = int(index) if index.isascii() and index.isdecimal() else -1 if colon else 0
    if kind != "cuda" or not 0 <= number < gpus:
        raise RedppError(f"--device {text}", "cpu, or cuda:N on a machine that has it", "leave out --device")
    return torch.device("cuda", number)


@cache
def device_name(device: torch.device) -> str:
    """Return the product name that the maker gives to a GPU or to this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
