"""The unit by which systemd runs a command: what it runs, and what it leaves alone."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from redpp_serve.cli import main
from redpp_serve.serving.systemd import unit_of

FOLDER = Path("/dist/my model")


def words(unit_text: str) -> list[str]:
    """The command of a unit, as systemd splits it."""
    (line,) = [line for line in unit_text.splitlines() if line.startswith("ExecStart=")]
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line.removeprefix("ExecStart="))]


@pytest.mark.parametrize("given", [["--systemd"], ["--systemd", "print"], ["--systemd=install"]])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_it_runs_the_command_without_the_option(given: list[str], place: int) -> None:
    asked = ["serve", "dist/my model", "--port", "80"]
    unit = unit_of("serve", FOLDER, [*asked[:place], *given, *asked[place:]])
    assert words(unit.text()) == [sys.executable, "-m", "redpp_serve.cli", *asked]
    assert unit.name == "redpp-serve-my-model" and "Restart=on-failure" in unit.text()
    assert "KillMode=mixed" in unit.text()


def test_what_systemd_would_read_otherwise_is_quoted() -> None:
    odd = ["serve", "100%h", "$HOME", 'a "b"', "c\\d", "e f", "'g'", "--sticky-header=X"]
    assert words(unit_of("serve", FOLDER, odd).text())[3:] == odd


def test_the_server_of_an_ab_test_outlives_its_supervisor() -> None:
    text = unit_of("ab start", FOLDER, ["ab", "start", "dist/m", "--systemd"]).text()
    assert words(text)[3:] == ["ab", "start", "dist/m", "--foreground"]
    assert "KillMode=process" in text and "OOMPolicy=continue" in text
    assert words(unit_of("ab start", FOLDER, ["ab", "start", "m", "--foreground"]).text())[3:] == [
        "ab",
        "start",
        "m",
        "--foreground",
    ]


def test_both_commands_print_or_install_it(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("REDPP_PLAN_SECONDS", "7")
    monkeypatch.setenv("SECRET", "never")
    for command, name in ((["serve"], "redpp-serve-small"), (["ab", "start"], "redpp-ab-small")):
        assert main([*command, str(packaged), "--systemd"]) == 0
        printed = capsys.readouterr().out
        assert 'Environment="REDPP_PLAN_SECONDS=7"' in printed and "SECRET" not in printed
        assert f"WorkingDirectory={os.getcwd()}" in printed
        assert main([*command, str(packaged), "--systemd", "install"]) == 0
        assert f"systemctl --user enable --now {name}" in " ".join(capsys.readouterr().out.split())
        path = tmp_path / "systemd" / "user" / f"{name}.service"
        assert path.read_text() == printed
        if analyze := shutil.which("systemd-analyze"):
            checked = subprocess.run([analyze, "verify", path], capture_output=True, text=True, timeout=30)
            assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
        assert main([*command, str(tmp_path), "--systemd"]) == 2
        assert "is not a packaged model" in capsys.readouterr().err
    (tmp_path / "systemd" / "user").rename(tmp_path / "aside")
    (tmp_path / "systemd" / "user").write_text("a file")
    assert main(["serve", str(packaged), "--systemd", "install"]) == 2
    assert "the unit cannot be written" in capsys.readouterr().err
