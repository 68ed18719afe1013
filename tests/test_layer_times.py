"""The times of layers in the engine that serves: they add up, lead back to layers, and never stop `inspect`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redpp_serve import layer_times as module
from redpp_serve.capture.export import capture
from redpp_serve.engines import ENGINES
from redpp_serve.engines.onnx_builder import to_onnx
from redpp_serve.engines.onnx_writer import node_names
from redpp_serve.engines.sessions import OnnxRuntimeSession, OpenVinoSession
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import find_layers
from redpp_serve.inspection import describe_network
from redpp_serve.layer_times import LayerTimes, layer_times
from redpp_serve.options import Serving
from redpp_serve.runtime.fused_layer import fused_layers
from redpp_serve.runtime.serving_graph import serving_graph
from tests.support.small import SHAPE, captured, network, write_model


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROFILE_SECONDS", 0.02)


class Blocks(nn.Module):
    """What engines rewrite: a residual, a depthwise convolution, activations, a Linear on each position."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 32, 3, padding=1)
        self.apart = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm = nn.BatchNorm2d(32)
        self.narrow = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x).relu()
        y = y + self.narrow(nn.functional.relu6(self.norm(self.apart(y))))
        return self.head(nn.functional.silu(y).permute(0, 2, 3, 1))


@pytest.fixture(scope="module")
def blocks() -> Graph:
    return capture(Blocks().eval(), [InputSpec("x", (3, 24, 24))], [])


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "redpp"])
def test_every_layer_has_its_time_in_each_engine(blocks: Graph, engine: str) -> None:
    found = layer_times(blocks, Serving(engine=engine))
    assert found is not None and (found.engine, found.precision, found.threads) == (engine, "fp32", 1)
    assert set(found.layers) == {layer.name for layer in find_layers(blocks)}
    assert all(0 < seconds < 1 for seconds in found.layers.values()) and found.others >= 0
    assert str(found).startswith(f"{engine} fp32, batch 1, 1 thread: ")


@pytest.mark.parametrize("session", [OpenVinoSession, OnnxRuntimeSession])
def test_the_names_of_an_engines_nodes_lead_to_the_graphs(blocks: Graph, session: Any) -> None:
    """The largest part of the time is in nodes whose names begin with those of the model."""
    graph = serving_graph(blocks, torch.device("cpu"))
    model = to_onnx(graph)
    owners = node_names(model, graph)
    assert {node.name for node in model.graph.node} == set(owners)
    assert {layer.node.name for layer in fused_layers(graph)} <= set(owners.values()) <= {n.name for n in graph.nodes}
    made = session(model.SerializeToString(), "fp32", 1, profiled=True)
    seconds = made.node_seconds([torch.randn(1, 3, 24, 24).numpy()], 0.05)
    made.close()
    known = sum(value for name, value in seconds.items() if any(name.startswith(owner) for owner in owners))
    assert known > 0.5 * sum(seconds.values()) > 0


def test_no_profile_is_left_behind(blocks: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("REDPP_PLAN_CACHE", str(tmp_path / "plans.json"))
    assert layer_times(blocks, Serving(engine="onnxruntime"))
    assert list(tmp_path.iterdir()) == []


def test_what_an_engine_does_not_take_is_timed_in_the_own_runtime(
    blocks: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unprofiled(OpenVinoSession):
        def node_seconds(self, *_: Any) -> dict[str, float]:
            raise RuntimeError("no counters on this processor")

    engine = ENGINES["openvino"]
    monkeypatch.setitem(ENGINES, "openvino", type(engine)(engine.name, engine.packages, engine.precisions, Unprofiled))
    found = layer_times(blocks, Serving(engine="openvino"))
    assert found is not None and found.engine == "redpp" and len(found.layers) == 4


def test_nothing_measured_is_no_error(blocks: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "_in_own_runtime", fail)
    threads = torch.get_num_threads()
    assert layer_times(blocks, Serving(engine="redpp", threads=threads + 1)) is None
    assert torch.get_num_threads() == threads


def test_the_table_has_a_column_where_there_are_times(tmp_path: Path) -> None:
    known = captured(write_model(tmp_path))
    times = LayerTimes("openvino", "fp32", 1, {"stem.0": 0.0123, "head": 1.5e-5}, 0.001)
    report = describe_network(known, (), times=times)
    lines = report.to_text().splitlines()
    assert next(line for line in lines if line.startswith("layer")).split()[5:7] == ["ms", "channels"]
    rows = {line.split()[0]: line.split()[-3] for line in lines if line.startswith(("stem.0 ", "body.0 ", "head "))}
    assert rows == {"stem.0": "12.300", "body.0": "–", "head": "0.015"}
    assert any("openvino fp32, batch 1, 1 thread: 13.3 ms, 92% of it in the layers below" in line for line in lines)
    document = report.to_json()
    assert [layer.get("ms") for layer in document["layers"]] == [12.3, None, 0.015]
    assert "ms" not in describe_network(known, ()).to_text().split()


def test_layers_of_a_network_with_small_parts() -> None:
    graph = capture(network(), [InputSpec("x", SHAPE)], [])
    found = layer_times(graph)
    assert found is not None and set(found.layers) == {"stem.0", "body.0", "head"}
