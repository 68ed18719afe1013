"""One normal form: a module gives the same layers whichever way it was saved."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from redpp_serve.capture.export import capture
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import find_layers, mac_count
from tests.support.captures import lively, quick  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("quick")

Route = Callable[[nn.Module, Tensor], object]
INPUTS = (InputSpec("x", (3, 8, 8)),)
WEIGHTED = ("aten.conv", "aten.linear", "aten.group_norm", "aten.layer_norm")


class Picture(nn.Module):
    """Convolutions of all kinds, norms, and Linear on matrices and on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 8, 3, padding="same", dilation=2)
        self.even = nn.Conv2d(8, 8, 4, padding="same", groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1)
        self.reflect = nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")
        self.batch, self.group, self.layer = nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm(16)
        self.tokens, self.plain, self.head = nn.Linear(4, 16), nn.Linear(16, 5, bias=False), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.reflect(self.up(self.even(F.relu(self.group(self.batch(self.same(x)))))))
        y = self.layer(self.tokens(x.flatten(2).transpose(1, 2)))
        return self.head(y.mean(1)).softmax(1), self.plain(y).sum(1)


class Series(nn.Module):
    """The same in one dimension and in three."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = nn.Conv1d(3, 6, 5, stride=2, padding=2), nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1)
        self.deep, self.back = nn.Conv3d(4, 6, 3, padding=1), nn.ConvTranspose3d(6, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.up(F.relu(self.a(x.flatten(2)))))
        return self.back(F.relu(self.deep(x.unflatten(2, (4, 4, 4))))).mean((2, 3, 4))


def exported(module: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(module, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))


def loaded(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    data = io.BytesIO()
    torch.jit.save(module, data)
    data.seek(0)
    return torch.jit.load(data)


ROUTES: dict[str, Route] = {
    "core": lambda module, x: exported(module, x).run_decompositions(),
    "traced": lambda module, x: loaded(torch.jit.trace(module, (x,))),
    "scripted": lambda module, x: loaded(torch.jit.script(module)),
    "frozen trace": lambda module, x: loaded(torch.jit.freeze(torch.jit.trace(module, (x,)))),
    "frozen script": lambda module, x: loaded(torch.jit.freeze(torch.jit.script(module), optimize_numerics=False)),
}


def described(graph: Graph) -> tuple[object, ...]:
    layers = [(layer.shape, layer.positions, layer.groups) for layer in find_layers(graph)]
    return layers, mac_count(graph), [node.op for node in graph.nodes if node.op.startswith(WEIGHTED)]


@cache
def eager(kind: type[nn.Module]) -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    module = lively(kind())
    return module, capture(module, INPUTS, [])


FAST = {Picture: ("core", "frozen script"), Series: ("traced",)}
CASES = [
    pytest.param(kind, route, marks=() if route in FAST[kind] else pytest.mark.exhaustive)
    for kind in FAST
    for route in ROUTES
]


@pytest.mark.parametrize(("kind", "route"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_every_route_gives_the_same_layers(kind: type[nn.Module], route: str) -> None:
    module, wanted = eager(kind)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    graph = capture(ROUTES[route](module, x[:2]), INPUTS, [])  # type: ignore[arg-type]
    assert described(graph) == described(wanted)
    for mine, theirs in zip(Program(graph)(x), Program(wanted)(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    if not route.startswith("frozen"):
        assert [layer.name for layer in find_layers(graph)] == [layer.name for layer in find_layers(wanted)]


def linear(body: Callable[[nn.Module, Tensor], Tensor]) -> Graph:
    """The graph of a forward that uses a matrix (8, 5) and a vector (5,)."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m, self.b = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return body(self, x)

    return capture(Product().eval(), (InputSpec("x", (6, 8)),), [])


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: x @ net.m,
        lambda net, x: x @ net.m + net.b,
        lambda net, x: net.b + torch.matmul(x, net.m),
        lambda net, x: torch.einsum("bti,io->bto", x, net.m),
        lambda net, x: torch.einsum("...i,io->...o", x, net.m) + net.b,
        lambda net, x: torch.mm(x.reshape(-1, 8), net.m).view(-1, 6, 5),
        lambda net, x: torch.addmm(net.b, x.reshape(-1, 8), net.m).view(-1, 6, 5),
        lambda net, x: torch.bmm(x, net.m.expand(x.shape[0], 8, 5)),
        lambda net, x: x @ (net.m * 2),
        lambda net, x: x @ net.m.contiguous(),
    ],
)
def test_products_with_a_stored_matrix_are_linear(body: Callable[[nn.Module, Tensor], Tensor]) -> None:
    graph = linear(body)
    assert [node.op for node in graph.nodes] == ["aten.linear.default"]
    assert find_layers(graph)[0].shape == (5, 8)


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: net.m @ x[:, :5],  # the matrix is on the left
        lambda net, x: x @ x.mT,
        lambda net, x: torch.einsum("bti,io->bot", x, net.m),
        lambda net, x: torch.addmm(net.b, x[:, 0], net.m, beta=2),
        lambda net, x: torch.einsum("bti,to->bio", x, net.m[:6]),
    ],
)
def test_other_products_stay_what_they_are(body: Callable[[nn.Module, Tensor], Tensor]) -> None:
    assert not find_layers(linear(body))
