"""A package that release 0.1 wrote answers as it did, and today's commands plan, serve, compare and replace it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from redpp_serve import cli
from redpp_serve.graph.graph import InputSpec
from redpp_serve.options import Serving
from redpp_serve.packaging.output_folder import check_out
from redpp_serve.packaging.trials import run_trials, try_archive, try_model
from redpp_serve.packaging.triton_repository import to_json, triton_config
from redpp_serve.serving.running import register
from redpp_serve.serving.serve import open_server
from tests.support.former import former_package


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    return former_package(tmp_path_factory.mktemp("former"))


def test_its_archives_and_its_model_repository_answer_as_they_did(former: tuple[Path, dict[str, list[float]]]) -> None:
    folder, outputs = former
    request = (folder / "sample.npy").read_bytes()
    x, y = InputSpec("x", (1, 12, 12)), InputSpec("output_0", (5,))
    config = triton_config("small", [x], [y], Serving(precision="fp32"))  # which its code knows
    archives = [try_archive(folder / f"{name}.mar", request, {"output_0": np.array(y)}) for name, y in outputs.items()]
    models = [
        try_model(folder / "triton" / "small" / version, to_json(config), request, {"output_0": np.array(y)})
        for version, y in zip(("1", "2"), outputs.values(), strict=True)
    ]
    names = [trial["archive"] for trial in run_trials([*archives, *models])]
    assert names == ["original.mar", "redpp.mar", "triton version 1", "triton version 2"]


def test_its_folder_may_be_replaced(former: tuple[Path, dict[str, list[float]]]) -> None:
    check_out(former[0])


@pytest.fixture
def own(former: tuple[Path, dict[str, list[float]]], tmp_path: Path) -> Path:
    """A copy that a command may write its figures into."""
    return shutil.copytree(former[0], tmp_path / "small")


def test_plans_are_added_to_its_report(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((own / "report.json").read_text())
    assert cli.main(["plan", str(own), "--time-budget", "1"]) == 0
    after = json.loads((own / "report.json").read_text())
    assert set(after.pop("plan")) == {"original", "pruned"}
    assert after == before
    assert "Engines and kernels" in (own / "report.html").read_text()


@pytest.mark.server
def test_it_is_served_and_compared(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with open_server(own, name="small") as server, register(server.running()):
        assert cli.main(["health", str(own)]) == 0
        answers = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
        assert answers == [["original", "ok,"], ["pruned", "ok,"], ["default", "ok,"]]
    assert cli.main(["compare", str(own), "--duration", "2"]) == 0
    report = json.loads((own / "report.json").read_text())
    assert report["pruned"]["errors"] == 0 and report["pruned"]["handler_ms"]["p50"] > 0
    assert report["original"]["bytes"] == 5684 and report["agreement"]["top1"] == 1.0
