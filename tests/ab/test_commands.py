"""What `redpp-serve ab` refuses before anything starts, and in which words."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from redpp_serve.ab import commands
from redpp_serve.ab.state import abandoned, supervising
from redpp_serve.cli import main
from redpp_serve.processes import started
from redpp_serve.serving.running import Running, register
from tests.support.served import write_archives
from tests.support.tools import tool


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two archives and the name of a package; no server is started on it."""
    folder = write_archives(tmp_path_factory.mktemp("packaged") / "tiny")
    (folder / "report.json").write_text('{"name": "tiny"}')
    return folder


@pytest.fixture(autouse=True)
def own_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


def test_what_the_command_line_alone_decides(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--split", "90:20"], "--split 90:20 adds up to 110"),
        (["--split", "ninety"], "--split 'ninety'"),
        (["--sticky-header", "X User"], "--sticky-header 'X User'"),
        (["--split", "100:0"], "no user for the pruned version and no shadow mode"),
    ):
        assert main(["ab", "start", str(packaged), *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith(f"redpp-serve ab start: {message}") and "What to do:" in error, arguments
        assert not abandoned(packaged)


def test_values_out_of_range(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--tolerance", "0"],
        ["--min-agreement", "1.1"],
        ["--max-error-rate-gap", "-1"],
        ["--max-p99-ratio", "x"],
        ["--port", "70000"],
        ["--server", "other"],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["ab", "start", str(packaged), *arguments])
        assert exit_.value.code == 2 and arguments[0] in capsys.readouterr().err, arguments


def test_nginx_is_missing(packaged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr("redpp_serve.serving.tools._ADMINISTRATION", ())
    assert main(["ab", "start", str(packaged)]) == 2
    assert "apt-get install nginx-light" in capsys.readouterr().err


def test_what_is_no_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ab", "start", str(tmp_path)]) == 2
    assert "is not a packaged model" in capsys.readouterr().err


def test_nothing_runs(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "promote", "rollback", "stop"):
        assert main(["ab", command, str(packaged)]) == 2, command
        assert f"no A/B test runs for {packaged}" in capsys.readouterr().err, command


def test_one_that_is_starting_and_one_that_was_killed(
    packaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with supervising(packaged, tmp_path / "state"):
        path = next((tmp_path / "run").rglob("ab-*.lock"))
        text = path.read_text()
        assert main(["ab", "status", str(packaged)]) == 2
        assert "is still starting, or ending" in capsys.readouterr().err
        assert main(["ab", "start", str(packaged)]) == 2
        assert "an A/B test already runs" in capsys.readouterr().err
    path.write_text(text)  # what a killed one leaves
    assert main(["ab", "status", str(packaged)]) == 2
    assert f"clean up with redpp-serve ab stop {packaged}" in capsys.readouterr().err
    assert main(["ab", "stop", str(packaged)]) == 0
    assert "cleaned up after an A/B test" in capsys.readouterr().out
    assert not abandoned(packaged)


def test_an_ab_test_is_found_beside_another_server_of_its_folder(
    packaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody ran redpp-serve serve for the same folder meanwhile."""
    (state := tmp_path / "state" / "gateway").mkdir(parents=True)
    server = Running(
        str(packaged),
        "m",
        "torchserve",
        os.getpid(),
        started(os.getpid()) or 0.0,
        ("1.0", "2.0"),
        {},
        "http://127.0.0.1:9",
        [],
        {"management": {}},
    )
    test = replace(server, extra={"state": str(state.parent), "gateway": "http://g", "ab_metrics": ""})
    other = subprocess.Popen(["sleep", "60"])
    try:
        with register(test), register(replace(server, pid=other.pid, created=started(other.pid) or 0.0)):
            assert main(["ab", "promote", str(packaged)]) == 0
            assert "all users of http://g get pruned" in capsys.readouterr().out and (state / "promoted").exists()
            read, write = os.pipe()
            os.close(read)  # as head does when it has seen enough
            command = [sys.executable, "-m", "redpp_serve.cli", "ab", "promote", str(packaged)]
            quiet = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60)
            os.close(write)
            assert (quiet.returncode, quiet.stderr) == (128 + signal.SIGPIPE, b"")
            shutil.rmtree(state)
            assert main(["ab", "promote", str(packaged)]) == 2
            assert "users cannot be moved" in capsys.readouterr().err
            shutil.rmtree(state.parent)
            assert main(["ab", "status", str(packaged)]) == 2
            assert f"folder {state.parent} is gone" in capsys.readouterr().err
            assert main(["ab", "stop", str(packaged), "--keep", str(tmp_path / "keep")]) == 2
            assert f"folder {state.parent} is gone" in capsys.readouterr().err and not (tmp_path / "keep").exists()
    finally:
        other.kill()
        other.wait()


@pytest.mark.server
def test_a_supervisor_that_fails_says_why(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that fails in a way nobody foresaw: the end of its log is shown, and its folder goes."""
    tool("nginx")
    made: list[Path] = []
    private = commands.private_folder
    monkeypatch.setattr(commands, "private_folder", lambda prefix: made.append(private(prefix)) or made[-1])
    monkeypatch.setattr(commands, "write_json", lambda path, document: path.write_text("{}"))
    assert main(["ab", "start", str(packaged)]) == 2
    error = capsys.readouterr().err
    assert "the A/B test did not start" in error and "KeyError: 'spec'" in error
    assert made and not made[0].exists()
