"""Programs of the system are found, or the message names the package to install; tests skip or fail as told."""

from pathlib import Path

import pytest

from redpp_serve.errors import RedppError
from redpp_serve.serving.tools import find_tool
from tests.support.tools import REQUIRED, tool


def test_found_in_path_and_among_programs_for_administration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redpp_serve.serving.tools._ADMINISTRATION", (str(tmp_path / "sbin"),))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for folder in ("sbin", "bin"):
        (tmp_path / folder).mkdir()
        program = tmp_path / folder / "nginx"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert find_tool("nginx") == program  # once it is in both, PATH wins


def test_a_missing_program_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redpp_serve.serving.tools._ADMINISTRATION", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RedppError, match="nginx is not installed.*apt-get install nginx-light"):
        find_tool("nginx")
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="nginx-light"):
        tool("nginx")
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="nginx-light"):
        tool("nginx")
