"""Blocks, devices and computed weights in a forward, and how what cannot be captured is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from redpp_serve.capture.export import capture
from redpp_serve.graph.graph import InputSpec
from redpp_serve.graph.layers import find_layers
from tests.support.captures import IMAGE, captured, lively, quick, refused  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("quick")

PLAIN = ["aten.conv2d.default", "aten.batch_norm.default", "aten.relu.default", "aten.mean.dim", "aten.linear.default"]


class Base(nn.Module):
    """A small classifier whose forward is given."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.f = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.h = nn.Linear(6, 4)

    def rest(self, x: Tensor) -> Tensor:
        return self.h(self.f(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def under(context: Callable[[], Any]) -> Callable[[Any, Tensor], Tensor]:
    def body(net: Any, x: Tensor) -> Tensor:
        with context():
            y = net.f(x)
        return net.h(y.float().mean((2, 3)))

    return body


def nested(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False), torch.no_grad():
        with torch.autocast("cpu", enabled=False):
            y = net.f(x)
        y = y.mean((2, 3))
    return net.h(y)


BODIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "to a device": lambda net, x: net.rest(x.to(net.h.weight.device)),
    "to a weight": lambda net, x: net.rest(x.to(net.h.weight)),
    "cpu": lambda net, x: net.rest(x.cpu()),
    "channels last": lambda net, x: net.rest(x.to(memory_format=torch.channels_last)),
    "device and dtype": lambda net, x: net.rest(x.to("cpu", torch.float32, non_blocking=True)),
    "no_grad": torch.no_grad()(lambda net, x: net.rest(x)),
    "no_grad block": under(torch.no_grad),
    "enable_grad block": under(torch.enable_grad),
    "inference_mode": torch.inference_mode()(lambda net, x: net.rest(x)),
    "inference_mode block": under(torch.inference_mode),
    "autocast off": under(lambda: torch.autocast("cpu", enabled=False)),
    "autocast of a GPU": under(lambda: torch.autocast("cuda", dtype=torch.float16)),
    "nested": nested,
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available", "ignore:User provided device_type")
def test_blocks_and_devices_vanish(body: str) -> None:
    assert [node.op for node in captured(lively(Base(BODIES[body]))).nodes] == PLAIN


def test_blocks_of_a_program_vanish() -> None:
    """A program exported with gradients keeps its no_grad blocks; the block's result is an output too."""

    def body(net: Any, x: Tensor) -> Any:
        with torch.no_grad():
            y = net.f(x).mean((2, 3))
        return y, net.h(y)

    module = lively(Base(body))
    program = torch.export.export(module, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: Dim.DYNAMIC},))
    assert [node.op for node in capture(program, IMAGE, []).nodes] == PLAIN


def test_autocast_that_changes_numbers_is_refused_by_name() -> None:
    refused(Base(under(lambda: torch.autocast("cpu", dtype=torch.bfloat16))).eval(), "autocast block")


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral, old": nn.utils.spectral_norm,
    "spectral": nn.utils.parametrizations.spectral_norm,
    "weight, old": nn.utils.weight_norm,
    "weight": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_computed_weights_are_weights(norm: str) -> None:
    wrap = NORMS[norm]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph = captured(nn.Sequential(wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), pool, wrap(nn.Linear(8, 4))).eval())
    assert [layer.shape for layer in find_layers(graph)] == [(8, 3, 3, 3), (4, 8)]
    assert not graph.buffers


@pytest.mark.parametrize("how", ["matrix_exp", "cayley", "householder"])
def test_orthogonal_weights_are_weights(how: str) -> None:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(12, 12), orthogonal_map=how)
    graph = captured(nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), layer).eval())
    assert [layer.shape for layer in find_layers(graph)] == [(12, 192), (12, 12)]


def when(net: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x * 2
    return x


def test_a_condition_on_data_is_refused_without_torchs_own_dump(capfd: pytest.CaptureFixture[str]) -> None:
    refused(nn.Sequential(Base(when)).eval(), "in module 0 (test_blocks.py:")
    assert capfd.readouterr().err == ""


def test_refusals_name_operator_module_and_line() -> None:
    refused(nn.Sequential(Base(lambda net, x: x + x.nonzero()[:1, :1])).eval(), "in module 0 (test_blocks.py:")
    refused(nn.Sequential(Base(lambda net, x: x + torch.rand(8))).eval(), "in module 0 (test_blocks.py:")
    refused(Base(lambda net, x: x + torch.randn_like(x)).eval(), "draws random numbers")
    refused(
        Base(lambda net, x: torch.vmap(torch.relu, out_dims=1)(x)).eval(), "shape (3, 2, 8, 8) (output_0) in module"
    )
    refused(Base(lambda net, x: net.h(net.f(x).mean((2, 3), True).squeeze())).eval(), "drops the batch dimension")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_recurrent_scripts() -> None:
    """A script of nn.LSTM itself has no forward; a trace in train mode without dropout draws nothing."""
    inputs = (InputSpec("x", (5, 3)),)
    refused(torch.jit.script(nn.LSTM(3, 4, batch_first=True)), "TorchScript of LSTM has no method forward", inputs)
    network = Base(lambda net, x: net.f(x)[0])
    network.f = nn.GRU(3, 4, batch_first=True)
    captured(torch.jit.trace(network.train(), torch.ones(2, 5, 3), check_trace=False), inputs)
