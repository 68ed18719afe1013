"""Latency: what is timed is what serves, drift cancels, and the model of it follows the widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from redpp_serve.engines import OWN
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph, InputSpec, Ref
from redpp_serve.graph.layers import find_layers
from redpp_serve.pruning import latency
from redpp_serve.pruning.latency import FEWEST_ROUNDS, LatencyModel, LayerTime, layer_model, paired_latency
from redpp_serve.runtime.fused_layer import available
from redpp_serve.runtime.serving_graph import serving_program
from tests.support import networks
from tests.support.networks import Builder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engine that everything is timed in: the own runtime, whose steps the made-up clocks count."""
    named = [OWN]
    monkeypatch.setattr(latency, "serving_engine", lambda graph, device: named[0])
    return named


def test_networks_are_timed_in_the_engine_that_would_serve(engine: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine[0] = "openvino"
    graphs, runs = [networks.network("chain", width) for width in (16, 8)], []
    real = latency.run_in
    monkeypatch.setattr(latency, "run_in", lambda name, *rest: runs.append(name) or real(name, *rest))
    assert [t.median > 0 for t in paired_latency(graphs, seconds=0)] == [True, True] and runs == ["openvino"] * 2
    engine[0] = "no such engine"
    assert paired_latency(graphs, seconds=0)[1].median > 0 and runs[-2:] == [OWN] * 2


class Clock:
    """A timer by which each call of a program takes what ``cost`` says, and all take longer as time goes by."""

    def __init__(self, cost: Callable[[Program], float], drift: float = 0.0) -> None:
        self.cost, self.drift, self.now = cost, drift, 0

    def __call__(self, program: Program, inputs: Sequence[Tensor], device: torch.device) -> float:
        program(*inputs)
        self.now += 1
        return self.cost(program) * (1 + self.drift * self.now)


def weights(graph: Graph) -> int:
    return sum(math.prod(layer.shape) for layer in find_layers(graph))


def by_steps(known: dict[int, int]) -> Callable[[Program], float]:
    """Cost by the number of a program's steps (which tells test networks apart)."""
    return lambda program: known[len(program.operators)]


def test_a_drifting_machine_leaves_the_ratio_alone() -> None:
    """Both calls of a round sum to the same drift for each network, so the ratio within a round is exact."""
    graphs = [networks.network("chain"), networks.network("bare"), networks.network("mlp")]
    steps = [len(serving_program(g, torch.device("cpu")).operators) for g in graphs[:2]]
    assert steps[0] != steps[1]
    clock = Clock(by_steps({steps[0]: 2, steps[1]: 1}), drift=0.5)
    first, second = paired_latency(graphs[:2], seconds=0, timer=clock)
    assert (first.ratio, first.low, first.high) == (1, 1, 1)
    assert (second.ratio, second.low, second.high) == (0.5, 0.5, 0.5)
    assert first.rounds == second.rounds == FEWEST_ROUNDS
    assert first.p10 < first.median < first.p90  # the drift itself shows


def test_a_much_larger_network_is_slower() -> None:
    def wide(width: int) -> Graph:
        b = Builder(8, 32, 32)
        return b.graph(b.conv(b.conv("x", "one", 8, width), "two", width, 8))

    large, small = paired_latency([wide(512), wide(8)], batch=2, seconds=0.2)
    assert large.ratio == 1 and small.ratio < 0.5  # beside other work the intervals may be wide
    assert 0 < small.p10 <= small.median <= small.p90 and small.median < large.median
    assert small.low <= small.ratio <= small.high


def test_integer_inputs_are_valid_indices() -> None:
    b = Builder(4)
    b.inputs = [InputSpec("x", (4,), "int64")]
    graph = b.graph(b.op("e", "embedding.default", b.tensor("table", b.random(3, 5)), Ref("x")))
    assert paired_latency([graph], seconds=0)[0].median > 0


@pytest.mark.parametrize("kind", networks.KINDS)
def test_a_patch_computes_what_the_network_computes_there(kind: str) -> None:
    graph = networks.network(kind)
    inputs = tuple(x.float() for x in networks.example(graph, count=1))
    for patch in latency._patches(graph):
        layer = patch.layer
        wanted = [spec.name for spec in patch.graph.inputs] + list(patch.graph.outputs)
        needed = [name for name in wanted if name not in {i.name for i in graph.inputs}]
        values = dict(zip((i.name for i in graph.inputs), inputs, strict=True)) | dict(
            zip(needed, Program(graph, needed)(*inputs), strict=True)
        )
        (found,) = Program(patch.graph)(*(values[spec.name] for spec in patch.graph.inputs))
        torch.testing.assert_close(found, values[patch.graph.outputs[0]])
        assert patch.layer == layer


def test_a_patch_takes_norm_activation_and_addition_along_once() -> None:
    b = Builder(4, 6, 6)
    left = b.norm(b.conv("x", "left", 4, 8, bias=False), "left_bn", 8)
    right = b.norm(b.conv("x", "right", 4, 8, bias=False), "right_bn", 8)
    graph = b.graph(b.relu(b.add(left, right)))
    left_patch, right_patch = latency._patches(graph)
    names = ["left", "right_bn.summand", "left_bn", "left_bn_right_bn", "left_bn_right_bn_relu"]
    assert [node.name for node in left_patch.graph.nodes] == names
    assert [spec.name for spec in left_patch.graph.inputs] == ["x", "right_bn"]
    # the addition belongs to one of the two
    assert [node.name for node in right_patch.graph.nodes] == ["right", "right_bn"]
    if not available():
        return
    for patch, steps in ((left_patch, ["onednn.conv2d_add", "aten.expand.default"]), (right_patch, ["onednn.conv2d"])):
        program = serving_program(patch.graph, torch.device("cpu"))
        assert sorted(program.operators) == sorted(steps)


@pytest.mark.parametrize("kind", networks.KINDS)
def test_narrowed_patches_run_and_have_the_width_asked_for(kind: str) -> None:
    for patch in latency._patches(networks.network(kind, width=12)):
        layer = patch.layer
        widths = patch.widths()
        assert widths[0] == layer.shape[:2]
        for outputs, inputs in widths:
            small = patch.narrowed(outputs, inputs)
            assert small.tensors[layer.weight].shape[:2] == (outputs, inputs)
            shape = value_shapes(small)[small.outputs[0]]
            assert shape[layer.axis] == outputs


def test_widths_are_about_half_on_multiples_of_eight() -> None:
    b = Builder(3, 8, 8)
    deep = b.conv(b.conv("x", "stem", 3, 40), "spatial", 40, 40, groups=40)
    graph = b.graph(b.conv(b.conv(deep, "grouped", 40, 80, groups=4), "last", 80, 6))
    widths = {patch.layer.name: patch.widths() for patch in latency._patches(graph)}
    assert widths == {
        "stem": [(40, 3), (24, 3)],
        "spatial": [(40, 1), (24, 1)],
        "grouped": [(80, 10), (40, 10)],
        "last": [(6, 80), (6, 40), (3, 80), (3, 40)],
    }


def test_a_batch_norm_over_positions_stays_out_of_a_linears_patch() -> None:
    """It would be narrowed like the outputs when it happens to have as many positions."""
    b = Builder(6, 5)
    graph = b.graph(b.norm(b.linear("x", "fc", 5, 6), "bn", 6))
    (patch,) = latency._patches(graph)
    assert [node.name for node in patch.graph.nodes] == ["fc"]


def test_windows_along_axis_0_are_kept() -> None:
    b = Builder(8, 4)
    windows = b.op("windows", "reshape.default", Ref("x"), [-1, 2, 4])
    (patch,) = latency._patches(b.graph(b.linear(windows, "fc", 4, 6)))
    assert patch.rows == 4 and patch.graph.inputs[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("sizes", "times", "expected"),
    [
        ([100, 50, 25], [11.0, 6.0, 3.5], (1.0, 0.1)),
        ([100, 50], [5.0, 5.0], (5.0, 0.0)),
        ([100, 50], [5.0, 8.0], (5.843, 0.0)),  # slower when smaller: nothing is saved, never a negative slope
        ([100, 50], [8.0, 2.0], (0.0, 0.048)),
        ([100], [5.0], (0.0, 0.05)),
    ],
)
def test_fixed_and_slope_are_never_negative(
    sizes: list[int], times: list[float], expected: tuple[float, float]
) -> None:
    assert latency._line(sizes, times) == pytest.approx(expected, abs=1e-3)


def test_the_model_predicts_a_narrowed_network() -> None:
    """With times that follow its law exactly: 1 a step, 0.01 a weight, and steps that belong to no layer."""
    whole, narrow = (networks.network("residual", width) for width in (32, 16))

    def cost(program: Program) -> float:
        steps = sum("expand" not in op for op in program.operators)
        return steps + 0.01 * sum(t.numel() for t in program.buffers() if t.dim() > 1)

    model = layer_model(whole, seconds=0, timer=Clock(cost))
    real = [cost(serving_program(graph, torch.device("cpu"))) for graph in (whole, narrow)]
    assert model.whole == pytest.approx(real[0])
    assert model.predict({layer.name: layer.shape for layer in find_layers(whole)}) == pytest.approx(real[0])
    assert model.predict({layer.name: layer.shape for layer in find_layers(narrow)}) == pytest.approx(real[1])
    total = sum(layer.at(layer.shape) for layer in model.layers.values())
    assert model.constant == pytest.approx(model.whole - total) and model.constant > 0


def test_layers_that_explain_more_than_all_are_scaled_down() -> None:
    graph = networks.network("chain")
    steps = len(serving_program(graph, torch.device("cpu")).operators)
    model = layer_model(graph, seconds=0, timer=Clock(lambda program: 1.0 if len(program.operators) == steps else 10.0))
    assert (model.whole, model.constant) == (1.0, 0.0)
    assert sum(layer.at(layer.shape) for layer in model.layers.values()) == pytest.approx(1.0)


def test_equal_geometries_are_measured_once() -> None:
    b = Builder(8, 6, 6)
    value = "x"
    for k in range(4):
        value = b.conv(value, f"c{k}", 8, 8)
    graph = b.graph(value)
    timed: set[Program] = set()
    model = layer_model(graph, seconds=0, timer=Clock(lambda program: timed.add(program) or 1.0))
    assert len(timed) == 1 + 4  # the network, and one layer at (8, 8), (8, 4), (4, 8), (4, 4)
    assert len(model.layers) == 4 and len(set(model.layers.values())) == 1


def test_measured_model_of_a_real_network_is_sane() -> None:
    graph = networks.network("depthwise", 16)
    model = layer_model(graph, seconds=0.05, batch=2)
    assert set(model.layers) == {layer.name for layer in find_layers(graph)}
    assert model.whole > 0 and model.constant >= 0
    assert all(layer.fixed >= 0 and layer.slope >= 0 for layer in model.layers.values())
    narrow = {layer.name: layer.shape for layer in find_layers(networks.network("depthwise", 4))}
    assert 0 < model.predict(narrow) <= model.whole


def test_unnamed_layers_keep_their_shape_and_products_their_time() -> None:
    model = LatencyModel(1.0, {"a": LayerTime(0.5, 0.1, (4, 5)), "b": LayerTime(0.0, 0.2, (3, 5))}, 6.5)
    assert model.predict({}) == 6.5
    assert model.predict({"a": (2, 5)}) == pytest.approx(5.5)
    assert model.predict({"c#0": (1, 1)}) == 6.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    graph = networks.network("residual", 16)
    (found,) = paired_latency([graph], device="cuda", seconds=0.1)
    assert found.median > 0 and layer_model(graph, "cuda", seconds=0.1).whole > 0
