"""What `redpp-serve ab` refuses before anything starts, and in which words."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redpp_serve.ab import commands
from redpp_serve.ab.commands import mixed_folder
from redpp_serve.ab.gateway import divide, switched
from redpp_serve.ab.journal import begin_journal, key_path
from redpp_serve.ab.spec import Spec, Started, parse_split
from redpp_serve.ab.state import left_behind, supervising
from redpp_serve.cli import main
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec, Ref
from redpp_serve.options import Serving
from redpp_serve.packaging.mar import build_mar
from redpp_serve.packaging.server_config import model_config
from redpp_serve.processes import started
from redpp_serve.serving.running import Running, register
from tests.ab.test_status import Experiment
from tests.support.served import built, network, write_archives
from tests.support.stubs import stub
from tests.support.tools import tool


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two archives and the name of a package; no server is started on it."""
    folder = write_archives(tmp_path_factory.mktemp("packaged") / "tiny")
    (folder / "report.json").write_text('{"name": "tiny"}')
    return folder


@pytest.fixture(autouse=True)
def own_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "run"))


def test_bad_arguments_are_refused_before_anything_starts(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--split", "90:20"], "--split 90:20 adds up to 110"),
        (["--split", "ninety"], "--split 'ninety'"),
        (["--sticky-header", "X User"], "--sticky-header 'X User'"),
        (["--split", "100:0"], "no user for the pruned version and no shadow mode"),
        (["--auto", "--ramp", "5,5,10"], "--ramp '5,5,10'"),
        (["--auto", "--ramp", "50,25"], "--ramp '50,25'"),
        (["--auto", "--ramp", ""], "--ramp ''"),
        (["--ramp", "5,100"], "--ramp without --auto"),
        (["--auto", "--ramp", "5,100", "--split", "90:10"], "--split and --ramp"),
        (["--webhook", "chat.example.com"], "--webhook with what is no URL"),
        (["--attach"], f"no servers of kind torchserve run for {packaged}"),
        (["--attach", "--candidate", "x"], "--attach with --candidate"),
        (["--attach", "--workers", "2"], "--attach with --candidate, --observe, --workers"),
    ):
        assert main(["ab", "start", str(packaged), *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith(f"redpp-serve ab start: {message}") and "What to do:" in error, arguments
        assert left_behind(packaged) is None


def test_values_out_of_range_are_refused(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_missing_nginx_is_named_with_its_package(
    packaged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr("redpp_serve.processes.ADMINISTRATION", ())
    assert main(["ab", "start", str(packaged)]) == 2
    assert "apt-get install nginx-light" in capsys.readouterr().err


def test_a_folder_that_is_not_a_package_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ab", "start", str(tmp_path)]) == 2
    assert "is not a packaged model" in capsys.readouterr().err


def test_commands_say_when_no_ab_test_runs(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "promote", "rollback", "stop"):
        assert main(["ab", command, str(packaged)]) == 2, command
        assert f"no A/B test runs for {packaged}" in capsys.readouterr().err, command


SPEC = Spec(Path(), None, "torchserve", parse_split("90:10"), None, False)


def test_an_ab_test_that_is_starting_and_one_that_was_killed(
    packaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with supervising(packaged):
        assert main(["ab", "status", str(packaged)]) == 2
        assert "is still starting, or ending" in capsys.readouterr().err
        assert main(["ab", "start", str(packaged)]) == 2
        assert "an A/B test already runs" in capsys.readouterr().err
    (state := tmp_path / "state").mkdir()
    (state / "counts.json").write_text("{}")
    begin_journal(Started(replace(SPEC, folder=packaged), "tiny", 1.0), state)  # what a killed one leaves
    for command in ("status", "promote", "rollback"):
        assert main(["ab", command, str(packaged)]) == 2
        assert f"clean up with redpp-serve ab stop {packaged}" in capsys.readouterr().err
    tool("nginx")
    assert main(["ab", "start", str(packaged), "--shadow"]) == 2
    assert "the options that the test was started with" in capsys.readouterr().err and state.exists()
    assert main(["ab", "stop", str(packaged), "--keep", str(tmp_path / "kept")]) == 0
    out = capsys.readouterr().out
    assert "cleaned up after an A/B test" in out and f"is in {tmp_path / 'kept'}" in out
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["counts.json"]
    assert not state.exists() and left_behind(packaged) is None


class Gateway:
    """Stands in for nginx: gives users the arm that the files of its folder name, unless told to keep to one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.always, self.status = folder, "", 200

    def answer(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        assert headers["x-redpp-probe"] == "secret" and "x-redpp-arm" not in headers
        arm = self.always or switched(self.folder)
        by = {"original": "rollback", "pruned": "promote", None: "split"}[arm]
        return self.status, {}, {"X-Redpp-Arm": arm or "original", "X-Redpp-Chosen-By": by}


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[tuple[Gateway, str]]:
    (tmp_path / "state" / "gateway").mkdir(parents=True)
    stands_in = Gateway(tmp_path / "state" / "gateway")
    divide(stands_in.folder)
    with stub(stands_in.answer) as server:
        yield stands_in, f"http://127.0.0.1:{server.port}/predictions/m"


def note_of(packaged: Path, state: Path, url: str, pid: int) -> Running:
    return Running(
        str(packaged),
        "m",
        "torchserve",
        pid,
        started(pid) or 0.0,
        ("1.0", "2.0"),
        {},
        "http://127.0.0.1:9",
        [],
        extra={"state": str(state), "gateway": url, "ab_metrics": "", "probe": "secret"},
    )


def test_an_ab_test_is_found_beside_another_server_of_its_folder(
    packaged: Path, tmp_path: Path, gateway: tuple[Gateway, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody ran redpp-serve serve for the same folder meanwhile."""
    stands_in, url = gateway
    test = note_of(packaged, tmp_path / "state", url, os.getpid())
    other = subprocess.Popen(["sleep", "60"])
    try:
        servers = [replace(test, extra={}, pid=pid, created=started(pid) or 0.0) for pid in (1, other.pid)]
        with register(test), register(servers[0]), register(servers[1]):  # before and after it in any order
            assert main(["ab", "promote", str(packaged)]) == 0
            assert f"all users of {url} get pruned" in capsys.readouterr().out
            assert switched(stands_in.folder) == "pruned"
            read, write = os.pipe()
            os.close(read)  # as head does when it has seen enough
            command = [sys.executable, "-m", "redpp_serve.cli", "ab", "promote", str(packaged)]
            quiet = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60)
            os.close(write)
            assert (quiet.returncode, quiet.stderr) == (128 + signal.SIGPIPE, b"")
    finally:
        other.kill()
        other.wait()


def test_no_command_says_that_users_have_moved_unless_the_gateway_does(
    packaged: Path,
    tmp_path: Path,
    gateway: tuple[Gateway, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("redpp_serve.ab.moves._PATIENCE_S", 0.1)
    stands_in, url = gateway
    with register(note_of(packaged, tmp_path / "state", url, os.getpid())):
        for command, always in (("promote", "original"), ("rollback", "pruned")):  # it cannot read its files
            stands_in.always = always
            assert main(["ab", command, str(packaged)]) == 2
            error = capsys.readouterr().err
            assert f"users have not moved to {'pruned' if always == 'original' else 'original'}" in error
            assert f"a request got {always}" in error and "Traceback" not in error
        stands_in.always, stands_in.status = "", 502
        assert main(["ab", "rollback", str(packaged)]) == 0
        assert "all users of" in (said := capsys.readouterr().out) and "it does not answer now: 502" in said
        stands_in.status = 200
        shutil.rmtree(stands_in.folder)
        assert main(["ab", "promote", str(packaged)]) == 2
        assert "users cannot be moved" in capsys.readouterr().err
        assert main(["ab", "rollback", str(packaged)]) == 0
        assert "get original" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "state")
        assert main(["ab", "rollback", str(packaged)]) == 0
        capsys.readouterr()
        assert main(["ab", "stop", str(packaged), "--keep", str(tmp_path / "keep")]) == 2
        assert "are gone" in capsys.readouterr().err and not (tmp_path / "keep").exists()
    with register(note_of(packaged, tmp_path, "http://127.0.0.1:9/x", os.getpid())):
        (tmp_path / "gateway").mkdir()
        assert main(["ab", "rollback", str(packaged)]) == 2
        assert "users have not moved to original: it answers no answer: " in capsys.readouterr().err


def test_a_full_disk_keeps_nobody_from_rolling_back_and_looking(
    packaged: Path,
    tmp_path: Path,
    gateway: tuple[Gateway, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No command but a promotion writes a file."""
    stands_in, url = gateway
    begin_journal(Started(replace(SPEC, folder=packaged), "tiny", 1.0), tmp_path / "state")
    with register(note_of(packaged, tmp_path / "state", url, os.getpid())), monkeypatch.context() as full:

        def no_room(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        opened = os.open

        def no_new(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_CREAT and not os.path.exists(path):
                no_room()
            return opened(path, flags, *rest, **more)

        full.setattr("os.open", no_new)
        full.setattr("tempfile.mkstemp", no_room)
        full.setattr("tempfile.mkdtemp", no_room)
        full.setattr("pathlib.Path.touch", no_room)
        assert main(["ab", "promote", str(packaged)]) == 2
        assert "No space left on device" in capsys.readouterr().err and switched(stands_in.folder) is None
        assert main(["ab", "rollback", str(packaged)]) == 0 and switched(stands_in.folder) == "original"
        assert main(["ab", "status", str(packaged)]) == 0
        assert "all requests go to original" in capsys.readouterr().out
    key_path(packaged, "json").unlink()


@pytest.fixture
def registered(packaged: Path, tmp_path: Path) -> Iterator[tuple[Experiment, subprocess.Popen[bytes]]]:
    """An A/B test's state folder, and a process that other commands take for its supervisor."""
    (tmp_path / "state").mkdir()
    experiment = Experiment(tmp_path / "state", margin=0.05, max_error_rate_gap=0.05)
    process = subprocess.Popen(["sleep", "60"])
    stands_in = Gateway(experiment.state / "gateway")
    journal = begin_journal(replace(experiment.test, spec=replace(experiment.spec, folder=packaged)), experiment.state)
    with stub(stands_in.answer) as server:
        url = f"http://127.0.0.1:{server.port}/m"
        journal.test = replace(journal.test, spec=replace(journal.test.spec, candidate=experiment.spec.folder))
        journal.running = note_of(packaged, experiment.state, url, process.pid)
        journal.supervisor = [process.pid, journal.running.created]
        journal.write()
        with register(journal.running):
            yield experiment, process
    process.kill()
    process.wait()
    journal.path.unlink(missing_ok=True)


def test_a_promotion_against_the_advice_says_so(
    packaged: Path, registered: tuple[Experiment, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, _ = registered
    assert main(["ab", "promote", str(packaged)]) == 0
    assert "the advice was another one: " in capsys.readouterr().out
    experiment.pairs(1500, 0.8)
    experiment.windows(200, 0.8)
    assert experiment.status().advice.kind == "promote"
    assert main(["ab", "promote", str(packaged)]) == 0
    assert "the advice was another one" not in capsys.readouterr().out


def test_records_are_kept_in_a_new_folder_only(
    packaged: Path, registered: tuple[Experiment, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, process = registered
    (experiment.state / "access.log").write_text("a line")
    (tmp_path / "there").mkdir()
    assert main(["ab", "stop", str(packaged), "--keep", str(tmp_path / "there")]) == 2
    assert "there exists" in capsys.readouterr().err and process.poll() is None
    assert main(["ab", "stop", str(packaged), "--keep", str(tmp_path / "kept")]) == 0
    assert process.wait(5) == -signal.SIGTERM and f"is in {tmp_path / 'kept'}" in capsys.readouterr().out
    results = {"report.html", "report.json", "verdict.txt"}
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"spec.json", "counts.json", "access.log", *results}


@pytest.mark.server
def test_a_supervisor_that_fails_says_why(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that fails in a way nobody foresaw: the end of its log is shown, and its folder goes."""
    tool("nginx")
    monkeypatch.setattr(commands.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho KeyError: of nobody >&2; exit 1\n")
    (tmp_path / "python").chmod(0o700)
    assert main(["ab", "start", str(packaged), "--log-format", "json"]) == 2
    error = capsys.readouterr().err
    assert "the A/B test did not start" in error and "KeyError: of nobody" in error
    logs = Path(error.rpartition("all of it is in ")[2].strip().removesuffix("."))
    assert [path.name for path in logs.iterdir()] == ["supervisor.log"], "another process than the supervisor adds JSON"
    assert "KeyError: of nobody" in (logs / "supervisor.log").read_text(), "the log ends with the test"
    assert left_behind(packaged) is None and not list(Path(os.environ["XDG_STATE_HOME"]).rglob("redpp-ab-*"))


@pytest.mark.parametrize("lost", [False, True])
def test_a_test_that_cannot_be_taken_over_stays_with_what_it_counted(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: bool
) -> None:
    """Also where its folder was lost meanwhile."""
    tool("nginx")
    monkeypatch.setattr(commands.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho of nobody >&2; exit 1\n")
    (tmp_path / "python").chmod(0o700)
    begin_journal(Started(replace(SPEC, folder=packaged), "tiny", 1.0), state := tmp_path / "state")
    if not lost:
        state.mkdir()
        (state / "counts.json").write_text("{}")
    assert main(["ab", "start", str(packaged)]) == 2
    error = capsys.readouterr().err
    assert "it goes on" in error and "the A/B test did not start" in error and "of nobody" in error
    left = left_behind(packaged)
    assert left and left.state == state and (lost or (state / "counts.json").exists())
    assert main(["ab", "stop", str(packaged)]) == 0 and not state.exists()


def package(folder: Path, name: str, spec: InputSpec | None = None) -> Path:
    write_archives(folder)
    if spec:
        graph = network(1)
        first = replace(graph.nodes[0], args=(Ref(spec.name), *graph.nodes[0].args[1:]))
        graph = replace(graph, inputs=(spec,), nodes=(first, *graph.nodes[1:]))
        data = built("2.0", graph, preprocess=None)
        (folder / "pruned.mar").write_bytes(build_mar(data, name="tiny", model_config=model_config(Serving(4, 20, 1))))
    (folder / "report.json").write_text(json.dumps({"name": name}))
    for version in ("1", "2"):
        (folder / "triton" / name / version).mkdir(parents=True)
        (folder / "triton" / name / version / "model.py").write_text(f"{name} {version}")
    (folder / "triton" / name / "config.pbtxt").write_text(name)
    return folder


def test_the_mixed_folder_holds_one_version_of_each_package(tmp_path: Path) -> None:
    first, second = package(tmp_path / "a", "one"), package(tmp_path / "b", "two")
    mixed = mixed_folder(first, second, tmp_path / "mixed")
    assert os.path.samefile(mixed / "original.mar", first / "original.mar")
    assert os.path.samefile(mixed / "pruned.mar", second / "pruned.mar")
    model = mixed / "triton" / "one"
    assert sorted(path.name for path in (mixed / "triton").iterdir()) == ["one"]
    assert (model / "config.pbtxt").read_text() == "one"
    assert ((model / "1" / "model.py").read_text(), (model / "2" / "model.py").read_text()) == ("one 1", "two 2")
    shutil.rmtree(mixed)
    assert (first / "original.mar").exists() and (second / "triton" / "two" / "2" / "model.py").exists()


def test_a_candidate_with_other_inputs_is_refused(tmp_path: Path) -> None:
    first = package(tmp_path / "a", "one")
    specs = InputSpec("other", (3, 8, 8)), InputSpec("x", (3, 8, 9)), InputSpec("x", (3, 8, 8), "float64")
    for number, spec in enumerate(specs):
        second = package(tmp_path / f"b{number}", "two", spec)
        with pytest.raises(RedppError) as error:
            mixed_folder(first, second, tmp_path / "mixed")
        assert f"{first} takes x 3x8x8 float32" in error.value.found and str(second) in error.value.found
        assert f"{spec.name} {'x'.join(map(str, spec.shape))} {spec.dtype}" in error.value.found
        assert not (tmp_path / "mixed").exists()


def test_damaged_packages_are_refused(tmp_path: Path) -> None:
    first, second = package(tmp_path / "a", "one"), package(tmp_path / "b", "two")
    with pytest.raises(RedppError, match="not a packaged model"):
        mixed_folder(first, tmp_path, tmp_path / "mixed")
    for damage in (b"no zip", b""):
        (second / "pruned.mar").write_bytes(damage)
        with pytest.raises(RedppError, match="pruned.mar cannot be read"):
            mixed_folder(first, second, tmp_path / "mixed")
    with zipfile.ZipFile(second / "pruned.mar", "w") as file:
        file.writestr("x", "y")
    with pytest.raises(RedppError, match="pruned.mar cannot be read"):
        mixed_folder(first, second, tmp_path / "mixed")
