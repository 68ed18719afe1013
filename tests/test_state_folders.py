"""Where state lies: found from any shell, closed to others, swept when its processes were killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from redpp_serve import state_folders
from redpp_serve.errors import RedppError
from redpp_serve.packaging.output_folder import replaced
from redpp_serve.state_folders import hold, open_to_others, private_folder, scratch_folder, state_folder, sweep

MODE = 0o711 if os.geteuid() == 0 else 0o700


@pytest.fixture
def home(state_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A short path of this test's own, open to others."""
    path = state_home / tmp_path.name[-12:]
    path.mkdir(mode=0o755)
    monkeypatch.setenv("XDG_STATE_HOME", str(path))
    return path


def test_the_state_folder_is_private_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "run"))
    folder = state_folder()
    assert folder == tmp_path / "run" / "redpp-serve" and folder.stat().st_mode & 0o777 == MODE
    folder.chmod(0o750)
    with pytest.raises(RedppError, match="not a folder of this user alone.*XDG_STATE_HOME"):
        state_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(RedppError, match="not a folder of this user alone"):
        state_folder()


def test_it_is_the_same_from_every_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a folder for temporary files nor one of a login session decides, nor a disk that is full."""
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.gettempdir", lambda: pytest.fail("it looked for a folder that can be written to"))
    for uid, wanted in ((0, Path("/var/lib")), (1000, tmp_path / ".local" / "state")):
        monkeypatch.setattr("os.geteuid", lambda uid=uid: uid)
        for variable in ("TMPDIR", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
            monkeypatch.setenv(variable, "elsewhere" if variable == "XDG_STATE_HOME" else str(tmp_path / variable))
            assert state_folders._state_homes() == [wanted], (uid, variable)


def test_a_folder_that_cannot_be_made_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(RedppError, match="cannot be written to: File exists.*XDG_STATE_HOME"):
        state_folder()


def test_a_full_disk_is_refused_in_words(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", no_room)
    with pytest.raises(RedppError, match="No space left on device.*XDG_STATE_HOME"):
        private_folder("redpp-x-")


def test_a_place_that_sockets_or_nginx_cannot_use_is_passed_by(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a long path, a dollar sign, and for root a home that is closed to nginx's worker."""
    closed = home / "closed"
    closed.mkdir(mode=0o700)
    (home / "default").mkdir(mode=0o755)
    for given in (tmp_path / ("x" * 80), home / "a$b", closed):
        monkeypatch.setattr(state_folders, "_state_homes", lambda given=given: [given, home / "default"])
        folder = private_folder("redpp-x-", for_others=True)
        assert folder.path.parent.parent == home / "default", given
        folder.release()
    monkeypatch.setattr(state_folders, "_state_homes", lambda: [closed])
    own = private_folder("redpp-x-")
    assert own.path.is_relative_to(closed), "its own processes get there"
    own.release()
    with pytest.raises(RedppError, match="others may pass through.*XDG_STATE_HOME"):
        private_folder("redpp-x-", for_others=True)
    assert open_to_others(home / "default") and not open_to_others(closed) and not open_to_others(home / "none")


def test_folders_of_killed_processes_are_swept_and_no_others(home: Path) -> None:
    ours, kept = private_folder("redpp-x-"), private_folder("redpp-x-")
    other = private_folder("redpp-y-")
    (ours.path / "file").write_text("data")
    code = (
        "import subprocess, sys\nfrom redpp_serve.state_folders import private_folder\n"
        "held = private_folder('redpp-x-')\n"
        "fds = [held.handle] if sys.argv[1] == 'served' else []\n"
        "child = subprocess.Popen(['sleep', '60'], stdout=-3, pass_fds=fds)\n"
        "print(held.path, child.pid, flush=True)\ninput()"
    )
    made, children, processes = {}, [], []
    for name in ("alone", "served"):
        process = subprocess.Popen(
            [sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        path, child = process.stdout.readline().split()
        made[name] = Path(path)
        children.append(int(child))
        processes.append(process)
    assert sweep("redpp-x-") == [], "they live"
    for process in processes:
        process.kill()
        process.communicate()
    try:
        assert sweep("redpp-x-") == [made["alone"]], "a server that has outlived its supervisor keeps its folder"
    finally:
        for child in children:
            os.kill(child, 9)
    kept.release()
    while made["served"].exists():  # the system ends the child in a moment
        assert kept.path not in sweep("redpp-x-", [kept.path])
    assert ours.path.exists() and other.path.exists() and kept.path.exists()
    assert sweep("redpp-x-") == [kept.path]
    ours.release()
    other.release()


def test_a_folder_that_was_removed_or_replaced_is_not_in_place(tmp_path: Path) -> None:
    folder = hold(tmp_path)
    assert folder.in_place()
    tmp_path.rename(aside := tmp_path.with_name("aside"))
    assert not folder.in_place()
    tmp_path.mkdir()
    assert not folder.in_place()
    tmp_path.rmdir()
    aside.rename(tmp_path)
    assert folder.in_place()
    folder.release()


KILLED = """
import os, signal, sys
from pathlib import Path
from redpp_serve.packaging.output_folder import replaced
with replaced(Path(sys.argv[1])) as new:
    (new / "half").touch()
    if sys.argv[2] == "between":
        os.replace(sys.argv[1], new.parent / "old")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def aged(folder: Path, prefix: str) -> list[Path]:
    """Make scratch folders look old enough to be swept."""
    left = [path for path in folder.iterdir() if path.name.startswith(prefix)]
    for path in left:
        os.utime(path, (0, 0))
    return left


def test_scratch_of_killed_processes_is_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in ("redpp-smoke-left", "redpp-smoke-held", "redpp-smoke-young", "redpp-other"):
        (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / "redpp-smoke-file").touch()
    (tmp_path / "redpp-smoke-link").symlink_to(tmp_path / "redpp-other")
    aged(tmp_path, "redpp-")
    os.utime(tmp_path / "redpp-smoke-young")
    held = hold(tmp_path / "redpp-smoke-held")
    with scratch_folder(tmp_path, "redpp-smoke-") as made:
        assert made.is_dir() and not (tmp_path / "redpp-smoke-left").exists()
    held.release()
    kept = {"redpp-smoke-held", "redpp-smoke-young", "redpp-smoke-file", "redpp-smoke-link", "redpp-other"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert (tmp_path / "redpp-other" / "deep").is_dir()


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_killed_package_leaves_the_earlier_one_and_no_scratch_for_long(tmp_path: Path, moment: str) -> None:
    out = tmp_path / "a [b]"
    with replaced(out) as new:
        (new / "first").touch()
    run = subprocess.run([sys.executable, "-c", KILLED, out, moment], check=False)
    assert run.returncode == -signal.SIGKILL
    (left,) = aged(tmp_path, ".a [b].redpp-")
    with pytest.raises(RuntimeError), replaced(out):
        raise RuntimeError("the next one fails")
    assert not left.exists() and [path.name for path in out.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [out]
