"""The supervisor's loop: what goes wrong in it is told, and never ends the users' gateway."""

import fcntl
import json
import os
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redpp_serve.ab import shadow
from redpp_serve.ab.spec import Spec, Started, TrafficSplit
from redpp_serve.ab.state import GATEWAY, HEARTBEAT, RECORDER, SPEC, Heartbeat, not_swept, read_json, write_json
from redpp_serve.ab.status import read_status
from redpp_serve.ab.supervisor import Parts, Watch, tell_others
from redpp_serve.errors import RedppError

URLS = {"gateway": "g", "metrics": "m"}
SPEC_OF_ALL = Spec(Path("/dist/m"), None, "torchserve", TrafficSplit(Decimal(50), Decimal(50)), None, False)


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def watched(
    state: Path, check: Callable[[], None] = lambda: None, count: Callable[[], Any] = list, **nginx: Any
) -> Watch:
    """A watch over stand-ins for server, nginx and counts; each of them can be told to fail."""
    (state / GATEWAY).mkdir(exist_ok=True)
    test = Started(SPEC_OF_ALL, "m", time.time())
    write_json(state / SPEC, test.to_json())
    counting = SimpleNamespace(count=count, totals=lambda: None, new_windows=list)
    gateway = SimpleNamespace(folder=state / GATEWAY)
    made = SimpleNamespace(**{"alive": lambda: True, "rotate": lambda: False, "gateway": gateway, **nginx})
    return Watch(state, test, URLS, counting, Parts(SimpleNamespace(check_alive=check), made))  # type: ignore[arg-type]


def test_a_full_disk_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failing = [True, True, False, False]
    watch = watched(tmp_path, count=lambda: full_disk() if failing.pop(0) else [])
    told = []
    for _ in range(4):
        watch.look()
        told.append(Heartbeat.read(tmp_path))
    problem = "the A/B test was not looked after: OSError: [Errno 28] No space left on device"
    assert [beat.problems for beat in told] == [(), (problem,), (), ()]  # told at the beginning of the next look
    assert all(beat.ready and beat.looked is not None for beat in told)
    assert [beat.looked for beat in told] == sorted({beat.looked for beat in told}), "it does not say when it looked"
    assert capsys.readouterr().err.count("Traceback") == 1  # not one a second
    assert watch.latest is not None and watch.latest.problems == []


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    watch = watched(tmp_path)
    (tmp_path / SPEC).unlink()
    watch.look()
    assert Heartbeat.read(tmp_path).problems == () and watch.latest is not None
    with pytest.raises(RedppError, match="is gone, and what it recorded.*redpp-serve ab stop"):
        read_status(tmp_path, {})


def test_processes_that_cannot_be_restarted_are_reported(tmp_path: Path) -> None:
    def dead() -> None:
        raise RedppError("TorchServe has ended", "", "")

    first, second = watched(tmp_path, dead, alive=lambda: False, start=full_disk).mend()
    assert first.startswith("TorchServe has ended") and "ab stop" in first
    assert "gateway or recorder" in second and "No space left" in second
    assert "No space left" in watched(tmp_path, full_disk).mend()[0]


def test_a_recorder_with_enough_pairs_gets_no_more_requests(tmp_path: Path) -> None:
    write_json(tmp_path / RECORDER, {"received": 0, "dropped": 0, "pairs": shadow.MAX_PAIRS - 1})
    watch = watched(tmp_path)
    assert watch.mend() == [] and not (tmp_path / GATEWAY / "shadow_off").exists()
    write_json(tmp_path / RECORDER, {"received": 0, "dropped": 0, "pairs": shadow.MAX_PAIRS})
    assert "start a new A/B test" in watch.mend()[0] and (tmp_path / GATEWAY / "shadow_off").exists()


def test_the_counts_go_on_where_the_log_was_put_aside(tmp_path: Path) -> None:
    watch = watched(tmp_path, rotate=lambda: True)
    put_aside = []
    watch._counting.put_aside = lambda: put_aside.append(True)  # type: ignore[method-assign]
    watch.look()
    assert put_aside == [True]


def test_status_says_when_nothing_is_written_down_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched(tmp_path)
    tell_others(tmp_path, [])
    assert read_status(tmp_path, URLS).problems == []
    document = json.loads((tmp_path / HEARTBEAT).read_text())
    write_json(tmp_path / HEARTBEAT, {**document, "looked": document["looked"] - 60})
    (problem,) = read_status(tmp_path, URLS).problems
    assert problem.startswith("nothing was written down for 60 s") and "restarting the server" in problem
    monkeypatch.setattr("redpp_serve.ab.status.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert read_status(tmp_path, URLS).problems[0].endswith("is full")


def test_a_heartbeat_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Heartbeat.read(tmp_path) == Heartbeat()
    for beat in (Heartbeat(True, ("one", "two"), 3.5), Heartbeat(refusal=("found", "expected", "do"))):
        beat.write(tmp_path)
        assert Heartbeat.read(tmp_path) == beat
    assert read_json(tmp_path / HEARTBEAT)["refusal"] == ["found", "expected", "do"]


def test_the_state_folder_is_kept_from_cleaners_of_temporary_files(tmp_path: Path) -> None:
    """They ask for the folder's lock as here, and pass by where they do not get it."""
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        with not_swept(tmp_path), pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)
