"""Files for other programs: each computes what the network computes, at any batch, or is not written."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.cli import main
from redpp_serve.errors import RedppError
from redpp_serve.exporting.formats import ALIKE, FORMATS, export, graph_for, write_checked
from redpp_serve.exporting.python_source import python_source
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref, Size
from redpp_serve.graph.passes import in_precision
from redpp_serve.graph.quantization import find_ranges
from redpp_serve.packaging.mar import read_artifact
from redpp_serve.runtime.serving_graph import serving_graph
from tests.support.small import SHAPE, network, randomise
from tests.support.small_networks import Two

ALL = [
    pytest.param(
        "onnx", marks=pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="no ONNX Runtime")
    ),
    pytest.param("openvino", marks=pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="no OpenVINO")),
    "pt2",
    "module",
]


class Shapes(nn.Module):
    """What source code must get right: sizes of the batch, slices, infinities, tensors made on the way, a getitem."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        first, second = (x + torch.arange(4, dtype=torch.float32)).reshape(n * 2, 2).chunk(2, 1)
        joined = torch.cat([first, second], 1).reshape(n, 4)
        mask = torch.zeros(4, dtype=torch.bool)
        return joined.masked_fill(mask, float("-inf")).softmax(1)


def some(specs: Sequence[InputSpec], count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *spec.shape, generator=generator) for spec in specs]


def checked(to: str, graph: Graph, path: Path, alike: float = 1e-4) -> Any:
    write_checked(FORMATS[to], graph, some(graph.inputs, 2), path, title="a network", alike=alike)
    return FORMATS[to].open(path)


@pytest.mark.parametrize("to", ["pt2", "module"])
@pytest.mark.parametrize("name", ["small", "two", "shapes"])
def test_files_of_torch_compute_the_same_bits_at_any_batch(tmp_path: Path, to: str, name: str) -> None:
    module, specs = {
        "small": (network(), (InputSpec("x", SHAPE),)),
        "two": (randomise(Two()), (InputSpec("image", (1, 8, 8)), InputSpec("vector", (4,)))),
        "shapes": (Shapes(), (InputSpec("x", (4,)),)),
    }[name]
    graph = capture(module.eval(), specs, [])
    run = checked(to, graph, tmp_path / f"net{FORMATS[to].suffixes[0]}")
    for batch in (1, 2, 7):
        inputs = some(specs, batch, seed=batch)
        with torch.no_grad():
            expected = Program(graph)(*inputs)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(run(inputs), expected, strict=True))


@pytest.mark.parametrize("to", ["pt2", "module"])
def test_sixteen_bits(tmp_path: Path, to: str) -> None:
    graph = in_precision(capture(network(), [InputSpec("x", SHAPE)], []), "bf16")
    run = checked(to, graph, tmp_path / f"net{FORMATS[to].suffixes[0]}", 1e-2)
    assert run(some(graph.inputs, 4))[0].dtype == torch.float32


def test_the_written_module_needs_torch_alone_and_can_be_trained(packaged: Path, tmp_path: Path) -> None:
    files = export(packaged, "module", tmp_path / "net.py")
    assert (
        [path.name for path in files]
        == ["net.py", "net.pt"]
        == sorted((p.name for p in tmp_path.iterdir()), reverse=True)
    )
    code = """
import sys, torch
from net import Network
network = Network()
x = torch.ones(3, 1, 12, 12)
before = network(x)
network.train()(torch.randn(4, 1, 12, 12)).sum().backward()
assert network.get_parameter("head.weight").grad is not None
assert not torch.equal(network.eval()(x), before), "batch norms are live"
print(len(list(network.parameters())), sorted({n.split(".")[0] for n in sys.modules} & {"redpp_serve", "safetensors"}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["9", "[]"]
    assert compile((tmp_path / "net.py").read_text(), "net.py", "exec")


@pytest.mark.parametrize("to", ["pt2", "module"])
@pytest.mark.parametrize("version", ["original", "pruned"])
def test_a_package_is_exported(packaged: Path, tmp_path: Path, to: str, version: str) -> None:
    files = export(packaged, to, tmp_path / "new" / f"net{FORMATS[to].suffixes[0]}", version=version)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(path.name for path in files)
    graph = read_artifact(packaged / f"{version}.mar").graph
    inputs = some(graph.inputs, 5)
    with torch.no_grad():
        assert torch.equal(FORMATS[to].open(files[0])(inputs)[0], Program(graph)(*inputs)[0])


def test_names_and_texts_of_an_artifact_never_become_code() -> None:
    hostile = '"""\nimport os; os.abort()\n"""'
    x, y = "x; import os", "def"
    nodes = (
        Node("1 + 1", "aten.linear.default", (Ref(x), Ref(hostile))),
        Node(y, "aten.relu.default", (Ref("1 + 1"),)),
    )
    graph = Graph((InputSpec(x, (3,)),), {hostile: torch.eye(3)}, nodes, (y,))
    source = python_source(graph, hostile)
    names: dict[str, Any] = {"__file__": "net.py"}
    exec(compile(source, "net.py", "exec"), names)
    assert "os" not in names and "import os; os.abort" in source, "quoted as the name of a tensor"
    assert "value_1___1 = aten.linear.default(x__import_os, stored[" in source


def test_a_file_that_computes_something_else_is_not_written(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FORMATS["pt2"]

    def wrong(graph: Graph, path: Path, title: str) -> None:
        right.write(
            replace(graph, tensors={k: t * 1.01 if t.dim() > 1 else t for k, t in graph.tensors.items()}), path, ""
        )

    def crashing(graph: Graph, path: Path, title: str) -> None:
        path.write_text("half")
        raise ValueError("no such thing\nand more")

    def shorter(path: Path) -> Any:
        run = right.open(path)
        return lambda inputs: [y[:1] for y in run(inputs)]

    out = tmp_path / "net.pt2"
    out.write_text("before")
    for changed, says in (
        (replace(right, write=wrong), r"computes something else.*differs by .* at batch 1"),
        (replace(right, open=shorter), r"differs by inf of the outputs' spread at batch 3"),
        (replace(right, write=crashing), r"cannot be written as \.pt2: ValueError: no such thing\."),
    ):
        monkeypatch.setitem(FORMATS, "pt2", changed)
        with pytest.raises(RedppError, match=says):
            export(packaged, "pt2", out)
        assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"] and out.read_text() == "before"


def test_refusals(packaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*words: str | Path) -> str:
        assert main(["export", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "--precision bf16 for --to onnx. Expected: fp32 or int8" in refusal(packaged, "--precision", "bf16")
    assert "a file that ends in .pt2" in refusal(packaged, "--to", "pt2", "--out", tmp_path / "net.onnx")
    assert "cannot be read" in refusal(tmp_path, "--to", "pt2")
    (tmp_path / "file").write_text("")
    says = refusal(packaged, "--to", "pt2", "--out", tmp_path / "file" / "net.pt2")
    assert "cannot be written" in says
    assert "--version beside --to triton-openvino" in refusal(
        packaged, "--to", "triton-openvino", "--version", "pruned", "--out", tmp_path / "repository"
    )


@pytest.mark.parametrize("to", ALL[:2])
def test_engines_take_the_files(packaged: Path, tmp_path: Path, to: str) -> None:
    (first, *_) = export(packaged, to, tmp_path / f"net{FORMATS[to].suffixes[0]}")
    graph = read_artifact(packaged / "pruned.mar").graph
    run = FORMATS[to].open(first)
    for batch in (1, 5):
        inputs = some(graph.inputs, batch)
        with torch.no_grad():
            torch.testing.assert_close(run(inputs)[0], Program(graph)(*inputs)[0], rtol=1e-4, atol=1e-4)


class Upsampled(nn.Module):
    """A map of the input's own height and width, whatever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.interpolate(self.down(x).relu(), size=x.shape[2:], mode="bilinear"))


ANY = InputSpec("x", (2, 8, 12), varying=((1, Size("H", 4, 32, 4)), (2, Size("W", 4, 32, 4))))


@pytest.mark.parametrize("to", ALL)
def test_sizes_that_vary(tmp_path: Path, to: str) -> None:
    graph = graph_for(FORMATS[to], LoadedArtifact(capture(randomise(Upsampled()), [ANY], []), {}))
    run = checked(to, graph, tmp_path / f"net{FORMATS[to].suffixes[0]}")
    for batch, height, width in ((1, 4, 32), (3, 20, 16), (2, 32, 4)):
        inputs = [torch.randn(batch, 2, height, width, generator=torch.Generator().manual_seed(height))]
        with torch.no_grad():
            (expected,) = Program(graph)(*inputs)
        assert expected.shape == (batch, 3, height, width)
        torch.testing.assert_close(run(inputs)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_file_that_is_wrong_at_another_size_is_not_written(tmp_path: Path) -> None:
    """Integers are drawn at the other sizes, from the range that the network reads."""
    words = InputSpec("ids", (6,), "int64", ranges=((3, 9),), varying=((0, Size("L", 2, 40)),))
    graph = capture(nn.Sequential(nn.Embedding(10, 4)), [words], [])
    right, seen = FORMATS["pt2"], []

    def longest_is_wrong(path: Path) -> Any:
        run = right.open(path)
        return lambda inputs: seen.append(inputs[0]) or [y + (y.shape[1] == 40) for y in run(inputs)]

    changed = replace(right, open=longest_is_wrong)
    with pytest.raises(RedppError, match=r"computes something else .* at batch 1 L=40\. Expected"):
        write_checked(changed, graph, [torch.full((2, 6), 5)], tmp_path / "net.pt2", title="a network")
    assert [list(x.shape) for x in seen] == [[1, 6], [3, 6], [1, 2], [1, 40]]
    assert (seen[-1].min(), seen[-1].max()) == (3, 9)


@pytest.mark.parametrize("to", ALL[:2])
def test_eight_bits_are_there_and_are_near(tmp_path: Path, to: str) -> None:
    graph = capture(network(), [InputSpec("x", SHAPE)], [])
    with pytest.raises(RedppError, match="without ranges for eight bits"):
        graph_for(FORMATS[to], LoadedArtifact(graph, {}), "int8")
    inputs = some(graph.inputs, 64)
    ranges = find_ranges(serving_graph(graph, torch.device("cpu")), inputs)
    small = graph_for(FORMATS[to], LoadedArtifact(graph, {"precision": {"ranges": ranges}}), "int8")
    run = checked(to, small, tmp_path / f"net{FORMATS[to].suffixes[0]}", ALIKE["int8"])
    with torch.no_grad():
        (expected,) = Program(graph)(*inputs)
    error = float((run(inputs)[0] - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.1
