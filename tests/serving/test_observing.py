"""`--observe` is refused before a server starts where it cannot work; real servers give the moments of requests."""

import re
import shutil
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from redpp_serve.cli import main
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import load
from redpp_serve.graph.graph import Graph
from redpp_serve.handlers.wire import OBSERVE_FILE_VARIABLE, OBSERVE_VARIABLE
from redpp_serve.options import ObserveOptions, ServerOptions
from redpp_serve.runtime.moments import Adder, Moments
from redpp_serve.runtime.moments_file import LEAST, load_moments, lock_path
from redpp_serve.serving.health import triton_request
from redpp_serve.serving.observing import observing
from redpp_serve.serving.serve import KINDS, open_server
from redpp_serve.serving.server import LocalServer
from tests.support.served import npy
from tests.support.small import SHAPE


def original(folder: Path) -> Graph:
    with zipfile.ZipFile(folder / "original.mar") as archive:
        return load(archive.read("model.redpp")).graph


def test_the_default_file_lies_beside_the_folder(packaged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(packaged, folder)
    found = observing(folder, 10, None)
    assert found and found.file == tmp_path / "model.moments.safetensors" and not found.file.exists()
    assert found.environment() == {OBSERVE_VARIABLE: "10", OBSERVE_FILE_VARIABLE: str(found.file)}
    assert any(str(found.file) in line for line in found.lines())
    assert observing(folder, None, None) is None


@pytest.mark.parametrize("command", [["serve"], ["ab", "start"]])
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--observe", "0"], "'0' is not a whole number of at least 1"),
        (["--observe", "-3"], "whole number|expected"),
        (["--observe", "some"], "'some' is not a whole number"),
        (["--observe-to", "file"], "--observe-to is file"),
        (["--observe", "5", "--observe-to", "/proc/moments"], "/proc/moments"),
        (["--observe", "--observe-to", "/missing/folder/moments"], "/missing/folder is no folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    packaged: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    words: list[str],
    found: str,
) -> None:
    monkeypatch.setattr(LocalServer, "start", lambda *_: pytest.fail("a server was started"))
    try:
        code = main([*command, str(packaged), *words])
    except SystemExit as error:  # the parser's
        code = int(str(error.code))
    assert code == 2
    assert re.search(found, capsys.readouterr().err)


def test_a_file_of_other_content_and_an_archive_that_cannot_observe_are_refused(packaged: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("not moments")
    with pytest.raises(RedppError, match="cannot be read as moments"):
        observing(packaged, 1, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "not moments"
    folder = tmp_path / "old"
    folder.mkdir()
    with zipfile.ZipFile(packaged / "original.mar") as new, zipfile.ZipFile(folder / "original.mar", "w") as old:
        for name in new.namelist():
            if not name.endswith("observer.py"):
                old.writestr(name, new.read(name))
    with pytest.raises(RedppError, match="of an earlier release"):
        observing(folder, 1, None)
    with pytest.raises(RedppError, match="cannot be read"):
        observing(tmp_path, 1, None)


def test_without_a_number_it_is_one_in_ten(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("redpp_serve.serving.observing.observing", lambda *given: seen.append(given))
    monkeypatch.setattr("redpp_serve.serving.serve.serve", lambda *_, **__: None)
    assert main(["serve", str(packaged), "--observe"]) == 0
    assert main(["serve", str(packaged), "--observe", "3", "--observe-to", "here"]) == 0
    assert main(["serve", str(packaged)]) == 0
    assert [given[1:] for given in seen] == [(10, None), (3, Path("here")), (None, None)]
    with pytest.raises(RedppError, match="--observe is 0"):
        ObserveOptions(observe=0)


def test_a_server_observes_only_when_it_is_told_to(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OBSERVE_VARIABLE, "1")
    server = open_server(packaged, name="small")
    assert OBSERVE_VARIABLE not in server._surroundings()
    server.environment[OBSERVE_VARIABLE] = "7"
    assert server._surroundings()[OBSERVE_VARIABLE] == "7"


def send(server: LocalServer, x: np.ndarray) -> None:
    url, headers, body = server.url(server.versions[0]), server.headers(), npy(x)
    if server.kind == "triton":
        metadata = {
            "inputs": [{"name": "x", "shape": [-1, *SHAPE], "datatype": "FP32"}],
            "outputs": [{"name": "output_0"}],
        }
        request = triton_request(metadata, [x])
        body, headers = request.body, {**headers, **request.headers}
    headers = {"Content-Type": "application/octet-stream", **headers}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as reply:
        assert reply.status == 200


def wait_for(path: Path, graph: Graph, server: LocalServer) -> Moments:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, server.log_tail()
        time.sleep(0.1)
    return load_moments(path, graph)


@pytest.mark.server
@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_of_a_real_server_are_those_of_its_requests(packaged: Path, tmp_path: Path, kind: str) -> None:
    """The thread may miss requests, so how often each input was observed follows from the sums themselves."""
    inputs = np.random.default_rng(0).standard_normal((5, *SHAPE), dtype=np.float32)
    graph, path = original(packaged), tmp_path / "moments.safetensors"
    told = observing(packaged, 1, path)
    assert told
    with open_server(packaged, ServerOptions(kind, 2), name="small") as server:
        send(server, inputs[0])
        assert "observing" not in server.log_tail(1000)
    server = open_server(packaged, ServerOptions(kind, 2), name="small")
    server.environment |= told.environment()
    with server:
        # One line for each worker of the original; Triton has a second version of it, which gives the default.
        assert server.log_tail(1000).count("no input and no output is kept") in (2, 4)
        for round_ in range(60):
            for x in inputs:
                send(server, x)
            time.sleep(0.02)
            if round_ > 30 and path.exists():
                break
        found = wait_for(path, graph, server)
    assert found.images >= LEAST
    adders = [Adder(graph) for _ in inputs]
    for adder, x in zip(adders, inputs, strict=True):
        adder.add([torch.from_numpy(x)[None]])
    each = [adder.sums for adder in adders]
    found = load_moments(path, graph)
    totals = torch.stack([sums.tensors["output/linear/total"] for sums in each], 1)
    times = torch.linalg.lstsq(totals, found.outputs["linear"].total[:, None]).solution[:, 0]
    assert torch.allclose(times, times.round(), atol=1e-4) and int(times.round().sum()) == found.images
    for name, value in found.values.items():
        key = f"value/{name}/" + ("squares" if value.gram is None else "gram")
        wanted = sum(count * sums.tensors[key] for count, sums in zip(times.round(), each, strict=True))
        torch.testing.assert_close(value.squares if value.gram is None else value.gram, wanted, rtol=1e-5, atol=1e-5)
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, lock_path(path).name}
