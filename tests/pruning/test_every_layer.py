"""Every kind of layer is merged exactly, fitted, hashed, split and narrowed; a network without any is told so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.coverage import planted
from redpp_serve.capture.export import capture
from redpp_serve.channels.coupling import couple
from redpp_serve.errors import GateFailed
from redpp_serve.graph import operators
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import RECURRENT, find_layers, mac_count
from redpp_serve.graph.passes import fold_batch_norm
from redpp_serve.options import Options
from redpp_serve.pruning.effort import Effort
from redpp_serve.pruning.fit import Fitting, quick_fit, reconstruct
from redpp_serve.pruning.matching import SynthesisBudget
from redpp_serve.pruning.merging import merge_exact
from redpp_serve.pruning.observation import observe, select
from redpp_serve.pruning.pipeline import Pruned, prune
from tests.support.layer_networks import EXAMPLES, Called, recurrent_graph

EFFORT = Effort(SynthesisBudget(48, 16, 2, 8, 16), frontier_points=2, pace=1e-4)
OPENS = {name: example for name, example in EXAMPLES.items() if name != "attention"}


def inputs_of(graph: Graph, count: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(50, (count, *i.shape), generator=generator)
        if i.dtype == "int64"
        else torch.randn(count, *i.shape, generator=generator)
        for i in graph.inputs
    )


@torch.no_grad()
def gap(a: Graph, b: Graph, count: int = 3, dtype: torch.dtype = torch.float64) -> float:
    """The relative difference of the outputs."""
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs_of(a, count, 5))
    pairs = list(zip(Program(a.to(dtype))(*inputs), Program(b.to(dtype))(*inputs), strict=True))
    lost = sum(float((x - y).square().sum()) for x, y in pairs)
    return float((lost / sum(float(x.square().sum()) for x, _ in pairs)) ** 0.5)


@pytest.mark.parametrize("name", OPENS)
def test_planted_duplicates_are_merged_exactly(name: str) -> None:
    exact = couple(OPENS[name].graph().to(torch.float64))
    graph, count = planted(exact)
    merged = merge_exact(exact.with_tensors(graph.tensors), 1)
    assert merged.removed == count > 0
    assert gap(graph, merged.graph) < 1e-12


@pytest.mark.parametrize("name", OPENS)
def test_norms_fold_into_every_layer(name: str) -> None:
    graph = OPENS[name].graph()
    folded = fold_batch_norm(graph)
    assert gap(graph, folded) < 1e-6
    norms = sum(node.op == "aten.batch_norm.default" for node in folded.nodes)
    assert norms == 0 or name == "pyramid_norms"


def two(first: nn.Module, second: nn.Module, *shape: int) -> Graph:
    """Two layers, the first of whose channels all follow from half of them."""
    torch.manual_seed(0)
    module = nn.Sequential(first, second).eval()
    low_rank(first)
    return capture(module, [InputSpec("x", shape)], [])


def low_rank(layer: nn.Module) -> None:
    weight = layer.weight.data
    out = 1 if isinstance(layer, (nn.modules.conv._ConvTransposeNd, nn.Embedding)) else 0
    half = weight.shape[out] // 2
    rows = weight.movedim(out, 0)
    mix = torch.randn(half, half)
    rows[half:] = (mix @ rows[:half].flatten(1)).view(rows[half:].shape)
    if getattr(layer, "bias", None) is not None:
        layer.bias.data[half:] = mix @ layer.bias.data[:half]


def shared() -> Graph:
    def forward(parts: nn.ModuleDict, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([parts["second"](parts["first"](x)).mean(2) for x in (a, F.relu(b))], 1)

    module = Called(forward, first=nn.Conv1d(3, 8, 3), second=nn.Conv1d(8, 4, 3, padding=1)).eval()
    low_rank(module.parts["first"])
    return capture(module, [InputSpec("a", (3, 20)), InputSpec("b", (3, 20))], [])


def bag() -> Graph:
    module = EXAMPLES["bag"].module()
    low_rank(module.parts["table"])
    return capture(module, [InputSpec("x", (9,), "int64")], [])


LOW_RANK = {
    "conv1d": lambda: two(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 5, stride=2, dilation=2), 3, 40),
    "conv2d same": lambda: two(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding="same"), 3, 10, 10),
    "conv3d": lambda: two(nn.Conv3d(2, 8, 2), nn.Conv3d(8, 4, (1, 3, 2), padding=(0, 1, 0)), 2, 5, 6, 6),
    "transposed1d": lambda: two(nn.ConvTranspose1d(3, 8, 3), nn.ConvTranspose1d(8, 4, 4, 2, 1), 3, 20),
    "transposed2d": lambda: two(
        nn.ConvTranspose2d(3, 8, 2, stride=2), nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1), 3, 6, 6
    ),
    "transposed3d": lambda: two(nn.ConvTranspose3d(2, 8, 2), nn.ConvTranspose3d(8, 4, 2, 2), 2, 3, 3, 3),
    "shared": shared,
    "embedding": bag,
}


@pytest.mark.parametrize("name", LOW_RANK)
def test_fitted_readers_make_up_for_channels_that_follow_from_others(name: str) -> None:
    graph = LOW_RANK[name]()
    coupling, inputs = couple(graph), inputs_of(graph, 48)
    observed = observe(coupling, inputs)
    channel_set = coupling.open[0]
    kept = {channel_set.name: select(observed)[channel_set.name].kept(channel_set.channels // 2)}
    cut, quick = coupling.narrow(kept), quick_fit(observed, kept)
    fitted, _ = reconstruct(Fitting(graph, coupling, inputs, inputs_of(graph, 24, 1)), kept, quick)
    assert gap(graph, cut, 16, torch.float32) > 0.05
    assert gap(graph, quick, 16, torch.float32) < 0.02
    assert gap(graph, fitted, 16, torch.float32) < 0.01


def run(graph: Graph, **how: object) -> Pruned:
    limits = {} if "max_error" in how or "method" in how else {"max_error": 10.0}
    options = Options(distil=0.0, time_budget=60.0, round_to=1, accept_unmeasured=True, **limits, **how)
    return prune(graph, options, effort=EFFORT)


@pytest.mark.parametrize(
    ("name", "how", "most"),
    [
        ("tcn", {"keep": 0.5}, 0.45),
        ("generator1d", {"target_macs": 0.6}, 0.6),
        ("shared_linear", {"max_error": 0.5}, 1.0),
        ("bag", {"keep": 0.5}, 0.45),
        ("siamese", {"method": "red++"}, 1.0),
    ],
    ids=str,
)
def test_a_run_over_a_network_of_such_layers_alone(name: str, how: dict[str, object], most: float) -> None:
    graph = EXAMPLES[name].graph()
    result = run(graph, **how)
    assert mac_count(result.pruned) <= most * mac_count(graph)
    layers = {layer.name: layer for layer in find_layers(graph)}
    assert {layer.name for layer in result.layers if layer.hash} == set(layers)
    assert {layer.name for layer in result.layers if layer.split} == {
        n for n, x in layers.items() if not x.is_embedding
    }


HOWS: list[dict[str, object]] = [{"keep": 0.5}, {"target_macs": 0.8}, {"max_error": 0.1}, {}, {"method": "red++"}]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "how"), [(name, HOWS[k % len(HOWS)]) for k, name in enumerate(EXAMPLES)], ids=str)
def test_a_run_over_every_kind_of_layer(name: str, how: dict[str, object]) -> None:
    graph = EXAMPLES[name].graph()
    if "target_macs" in how and not couple(graph).open:
        with pytest.raises(GateFailed, match="no channel set is open"):
            run(graph, **how)
        return
    assert mac_count(run(graph, **how).pruned) <= how.get("target_macs", 1.0) * mac_count(graph)


def test_a_recurrent_operator_is_hashed_and_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "ALLOWED", operators.ALLOWED | RECURRENT)
    graph = recurrent_graph()
    result = run(graph, keep=0.5)
    shapes = {layer.name: (layer.shape, layer.pruned_shape) for layer in result.layers}
    assert shapes["rnn.weight_ih_l0"] == ([32, 4], [32, 4]) and shapes["hidden"] == ([6, 8], [3, 8])
    assert {layer.name for layer in result.layers if layer.hash} == set(shapes)


def test_a_target_out_of_reach_names_what_stays() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        return parts["out"](torch.relu(parts["hidden"]((x @ x.transpose(1, 2)) @ x)))

    module = Called(forward, hidden=nn.Linear(8, 8), out=nn.Linear(8, 2)).eval()
    graph = capture(module, [InputSpec("x", (64, 8))], [])
    with pytest.raises(GateFailed, match=r"the narrowest network still has 0\.9.* is in layers and products whose"):
        run(graph, target_macs=0.5)


def test_a_network_without_any_layer_stays_and_says_so() -> None:
    graph = capture(nn.Sequential(nn.ReLU(), nn.Softmax(1)), [InputSpec("x", (6,))], [])
    for how in ({"keep": 0.5}, {"max_error": 0.1}, {}):
        result = run(graph, **how)
        assert mac_count(result.pruned) == 0 and result.layers == [] and result.choice.narrowed is None
    with pytest.raises(GateFailed, match="no channel set is open"):
        run(graph, target_macs=0.5)
