"""Operators that torch composes of others are taken apart, in whatever order networks are captured."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from redpp_serve.capture.export import capture
from redpp_serve.capture.written_out import _BAGS, _bags, _even_bags
from redpp_serve.channels.coupling import couple
from redpp_serve.graph.executor import value_types
from redpp_serve.graph.graph import InputSpec
from tests.support.captures import Net, captured

FRESH = """
import torch
from torch import nn
from redpp_serve.capture.export import capture
from redpp_serve.graph.graph import InputSpec
class Moved(nn.Module):
    def forward(self, x): return x.movedim(1, -1)
print([node.op for node in capture(Moved().eval(), [InputSpec("x", (3, 4))], []).nodes])
"""


@pytest.mark.exhaustive
def test_the_first_network_of_a_process() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['aten.permute.default']", done.stderr


def test_an_operator_without_shapes_on_the_meta_device() -> None:
    def there_and_back(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        window = torch.ones(64)
        return torch.istft(torch.stft(x, 64, 16, window=window, return_complex=True), 64, 16, window=window, length=256)

    graph = capture(Net(there_and_back).eval(), [InputSpec("x", (256,))], [])
    assert value_types(graph)[graph.outputs[0]] == ((1, 256), torch.float32)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0])
def test_an_embedding_bag_is_an_embedding_whose_rows_may_be_narrowed(mode: str, padding: int | None) -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(7, 6, mode=mode, padding_idx=padding)
    graph = captured(nn.Sequential(bag, nn.Linear(6, 3)).eval(), [InputSpec("x", (4,), "int64", ((0, 6),))])
    assert "aten.embedding.default" in {node.op for node in graph.nodes}
    (channel_set,) = couple(graph).open
    assert channel_set.channels == 6


@pytest.mark.parametrize("mode", range(3))
@pytest.mark.parametrize("padding", [-1, 2])
@pytest.mark.parametrize("starts", [[0, 4, 8], [0, 1, 7], [0, 0, 5]])
def test_bags_are_those_of_torch(mode: int, padding: int, starts: list[int]) -> None:
    """Also bags of padding alone, and empty ones."""
    ids, weight = torch.tensor([2, 2, 2, 2, 0, 1, 2, 3, 4, 2, 0, 1]), torch.randn(5, 3)
    rows = (weight, ids, torch.tensor(starts), False, mode, False, None, False, padding)
    expected = _BAGS[0](*rows)[0]
    torch.testing.assert_close(_bags(*rows)[0], expected)
    if starts == [0, 4, 8]:
        torch.testing.assert_close(_even_bags(*rows)[0], expected)
