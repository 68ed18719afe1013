"""Layers are found with their geometry and cost; what is not plainly a layer is left out."""

import pytest
import torch
from hypothesis import given
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from redpp_serve.capture.export import capture
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import InputSpec, Ref
from redpp_serve.graph.layers import find_layers, mac_count, parameter_count
from tests.support.networks import KINDS, Builder, few, network, networks, outputs


@given(networks())
@few
def test_macs_are_half_the_flops_that_torch_counts(graph):
    with FlopCounterMode(display=False) as counter:
        Program(graph)(*(torch.zeros(1, *i.shape) for i in graph.inputs))
    assert 2 * mac_count(graph) == counter.get_total_flops()


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
    assert (conv.shape, conv.stride, conv.padding, conv.dilation, conv.groups) == (
        (8, 2, 3, 5),
        (2, 1),
        (1, 2),
        (1, 2),
        2,
    )
    assert conv.is_conv and conv.positions == 5 * 5 and conv.macs == 25 * 8 * 2 * 15
    assert not linear.is_conv and linear.bias is None and linear.positions == 1 and linear.macs == 7 * 200


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


@pytest.mark.parametrize("make", [shared_weight, shared_bias, computed_weight, computed_bias])
def test_shared_or_computed_parameters_make_no_layer(make):
    graph = make()
    outputs(graph)  # a valid network
    assert [layer.name for layer in find_layers(graph)] == ["last"]


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_unique_and_in_order_of_execution(kind):
    graph = network(kind)
    names = [layer.name for layer in find_layers(graph)]
    assert len(set(names)) == len(names)
    assert names == [n.name for n in graph.nodes if n.op in ("aten.conv2d.default", "aten.linear.default")]
