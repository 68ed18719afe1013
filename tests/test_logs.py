"""The log folder of a run: what is in it, what is kept, and that it stays small."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import redpp_serve.logs as module
from redpp_serve.logs import KEPT_RUNS, Logs, as_json, open_logs, reopen_logs, stamped, unstamped
from redpp_serve.state_folders import state_folder


@pytest.fixture(autouse=True)
def own_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def lines(logs: Logs, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (logs.folder / name).read_text().splitlines()]


def append(logs: Logs, name: str, text: str) -> None:
    with logs.file(name).open("a") as file:
        file.write(text)


def test_the_newest_runs_are_kept_and_those_that_go_on() -> None:
    first = open_logs("a-serve", "text")
    first.say("begins")
    for _ in range(KEPT_RUNS + 3):
        open_logs("b-serve", "text").close()
    folders = sorted((state_folder() / "logs").iterdir())
    assert len(folders) == KEPT_RUNS + 1 and folders[0] == first.folder and "a-serve" in first.folder.name
    first.close()
    open_logs("c-serve", "text").close()
    assert not first.folder.exists() and len(list((state_folder() / "logs").iterdir())) == KEPT_RUNS


def test_what_runs_on_without_its_supervisor_holds_its_folder() -> None:
    """As nginx and the server do, which inherit the descriptor."""
    logs = open_logs("a-ab", "text")
    inherited = os.dup(logs.handle)
    logs.close()
    for _ in range(KEPT_RUNS + 1):
        open_logs("b-serve", "text").close()
    assert logs.folder.exists()
    os.close(inherited)
    open_logs("b-serve", "text").close()
    assert not logs.folder.exists()


@pytest.mark.parametrize("for_others", [False, True])
def test_nobody_else_reads_them(for_others: bool) -> None:
    """Other users pass through the folder where nginx's worker has to, and know neither its name nor its files'."""
    logs = open_logs("a-ab", "text", for_others=for_others)
    assert logs.folder.stat().st_mode & 0o777 == (0o711 if for_others else 0o700)
    assert logs.folder.parent.stat().st_mode & 0o066 == 0
    assert logs.file("server.log").stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z-a-ab-.{8}", logs.folder.name)


def test_a_large_log_is_cut_while_its_writer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    logs = open_logs("a", "json")
    with logs.file("server.log").open("ab", buffering=0) as writer:
        for k in range(300):
            writer.write(b"line %d\n" % k)
            if k % 10 == 9:
                logs.look()
    sizes = {path.name: path.stat().st_size for path in logs.folder.iterdir()}
    assert sizes["server.log"] < 1000 and 1000 <= sizes["server.log.1"] < 1100
    assert sizes["server.jsonl"] < 2 * 1000 + 1000 and sizes["server.jsonl.1"] < 2 * 1000 + 1000
    logs.look()
    assert lines(logs, "server.jsonl")[-1]["message"] == "line 299"
    text = (logs.folder / "server.log.1").read_text() + (logs.folder / "server.log").read_text()
    assert text == "".join(f"line {k}\n" for k in range(300))[-len(text) :]
    with logs.file("server.log").open("a") as file:
        file.write("half")
    logs.look()
    assert lines(logs, "server.jsonl")[-1]["message"] == "line 299", "a line that is not finished"
    append(logs, "server.log", " done\n")
    logs.look()
    assert lines(logs, "server.jsonl")[-1]["message"] == "half done"


def test_a_log_that_somebody_empties_goes_on() -> None:
    logs = open_logs("a", "json")
    append(logs, "server.log", "one\ntwo\n")
    logs.look()
    (logs.folder / "server.log").write_text("3\n")
    logs.look()
    assert [line["message"] for line in lines(logs, "server.jsonl")] == ["one", "two", "3"]


def test_the_next_supervisor_goes_on_where_the_former_one_was_killed() -> None:
    logs = open_logs("a", "json")
    append(logs, "server.log", "one\ntwo\n")
    logs.look()
    append(logs, "server.log", "three\n")
    again = reopen_logs(logs.folder, "json")
    again.look()
    assert [line["message"] for line in lines(again, "server.jsonl")] == ["one", "two", "three"]


def test_a_lost_folder_is_made_again_and_told_once() -> None:
    logs = open_logs("a", "json", for_others=True)
    logs.say("before")
    assert logs.look()
    shutil.rmtree(logs.folder)
    assert not logs.look() and logs.look()
    assert logs.folder.stat().st_mode & 0o777 == 0o711
    logs.say("after")
    logs.look()
    assert [line["message"] for line in lines(logs, "supervisor.jsonl")] == ["after"]
    shutil.rmtree(logs.folder)
    assert logs.file("server.log").exists(), "a server that is started again logs"


def test_a_full_disk_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = open_logs("a", "json")
    append(logs, "server.log", "one\n")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as no_room:
        for name in ("os.truncate", "shutil.copy", "tempfile.mkstemp", "pathlib.Path.touch", "pathlib.Path.open"):
            no_room.setattr(name, full)
        logs.say("lost")
        assert logs.look() and logs.file("server.log") == logs.folder / "server.log"
    logs.look()
    assert lines(logs, "server.jsonl")[-1]["message"] == "one"


@pytest.mark.parametrize(
    ("line", "level", "message", "time"),
    [
        ("2026-11-30T06:43:10Z the front has died", "info", "the front has died", "2026-11-30T06:43:10.000Z"),
        ("2026-11-30T06:43:10Z E file.cc:12] no", "error", "file.cc:12] no", "2026-11-30T06:43:10.000Z"),
        ("2026-11-30T06:43:10,123 [WARN ] a.B - late", "warn", "a.B - late", "2026-11-30T06:43:10.123Z"),
        ("2026/11/30 06:43:10 [crit] 7#7: *1 open()", "crit", "7#7: *1 open()", "2026-11-30T06:43:10.000Z"),
        ("Traceback (most recent call last):", "info", "Traceback (most recent call last):", None),
        ('{"not": "ours"}', "info", '{"not": "ours"}', None),
        ("9999-99-99T99:99:99Z x", "info", "x", None),
    ],
)
def test_a_line_of_every_program_becomes_an_object(
    line: str, level: str, message: str, time: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    found = as_json(line, "server")
    assert {key: found[key] for key in ("level", "source", "message")} == {
        "level": level,
        "source": "server",
        "message": message,
    }
    assert found["time"] == time if time else re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found["time"])
    assert "request_id" not in found


def test_the_request_that_a_handler_names_is_a_field_of_its_own() -> None:
    line = "2026-11-30T06:43:10,123 [INFO ] MODEL_LOG - request 4bf92f3577b34da6: the network failed"
    assert as_json(line, "server")["request_id"] == "4bf92f3577b34da6"


def test_a_stamp_is_taken_off_again() -> None:
    for line in ("workers ready", "", "2026 is no stamp"):
        assert unstamped(stamped(line)) == line and unstamped(line) == line
