"""A test that uses the server which `serve` runs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from redpp_serve.ab.attached import find_served
from redpp_serve.ab.spec import Spec, parse_split
from redpp_serve.errors import RedppError
from redpp_serve.processes import Guard, started
from redpp_serve.serving.running import Running, find, register
from tests.support.stubs import stub


@pytest.fixture(autouse=True)
def own_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "run"))


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return Spec(tmp_path, None, "torchserve", parse_split("50:50"), None, False, attach=True)


def note(folder: Path, pid: int = os.getppid(), kind: str = "torchserve") -> Running:
    urls = {"original": "http://h:1/m/1.0", "pruned": "http://h:1/m/2.0", "default": "http://h:1/m"}
    headers = {"inference": {"Authorization": "Bearer a"}, "management": {"Authorization": "Bearer b"}}
    return Running(
        str(folder), "m", kind, pid, started(pid) or 0.0, ("1.0", "2.0"), urls, "http://h:2", ["http://h:3"], headers
    )


def test_there_has_to_be_one_server(spec: Spec, tmp_path: Path) -> None:
    with pytest.raises(RedppError, match="no servers of kind torchserve run"):
        find_served(spec)
    with register(note(tmp_path, kind="triton")), pytest.raises(RedppError, match="leave --attach out"):
        find_served(spec)
    with register(note(tmp_path)), register(note(tmp_path, os.getpid())), pytest.raises(RedppError, match="2 servers"):
        find_served(spec)


def test_the_server_is_used_as_its_note_says(spec: Spec, tmp_path: Path) -> None:
    with register(note(tmp_path)):
        server = find_served(spec)
        assert (server.name, server.folder, server.metrics_url) == ("m", tmp_path, "http://h:3")
        assert [server.url(v) for v in server.versions] == ["http://h:1/m/1.0", "http://h:1/m/2.0"]
        assert server.default_url() == "http://h:1/m" and server.headers("management")["Authorization"] == "Bearer b"
        server.check_alive()
        assert server.adopt(server.handover(), Guard()) and not server.adopt({"pid": 1}, Guard())
        ours = server.running({"state": "s", "gateway": "g"})
        assert ours.pid == os.getpid() and ours.urls == note(tmp_path).urls
        with register(ours):
            assert find(tmp_path) == ours, "the test speaks for the server"
            assert find_served(spec).handover() == server.handover()
        assert find(tmp_path).pid == os.getppid()


def test_a_server_that_has_ended_is_told(spec: Spec, tmp_path: Path) -> None:
    with register(note(tmp_path)):
        server = find_served(spec)
    server._note = replace(server._note, created=1.0)
    for act in (server.check_alive, server.start):
        with pytest.raises(RedppError, match="has ended"):
            act()


def test_a_version_of_triton_is_dead_from_its_workers_end_until_a_new_one_is_ready(spec: Spec, tmp_path: Path) -> None:
    index = [{"name": "m", "version": number, "state": "READY"} for number in "123"]

    def begin(number: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", "input()", f"{tmp_path}/models/m/{number}/model.py"]
        return subprocess.Popen(words, stdin=subprocess.PIPE)

    def end(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.communicate()

    with stub(lambda *_: (200, index)) as server:
        url = f"http://127.0.0.1:{server.port}"
        told = replace(note(tmp_path, os.getpid(), "triton"), versions=("1", "2"), management_url=url)
        stubs = {number: begin(number) for number in "123"}
        try:
            with register(told):
                attached = find_served(replace(spec, kind="triton"))
            assert attached.dead(0) == set()
            end(stubs["3"])
            assert attached.dead(0) == set(), "a stand-in is no arm"
            end(stubs["2"])
            assert attached.dead(60) == {"2"}
            stubs["2"] = begin("2")
            index[1]["state"] = "LOADING"
            assert attached.dead(0) == {"2"}
            index[1]["state"] = "READY"
            assert attached.dead(0) == set()
            index.clear()
            end(stubs["1"])
            assert attached.dead(60) == {"1"}, "nobody knows better"
        finally:
            for process in stubs.values():
                end(process)
