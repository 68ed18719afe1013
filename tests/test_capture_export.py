"""Capture of modules: the graph computes what the network computes, or the network is refused in words."""

import logging
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.capture.arch import build as architecture
from redpp_serve.capture.arch import import_library
from redpp_serve.capture.export import capture
from redpp_serve.errors import RedppError
from redpp_serve.runtime.artifact import build, load
from redpp_serve.runtime.graph import Graph, InputSpec
from redpp_serve.runtime.model import serving_program
from redpp_serve.runtime.program import Program

IMAGE = (InputSpec("input_0", (3, 8, 8)),)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as the networks are small; and no listener, for which torch.export writes down its whole trace."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """A forward given as a function of the module and one input, with buffers by name."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **buffers: Tensor) -> None:
        super().__init__()
        self.body = body
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode, with statistics and zero-initialised weights such that every layer shows."""
    g = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.copy_(0.3 * torch.randn(part.num_features, generator=g))
            part.running_var.copy_(0.5 + torch.rand(part.num_features, generator=g))
    for parameter in module.parameters():
        if not parameter.detach().any():
            parameter.data.normal_(std=0.1, generator=g)
    return module.eval()


def captured(module: nn.Module, inputs: Sequence[InputSpec] = IMAGE, messages: list[str] | None = None) -> Graph:
    """The captured graph, after a check that it, its artifact and the server's form of it agree with the module."""
    torch.manual_seed(0)
    graph = capture(module, inputs, [] if messages is None else messages)
    loaded = load(build(graph, {})).graph
    for batch in (1, 4):
        x = [torch.randn(batch, *i.shape) if i.dtype == "float32" else torch.ones(batch, *i.shape, dtype=torch.int64)
             for i in inputs]  # fmt: skip
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(module(*(t.clone() for t in x)))
            for program in (Program(graph), Program(loaded), serving_program(loaded, torch.device("cpu"))):
                got = program(*(t.clone() for t in x))
                for mine, theirs in zip(got, expected, strict=True):
                    scale = float(theirs.abs().max())
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5 * scale + 1e-7)
    return graph


def refused(module: Any, says: str, inputs: Sequence[InputSpec] = IMAGE) -> None:
    with pytest.raises(RedppError) as caught:
        capture(module, inputs, [])
    assert says in str(caught.value)


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
        settings = [models.efficientnet.MBConvConfig(*s, 1.0, 1.0) for s in ((1, 3, 1, 16, 16, 1), (6, 5, 2, 16, 24, 2))]
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
    narrow = blocks.BasicConv2d(232, 16, kernel_size=1)
    return nn.Sequential(blocks.InceptionA(3, 8), narrow, blocks.InceptionC(16, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


FAMILIES = ["mobilenet", "densenet", "shufflenet", "efficientnet", "convnext", "vit", "swin", "googlenet", "inception"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_torchvision(family: str) -> None:
    captured(lively(small(family)), [InputSpec("x", (3, 32, 32))])


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_networks_of_torchvision(name: str) -> None:
    captured(lively(architecture(f"torchvision:{name}", {})), [InputSpec("x", (3, 64, 64))])


# --- in-place operators and views ---


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


BODIES = [in_place_then_read, through_a_view, read_by_an_older_view, one_part_of_two, masked_by_slices, assigned_by_mask,
          copied, dropped_then_changed, filled, to_its_input]  # fmt: skip


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


def test_infinite_outputs_are_compared() -> None:
    captured(Net(lambda net, x: torch.where(x > 0, x, -torch.inf)).eval())


# --- refusals ---


def test_wrong_inputs() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval()
    refused(network, "rejects a batch of inputs of shape 1x8x8:float32", [InputSpec("x", (1, 8, 8))])
    refused(network, "rejects a batch of inputs of shape 3x9x9:float32", [InputSpec("x", (3, 9, 9))])
    refused(network, "3x8x8:int64", [InputSpec("x", (3, 8, 8), "int64")])
    refused(network, "one --input for each argument", [*IMAGE, *IMAGE])


def counted(net: Any, x: Tensor) -> Tensor:
    net.count.add_(1)
    return x * net.count


def assigned(net: Any, x: Tensor) -> Tensor:
    net.count = net.count + 1
    return x * net.count


def averaged(net: Any, x: Tensor) -> Tensor:
    net.count[:1].mul_(0.9)
    return x * net.count


@pytest.mark.parametrize("body", [counted, assigned, averaged])
def test_a_forward_that_keeps_state(body: Callable[[Any, Tensor], Tensor]) -> None:
    refused(Net(body, count=torch.ones(1)).eval(), "changes a buffer")


def calls(count: list[int], x: Tensor) -> Tensor:
    count[0] += 1
    return x * count[0]


IMPURE: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "random": (lambda net, x: x + torch.rand(8), "operator aten.rand.default"),
    "dropout in eval mode": (lambda net, x: F.dropout(x, 0.5, True), "operator aten.dropout.default"),
    "state in Python": (lambda net, x, count=[0]: calls(count, x), "another result than the network"),  # noqa: B006
    "control by data": (lambda net, x: x * 2 if x.sum() > 0 else x, "data-dependent"),
    "torch.cond": (lambda net, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), "operator cond"),
    "fixed batch": (lambda net, x: x.view(2, 192), "batch"),
    "fixed batch by assertion": (lambda net, x: x if x.shape[0] == 2 else 1 / 0, "at batch size 1 it fails"),
    "mean over the batch": (lambda net, x: x - x.mean(0), "depends on the others in its batch"),
    "largest of the batch": (lambda net, x: x * x.amax(), "depends on the others in its batch"),
    "a number read from data": (lambda net, x: x * x.max().item(), "operator aten.item.default"),
    "no batch in the output": (lambda net, x: x.mean(), "an output of shape ()"),
    "constant output": (lambda net, x: (x, torch.zeros(5)), "output of shape (5,)"),
    "a number beside tensors": (lambda net, x: (x, 3), "an output is not a tensor"),
    "None beside tensors": (lambda net, x: (x, None), "an output is not a tensor"),
    "text": (lambda net, x: "text", "an output is not a tensor"),
    "Fourier transform": (lambda net, x: torch.fft.fft(x).real, "operator aten.fft_fft.default"),
    "rows shuffled": (lambda net, x: x.flip(0), "depends on the others in its batch"),
}


@pytest.mark.parametrize("case", IMPURE)
def test_what_is_no_function_of_one_input(case: str) -> None:
    body, says = IMPURE[case]
    refused(Net(body).eval(), says)


def test_batch_norm_by_batch_statistics() -> None:
    """Its answer to a request would depend on whose requests the server puts into the same batch."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    refused(network, "depends on the others in its batch")


def test_buffers_that_an_artifact_cannot_hold() -> None:
    refused(Net(lambda net, x: (x * net.c).abs(), c=torch.ones(1, dtype=torch.complex64)).eval(), "c is of type torch.complex64")
    refused(Net(lambda net, x: x * net.c.float(), c=torch.ones(1).to(torch.float8_e5m2)).eval(), "torch.float8_e5m2")


def test_a_library_call_that_fails_is_named() -> None:
    def broken(net: Any, x: Tensor) -> Tensor:
        raise LookupError("no such table\nsecond line")

    refused(Net(broken).eval(), "no such table. Expected")
