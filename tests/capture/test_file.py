"""From a file to a graph: every format gives the same network, and says what it needs."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from redpp_serve.capture import Captured, capture_file
from redpp_serve.capture.sniff import FileKind
from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec
from tests.attacks.files import Net

INPUT = [InputSpec("input_0", (1, 6, 6))]
FACTORY = """
from torch import nn
import torch

class Net(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))
"""


def network() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    return net


def scripted(net: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        return torch.jit.script(net)


def exported(net: nn.Module, batch: Any = torch.export.Dim.DYNAMIC, size: int = 6) -> torch.export.ExportedProgram:
    shapes = ({0: batch},) if batch is not None else None
    return torch.export.export(net, (torch.randn(2, 1, size, size),), dynamic_shapes=shapes)


def pt2(net: nn.Module, path: Path, **options: Any) -> None:
    torch.export.save(exported(net, **options), path)


WRITERS: dict[str, tuple[Callable[[nn.Module, Path], Any], FileKind]] = {
    "state_dict": (lambda net, path: torch.save(net.state_dict(), path), FileKind.STATE_DICT),
    "legacy state_dict": (
        lambda net, path: torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False),
        FileKind.LEGACY_STATE_DICT,
    ),
    "safetensors": (lambda net, path: save_file(net.state_dict(), path), FileKind.SAFETENSORS),
    "checkpoint": (
        lambda net, path: torch.save({"state_dict": net.state_dict(), "epoch": 3}, path),
        FileKind.STATE_DICT,
    ),
    "module": (torch.save, FileKind.MODULE),
    "TorchScript": (lambda net, path: torch.jit.save(scripted(net), path), FileKind.TORCHSCRIPT),
    "pt2": (pt2, FileKind.EXPORTED),
}
BRING_THEIR_CODE = ("module", "TorchScript", "pt2")


@pytest.fixture
def arch(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(FACTORY)
    return f"{tmp_path / 'nets.py'}:Net"


def written(form: str, folder: Path, net: nn.Module | None = None) -> Path:
    path = folder / "model.bin"  # the name says nothing: the bytes do
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WRITERS[form][0](net or network(), path)
    return path


def assert_same(got: Captured, net: nn.Module) -> None:
    for batch in (1, 5):
        x = torch.randn(batch, 1, 6, 6)
        with torch.no_grad():
            torch.testing.assert_close(Program(got.graph)(x)[0], net(x))


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_the_network(form: str, tmp_path: Path, arch: str) -> None:
    path = written(form, tmp_path)
    own = form in BRING_THEIR_CODE
    got = capture_file(path, INPUT, arch=None if own else arch, trust=own)
    assert_same(got, network())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    kind = WRITERS[form][1].value
    assert got.source == {"file": "model.bin", "kind": kind, "sha256": digest, "arch": None if own else arch}
    assert got.messages == (["took the weights under 'state_dict', not epoch"] if form == "checkpoint" else [])
    assert got.hints is None and got.graph.inputs[0].shape == (1, 6, 6)


@pytest.mark.parametrize("form", BRING_THEIR_CODE)
def test_formats_that_run_code_need_trust(form: str, tmp_path: Path) -> None:
    with pytest.raises(RedppError, match="--trust-file"):
        capture_file(written(form, tmp_path), INPUT)


@pytest.mark.parametrize("form", ["state_dict", "safetensors"])
def test_weights_need_their_architecture(form: str, tmp_path: Path) -> None:
    with pytest.raises(RedppError, match=r"holds weights only .*--arch torchvision:NAME"):
        capture_file(written(form, tmp_path), INPUT)


def test_an_architecture_that_is_not_needed_is_noted(tmp_path: Path, arch: str) -> None:
    got = capture_file(written("module", tmp_path), INPUT, arch=arch, trust=True)
    assert len(got.messages) == 1 and "is not needed" in got.messages[0]
    assert_same(got, network())


def test_arguments_reach_the_architecture(tmp_path: Path, arch: str) -> None:
    path = written("state_dict", tmp_path)
    with pytest.raises(RedppError, match="of another shape"):
        capture_file(path, INPUT, arch=arch, arch_args={"channels": 5})
    assert_same(capture_file(path, INPUT, arch=arch, arch_args={"channels": 4}), network())


def test_without_an_input(tmp_path: Path, arch: str) -> None:
    with pytest.raises(RedppError, match="no --input was given.*--input 3x224x224"):
        capture_file(written("state_dict", tmp_path), [], arch=arch)


@pytest.mark.parametrize("form", ["module", "TorchScript"])
def test_a_network_saved_in_train_mode(form: str, tmp_path: Path) -> None:
    got = capture_file(written(form, tmp_path, network().train()), INPUT, trust=True)
    assert len(got.messages) == 1 and "train mode" in got.messages[0]
    assert_same(got, network())


def test_a_sequential_whose_length_is_zero_is_still_a_network(tmp_path: Path) -> None:
    """Modules with a length are false when empty."""
    torch.save(nn.Sequential().eval(), tmp_path / "model.pt")
    graph = capture_file(tmp_path / "model.pt", INPUT, trust=True).graph
    assert graph.nodes == () and graph.outputs == (graph.inputs[0].name,)


def test_float16_weights_for_a_float32_network_are_converted(tmp_path: Path, arch: str) -> None:
    torch.save(network().half().state_dict(), tmp_path / "model.pt")
    got = capture_file(tmp_path / "model.pt", INPUT, arch=arch)
    assert got.messages == ["converted weights from float16 to float32"]


def test_hints_of_a_timm_network(tmp_path: Path) -> None:
    net = network()
    net.pretrained_cfg = {"mean": (0.5,), "std": (0.25,), "input_size": (1, 6, 6)}  # type: ignore[assignment]
    torch.save(net, tmp_path / "model.pt")
    hints = capture_file(tmp_path / "model.pt", INPUT, trust=True).hints
    assert hints is not None and (hints["mean"], hints["std"], hints["size"]) == ([0.5], [0.25], [6, 6])


# --- exported programs ---


def refused(path: Path, says: str, inputs: list[InputSpec] = INPUT) -> None:
    with pytest.raises(RedppError) as caught:
        capture_file(path, inputs, trust=True)
    assert says in str(caught.value)


def test_a_program_exported_for_one_batch_size(tmp_path: Path) -> None:
    pt2(network(), tmp_path / "model.pt2", batch=None)
    refused(tmp_path / "model.pt2", "was exported for batches of 2 only (input x)")


def test_a_program_exported_for_another_shape_or_number_of_inputs(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    pt2(network(), path)
    refused(path, "was exported as 1x6x6:float32", [InputSpec("x", (1, 7, 7))])
    refused(path, "was exported as 1x6x6:float32", [InputSpec("x", (1, 6, 6), "float16")])
    refused(path, "was exported as 1x6x6:float32", [InputSpec("x", (6, 6))])
    refused(path, "forward takes x; 2 --input given", [*INPUT, *INPUT])


def test_a_program_exported_in_train_mode(tmp_path: Path) -> None:
    pt2(network().train(), tmp_path / "model.pt2")
    refused(tmp_path / "model.pt2", "as batch norm does in train mode")


def test_a_program_made_functional_by_its_author(tmp_path: Path) -> None:
    """``run_decompositions`` turns batch norm into another operator; here it is batch norm again."""
    torch.export.save(exported(network()).run_decompositions({}), tmp_path / "model.pt2")
    got = capture_file(tmp_path / "model.pt2", INPUT, trust=True)
    assert_same(got, network())
    assert [node.op for node in got.graph.nodes] == [
        "aten.conv2d.default",
        "aten.batch_norm.default",
        "aten.relu.default",
    ]


def test_any_image_size_if_the_program_takes_it(tmp_path: Path) -> None:
    x = torch.randn(2, 1, 6, 6)
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    torch.export.save(torch.export.export(network(), (x,), dynamic_shapes=(dynamic,)), tmp_path / "model.pt2")
    got = capture_file(tmp_path / "model.pt2", [InputSpec("x", (1, 9, 7))], trust=True)
    assert got.graph.inputs[0].shape == (1, 9, 7)


def test_capturing_needs_no_name_of_the_file(tmp_path: Path, arch: str) -> None:
    odd = tmp_path / "weird name;rm.txt"
    written("safetensors", tmp_path).rename(odd)
    assert capture_file(odd, INPUT, arch=arch).source["file"] == "weird name;rm.txt"
