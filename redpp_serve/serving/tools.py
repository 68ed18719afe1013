"""Programs of the system that this project starts but does not install: nginx, Prometheus."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from redpp_serve.errors import RedppError

PACKAGES = {
    "nginx": "nginx-light",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "chromium": "chromium",
    "kubectl": "kubernetes-client",
}
_ADMINISTRATION = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not in every user's PATH, and nginx lies there


def find_tool(name: str) -> Path:
    """The program of that name, in PATH or in the folders of programs for administration.

    Raises:
        RedppError: it is not installed; names Debian's package.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), *_ADMINISTRATION])
    found = shutil.which(name, path=path)
    if found is None:
        raise RedppError(
            f"the program {name} is not installed",
            f"{name} in PATH",
            f"install it, on Debian and Ubuntu: apt-get install {PACKAGES.get(name, name)}",
        )
    return Path(found)
