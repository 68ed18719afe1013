"""Channels that do not depend on the input go without a trace: zero ones, constants, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as masks

from redpp_serve.capture.export import capture
from redpp_serve.channels.coupling import couple
from redpp_serve.graph.graph import Graph, InputSpec, Ref
from redpp_serve.graph.layers import find_layers, mac_count
from redpp_serve.graph.operators import resolve
from redpp_serve.inspection import describe_network
from redpp_serve.options import Options
from redpp_serve.pruning.constant_channels import _NAMES, find_constants
from redpp_serve.pruning.constants import add_constant
from redpp_serve.pruning.merging import Merged, merge_exact
from redpp_serve.pruning.pipeline import prune
from redpp_serve.pruning.verification import exact_error
from tests.support.layer_networks import EXAMPLES, Called
from tests.support.networks import Builder, difference
from tests.support.small import captured, network, write_model


def merged(graph: Graph, step: int = 1) -> Merged:
    """Merge in float64, and check that nothing else than rounding has changed."""
    result = merge_exact(couple(graph.to(torch.float64)), step)
    assert difference(graph, result.graph) < 1e-12
    return result


def graph_of(module: nn.Module, *shape: int) -> Graph:
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(part.bias)
    return capture(module.eval(), [InputSpec("x", shape)], [])


class OfIntegers(nn.Module):
    """A convolution with a channel of zeros, behind a step from bytes to floats."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step, self.first, self.second = step, nn.Conv2d(1, 16, 3), nn.Conv2d(16, 4, 3)
        with torch.no_grad():
            self.first.weight[3] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(self.step(x)))).mean((2, 3))


TO_FLOATS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float() / 255,
    "to": lambda x: x.to(torch.float32).sub(127.5),
    "type_as": lambda x: x.type_as(torch.zeros(1)),
    "division": lambda x: x / 255,
    "product": lambda x: x * (1 / 255),
    "keyword": lambda x: x.to(dtype=torch.get_default_dtype()),
    "one_hot": lambda x: F.one_hot(x.long(), 256).float().movedim(-1, 1)[:, 7],
    "eq": lambda x: x.eq(7).float(),
}


@pytest.mark.parametrize("step", TO_FLOATS)
def test_integers_that_become_floats_inside_of_the_network(step: str):
    graph = capture(OfIntegers(TO_FLOATS[step]).eval(), [InputSpec("x", (1, 9, 9), "uint8")], [])
    coupling = couple(graph)
    precise = coupling.with_tensors(graph.to(torch.float64).tensors)
    result = merge_exact(precise, 1)
    assert result.constant == 1 and exact_error(precise.graph, result.graph, graph, seed=0) < 1e-12


class Residual(nn.Module):
    """Two residual blocks and a head, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        conv = lambda n_in, n_out: nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)  # noqa: E731
        self.stem, self.first, self.second = conv(3, 8), conv(8, 16), conv(16, 8)
        self.third, self.fourth = conv(8, 16), conv(16, 8)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (8, 16, 8, 16, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        norms = self.norms
        x = F.relu(norms[0](self.stem(x)))
        x = F.relu(x + norms[2](self.second(F.relu(norms[1](self.first(x))))))
        x = F.relu(x + norms[4](self.fourth(F.relu(norms[3](self.third(x))))))
        return self.head(x.mean((2, 3)))


def test_half_of_the_channels_masked_as_torch_does_it() -> None:
    torch.manual_seed(0)
    module = Residual()
    for layer in (module.first, module.third):
        masks.ln_structured(layer, "weight", 0.5, 2, 0)
        masks.remove(layer, "weight")
    graph = graph_of(module, 3, 8, 8)
    result = merged(graph)
    shapes = {layer.name: layer.shape for layer in find_layers(result.graph)}
    # with padding one channel of each set stays where it is not zero, and takes over the others
    assert 14 <= result.constant == result.removed <= 16
    assert shapes["first"][0] <= 9 and shapes["fourth"][1] <= 9 and shapes["stem"][0] == 8
    assert mac_count(result.graph) < 0.65 * mac_count(graph)
    for part in module.norms:
        part.bias.data.clamp_(max=-2)  # so that ReLU makes all of them zero
        part.running_mean.zero_()
    result = merged(capture(module.eval(), [InputSpec("x", (3, 8, 8))], []))
    assert result.constant == 16 and all(x.bias is None for x in find_layers(result.graph)[:-1])


def test_the_widths_stay_multiples_of_the_step() -> None:
    torch.manual_seed(0)
    module = Residual()
    module.first.weight.data[:5] = 0
    result = merged(graph_of(module, 3, 8, 8), 4)
    assert {x.name: x.shape for x in find_layers(result.graph)}["first"] == (12, 8, 3, 3) and result.constant == 4


def test_a_norm_with_a_scale_of_zero_leaves_a_constant() -> None:
    torch.manual_seed(0)
    module = Residual()
    module.norms[1].weight.data[::2] = 0
    assert merged(graph_of(module, 3, 8, 8)).constant >= 7


UNPADDED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "mlp": (nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 3, bias=False)), (5,)),
    "tokens": (nn.Sequential(nn.Linear(5, 12), nn.SiLU(), nn.Linear(12, 3)), (7, 5)),
    "conv1d": (nn.Sequential(nn.Conv1d(2, 12, 3), nn.BatchNorm1d(12), nn.ELU(), nn.Conv1d(12, 3, 3)), (2, 12)),
    "conv3d": (nn.Sequential(nn.Conv3d(2, 12, 3), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(12, 3, 1)), (2, 6, 6, 6)),
    "to a norm": (
        nn.Sequential(nn.Conv2d(2, 12, 3), nn.Tanh(), nn.Conv2d(12, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
                      nn.Conv2d(6, 2, 1)),
        (2, 9, 9),
    ),
    "flattened": (nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 3)), (2, 6, 6)),
    "transposed first": (nn.Sequential(nn.ConvTranspose2d(2, 12, 3), nn.ReLU(), nn.Conv2d(12, 3, 1)), (2, 5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNPADDED)
def test_without_padding_every_constant_channel_goes(name: str) -> None:
    torch.manual_seed(1)
    module, shape = UNPADDED[name]
    nn.init.normal_(module[0].bias)
    if isinstance(module[0], nn.ConvTranspose2d):
        module[0].weight.data[:, :5] = 0
    else:
        module[0].weight.data[:5] = 0
    result = merged(graph_of(module, *shape))
    assert (result.constant, result.removed) == (5, 5)


def gate(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    y = F.relu(parts["first"](x))
    y = y * torch.sigmoid(parts["up"](F.relu(parts["down"](y.mean((2, 3), keepdim=True)))))
    return parts["last"](y)


def test_zero_stays_zero_behind_a_gate_and_a_constant_does_not() -> None:
    torch.manual_seed(0)
    module = Called(
        gate, first=nn.Conv2d(3, 12, 3), down=nn.Conv2d(12, 4, 1), up=nn.Conv2d(4, 12, 1), last=nn.Conv2d(12, 2, 3)
    )
    first = module.parts["first"]
    first.weight.data[:6] = 0
    first.bias.data[:3] = -1.0
    first.bias.data[3:6] = 1.0
    assert merged(graph_of(module, 3, 8, 8)).constant == 3


def test_what_follows_from_constants_alone_is_constant_too() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    module[0].weight.data[:4] = 0
    module[2].weight.data[:3, 4:] = 0  # read the constants alone
    assert merged(graph_of(module, 5)).constant == 7


def test_a_border_that_differs_is_no_constant() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 2, 1)
    )
    module[0].weight.data[:4] = 0
    nn.init.constant_(module[0].bias, 1.0)
    assert merged(graph_of(module, 3, 8, 8)).constant == 0
    module[0].bias.data[:4] = 0
    module[2].bias.data[:4] = 0
    assert merged(graph_of(module, 3, 8, 8)).constant == 4


@pytest.mark.parametrize("name", ["siamese", "pyramid", "pyramid_norms", "repeated", "shared_linear"])
def test_shared_layers(name: str) -> None:
    module = EXAMPLES[name].module()
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)) and part.weight.shape[0] > 4:
            part.weight.data[:4] = 0
    specs = [InputSpec(f"x{k}", shape) for k, shape in enumerate(EXAMPLES[name].shapes)]
    result = merged(capture(module, specs, []))
    assert result.constant > 0


def constants_apart(readers: nn.Module) -> nn.Module:
    """Make a network whose second layer has two channels that differ in what they read of a constant alone."""
    torch.manual_seed(0)
    module = nn.Sequential()
    module.add_module("conv2d_1", nn.Conv2d(3, 8, 3))
    module.add_module("act", nn.ReLU())
    module.add_module("second", readers)
    module.add_module("last", nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 1)))
    second = readers[0] if isinstance(readers, nn.Sequential) else readers
    module.conv2d_1.weight.data[0], module.conv2d_1.bias.data[0] = 0, 1
    second.weight.data[1] = second.weight.data[2] = second.weight.data[0]
    second.weight.data[1, 0] += 3
    if second.bias is not None:
        second.bias.data[1] = second.bias.data[2] = second.bias.data[0]
    return module.eval()


@pytest.mark.parametrize(
    "readers",
    [
        nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, bias=False),
        nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
    ],
)  # fmt: skip
def test_channels_that_read_a_constant_differently_are_not_equal(readers: nn.Module) -> None:
    module = constants_apart(readers)
    result = merged(capture(module, [InputSpec("x", (3, 8, 8))], []))
    assert (result.constant, result.removed) == (1, 2)


def test_a_new_bias_has_a_name_of_its_own_and_the_type_of_the_weights() -> None:
    """The second call is named conv2d_1, as the first module is, which has a bias."""
    module = constants_apart(nn.Conv2d(8, 8, 1, bias=False))
    result = prune(capture(module, [InputSpec("x", (3, 8, 8))], []), Options(method="red++", hash="none", round_to=1))
    assert {t.dtype for t in result.pruned.tensors.values()} == {torch.float32}
    assert len(find_layers(result.pruned)) == 3 and all(layer.bias for layer in find_layers(result.pruned))
    assert difference(result.original, result.pruned) < 1e-5


def test_a_norm_takes_no_constant_of_a_layer_that_is_an_output_too() -> None:
    torch.manual_seed(0)

    def forward(parts: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
        y = parts["second"](F.relu(parts["first"](x)))
        return y, parts["norm"](y)

    module = Called(forward, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 4, 1, bias=False), norm=nn.BatchNorm2d(4))
    module.parts["first"].weight.data[0], module.parts["first"].bias.data[0] = 0, 1
    assert merged(graph_of(module, 3, 8, 8)).constant == 1


def test_a_bias_that_two_layers_add_takes_no_constant_of_one() -> None:
    b = Builder(3, 6, 6)
    b.conv("x", "first", 3, 4)
    b.op("second", "conv2d.default", Ref("x"), b.tensor("second.weight", b.random(4, 3, 3, 3)), Ref("first.bias"))
    b.conv("x", "third", 3, 4)
    graph = b.graph("first", "second", "third")
    assert add_constant(graph, "first", torch.ones(4)) is graph is add_constant(graph, "second", torch.ones(4))
    torch.testing.assert_close(
        add_constant(graph, "third", torch.ones(4)).tensors["third.bias"], graph.tensors["third.bias"] + 1
    )


def _needed(name: str) -> int:
    """How many arguments a call cannot do without."""
    return sum(not argument.has_default_value() for argument in resolve(f"aten.{name}")._schema.arguments)


def test_operators_pass_a_nan_on() -> None:
    """A NaN among 80 numbers, so that vectorised code meets it too, at every place of a vector."""
    layout = ("reshape", "permute", "unsqueeze", "contiguous", "clone", "cat")
    simple = [name for name in _NAMES.split() if name.endswith(".default") and name.split(".")[0] not in layout]
    unary = [name for name in simple if _needed(name) == 1]
    assert len(unary) > 12
    for place in range(80):
        x = torch.linspace(0.1, 8, 80, dtype=torch.float64)
        x[place] = torch.nan
        for name in unary:
            y = resolve(f"aten.{name}")(x)
            assert y.isnan()[place] and y.isnan().sum() == 1, name
    for name, args in {
        "max_pool2d": ([3, 3], [1, 1], [1, 1]), "avg_pool2d": ([3, 3], [1, 1], [1, 1]),
        "adaptive_avg_pool2d": ([1, 1],), "max_pool1d": ([3],), "max_pool3d": ([2, 2, 2],),
    }.items():  # fmt: skip
        shape = {"max_pool1d": (1, 4, 40), "max_pool3d": (1, 4, 6, 6, 6)}.get(name, (1, 4, 9, 9))
        x = torch.randn(shape, dtype=torch.float64)
        x[0, 1] = torch.nan
        y = resolve(f"aten.{name}.default")(x, *args)
        assert y[0, 1].isnan().all() and y.isnan().sum() == y[0, 1].numel(), name


def test_inspect_tells_how_many_there_are(tmp_path: Path) -> None:
    module = network()
    assert "constant channels" not in describe_network(captured(write_model(tmp_path, module)), ()).to_text()
    module.body[0].weight.data[:4] = 0
    found = describe_network(captured(write_model(tmp_path, module)), ())
    assert found.facts["constant channels"] == (
        "3 of 24, from weights of zero: packaging leaves them out exactly"
    ) or found.facts["constant channels"].startswith("4 of 24")


def test_a_network_without_zeros_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redpp_serve.pruning.constant_channels._values", lambda *args: pytest.fail("ran"))
    assert find_constants(couple(graph_of(Residual(), 3, 8, 8))).count == 0
