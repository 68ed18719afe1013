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
from redpp_serve.ab.state import abandoned, supervising
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


def test_bad_arguments_are_refused_before_anything_starts(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_an_ab_test_that_is_starting_and_one_that_was_killed(
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
        servers = [replace(server, pid=pid, created=started(pid) or 0.0) for pid in (1, other.pid)]  # before and after
        with register(test), register(servers[0]), register(servers[1]):
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


@pytest.fixture
def registered(packaged: Path, tmp_path: Path) -> Iterator[tuple[Experiment, subprocess.Popen[bytes]]]:
    """An A/B test's state folder, and a process that other commands take for its supervisor."""
    (tmp_path / "state").mkdir()
    experiment = Experiment(tmp_path / "state", margin=0.05, max_error_rate_gap=0.05)
    process = subprocess.Popen(["sleep", "60"])
    extra = {"state": str(experiment.state), "gateway": "http://g", "ab_metrics": ""}
    begun = started(process.pid) or 0.0
    server = Running(
        str(packaged), "m", "torchserve", process.pid, begun, ("1.0", "2.0"), {}, "http://127.0.0.1:9", [], {}
    )
    with register(replace(server, headers={"management": {}}, extra=extra)):
        yield experiment, process
    process.kill()
    process.wait()


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
    (experiment.state / "gateway" / "access.log").write_text("a line")
    (tmp_path / "there").mkdir()
    assert main(["ab", "stop", str(packaged), "--keep", str(tmp_path / "there")]) == 2
    assert "there exists" in capsys.readouterr().err and process.poll() is None
    assert main(["ab", "stop", str(packaged), "--keep", str(tmp_path / "kept")]) == 0
    assert process.wait(5) == -signal.SIGTERM and f"is in {tmp_path / 'kept'}" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"spec.json", "counts.json", "access.log"}


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
