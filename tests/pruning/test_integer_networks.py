"""Trained networks that read integers keep their accuracy on inputs that nothing here has seen."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec
from redpp_serve.options import Options
from redpp_serve.pruning.pipeline import Pruned, prune
from redpp_serve.reference import catalog

pytestmark = pytest.mark.exhaustive
TOKENS, CLASSES, LENGTH = 1000, 8, 20
CARDINALITIES = (3, 40, 7, 500, 2)


class Text(nn.Module):
    """A classifier of sequences of tokens with a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(TOKENS, 64), nn.Linear(64, CLASSES)
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head((x + self.second(torch.relu(self.first(x)))).mean(1))


class Rows(nn.Module):
    """A classifier of rows of categories, each column of another cardinality."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count, 8) for count in CARDINALITIES)
        self.body = nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 4))

    def forward(self, row: Tensor) -> Tensor:
        return self.body(torch.cat([table(row[:, k]) for k, table in enumerate(self.tables)], 1))


class Bytes(nn.Module):
    """The digits' ResNet-20 with its normalisation inside."""

    def __init__(self) -> None:
        super().__init__()
        self.network = catalog.load("digits_resnet20")

    def forward(self, x: Tensor) -> Tensor:
        return self.network(catalog.DIGITS.normalise(x))


def texts(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw texts (count, 20) of which a third of the tokens come from the group of their class."""
    groups = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(5)).view(CLASSES, -1)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    own = groups[labels][torch.arange(count)[:, None], torch.randint(0, groups.shape[1], (count, LENGTH))]
    any_token = torch.randint(0, TOKENS, (count, LENGTH), generator=generator)
    return torch.where(torch.rand(count, LENGTH, generator=generator) < 0.35, own, any_token), labels


def rows(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw rows (count, 5) whose class is that of a sum of effects of their categories."""
    fixed = torch.Generator().manual_seed(3)
    effects = [torch.randn(n, 4, generator=fixed) for n in CARDINALITIES]
    drawn = torch.stack([torch.randint(0, n, (count,), generator=generator) for n in CARDINALITIES], 1)
    return drawn, sum(effect[drawn[:, k]] for k, effect in enumerate(effects)).argmax(1)


def trained(network: nn.Module, draw, steps: int = 400) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(steps):
        x, labels = draw(128, generator)
        optimiser.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimiser.step()
    return network.eval()


def outputs(result: Pruned, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return Program(result.original)(x)[0], Program(result.pruned)(x)[0]


@pytest.mark.parametrize(("network", "draw", "name"), [(Text, texts, "ids"), (Rows, rows, "row")])
def test_the_reported_error_holds_for_what_the_network_was_trained_on(network, draw, name):
    torch.manual_seed(0)
    module = trained(network(), draw)
    x, labels = draw(2000, torch.Generator().manual_seed(2))
    result = prune(capture(module, [InputSpec(name, tuple(x.shape[1:]), "int64")], []), Options())
    original, pruned = outputs(result, x)
    centred = original - original.mean(0)
    error = float((pruned - pruned.mean(0) - centred).norm() / centred.norm())
    assert error <= 2 * result.verify.output_error <= 0.4 and result.counting.kernel != result.counting.dense
    right = [float((y.argmax(1) == labels).double().mean()) for y in (original, pruned)]
    assert right[0] > 0.7 and right[1] > right[0] - 0.02
    assert float((original.argmax(1) == pruned.argmax(1)).double().mean()) > 0.96


def test_a_network_of_bytes_keeps_its_accuracy():
    x, labels = catalog.held_out("digits")
    images = (255 * (x * catalog.DIGITS.std + catalog.DIGITS.mean)).round().to(torch.uint8)
    result = prune(
        capture(Bytes().eval(), [InputSpec("x", (1, 32, 32), "uint8")], []), Options(distil=0, time_budget=30)
    )
    _, pruned = outputs(result, images)
    assert float((pruned.argmax(1) == labels).double().mean()) >= 0.99
    assert sum(layer.macs for layer in result.layers) and result.verify.output_error < 0.1
