"""The supervisor's loop: what goes wrong in it is told, and never ends the users' gateway."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redpp_serve.ab import shadow
from redpp_serve.ab.decisions import decisions
from redpp_serve.ab.gateway import Gateway, ListeningProcess, NginxProcess, divide, switch, switched
from redpp_serve.ab.journal import Journal
from redpp_serve.ab.spec import Spec, Started, parse_split
from redpp_serve.ab.state import GATEWAY, HEARTBEAT, RECORDER, SPEC, Heartbeat, read_json, write_json
from redpp_serve.ab.status import read_status
from redpp_serve.ab.supervisor import Parts, Watch, tell_others
from redpp_serve.errors import RedppError
from redpp_serve.logs import reopen_logs
from redpp_serve.signals import Stopped
from redpp_serve.statistics.verdicts import Advice

URLS = {"gateway": "g", "metrics": "m"}
TEST = Started(Spec(Path("/dist/m"), None, "torchserve", parse_split("50:50"), None, False), "m", time.time())


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def watched(
    state: Path,
    check: Callable[[], None] = lambda: None,
    count: Callable[[], Any] = list,
    spec: Spec = TEST.spec,
    **nginx: Any,
) -> Watch:
    """A watch over stand-ins for server, nginx and counts; each of them can be told to fail."""
    write_json(state / SPEC, TEST.to_json())
    folder = state / GATEWAY
    gateway = Gateway(folder, 1, 2, "/m", ("/m/1", "/m/2"), TEST.spec.split, None, "salt")
    made = StandIn(gateway)
    made.make_folder()
    made.access_log.touch()
    divide(folder)
    for name, stands_in in {"alive": lambda: True, "rotate": lambda: False, **nginx}.items():
        setattr(made, name, stands_in)
    counting: Any = SimpleNamespace(count=count, totals=lambda: None, new_windows=list)
    server: Any = SimpleNamespace(check_alive=check, handover=dict)
    logs = state.parent / f"{state.name}-logs"
    journal = Journal(state / "journal.json", replace(TEST, spec=spec), state, logs, "salt", "probe")
    return Watch(journal, URLS, counting, Parts(server, made), reopen_logs(logs, "text"))


class StandIn(NginxProcess):
    """An nginx that was never started."""

    def __init__(self, gateway: Gateway) -> None:
        ListeningProcess.__init__(self, "nginx", [], gateway.port, gateway.folder / "log")
        self.gateway, self.access_log = gateway, gateway.folder / "access.log"

    def reopen(self) -> None:
        self.access_log.touch()


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


@pytest.mark.parametrize("lost", ["test", "gateway", "emptied", "replaced", "closed"])
def test_where_the_folder_is_lost_all_users_get_the_original(tmp_path: Path, lost: str) -> None:
    """Also where an older one has taken its place, which says something else; until somebody moves them again."""
    state = tmp_path / "state"
    state.mkdir()
    watch = watched(state)
    gateway = state / GATEWAY
    switch(gateway, "pruned")
    watch.look()
    assert watch.latest and watch.latest.all_to == "pruned" and watch.latest.problems == []
    if lost == "replaced":
        shutil.copytree(gateway, tmp_path / "older")
        gateway.rename(tmp_path / "aside")
        (tmp_path / "older").rename(gateway)
        assert switched(gateway) == "pruned"
    elif lost == "closed":
        watch._parts.nginx.reaches_folder = lambda: False  # type: ignore[method-assign]
    else:
        shutil.rmtree(state if lost == "test" else gateway)
        if lost == "emptied":
            gateway.mkdir()
    watch.look()
    assert watch.latest.all_to == "original" and "was lost" in watch.latest.problems[0]
    there = read_status(state, TEST, URLS)
    assert there.all_to == "original" and there.problems == watch.latest.problems
    assert read_json(state / SPEC) == TEST.to_json() and (state / "journal.json").exists()
    if lost != "closed":
        switch(gateway, "pruned")
        watch.look()
        assert watch.latest.all_to == "pruned", "it stays where somebody has moved it"


def test_without_any_folder_the_status_says_where_users_go(tmp_path: Path) -> None:
    now = read_status(tmp_path / "none", TEST, URLS, ["the supervisor was killed"])
    assert now.all_to == "original" and now.problems == ["the supervisor was killed"] and now.to_text()


def test_processes_that_cannot_be_restarted_are_reported(tmp_path: Path) -> None:
    def dead() -> None:
        raise RedppError("TorchServe has ended", "", "")

    first, second = watched(tmp_path, dead, alive=lambda: False, start=full_disk).mend()
    assert first.startswith("TorchServe has ended") and "ab stop" in first
    assert "gateway or recorder" in second and "No space left" in second
    assert "No space left" in watched(tmp_path, full_disk).mend()[0]


def test_the_gateway_is_mended_while_the_server_loads(tmp_path: Path) -> None:
    started = threading.Event()
    watch = watched(tmp_path, lambda: started.wait(30) and None, alive=started.is_set, start=started.set)
    assert watch.mend() == [] and started.is_set()


def test_a_signal_while_the_server_loads_ends_the_server(tmp_path: Path) -> None:
    ended = threading.Event()

    def stopped() -> bool:
        raise Stopped

    watch = watched(tmp_path, lambda: ended.wait(30) and None, alive=stopped)
    watch._parts.server.stop = ended.set  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        watch.mend()
    assert ended.is_set()


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
    assert read_status(tmp_path, TEST, URLS).problems == []
    document = json.loads((tmp_path / HEARTBEAT).read_text())
    write_json(tmp_path / HEARTBEAT, {**document, "looked": document["looked"] - 60})
    (problem,) = read_status(tmp_path, TEST, URLS).problems
    assert problem.startswith("nothing was written down for 60 s") and "restarting the server" in problem
    monkeypatch.setattr("redpp_serve.ab.status.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert read_status(tmp_path, TEST, URLS).problems[0].endswith("is full")


class Advised:
    """A status that advises; everything else is that of a test without counts."""

    def __init__(self, watch: Watch, kind: str) -> None:
        watch.look()
        assert watch.latest
        self.status = replace(watch.latest, advice=Advice(kind, f"{kind}!", kind))


def test_decisions_are_done_written_down_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[str] = []
    monkeypatch.setattr("redpp_serve.ab.supervisor.move_all", lambda running, folder, arm: moves.append(arm))
    watch = watched(tmp_path, spec=replace(TEST.spec, auto=True))
    advised, texts = Advised(watch, "rollback").status, list[str]()
    watch._journal.running = SimpleNamespace()  # type: ignore[assignment]
    watch._tell = texts.append  # type: ignore[method-assign]
    assert watch.latest and [d.action for d in watch.latest.decisions] == ["start"]
    assert watch.act(advised) and moves == ["original"] and "rollback" in texts[-1]
    assert [d.action for d in decisions(tmp_path)] == ["start", "rollback"]
    assert not watch.act(advised) and len(texts) == 1


def test_a_move_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [True, False]

    def move(*_: Any) -> None:
        if failing.pop(0):
            raise RedppError("the gateway answers nobody", "", "")

    monkeypatch.setattr("redpp_serve.ab.supervisor.move_all", move)
    watch = watched(tmp_path, spec=replace(TEST.spec, auto=True))
    advised = Advised(watch, "rollback").status
    watch._journal.running = SimpleNamespace()  # type: ignore[assignment]
    assert not watch.act(advised) and "rollback could not be done: the gateway answers nobody" in watch._problems[-1]
    assert watch.act(advised) and [d.action for d in decisions(tmp_path)] == ["start", "rollback"]


def test_without_auto_the_webhook_is_told_of_advice_once(tmp_path: Path) -> None:
    watch = watched(tmp_path)
    watch.look()
    texts: list[str] = []
    watch._tell = texts.append  # type: ignore[method-assign]
    for kind in ("wait", "promote", "promote", "wait", "promote", "rollback"):
        watch.act(Advised(watch, kind).status)
    assert texts == ["promote!", "rollback!"]


def test_a_test_that_ends_leaves_its_report_in_its_package(tmp_path: Path) -> None:
    spec = replace(TEST.spec, folder=tmp_path / "package")
    watch = watched(tmp_path, spec=spec)
    watch.look()
    watch.end()
    (verdict,) = (tmp_path / "package" / "experiments").glob("*/verdict.txt")
    assert verdict.read_text().startswith("Ended without a decision: 50 % of users got pruned.")
    spec.folder.rename(tmp_path / "aside")
    spec.folder.write_text("no folder: nothing can be written, and the test ends all the same")
    watch.end()


def test_a_heartbeat_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Heartbeat.read(tmp_path) == Heartbeat()
    for beat in (Heartbeat(True, ("one", "two"), 3.5), Heartbeat(refusal=("found", "expected", "do"))):
        beat.write(tmp_path)
        assert Heartbeat.read(tmp_path) == beat
    assert read_json(tmp_path / HEARTBEAT)["refusal"] == ["found", "expected", "do"]
