"""The machine and the releases that a figure was measured with."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
import torch

from redpp_serve import __version__
from redpp_serve.runtime.device import device_name


def describe_machine() -> dict[str, Any]:
    """Return the device in words, torch's threads and the releases, as report.json holds them under ``environment``."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "device": f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores{gpu}",
        "threads": torch.get_num_threads(),
        "versions": {
            "redpp-serve": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
