"""A packaged network as a module: named parameters, live batch norms, and everything that torch does with modules."""

import copy
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import redpp_serve
from redpp_serve.capture.export import capture
from redpp_serve.errors import RedppError
from redpp_serve.exporting.module import GraphModule, graph_module
from redpp_serve.graph import artifact
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.packaging.mar import read_artifact
from redpp_serve.runtime.model import ServingModel
from tests.support.small import SHAPE, network, randomise
from tests.support.small_networks import Small, Two


class Everything(nn.Module):
    """Parameters and buffers of every kind: shared, outside of layers, integer, floating point, and a cast dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4, momentum=None)
        self.gamma = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.register_buffer("scale", torch.tensor([0.5, 1.0, 2.0, 4.0]))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.second(self.first(x)) * self.scale)[:, self.order] * self.gamma
        return hidden + torch.arange(4, dtype=torch.float32)


def graph_of(module: nn.Module, *specs: InputSpec) -> Graph:
    return capture(module.eval(), specs, [])


@pytest.fixture(scope="module")
def small() -> Graph:
    return graph_of(network(), InputSpec("x", SHAPE))


def some(count: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_names_are_those_of_the_original_and_eval_is_what_the_graph_computes(small: Graph) -> None:
    module, original = GraphModule(small), network()
    assert {n: p.shape for n, p in module.named_parameters()} == {n: p.shape for n, p in original.named_parameters()}
    buffers = {name for name, _ in original.named_buffers() if not name.endswith("num_batches_tracked")}
    assert {name for name, _ in module.named_buffers()} == buffers
    assert all(p.requires_grad and p.is_leaf for p in module.parameters())
    assert not module.training
    with torch.no_grad():
        assert torch.equal(module(some()), Program(small)(some())[0])
        torch.testing.assert_close(module(some()), original(some()))


def test_training_uses_and_updates_statistics_as_the_original_does(small: Graph) -> None:
    module, original = GraphModule(small).train(), network().train()
    for net in (module, original):
        optimiser = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        for step in range(3):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(some(seed=step)), torch.arange(6) % 5).backward()
            optimiser.step()
    state = original.state_dict()
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, state[name])
    assert not torch.equal(module.get_buffer("stem.1.running_mean"), small.tensors["stem.1.running_mean"])
    trained = module.eval().graph()
    with torch.no_grad():
        assert torch.equal(Program(trained)(some())[0], module(some()))


def test_a_frozen_batch_norm_keeps_its_statistics(small: Graph) -> None:
    module = GraphModule(small).train()
    module.get_submodule("stem.1").eval()
    module(some())
    assert torch.equal(module.get_buffer("stem.1.running_mean"), small.tensors["stem.1.running_mean"])
    assert not torch.equal(module.get_buffer("body.1.running_mean"), small.tensors["body.1.running_mean"])
    with pytest.raises(ValueError, match="more than 1 value"):
        GraphModule(graph_of(Everything(), InputSpec("x", (4,)))).train()(torch.ones(1, 4))


def test_the_graph_is_not_changed_by_what_is_done_to_the_module(small: Graph) -> None:
    before = {name: tensor.clone() for name, tensor in small.tensors.items()}
    with torch.no_grad():
        for tensor in GraphModule(small).state_dict().values():
            tensor.add_(1)
    assert all(torch.equal(small.tensors[name], tensor) for name, tensor in before.items())


def test_shared_weights_stay_one_and_constants_are_buffers() -> None:
    original = Everything()
    module = GraphModule(graph_of(original, InputSpec("x", (4,))))
    names = {name for name, _ in module.named_parameters()}
    assert len(names & {"first.weight", "second.weight"}) == 1
    assert names - {"first.weight", "second.weight"} == {
        "first.bias",
        "second.bias",
        "norm.weight",
        "norm.bias",
        "gamma",
    }
    assert {"scale", "order", "norm.running_mean", "norm.running_var"} <= {name for name, _ in module.named_buffers()}
    x = torch.randn(3, 4)
    torch.testing.assert_close(module(x), original(x))
    weight = next(p for n, p in module.named_parameters() if n in ("first.weight", "second.weight"))
    with torch.no_grad():
        weight.mul_(2)
        original.first.weight.mul_(2)
    torch.testing.assert_close(module(x), original(x))
    before = module.get_buffer("norm.running_mean").clone()
    module.train()(x)
    assert not torch.equal(module.get_buffer("norm.running_mean"), before), "a cumulative average must move too"


def test_which_tensors_are_buffers_goes_through_the_artifact() -> None:
    graph = graph_of(Everything(), InputSpec("x", (4,)))
    data = artifact.build(graph, {}).data
    module, loaded = GraphModule(graph), GraphModule(artifact.load(data).graph)
    assert {n for n, _ in loaded.named_buffers()} == {n for n, _ in module.named_buffers()}
    unknown = Graph(graph.inputs, graph.tensors, graph.nodes, graph.outputs)
    assert "scale" in {name for name, _ in GraphModule(unknown).named_parameters()}
    assert "order" in {name for name, _ in GraphModule(unknown).named_buffers()}


def test_state_dicts_copies_and_files(small: Graph) -> None:
    module, other = GraphModule(small), GraphModule(small)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True)
    whole = io.BytesIO()
    torch.save(module, whole)
    again = torch.load(io.BytesIO(whole.getvalue()), weights_only=False)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        expected = module(some())
        assert not torch.equal(expected, GraphModule(small)(some()))
        for copied in (other, again, twin):
            assert torch.equal(copied(some()), expected)
        twin.get_parameter("head.weight").zero_()
        assert torch.equal(module(some()), expected), "a copy shares no tensor"
    double = copy.deepcopy(module).double()
    assert double(some().double()).dtype == torch.float64


def test_several_inputs_and_outputs_export_and_capture_again() -> None:
    graph = graph_of(randomise(Two()), InputSpec("image", (1, 8, 8)), InputSpec("vector", (4,)))
    module = GraphModule(graph)
    inputs = torch.randn(3, 1, 8, 8), torch.randn(3, 4)
    batch = torch.export.Dim("batch", min=1)
    shapes = ({0: batch}, {0: batch})
    exported = torch.export.export(module, inputs, dynamic_shapes=(shapes,))
    with torch.no_grad():
        for mine, theirs in zip(module(*inputs), exported.module()(*inputs), strict=True):
            assert torch.equal(mine, theirs)
    assert {"conv.weight", "head.bias"} <= set(exported.state_dict)
    again = capture(module, graph.inputs, [])
    assert set(again.tensors) == set(graph.tensors) and again.buffers == graph.buffers
    with pytest.raises(TypeError, match=r"2 inputs \(image, vector\)"):
        module(inputs[0])


@pytest.mark.parametrize("version", ["original", "pruned"])
def test_a_package_gives_its_networks_back(packaged: Path, version: str) -> None:
    module = redpp_serve.load(packaged, version)
    graph = read_artifact(packaged / f"{version}.mar").graph
    with torch.no_grad():
        assert torch.equal(module(some()), Program(graph)(some())[0])
    assert module.get_parameter("body.0.weight").shape[0] == {"original": 16, "pruned": 8}[version]
    assert all(p.dtype == torch.float32 for p in module.parameters())
    served = redpp_serve.load(str(packaged), version, serving=True)
    assert isinstance(served.model, ServingModel) and served.model.batches == (1, 2, 4)
    torch.testing.assert_close(served(some()), module(some()), rtol=1e-4, atol=1e-4)


def test_refusals(packaged: Path, tmp_path: Path) -> None:
    with pytest.raises(RedppError, match="no version 'newest'.*original or pruned"):
        redpp_serve.load(packaged, "newest")
    with pytest.raises(RedppError, match=r"pruned\.mar cannot be read"):
        redpp_serve.load(tmp_path)


@pytest.mark.parametrize("name", ["forward", "a..b", "_parameters", "train.weight", "x."])
def test_names_that_no_module_can_have_are_refused(small: Graph, name: str) -> None:
    graph = replace(small, tensors={**small.tensors, name: torch.ones(2)})
    with pytest.raises(RedppError, match="name cannot be used"):
        graph_module(graph)


def test_a_module_of_random_weights_differs() -> None:
    """The comparisons above can fail: other weights give other outputs."""
    one, two = (GraphModule(graph_of(randomise(Small(), seed), InputSpec("x", SHAPE))) for seed in (0, 1))
    assert not torch.allclose(one(some()), two(some()))
