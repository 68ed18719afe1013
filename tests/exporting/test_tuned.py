"""A fine-tuned network becomes the pruned version of a new package, beside the original of an earlier one."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import redpp_serve
import redpp_serve.packaging.package as module
from redpp_serve.cli import main
from redpp_serve.errors import GateFailed, RedppError
from redpp_serve.exporting.tuned import Packaged, package_tuned, read_tuned
from redpp_serve.graph.executor import Program
from redpp_serve.options import Options
from redpp_serve.packaging.mar import read_artifact
from tests.support.small import ARCH, SHAPE, network, write_data

TRIALS = module.run_trials

pytestmark = pytest.mark.usefixtures("quick", "untried")


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial run of the archives, but in the test that puts it back."""
    monkeypatch.setattr(module, "run_trials", lambda *_: [])


def tuned(folder: Path, by: float = 0.02) -> nn.Module:
    """The package's pruned network with weights and statistics that training moved."""
    found = redpp_serve.load(folder).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(by * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
        found(torch.randn(16, *SHAPE, generator=generator))
    return found.eval()


@pytest.fixture
def weights(packaged: Path, tmp_path: Path) -> Path:
    torch.save(tuned(packaged).state_dict(), tmp_path / "tuned.pt")
    return tmp_path / "tuned.pt"


def packaged_options(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())["options"]


def some() -> Tensor:
    return torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3))


def test_a_tuned_network_is_packaged_as_it_is(packaged: Path, weights: Path, tmp_path: Path) -> None:
    like, out, data = Packaged.read(packaged), tmp_path / "out", write_data(tmp_path / "data.npz")
    report = package_tuned(read_tuned(weights, like), like, out, verify_data=data)
    served, expected = read_artifact(out / "pruned.mar").graph, tuned(packaged)
    with torch.no_grad():
        assert torch.equal(Program(served)(some())[0], expected(some()))
    before, original = (read_artifact(folder / "original.mar") for folder in (packaged, out))
    assert original.graph.nodes == before.graph.nodes and original.graph.buffers == before.graph.buffers
    assert all(torch.equal(before.graph.tensors[name], tensor) for name, tensor in original.graph.tensors.items())
    assert original.description["preprocess"] == before.description["preprocess"] is not None
    assert Packaged.read(out).serving() == like.serving()
    kept, former = np.load(out / "inputs.npz"), np.load(packaged / "inputs.npz")
    assert sorted(kept) == sorted(former) and all(np.array_equal(kept[name], former[name]) for name in kept)
    on_disk = json.loads((out / "report.json").read_text())
    assert (on_disk["name"], on_disk["hash"], on_disk["stages_share"]) == ("small", None, [])
    assert on_disk["options"] == {
        "like": "small",
        "max_error": None,
        "min_agreement": None,
        "max_accuracy_drop": None,
        "seed": 0,
        "device": "cpu",
        "batch_size": 4,
        "max_batch_delay_ms": 1,
        "threads": 1,
        **{key: packaged_options(packaged)[key] for key in ("precision", "engine", "precision_error")},
    }
    assert on_disk["source"]["tuned"]["file"] == "tuned.pt" and on_disk["source"]["file"] == "small.pt"
    assert on_disk["verify"]["output_error"] > 0 and len(on_disk["verify"]["families"]) >= 2
    assert on_disk["original"]["accuracy"] == 1.0 and 0 <= on_disk["pruned"]["accuracy"] <= 1
    assert any("trained further by its owner" in text for text in report.messages)
    assert not any("prune less" in text for text in report.messages)
    layers = {layer["name"]: layer for layer in on_disk["layers"]}
    assert (layers["body.0"]["merge"]["kept"], layers["body.0"]["merge"]["channels"]) == (8, 16)
    assert layers["head"]["error"] > 0 and layers["body.0"]["hash"] is None


def test_the_error_is_zero_for_the_original_itself_and_grows_with_the_distance(packaged: Path, tmp_path: Path) -> None:
    like, errors = Packaged.read(packaged), []
    torch.save(network().state_dict(), tmp_path / "same.pt")
    same = read_tuned(tmp_path / "same.pt", like, arch=f"{ARCH}:Small")
    errors.append(package_tuned(same, like, tmp_path / "out", dry_run=True).verify)
    for k, by in enumerate((0.01, 0.1)):
        torch.save(tuned(packaged, by).state_dict(), tmp_path / f"{k}.pt")
        errors.append(
            package_tuned(read_tuned(tmp_path / f"{k}.pt", like), like, tmp_path / "out", dry_run=True).verify
        )
    found = [verify.output_error for verify in errors if verify]
    assert found[0] == 0 and 0 < found[1] < found[2]
    assert not (tmp_path / "out").exists()


def test_only_limits_that_are_given_gate(packaged: Path, tmp_path: Path) -> None:
    torch.save(tuned(packaged, by=3.0).state_dict(), tmp_path / "far.pt")
    like = Packaged.read(packaged)
    far = read_tuned(tmp_path / "far.pt", like)
    report = package_tuned(far, like, tmp_path / "out", dry_run=True)
    assert report.verify and report.verify.output_error and report.verify.output_error > 0.5
    for options, says in (
        (Options(max_error=0.01), r"output error is .*at most 0\.01 \(--max-error\).*train the network further"),
        (Options(min_agreement=1.0), r"agreement is .*at least 1 \(--min-agreement\)"),
    ):
        with pytest.raises(GateFailed, match=says):
            package_tuned(far, like, tmp_path / "out", options=options)
    with pytest.raises(RedppError, match="max-accuracy-drop is 1, but there is no data"):
        package_tuned(far, like, tmp_path / "out", options=Options(max_accuracy_drop=1.0))
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_refused_by_name(packaged: Path, tmp_path: Path) -> None:
    like, state = Packaged.read(packaged), tuned(packaged).state_dict()

    def refusal(changed: dict[str, Tensor]) -> str:
        torch.save(changed, tmp_path / "bad.pt")
        with pytest.raises(RedppError) as caught:
            read_tuned(tmp_path / "bad.pt", like)
        return str(caught.value)

    assert "1 missing: head.weight" in refusal({k: v for k, v in state.items() if k != "head.weight"})
    assert "1 unexpected: tail.weight" in refusal({**state, "tail.weight": torch.ones(3)})
    says = refusal({**state, "head.weight": torch.ones(5, 9)})
    assert "head.weight is 5x9, not 5x8" in says and "redpp_serve.load" in says
    assert "is 16x8x3x3, not 8x8x3x3" in refusal(dict(redpp_serve.load(packaged, "original").state_dict()))
    assert "NaN" in refusal({**state, "head.bias": torch.full((5,), float("nan"))})


class Wide(nn.Module):
    """Another network for the same input, with more classes."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(144, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x.flatten(1))


class Other(Wide):
    """Another network with the same input and as many classes."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(144, 5)


def exported(net: nn.Module, path: Path) -> Path:
    batch = {0: torch.export.Dim.DYNAMIC}
    shapes = ((batch,),) if not isinstance(net, Wide) else (batch,)
    torch.export.save(torch.export.export(net.eval(), (some(),), dynamic_shapes=shapes), path)
    return path


def test_any_network_with_the_same_inputs_and_outputs_will_do(packaged: Path, tmp_path: Path) -> None:
    like = Packaged.read(packaged)
    found = read_tuned(exported(Other(), tmp_path / "other.pt2"), like, trust=True)
    assert found.graph.inputs == like.original.graph.inputs
    report = package_tuned(found, like, tmp_path / "out", dry_run=True)
    assert report.layers == [] and report.pruned.macs == 144 * 5
    again = read_tuned(exported(tuned(packaged), tmp_path / "again.pt2"), like, trust=True)
    assert set(again.graph.tensors) == set(like.pruned.graph.tensors)
    with pytest.raises(RedppError, match=r"outputs 7:float32\. Expected: those of the original in .*: 5:float32"):
        read_tuned(exported(Wide(), tmp_path / "wide.pt2"), like, trust=True)
    with pytest.raises(RedppError, match="--trust-file"):
        read_tuned(tmp_path / "other.pt2", like)
    torch.save(nn.Linear(3, 5).state_dict(), tmp_path / "narrow.pt")
    (tmp_path / "narrow.py").write_text("from torch.nn import Linear\ndef net():\n    return Linear(3, 5)\n")
    with pytest.raises(RedppError, match=r"rejects a batch of inputs of shape 1x12x12.*takes the inputs of"):
        read_tuned(tmp_path / "narrow.pt", like, arch=f"{tmp_path / 'narrow.py'}:net")


def test_the_command(packaged: Path, weights: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def run(*words: str | Path) -> tuple[int, str]:
        code = main(["package", str(weights), "--like", str(packaged), *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    code, text = run("--out", tmp_path / "out")
    assert code == 0 and f"wrote {tmp_path / 'out'}" in text and "trained further by its owner" in text
    code, text = run("--out", tmp_path / "two", "--threads", "2", "--batch-size", "8", "--name", "other")
    assert code == 0 and [packaged_options(tmp_path / "two")[key] for key in ("threads", "batch_size")] == [2, 8]
    assert json.loads((tmp_path / "two" / "report.json").read_text())["name"] == "other"
    code, text = run("--out", tmp_path / "three", "--keep", "0.5", "--target", "macs=0.5", "--exclude", "stem.*")
    assert code == 2 and "--keep, --exclude, --target beside --like" in text and not (tmp_path / "three").exists()
    code, text = run("--out", tmp_path / "three", "--input", "1x12x12", "--hash", "kde")
    assert code == 2 and "--hash, --input beside --like" in text, "a default that is given counts"
    code, text = run("--out", tmp_path / "three", "--max-error", "0.0001")
    assert code == 3 and "--max-error" in text and not (tmp_path / "three").exists()


@pytest.mark.parametrize("tried", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_package_may_be_replaced_by_its_tuned_self(
    packaged: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: bool
) -> None:
    if tried:
        monkeypatch.setattr(module, "run_trials", TRIALS)
    folder = shutil.copytree(packaged, tmp_path / "small")
    like = Packaged.read(folder)
    report = package_tuned(read_tuned(weights, like), like, folder)
    assert len(report.smoke or []) == (4 if tried else 0)
    changed, before = (read_artifact(place / "pruned.mar").graph.tensors for place in (folder, packaged))
    assert changed.keys() == before.keys() and not torch.equal(changed["head.weight"], before["head.weight"])
