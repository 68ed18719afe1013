"""Capture of modules: the graph computes what the network computes, or the network is refused in words."""

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.capture.arch import build as architecture
from redpp_serve.capture.arch import import_library
from redpp_serve.capture.export import capture
from redpp_serve.graph.graph import InputSpec
from tests.support.captures import IMAGE, Net, captured, lively, quick, refused  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("quick")

# --- torchvision: whole networks where small, else the family with fewer layers of each kind ---


def small(family: str) -> nn.Module:
    models = import_library("torchvision").models
    if family == "mobilenet":
        return models.MobileNetV2(7, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]])
    if family == "densenet":
        return models.DenseNet(8, (2, 2), 16, num_classes=7)
    if family == "shufflenet":
        return models.ShuffleNetV2([1, 2, 1], [8, 16, 32, 32, 64], num_classes=7)
    if family == "efficientnet":
        blocks = (1, 3, 1, 16, 16, 1), (6, 5, 2, 16, 24, 2)
        settings = [models.efficientnet.MBConvConfig(*block, 1.0, 1.0) for block in blocks]
        return models.EfficientNet(settings, 0.2, num_classes=7)
    if family == "convnext":
        blocks = [models.convnext.CNBlockConfig(16, 24, 2), models.convnext.CNBlockConfig(24, None, 1)]
        return models.ConvNeXt(blocks, num_classes=7)
    if family == "vit":
        return models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=7)
    if family == "swin":
        return models.SwinTransformer([4, 4], 8, [2, 2], [1, 2], [4, 4], num_classes=7)
    if family == "googlenet":
        block = import_module("torchvision.models.googlenet").Inception  # `models.googlenet` is the function
        return nn.Sequential(block(3, 8, 8, 8, 4, 8, 8), block(32, 8, 8, 8, 4, 8, 8))
    blocks = models.inception
    first, narrow, last = blocks.InceptionA(3, 8), blocks.BasicConv2d(232, 16, kernel_size=1), blocks.InceptionC(16, 4)
    return nn.Sequential(first, narrow, last, nn.AdaptiveAvgPool2d(1), nn.Flatten())


OFTEN = ["densenet", "efficientnet"]
SELDOM = ["mobilenet", "shufflenet", "convnext", "vit", "swin", "googlenet", "inception"]
FAMILIES = [*OFTEN, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in SELDOM)]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_torchvision(family: str) -> None:
    captured(lively(small(family)), [InputSpec("x", (3, 32, 32))])


@pytest.mark.parametrize("name", ["squeezenet1_1", pytest.param("resnet18", marks=pytest.mark.exhaustive)])
def test_networks_of_torchvision(name: str) -> None:
    captured(lively(architecture(f"torchvision:{name}", {})), [InputSpec("x", (3, 64, 64))])


def test_views_of_convolutions_survive_any_layout() -> None:
    """A view of a contiguous tensor may have none in channels-last layout, which the server uses."""
    net = Net(lambda net, x: net.conv(x).view(x.shape[0], -1))
    net.conv = nn.Conv2d(3, 5, 3)
    captured(net.eval())


# --- eval mode, dropout ---


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout])
@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_is_removed(kind: type[nn.Module], inplace: bool) -> None:
    graph = captured(nn.Sequential(nn.Conv2d(3, 4, 3), kind(0.5, inplace), nn.ReLU()).eval())
    assert [node.op for node in graph.nodes] == ["aten.conv2d.default", "aten.relu.default"]


def test_train_mode_is_switched_off_with_a_message() -> None:
    messages: list[str] = []
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    captured(network.train(), messages=messages)
    assert len(messages) == 1 and "train mode" in messages[0] and not network.training
    again: list[str] = []
    captured(network, messages=again)
    assert again == []


def test_one_part_in_train_mode_is_noticed() -> None:
    messages: list[str] = []
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    network[1].train()
    captured(network, messages=messages)
    assert len(messages) == 1


# --- inputs, outputs, names ---


def test_several_inputs_and_nested_outputs() -> None:
    class Two(nn.Module):
        def forward(self, image: Tensor, bias: Tensor) -> Any:
            return image + bias[:, None, None], [bias * 2, {"sum": image.sum((1, 2, 3))}]

    graph = captured(Two().eval(), [*IMAGE, InputSpec("input_1", (8,))])
    assert [i.name for i in graph.inputs] == ["image", "bias"] and len(graph.outputs) == 3


def test_inputs_through_varargs() -> None:
    class Any_(nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return (x[0] + x[1]).view(x[0].shape[0], -1)

    captured(Any_().eval(), [*IMAGE, InputSpec("input_1", (3, 8, 8))])


def test_integer_inputs() -> None:
    network = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(20, 3))
    assert captured(network.eval(), [InputSpec("ids", (5,), "int64")]).inputs[0].dtype == "int64"


def test_a_buffer_named_as_the_input() -> None:
    graph = captured(Net(lambda net, x: x * net.x, x=torch.full((1,), 3.0)).eval())
    assert "x" in graph.tensors and graph.inputs[0].name == "x_input"


def test_tied_weights_and_constants() -> None:
    net = Net(lambda net, x: net.b(F.relu(net.a(x))) * torch.tensor([2.0, -1.0, 0.5])[:, None, None])
    net.a = nn.Conv2d(3, 3, 3, padding=1)
    net.b = nn.Conv2d(3, 3, 3, padding=1)
    net.b.weight = net.a.weight
    captured(net.eval())


def test_computed_weights() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    captured(lively(nn.Sequential(conv, nn.BatchNorm2d(4))))


def test_half_precision() -> None:
    network = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).half()
    graph = capture(network, [InputSpec("x", (3, 8, 8), "float16")], [])
    assert graph.tensors["0.weight"].dtype is torch.float16
    refused(network, "rejects a batch of inputs of shape 3x8x8:float32")


# --- refusals ---


def test_wrong_inputs() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval()
    refused(network, "rejects a batch of inputs of shape 1x8x8:float32", [InputSpec("x", (1, 8, 8))])
    refused(network, "rejects a batch of inputs of shape 3x9x9:float32", [InputSpec("x", (3, 9, 9))])
    refused(network, "3x8x8:int64", [InputSpec("x", (3, 8, 8), "int64")])
    refused(network, "one --input for each argument", [*IMAGE, InputSpec("input_1", (3, 8, 8))])


def counted(net: Any, x: Tensor) -> Tensor:
    return x.reshape(len(x), 3, 64)


def stacked(net: Any, x: Tensor) -> Tensor:
    return torch.stack([row * 2 for row in x])


@pytest.mark.parametrize(("body", "what"), [(counted, "len(x)"), (stacked, "a loop over x")])
def test_a_batch_that_becomes_a_number_is_named(body: Any, what: str) -> None:
    refused(Net(body).eval(), f"size of its batch for a number, as {what} in module Net (test_export.py:")
    refused(Net(lambda net, x: x.reshape(int(x.shape[0]), 192)).eval(), "was captured for batches of 2 alone")


def test_numbers_that_give_nan_are_refused() -> None:
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        conv = norm(nn.Conv2d(3, 4, 3))
        direction = next(parameter for name, parameter in conv.named_parameters() if name.endswith(("original1", "_v")))
        direction.data[2] = 0
        refused(nn.Sequential(conv).eval(), "as NaN, for 0.")
    network = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    network[1].running_var[3] = -0.25
    refused(network, "1.running_var has variances down to -0.25")


def test_a_forward_that_ends_the_program_is_refused() -> None:
    def leaves(net: Any, x: Tensor) -> Tensor:
        raise SystemExit(0)

    refused(Net(leaves).eval(), "it ends the program, with SystemExit(0) in module Net (test_export.py:")


def test_buffers_that_an_artifact_cannot_hold() -> None:
    for dtype in (torch.complex64, torch.float8_e5m2):
        net = Net(lambda net, x: (x * net.c.to(torch.complex64)).abs(), c=torch.ones(1).to(dtype))
        refused(net.eval(), f"c is of type {dtype}")


def test_a_library_call_that_fails_is_named() -> None:
    def broken(net: Any, x: Tensor) -> Tensor:
        raise LookupError("no such table\nsecond line")

    refused(Net(broken).eval(), "no such table in module Net (test_export.py:")
