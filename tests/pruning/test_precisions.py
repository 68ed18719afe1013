"""Eight bits for all layers, or for all but depthwise ones: what a limit of the error decides."""

import pytest
import torch
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.pruning.precisions import Precisions, measure_precisions

INPUTS = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Separable(nn.Module):
    """A depthwise convolution whose channels have ranges that are ``spread`` times apart."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.first, self.each = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=16)
        self.last = nn.Linear(16, 10)
        with torch.no_grad():
            factor = torch.logspace(0, 1, 16, spread)[:, None, None, None]
            self.first.weight *= factor
            self.each.weight /= factor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.each(self.first(x)).mean((2, 3)))
        return y


def measured(spread: float, limit: float) -> Precisions:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        graph: Graph = capture(Separable(spread).eval(), [InputSpec("x", (3, 12, 12))], [])
    return measure_precisions(graph, [INPUTS[:48]], {"others": [INPUTS[48:]]}, limit)


def test_a_limit_that_all_layers_keep_leaves_none_wide() -> None:
    strict, easy = measured(100.0, 0.0), measured(100.0, 10.0)
    assert len(easy.ranges) > len(strict.ranges) and "wide" not in easy.records["int8"].note
    assert strict.records["int8"].note == "depthwise layers in fp32"
    assert strict.records["int8"].error < 0.5 * easy.records["int8"].error


def test_a_limit_that_wide_layers_keep_has_them_wide() -> None:
    every, wide = measured(10.0, 10.0).records["int8"].error, measured(10.0, 0.0)
    assert wide.records["int8"].note == "", "half of the error is not won"
    other = measured(10.0, 0.9 * every)
    assert other.records["int8"].error < every and other.records["int8"].note == "depthwise layers in fp32"


@pytest.mark.parametrize("limit", [0.0, 10.0])
def test_all_layers_alike_without_depthwise_ones(limit: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5)).eval()
    graph = capture(network, [InputSpec("x", (3, 12, 12))], [])
    found = measure_precisions(graph, [INPUTS[:48]], {"others": [INPUTS[48:]]}, limit)
    assert found.records["int8"].note == "" and 0 < found.records["int8"].error < 0.1
