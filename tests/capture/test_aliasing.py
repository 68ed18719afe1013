"""In-place operators: the captured graph has none, and what they wrote is read under every name and view."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.graph.executor import Program
from tests.support.captures import Net, captured, lively, quick, refused  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("quick")


def in_place_then_read(net: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = y
    y.add_(1)
    F.relu(y, inplace=True)
    return z + y  # `z` is `y`


def through_a_view(net: Any, x: Tensor) -> Tensor:
    y = x * 2
    y.view(y.shape[0], -1).clamp_(max=50.0)  # rare values: a comparison on random inputs would not notice
    return y * 1.0


def read_by_an_older_view(net: Any, x: Tensor) -> Tensor:
    y = x * 2
    part = y[:, 0]
    y.add_(1)
    return part + y[:, 1]


def one_part_of_two(net: Any, x: Tensor) -> Tensor:
    first, second = (x * 2).chunk(2, 3)
    first.mul_(3)
    return torch.cat([first, second], 3)


def masked_by_slices(net: Any, x: Tensor) -> Tensor:
    mask = x.new_zeros((8, 8))
    for k, rows in enumerate((slice(0, 3), slice(3, 8))):
        mask[rows, 2:] = k + 1
    return net.norm(x) + mask


def assigned_by_mask(net: Any, x: Tensor) -> Tensor:
    y = x * 2
    y[y > 0.5] = -1.0
    return y


def copied(net: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:].copy_(x[:, :2])
    return y


def dropped_then_changed(net: Any, x: Tensor) -> Tensor:
    y = x * 2
    F.dropout(y, 0.5, net.training).add_(1)  # in eval mode dropout returns `y` itself
    return y


def filled(net: Any, x: Tensor) -> Tensor:
    return x + torch.empty(8).fill_(0.5) + torch.zeros(8) + torch.arange(8)


def to_its_input(net: Any, x: Tensor) -> Tensor:
    x.add_(1)
    return x * 2


BODIES = [
    in_place_then_read,
    through_a_view,
    read_by_an_older_view,
    one_part_of_two,
    masked_by_slices,
    assigned_by_mask,
    copied,
    dropped_then_changed,
    filled,
    to_its_input,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_in_place_operators_become_functions(body: Callable[[Any, Tensor], Tensor]) -> None:
    net = Net(body)
    net.norm = nn.BatchNorm2d(3)
    graph = captured(lively(net))
    x = torch.full((2, 3, 8, 8), 40.0)  # 80 after doubling: past the clamp
    with torch.no_grad():
        torch.testing.assert_close(Program(graph)(x.clone())[0], net(x.clone()))
    assert not any(node.op.split(".")[1].endswith("_") for node in graph.nodes)


def test_batch_norm_stays_one_operator_beside_writes_to_views() -> None:
    net = Net(masked_by_slices)
    net.norm = nn.BatchNorm2d(3)
    graph = captured(lively(net))
    (norm,) = [node for node in graph.nodes if "norm" in node.op]
    assert norm.op == "aten.batch_norm.default" and norm.args[5] is False and norm.args[7] == 1e-5


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU])
def test_in_place_activations(activation: type[nn.Module]) -> None:
    """Also as the first layer, where it writes into the network's input."""
    captured(nn.Sequential(activation(inplace=True), nn.Conv2d(3, 4, 3), activation(inplace=True)).eval())


def counted(net: Any, x: Tensor) -> Tensor:
    net.count.add_(1)
    return x * net.count


def assigned(net: Any, x: Tensor) -> Tensor:
    net.count = net.count + 1
    return x * net.count


def averaged(net: Any, x: Tensor) -> Tensor:
    net.count[:1].mul_(0.9)
    return x * net.count


@pytest.mark.parametrize(
    ("body", "says"),
    [(counted, "changes count"), (assigned, "a pure function of its inputs"), (averaged, "changes count")],
)
def test_a_forward_that_keeps_state(body: Callable[[Any, Tensor], Tensor], says: str) -> None:
    refused(Net(body, count=torch.ones(1)).eval(), says)
