"""Layers are found with their calls, windows and cost; what is not plainly a layer stays for a reason."""

import math

import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.coverage import smallest
from benchmarks.coverage_networks import NETWORKS
from redpp_serve.capture.export import capture
from redpp_serve.graph import operators
from redpp_serve.graph.einsum import contractions
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import InputSpec, Ref
from redpp_serve.graph.layers import RECURRENT, Window, find_layers, find_products, mac_count, parameter_count
from tests.support.layer_networks import EXAMPLES, recurrent_graph
from tests.support.networks import KINDS, Builder, few, network, networks, outputs


def flops(graph):
    """The operations of the graph as torch counts them, two for each multiply-accumulate."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        Program(graph)(*(torch.zeros(1, *i.shape, dtype=getattr(torch, i.dtype)) for i in graph.inputs))
    return counter.get_total_flops()


@given(networks())
@few
def test_macs_are_half_the_flops_that_torch_counts(graph):
    assert 2 * mac_count(graph) == flops(graph)


@given(networks())
@few
def test_value_shapes_are_those_of_a_real_run(graph):
    names = [node.name for node in graph.nodes]
    values = Program(graph, names)(*(torch.zeros(1, *i.shape) for i in graph.inputs))
    expected = {name: tuple(v.shape) for name, v in zip(names, values, strict=True)}
    assert value_shapes(graph) == value_shapes(graph, "cpu") == expected


def test_geometry_of_a_strided_grouped_dilated_convolution():
    module = nn.Sequential(
        nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        nn.Flatten(),
        nn.Linear(8 * 5 * 5, 7, bias=False),
    ).eval()
    conv, linear = find_layers(capture(module, [InputSpec("x", (4, 10, 9))], []))
    assert (conv.name, conv.weight, conv.bias) == ("0", "0.weight", "0.bias")
    assert conv.shape == (8, 2, 3, 5) and conv.window == Window((2, 1), (1, 2), (1, 2), 2, (0, 0))
    assert (conv.axis, conv.inputs, conv.outputs, conv.taps, conv.unknowns) == (1, 4, 8, 15, 30)
    assert conv.positions == 5 * 5 and conv.macs == 25 * 8 * 2 * 15
    assert linear.axis == -1 and linear.bias is None and linear.positions == 1 and linear.macs == 7 * 200


def test_a_linear_over_tokens_counts_each_token():
    layer = find_layers(network("tokens", 8))[0]
    assert layer.positions == 6 and layer.macs == 6 * 5 * 8


def test_parameters_are_all_floating_values():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
    assert parameter_count(capture(module, [InputSpec("x", (1, 5, 5))], [])) == 4 * 9 + 4 + 4 * 4


def shared_weight():
    b = Builder(5)
    b.linear("x", "a", 5, 5)
    b.op("again", "linear.default", Ref("a"), Ref("a.weight"))
    return b.graph(b.linear("again", "last", 5, 2))


def shared_bias():
    b = Builder(5)
    b.linear("x", "a", 5, 5)
    b.op("b", "linear.default", Ref("a"), b.tensor("b.weight", b.random(5, 5)), Ref("a.bias"))
    return b.graph(b.linear("b", "last", 5, 2))


def computed_weight():
    b = Builder(5)
    b.op("w", "mul.Tensor", b.tensor("a.raw", b.random(5, 5)), 2.0)
    b.op("a", "linear.default", Ref("x"), Ref("w"))
    return b.graph(b.linear("a", "last", 5, 2))


def computed_bias():
    b = Builder(5)
    b.op("s", "mul.Tensor", b.tensor("a.raw", b.random(5)), 2.0)
    b.op("a", "linear.default", Ref("x"), b.tensor("a.weight", b.random(5, 5)), Ref("s"))
    return b.graph(b.linear("a", "last", 5, 2))


def weight_read_otherwise():
    b = Builder(5)
    b.linear("x", "a", 5, 5)
    b.op("sum", "add.Tensor", Ref("a"), b.op("row", "select.int", Ref("a.weight"), 0, 0) and Ref("row"))
    return b.graph(b.linear("sum", "last", 5, 2))


@pytest.mark.parametrize(
    ("make", "stays"),
    [
        (shared_weight, {"a": "the calls that share its weight add different biases", "last": ""}),
        (shared_bias, {"a": "its bias is shared with other calls", "b": "its bias is shared with other calls"}),
        (computed_bias, {"a": "its bias is computed"}),
    ],
)
def test_layers_with_odd_biases_stay_for_a_reason(make, stays):
    graph = make()
    outputs(graph)  # a valid network
    assert {layer.name: layer.stays for layer in find_layers(graph)} == {**stays, "last": ""}
    assert mac_count(graph) == flops(graph) // 2


@pytest.mark.parametrize(
    ("make", "reason"),
    [(computed_weight, "its weight is computed"), (weight_read_otherwise, "its weight is read in other ways too")],
)
def test_a_weight_that_makes_no_layer_is_named_and_counted(make, reason):
    graph = make()
    outputs(graph)  # a valid network
    assert [layer.name for layer in find_layers(graph)] == ["last"]
    assert [(product.node.name, product.reason) for product in find_products(graph)] == [("a", reason)]
    assert mac_count(graph) == 5 * 5 + 5 * 2 == flops(graph) // 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_macs_of_every_kind_of_layer(name):
    graph = EXAMPLES[name].graph()
    assert 2 * mac_count(graph) == flops(graph) > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", list(NETWORKS)[::7])  # `benchmarks.coverage` counts them all
def test_macs_of_the_networks_that_people_deploy(arch):
    module, side = smallest(arch)
    graph = capture(module, [InputSpec("x", (3, side, side))], [])
    recurrent = sum(layer.macs for layer in find_layers(graph) if layer.is_recurrent)  # torch does not count them
    assert 2 * (mac_count(graph) - recurrent) == pytest.approx(flops(graph), rel=0.01)


def test_a_shared_weight_is_one_layer_with_all_its_calls():
    layers = {layer.name.split(".")[-1]: layer for layer in find_layers(EXAMPLES["pyramid"].graph())}
    assert [call.positions for call in layers["hidden"].calls] == [256, 64, 16]
    assert layers["hidden"].positions == 336 and layers["hidden"].macs == 336 * 12 * 8 * 9
    assert [len(layers[name].calls) for name in ("stem", "hidden", "out")] == [1, 3, 3]
    assert not any(layer.stays for layer in layers.values())


def test_transposed_convolutions_and_embeddings_know_their_channels():
    first, _, last = find_layers(EXAMPLES["generator2d"].graph())
    assert (first.inputs, first.outputs, first.out_dim, first.unknowns) == (8, 12, 1, 8 * 16)
    assert last.window == Window((2, 2), (1, 1), (1, 1), 1, (1, 1)) and last.axis == 1
    back = next(layer for layer in find_layers(EXAMPLES["grouped1d"].graph()) if layer.is_transposed)
    assert (back.shape, back.groups, back.inputs, back.outputs) == ((12, 6, 2), 4, 12, 24)
    weight = torch.randn(back.shape)
    assert torch.equal(back.by_output(weight)[7], weight[3:6, 1])
    table = find_layers(EXAMPLES["bag"].graph())[0]
    assert (table.inputs, table.outputs, table.macs, table.axis) == (50, 16, 0, -1)


def test_padding_by_a_word_becomes_numbers():
    same = [layer.window.padding for layer in find_layers(EXAMPLES["same"].graph())]
    assert same == [(1, 1), (2, 2), (0, 0)]


def test_matrices_of_recurrent_operators_are_layers_that_stay(monkeypatch):
    monkeypatch.setattr(operators, "ALLOWED", operators.ALLOWED | RECURRENT)
    layers = find_layers(recurrent_graph())
    assert [(x.name, x.bias, x.macs) for x in layers] == [
        ("rnn.weight_ih_l0", "rnn.bias_ih_l0", 6 * 32 * 4),
        ("rnn.weight_hh_l0", "rnn.bias_hh_l0", 6 * 32 * 8),
        ("hidden", "hidden.bias", 6 * 8),
        ("head", "head.bias", 6 * 2),
    ]
    assert [x.stays for x in layers] == ["a recurrent operator stays whole"] * 2 + [""] * 2


EINSUMS = {
    "bid,bjd->bij": [(2, 3, 5), (2, 4, 5)],
    "bhid,bhjd,bhjk->bhik": [(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 6)],
    "...ij,jk->...ik": [(2, 3, 4), (4, 5)],
    "b...i,b...i->b...": [(2, 3, 4), (2, 3, 4)],
    "bi,bj->bij": [(2, 3), (2, 4)],
    "bij->bji": [(2, 3, 4)],
    "bchw, bkhw -> bck": [(1, 2, 3, 4), (1, 5, 3, 4)],
    "ij,jk": [(3, 4), (4, 5)],
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_an_einsum_multiplies_what_torch_counts(equation):
    shapes = EINSUMS[equation]
    with FlopCounterMode(display=False) as counter:
        torch.einsum(equation, *(torch.zeros(shape) for shape in shapes))
    terms = contractions(equation, [(str(k), shape) for k, shape in enumerate(shapes)])
    assert 2 * sum(math.prod(shapes[int(k)][axis] for k, axis in term) for term in terms) == counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_unique_and_in_order_of_execution(kind):
    graph = network(kind)
    names = [layer.name for layer in find_layers(graph)]
    assert len(set(names)) == len(names)
    assert names == [n.name for n in graph.nodes if n.op in ("aten.conv2d.default", "aten.linear.default")]
