"""What ``--auto`` does by itself with real servers and users: it promotes what is faster, and rolls back what fails."""

import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from redpp_serve.ab.decisions import PROMOTE, RAMP, ROLLBACK, START, Decision, decisions
from redpp_serve.cli import main
from redpp_serve.files import deterministic_zip
from redpp_serve.graph.artifact import build, load
from redpp_serve.graph.executor import Program
from redpp_serve.options import Options, Serving
from redpp_serve.packaging.mar import read_artifact
from redpp_serve.packaging.package import package
from tests.ab.test_live import Client, status, until
from tests.support.small import captured, randomise, write_model
from tests.support.small_networks import Wide
from tests.support.tools import tool

pytestmark = pytest.mark.server
DISTINCT, SECONDS = 64, 80.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose pruned version computes the same with 64 hidden units that the original does with 2048."""
    tool("nginx")
    base, network = tmp_path_factory.mktemp("auto"), randomise(Wide())
    with torch.no_grad():
        for layer in (network.first, network.second):
            layer.weight[:] = layer.weight[:DISTINCT].repeat(len(layer.weight) // DISTINCT, 1)
            layer.bias[:] = layer.bias[:DISTINCT].repeat(len(layer.bias) // DISTINCT)
    model = captured(write_model(base / "model", network), "Wide")
    serving = Serving(4, 1, 1, precision="fp32", engine="redpp")
    package(model, base / "wide", name="wide", options=Options(method="red++", hash="none"), serving=serving)
    return base / "wide"


@contextmanager
def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run ``serve``, and see that it ends as asked."""
    monkeypatch.setenv("REDPP_PLAN_SECONDS", "0")
    with subprocess.Popen(
        [sys.executable, "-m", "redpp_serve.cli", "serve", str(folder)], stdout=subprocess.PIPE
    ) as serve:
        try:
            assert serve.stdout and any(line.startswith(b"Ctrl-C") for line in serve.stdout)
            yield
        finally:
            serve.send_signal(signal.SIGTERM)
    assert serve.returncode == 0


def with_pruned(folder: Path, out: Path, change: Callable[[Tensor], Tensor]) -> Path:
    """Copy a package, and change the bias of its pruned version's last layer."""
    out.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    with zipfile.ZipFile(folder / "pruned.mar") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    found = load(content["model.redpp"])
    (name,) = (name for name, tensor in found.graph.tensors.items() if tensor.shape == (5,))
    tensors = {**found.graph.tensors, name: change(found.graph.tensors[name])}
    content["model.redpp"] = build(replace(found.graph, tensors=tensors), found.description).data
    (out / "pruned.mar").write_bytes(deterministic_zip(content))
    return out


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[tuple[Client, Path]]:
    """Start a test that acts by itself, and end it at last; yield its users, and its state folder."""
    words = ("--auto", "--sticky-header", "X-User-Id", "--max-p99-ratio", "50", *arguments)
    assert main(["ab", "start", str(folder), *words]) == 0
    try:
        client = Client(folder, "torchserve")
        yield client, Path(client.running.extra["state"])
    finally:
        main(["ab", "stop", str(folder)])  # a second one changes nothing


def decided(client: Client, state: Path, action: str) -> list[Decision]:
    """Have users ask until the journal ends with an action; no request may be lost."""
    made = until(
        lambda: client.load(50) or ((made := decisions(state)) and made[-1].action == action and made), SECONDS
    )
    assert {code for code, _ in client.seen} == {200}, client.seen
    return list(made)


def ended(folder: Path, kept: Path) -> tuple[str, dict[str, Any]]:
    """End the test; return verdict.txt and report.json. The page and the files beside the package say the same."""
    assert main(["ab", "stop", str(folder), "--keep", str(kept)]) == 0
    (own,) = (folder / "experiments").iterdir()
    text = (kept / "verdict.txt").read_text()
    outcome = text.split(". ")[0]
    assert outcome in (kept / "report.html").read_text()
    assert (own / "verdict.txt").read_text().startswith(outcome)
    return text, json.loads((kept / "report.json").read_text())


def test_what_is_equal_and_faster_climbs_to_all_users_and_is_promoted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = started(folder, "--attach", "--ramp", "20,60,100", "--hold", "1")
    with served(folder, monkeypatch), test as (client, state):
        made = decided(client, state, PROMOTE)
        assert [(d.action, d.users) for d in made] == [(START, "80:20"), (RAMP, "40:60"), (PROMOTE, "pruned")]
        assert status(folder).all_to == "pruned"
        assert {client.one() for _ in range(30)} == {(200, "pruned")}, "users have moved"
        text, document = ended(folder, tmp_path / "kept")
        assert text.startswith("Promoted by the verdict: all users got pruned."), text
        assert text.splitlines()[-3:-2] == [str(made[-1])] and "times as fast" in text
        assert [d["action"] for d in document["decisions"]] == [START, RAMP, PROMOTE]
        assert main(["health", str(folder)]) == 0, "the server is left to serve"


def test_wrong_answers_of_replays_are_rolled_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that answers another class than the original is rolled back before it gets a single user."""
    original = read_artifact(folder / "original.mar").graph
    x = torch.from_numpy(np.load(folder / "sample.npy")).view(-1, *original.inputs[0].shape)
    its_class = Program(original)(x)[0][0].argmax()
    wrong = with_pruned(folder, tmp_path / "wrong", lambda bias: bias - 1e4 * (torch.arange(5) == its_class))
    with served(wrong, monkeypatch), started(wrong, "--attach", "--shadow") as (client, state):
        made = decided(client, state, ROLLBACK)
        assert [d.action for d in made] == [START, ROLLBACK] and "agree" in made[-1].text
        assert {client.one() for _ in range(30)} == {(200, "original")}
        text, _ = ended(wrong, tmp_path / "kept")
        assert text.startswith("Rolled back by the verdict")


def test_what_fails_its_users_is_rolled_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = with_pruned(folder, tmp_path / "broken", lambda bias: torch.full_like(bias, torch.inf))
    test = started(broken, "--attach", "--ramp", "20,60,100", "--hold", "1")
    with served(broken, monkeypatch), test as (client, state):
        assert client.one(X_Redpp_Arm="pruned")[0] == 500
        made = decided(client, state, ROLLBACK)
        assert [d.action for d in made] == [START, ROLLBACK] and made[-1].users == "original"
        assert {client.one() for _ in range(30)} == {(200, "original")}
        assert status(broken).arms["pruned"].failed_over > 0, "its users were answered by the other one"
        text, document = ended(broken, tmp_path / "kept")
        assert text.startswith("Rolled back by the verdict: all users got original.") and "errors" in made[-1].text
        assert [d["action"] for d in document["decisions"]] == [START, ROLLBACK]
