"""The supervisor's loop: what goes wrong in it is told, and never ends the users' gateway."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redpp_serve.ab import supervisor
from redpp_serve.ab.spec import Spec, TrafficSplit
from redpp_serve.ab.state import GATEWAY, SPEC, STATUS, not_swept, read_json, write_json
from redpp_serve.ab.status import read_status
from redpp_serve.ab.supervisor import Supervisor, Watch
from redpp_serve.errors import RedppError


class Ended(BaseException):
    """What a signal does."""


def full_disk() -> list[str]:
    raise OSError(28, "No space left on device")


def watched(state: Path, monkeypatch: pytest.MonkeyPatch, looks: list[Callable[[], list[str]]]) -> Iterator[Any]:
    """What the status says after each look whose mending is one of ``looks``."""
    spec = Spec(Path("/dist/m"), None, "torchserve", TrafficSplit(Decimal(50), Decimal(50)), None, False)
    (state / GATEWAY).mkdir()
    write_json(state / SPEC, {"spec": spec.to_json(), "started": time.time(), "name": "m"})
    said: list[Any] = []

    def pause(seconds: float) -> None:
        said.append(read_json(state / STATUS))
        if not left:
            raise Ended

    left = list(looks)
    monkeypatch.setattr(supervisor.time, "sleep", pause)
    one = Supervisor(spec, state)
    one._journal = SimpleNamespace(write=lambda folders: None)  # type: ignore[assignment]
    watch = SimpleNamespace(mend=lambda: left.pop(0)(), nginx=SimpleNamespace(rotate=lambda: False))
    with pytest.raises(Ended):
        one._watch(SimpleNamespace(count=lambda: []), watch)  # type: ignore[arg-type]
    return iter(said)


def test_a_full_disk_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = [lambda: [], full_disk, full_disk, lambda: [], lambda: []]
    good, *bad, after, last = watched(tmp_path, monkeypatch, looks)
    assert good["problems"] == [] and last["problems"] == []
    assert bad[1]["problems"] == ["the experiment was not looked after: OSError: [Errno 28] No space left on device"]
    assert last["looked"] >= after["looked"] >= bad[1]["looked"]
    assert capsys.readouterr().err.count("Traceback") == 1  # not one a second


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove() -> list[str]:
        (tmp_path / SPEC).unlink()
        return []

    good, gone = watched(tmp_path, monkeypatch, [lambda: [], remove])
    assert good["problems"] == gone["problems"] == []
    with pytest.raises(RedppError, match="is gone, and what it recorded.*redpp-serve ab stop"):
        read_status(tmp_path, {})


def test_what_cannot_be_started_again_is_told(tmp_path: Path) -> None:
    def dead() -> None:
        raise RedppError("TorchServe has ended", "", "")

    server = SimpleNamespace(check_alive=dead)
    nginx = SimpleNamespace(alive=lambda: False, start=full_disk, gateway=SimpleNamespace(folder=tmp_path))
    first, second = Watch(tmp_path, server, nginx, None).mend()  # type: ignore[arg-type]
    assert first.startswith("TorchServe has ended") and "ab stop" in first
    assert "gateway or recorder" in second and "No space left" in second
    server.check_alive = full_disk
    assert "No space left" in Watch(tmp_path, server, nginx, None).mend()[0]  # type: ignore[arg-type]


def test_status_says_when_nothing_is_written_down_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(watched(tmp_path, monkeypatch, [lambda: []]))
    assert read_status(tmp_path, {"gateway": "g"}).problems == []
    document = json.loads((tmp_path / STATUS).read_text())
    write_json(tmp_path / STATUS, {**document, "looked": document["looked"] - 60})
    (problem,) = read_status(tmp_path, {"gateway": "g"}).problems
    assert problem.startswith("nothing was written down for 60 s") and "restarting the server" in problem
    monkeypatch.setattr("redpp_serve.ab.status.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert read_status(tmp_path, {"gateway": "g"}).problems[0].endswith("is full")


def test_a_folder_is_kept_from_those_who_clean_up(tmp_path: Path) -> None:
    """They ask for the folder's lock as here, and pass by where they do not get it."""
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        with not_swept(tmp_path), pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)
