"""Which channels may go: exactly those with one producer and known readers, with a reason for all others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Builder, difference, few, inner_of, network, networks, permuted
from torch import nn

from redpp_serve.capture.export import capture
from redpp_serve.graph.channels import find_inner_channels
from redpp_serve.runtime.graph import InputSpec, Ref

FOUND = {
    "chain": ["stem", "inner", "second"], "residual": ["inner"], "depthwise": ["inner"], "flatten": ["stem", "inner"],
    "mlp": ["inner", "second"], "tokens": ["inner", "second"], "branches": ["stem", "inner"], "bare": ["stem", "inner", "second"],
}  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_each_kind_has_its_inner_channels_and_a_reason_for_every_other_layer(kind):
    graph = network(kind)
    found, closed = find_inner_channels(graph)
    assert [inner.producer.name for inner in found] == FOUND[kind]
    assert all(closed.values()) and not set(closed) & set(FOUND[kind])


@given(networks(), st.data())
@few
def test_every_set_can_be_permuted_without_changing_the_function(graph, data):
    """The definition of coupling: if a tensor were missing from a set, this would change the outputs."""
    for inner in find_inner_channels(graph)[0]:
        order = torch.tensor(data.draw(st.permutations(range(inner.channels))))
        assert difference(graph, permuted(graph, order, inner.producer.name)) < 1e-12


def test_the_parts_of_a_depthwise_block():
    inner = inner_of(network("depthwise", 8))
    assert [layer.name for layer in inner.depthwise] == ["spatial"]
    assert set(inner.per_channel) == {
        "inner.weight", "spatial.weight", "spatial.bias",
        *(f"{bn}.{part}" for bn in ("inner_bn", "spatial_bn") for part in ("weight", "bias", "running_mean", "running_var")),
    }  # fmt: skip
    assert [(layer.name, columns) for layer, columns in inner.consumers] == [("second", 1)]


def test_a_flatten_gives_a_channel_all_its_positions():
    assert [(layer.name, columns) for layer, columns in inner_of(network("flatten", 8)).consumers] == [("head", 6)]


def test_all_readers_are_found():
    assert {layer.name for layer, _ in inner_of(network("branches", 8)).consumers} == {"left", "right", "aux"}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("inner", "excluded"), ("inn*", "excluded"), ("second", "second is excluded"), ("spat*", "spatial")],
)
def test_exclude_names_the_producer_or_any_other_layer_of_the_set(pattern, reason):
    found, closed = find_inner_channels(network("depthwise"), [pattern])
    assert not found and reason in closed["inner"]


class Cases(nn.Module):
    """conv -> something -> conv or Linear."""

    def __init__(self, between, reader):
        super().__init__()
        self.first, self.between, self.reader = nn.Conv2d(3, 8, 3, padding=1), between, reader

    def forward(self, x):
        return self.reader(self.between(self.first(x)))


class Lambda(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


CLOSED = {
    "concatenated": (Lambda(lambda x: torch.cat([x, x], 1)), nn.Conv2d(16, 4, 1), "concatenated"),
    "added to itself": (Lambda(lambda x: x + x.relu()), nn.Conv2d(8, 4, 1), "residual"),
    "multiplied": (Lambda(lambda x: x * x.sigmoid()), nn.Conv2d(8, 4, 1), "multiplied"),
    "group norm": (nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1), "normalised across channels"),
    "grouped reader": (nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2), "reader"),
    "depthwise multiplier": (nn.ReLU(), nn.Conv2d(8, 16, 1, groups=8), "reader"),
    "linear over the width": (nn.ReLU(), nn.Linear(8, 4), "along another axis"),
    "flatten from the start": (Lambda(lambda x: x.flatten(2)), nn.Linear(64, 4), "not known"),
    "mean over a channel axis": (Lambda(lambda x: x.mean((1, 2))), nn.Linear(8, 4), "not known"),
    "pool with indices": (nn.AdaptiveMaxPool2d(1), nn.Conv2d(8, 4, 1), "not known"),
    "transposed": (Lambda(lambda x: x.transpose(1, 3)), nn.Conv2d(8, 4, 1), "not known"),
}


@pytest.mark.parametrize("case", CLOSED)
def test_what_cannot_be_proved_is_closed_with_a_reason(case):
    between, reader, reason = CLOSED[case]
    graph = capture(Cases(between, reader).eval(), [InputSpec("x", (3, 8, 8))], [])
    found, closed = find_inner_channels(graph)
    assert not found and reason in closed["first"]


OPEN = {
    "pools": (nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, 4)),
    "activations": (
        nn.Sequential(nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.LeakyReLU(0.1)),
        nn.Conv2d(8, 4, 3),
    ),
    "dropout": (nn.Sequential(nn.Dropout(), nn.Dropout2d()), nn.Conv2d(8, 4, 1)),
    "norm after pooling": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8)), nn.Linear(8, 4)),
    "mean": (Lambda(lambda x: x.mean((-2, -1)).relu()), nn.Linear(8, 4)),
}


@pytest.mark.parametrize("case", OPEN)
def test_channelwise_operators_keep_channels_open(case):
    graph = capture(Cases(*OPEN[case]).eval(), [InputSpec("x", (3, 8, 8))], [])
    found, _ = find_inner_channels(graph)
    assert [(inner.producer.name, inner.consumers[0][0].name) for inner in found] == [("first", "reader")]


def test_a_batch_norm_over_tokens_is_not_one_over_the_features():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.reader = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

        def forward(self, x):  # (N, 6 tokens, 5)
            return self.reader(self.norm(self.first(x)))

    found, closed = find_inner_channels(capture(Tokens().eval(), [InputSpec("x", (6, 5))], []))
    assert not found and "batch_norm" in closed["first"]


def test_a_convolution_that_reads_tokens_as_channels_closes_them():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.reader = nn.Linear(5, 6), nn.Conv2d(6, 4, 1)

        def forward(self, x):  # (N, 6, 3, 5)
            return self.reader(self.first(x))

    found, closed = find_inner_channels(capture(Mixed().eval(), [InputSpec("x", (6, 3, 5))], []))
    assert not found and "another axis" in closed["first"]


def test_channels_that_are_an_output_or_share_a_batch_norm_stay():
    b = Builder(3, 4, 4)
    first = b.norm(b.conv("x", "first", 3, 4), "bn", 4)
    second = b.conv(first, "second", 4, 4)
    b.op("again", "batch_norm.default", Ref(second), *(Ref(f"bn.{k}") for k in ("weight", "bias", "running_mean", "running_var")),
         False, 0.1, 1e-5, True)  # fmt: skip
    last = b.conv("again", "last", 4, 4)
    found, closed = find_inner_channels(b.graph(last, second))
    assert not found
    assert "batch norm is shared" in closed["first"] and "output" in closed["second"] and "output" in closed["last"]


def test_depthwise_and_grouped_producers_say_so():
    b = Builder(4, 4, 4)
    x = b.conv(b.conv("x", "depthwise", 4, 4, groups=4), "grouped", 4, 4, groups=2)
    _, closed = find_inner_channels(b.graph(b.conv(x, "last", 4, 2)))
    assert closed["depthwise"].startswith("depthwise") and closed["grouped"] == "grouped convolution"


class Viewed(nn.Module):
    """The idiom x.view(x.size(0), -1) between a convolution and a Linear, or another shape that is no flatten."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.conv, self.shape = nn.Conv2d(3, 8, 3, padding=1), shape
        self.fc = nn.Linear(8 * 16 if shape == (-1,) else 16, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).view(x.size(0), *self.shape))


def test_a_view_that_flattens_is_followed():
    graph = capture(Viewed(-1).eval(), [InputSpec("x", (3, 4, 4))], [])
    (inner,), closed = find_inner_channels(graph)
    assert [(reader.name, columns) for reader, columns in inner.consumers] == [("fc", 16)] and set(closed) == {"fc"}


def test_another_view_closes_the_channels():
    _, closed = find_inner_channels(capture(Viewed(8, 16).eval(), [InputSpec("x", (3, 4, 4))], []))
    assert "reshape" in closed["conv"]
