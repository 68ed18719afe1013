"""LSTM, GRU and RNN stay whole, work in every precision, and read no memory but their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redpp_serve.channels.coupling import couple
from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec
from redpp_serve.graph.layers import parameter_count
from redpp_serve.graph.operators import resolve
from redpp_serve.graph.passes import in_precision
from redpp_serve.graph.recurrent import SEQUENCES
from tests.support.captures import captured, quick  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("quick")

SERIES = (InputSpec("x", (5, 8)),)


class Sequence(nn.Module):
    """A recurrent layer over (N, 5, 8), and a Linear."""

    def __init__(self, layer: nn.Module, width: int, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.r, self.h, self.read = layer, nn.Linear(width, 3), read

    def forward(self, x: Tensor) -> Tensor:
        if not self.r.batch_first:
            return self.h(self.r(x.transpose(0, 1))[0].transpose(0, 1))
        return self.h(self.read(self.r(x)))


LAYERS: dict[str, tuple[nn.Module, int, Callable[[Any], Tensor]]] = {
    "LSTM": (nn.LSTM(8, 6, batch_first=True), 6, lambda out: out[0]),
    "its state": (nn.LSTM(8, 6, batch_first=True), 6, lambda out: out[1][0][-1]),
    "both ways": (nn.LSTM(8, 6, bidirectional=True, batch_first=True), 12, lambda out: out[0]),
    "projected": (nn.LSTM(8, 9, 2, proj_size=4, dropout=0.5, batch_first=True), 4, lambda out: out[0]),
    "no bias": (nn.LSTM(8, 6, 2, bias=False, batch_first=True), 6, lambda out: out[0]),
    "time first": (nn.LSTM(8, 6), 6, lambda out: out[0]),
    "GRU": (nn.GRU(8, 6, 2, bidirectional=True, batch_first=True), 12, lambda out: out[0]),
    "RNN": (nn.RNN(8, 6, batch_first=True), 6, lambda out: out[0]),
    "RNN with ReLU": (nn.RNN(8, 6, nonlinearity="relu", batch_first=True), 6, lambda out: out[1][-1]),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layers_stay_whole(name: str) -> None:
    network = Sequence(*LAYERS[name]).eval()
    graph = captured(network, SERIES)
    assert sum(node.op in SEQUENCES for node in graph.nodes) == 1
    assert parameter_count(graph) == sum(p.numel() for p in network.parameters())


class Cells(nn.Module):
    """Three kinds of cells, stepped by hand from states of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.gated, self.plain = nn.LSTMCell(8, 6), nn.GRUCell(6, 6), nn.RNNCell(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], 6)
        g = x.new_zeros(x.size(0), 6)
        for t in range(3):
            h, c = self.long(x[:, t], (h, c))
            g = self.gated(h, g)
        return self.plain(g)


def test_cells() -> None:
    captured(Cells().eval(), SERIES)


def test_channels_that_a_recurrent_layer_reads_stay_and_say_why() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
            self.r, self.h = nn.GRU(16, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(self.r(self.b(self.a(x).relu()).relu().flatten(1, 2).transpose(1, 2))[0])

    graph = captured(Reader().eval(), (InputSpec("x", (1, 4, 6)),))
    coupling = couple(graph)
    assert any("stays whole" in reason or "gru" in reason for reason in coupling.closed_layers.values())
    assert [found.name for found in coupling.open] == ["a"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_half_precision(name: str, precision: str) -> None:
    graph = captured(Sequence(*LAYERS[name]).eval(), SERIES)
    x = torch.randn(2, 5, 8)
    (exact,), (rounded,) = Program(graph)(x), Program(in_precision(graph, precision))(x)
    assert rounded.dtype is torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.05)


@torch.no_grad()
def test_weights_of_other_sizes_are_not_read_past_their_end() -> None:
    """torch reads as many weights as the state calls for, from whatever memory follows."""
    lstm = resolve("aten.lstm.input")
    x, state = torch.randn(2, 5, 8), [torch.zeros(1, 2, 6), torch.zeros(1, 2, 6)]
    weights, options = [torch.randn(24, 8), torch.randn(24, 6), torch.randn(24), torch.randn(24)], (True, 1, 0.0)
    whole = (*options, False, False, True)
    lstm(x, state, weights, *whole)
    wrong: list[tuple[Any, ...]] = [
        (x, state, [w[:4] for w in weights], *whole),
        (x, state, [weights[0][:, :2].contiguous(), *weights[1:]], *whole),
        (x, state, weights[:3], *whole),
        (x, state, [*weights[:2], torch.randn(2), torch.randn(2)], *whole),
        (x, [torch.zeros(1, 2, 600), torch.zeros(1, 2, 600)], weights, *whole),
        (x, [torch.zeros(1, 1, 6), torch.zeros(1, 1, 6)], weights, *whole),
        (x, [state[0]], weights, *whole),
        (x[0], state, weights, *whole),
        (x, state, weights, True, 3, 0.0, False, True, True),
    ]
    for arguments in wrong:
        with pytest.raises(RedppError, match="lstm with states and weights"):
            lstm(*arguments)


@torch.no_grad()
def test_a_file_cannot_switch_dropout_on() -> None:
    network = nn.LSTM(8, 6, 2, batch_first=True)
    state = [torch.zeros(2, 2, 6), torch.zeros(2, 2, 6)]
    arguments = (
        torch.randn(2, 5, 8),
        state,
        [p.detach() for p in network.parameters()],
        True,
        2,
        0.9,
        True,
        False,
        True,
    )
    first, second = (resolve("aten.lstm.input")(*arguments)[0] for _ in range(2))
    assert torch.equal(first, second)
