"""Every rule of the ONNX builder against torch, in both engines, at batch sizes that shapes were not found with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.engines import processor
from redpp_serve.engines.onnx_builder import to_onnx
from redpp_serve.engines.onnx_writer import UntranslatableError
from redpp_serve.engines.sessions import OnnxRuntimeSession, OpenVinoSession
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.graph.quantization import find_ranges, in_int8
from redpp_serve.runtime.serving_graph import serving_graph

SESSIONS = {"onnxruntime": OnnxRuntimeSession, "openvino": OpenVinoSession}
CPU = torch.device("cpu")


class Calls(nn.Module):
    """A function with a few parameters of fixed names."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3, generator=generator) / 6)
        self.matrix = nn.Parameter(torch.randn(5, 8, generator=generator) / 3)
        self.vector = nn.Parameter(torch.rand(4, generator=generator) + 0.5)
        self.table = nn.Parameter(torch.randn(11, 3, generator=generator))
        self.register_buffer("mean", torch.rand(4, generator=generator) - 0.5)
        self.register_buffer("variance", torch.rand(4, generator=generator) + 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


IMAGE = {  # functions of (N, 4, 8, 8)
    "activations": lambda m, x: F.gelu(x) + F.gelu(x, approximate="tanh") + F.silu(x) * F.hardswish(x) - F.mish(x),
    "bounds": lambda m, x: F.relu6(4 * x) + F.hardtanh(x, -0.3, 0.4) + x.clamp(min=-1) + x.clamp(-2, 0.5) + F.elu(x),
    "slopes": lambda m, x: F.leaky_relu(x, 0.2) + F.prelu(x, m.vector) + F.softplus(x, 2.0) + F.selu(x),
    "sigmoids": lambda m, x: F.hardsigmoid(x) + torch.sigmoid(x) + torch.tanh(x) + F.glu(x, 1).repeat(1, 2, 1, 1),
    "functions": lambda m, x: x.abs().add(1).log() - x.square() + (x * x + 1).rsqrt() + x.exp().sqrt()
    + x.sin() * x.cos() + x.erf(),
    "signs": lambda m, x: (10 * x).round() + x.floor() + x.sign() + x.neg() + F.softplus(x, 1.5, 0.5),
    "arithmetic": lambda m, x: (2 - x) / (x * x + 3) + x**2 - torch.add(x, x, alpha=0.5) + torch.maximum(x, -x) * 3,
    "integers": lambda m, x: torch.div((10 * x).to(torch.int64), 3, rounding_mode="floor").float() + (x > 0) + 1,
    "comparisons": lambda m, x: torch.where((x > 0.1) & ~(x >= 1), x, -x) + x.masked_fill(x.round() == 0, 0.0),
    "convolutions": lambda m, x: F.conv2d(F.conv2d(x, m.weight, None, 2, 1), m.weight.transpose(0, 1), None, 1, "same"),
    "transposed": lambda m, x: F.conv_transpose2d(x, m.weight.transpose(0, 1), None, 2, 1, 1),
    "grouped": lambda m, x: F.conv2d(x, m.weight[:4, :1], m.vector, padding=2, dilation=2, groups=4),
    "linear": lambda m, x: F.linear(x, m.matrix) @ m.matrix[:, :4] + F.linear(x, m.matrix[:4]),
    "products": lambda m, x: torch.einsum("nchw,kw->nchk", x, m.matrix) @ torch.full((5, 2), 0.5),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, 2 * x, x - 1)
    + F.scaled_dot_product_attention(x, x, x, is_causal=True)
    + F.scaled_dot_product_attention(x, x, x, x.new_ones(8, 8).tril() > 0),
    "layer norms": lambda m, x: F.layer_norm(x, (8,)) + F.layer_norm(x, (8, 8), x.new_ones(8, 8) * 2, eps=1e-3),
    "group norms": lambda m, x: F.group_norm(x, 2, m.vector, -m.vector) + F.instance_norm(x, weight=m.vector),
    "rms norm": lambda m, x: F.rms_norm(x, (8,), m.matrix[0], 1e-5),
    "batch norm": lambda m, x: F.batch_norm(x, m.mean, m.variance, m.vector * 2, None),
    "sums": lambda m, x: x.mean((2, 3), keepdim=True) + x.sum(-1, keepdim=True)
    - x.amax((1,), keepdim=True) + x.amin(1)[:, None],
    "norms": lambda m, x: x / x.norm(dim=1, keepdim=True) + torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "variances": lambda m, x: x.var((2, 3), keepdim=True) + x.std(1, correction=0, keepdim=True),
    "extremes": lambda m, x: x.max(1).values + x.min(2).values.sum(1)[:, None] + x.argmax(1).float(),
    "softmaxes": lambda m, x: x.softmax(1) + x.log_softmax(-1) + x.logsumexp(1, keepdim=True) + x.cumsum(2),
    "top": lambda m, x: x.topk(3, dim=1).values.sum(1),
    "pools": lambda m, x: F.max_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 2) + F.avg_pool2d(x, 3, 2, 1, False, False),
    "ceiled pools": lambda m, x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "adaptive pools": lambda m, x: F.adaptive_avg_pool2d(x, 4) + F.adaptive_avg_pool2d(x, 1)
    + F.adaptive_max_pool2d(x, 4),
    "odd adaptive pool": lambda m, x: F.adaptive_avg_pool2d(x, (3, 5)),
    "resizes": lambda m, x: F.interpolate(x, scale_factor=2)
    + F.interpolate(x, size=(16, 16), mode="bilinear")
    + F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=True)
    + F.interpolate(x, scale_factor=2, mode="bicubic"),
    "shuffles": lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2) + F.channel_shuffle(x, 2),
    "shapes": lambda m, x: x.flatten(1).unflatten(1, (4, 64)).transpose(1, 2)
    .reshape(x.shape[0], 8, 8, 4).permute(0, 3, 1, 2),
    "squeezes": lambda m, x: x[:, :1].squeeze(1).unsqueeze(-1).expand(-1, -1, -1, 3),
    "batches": lambda m, x: x.view(x.shape[0] * 4, 64).softmax(1).view(x.shape[0], 4, 8, 8),
    "tokens": lambda m, x: torch.cat([m.vector.view(1, 4, 1).expand(x.shape[0], -1, -1), x.flatten(2)], 2),
    "slices": lambda m, x: x[:, 1:3, ::2] + x.narrow(1, 0, 2)[:, :, 4:] + x[:, -2:, :4],
    "pieces": lambda m, x: torch.stack(x.chunk(2, 1), 1).sum(1) + x.split([1, 3], 1)[1][:, :2]
    + x.unbind(1)[2][:, None],
    "gathers": lambda m, x: x[:, [2, 0, 1]] + x.index_select(1, torch.tensor([0, 0, 3])) + x.flip(1)[:, :3],
    "rolls": lambda m, x: x.roll((1, -3), (2, 3)) + x.roll(2, 1),
    "pads": lambda m, x: F.pad(x, (1, 2, 0, 1)) + F.pad(x, (2, 1, 1, 0), "reflect")
    + F.pad(x, (1, 2, 1, 0), "replicate"),
    "triangles": lambda m, x: x.tril() + x.triu(1),
    "made": lambda m, x: x + torch.zeros_like(x) + torch.ones(x.shape[0], 1, 1, 1) + torch.full((8,), 2.0),
    "fused": lambda m, x: F.relu(F.conv2d(x, m.weight[:4], m.vector, 1, 1) + x),
    "several outputs": lambda m, x: (x.mean((2, 3)), {"b": x.relu()}["b"]),
}  # fmt: skip


def graph_of(function: Callable[..., Any], shape: tuple[int, ...] = (4, 8, 8), dtype: str = "float32") -> Graph:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return capture(Calls(function).eval(), [InputSpec("x", shape, dtype)], [])


def close(found: list[np.ndarray[Any, Any]], expected: tuple[Tensor, ...]) -> bool:
    assert len(found) == len(expected)
    for x, y in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(y), x, rtol=1e-4, atol=2e-5, check_stride=False)
    return True


@pytest.mark.parametrize("name", IMAGE)
def test_rule(name: str) -> None:
    graph = graph_of(IMAGE[name])
    for served in (graph, serving_graph(graph, CPU)):
        model = to_onnx(served).SerializeToString()
        for session in SESSIONS.values():
            run = session(model, "fp32", 1)
            for batch in (1, 3):
                x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(batch))
                assert close(run([x.numpy()]), Program(graph)(x)), session


@pytest.mark.parametrize("session", SESSIONS)
def test_tokens_and_masks(session: str) -> None:
    graph = graph_of(
        lambda m, ids: F.embedding(ids, m.table).masked_fill((ids == 0)[..., None], 0.0).mean(1), (7,), "int64"
    )
    run = SESSIONS[session](to_onnx(graph).SerializeToString(), "fp32", 1)
    ids = torch.arange(21).view(3, 7) % 11
    assert close(run([ids.numpy()]), Program(graph)(ids))


@pytest.mark.parametrize("session", SESSIONS)
def test_signals(session: str) -> None:
    def network(m: Calls, x: Tensor) -> Tensor:
        y = F.conv1d(x, m.weight[:, :, 0], None, 2, 1)
        return F.avg_pool1d(F.max_pool1d(y, 2), 2).mean(2)

    graph = graph_of(network, (4, 64))
    x = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(1))
    assert close(SESSIONS[session](to_onnx(graph).SerializeToString(), "fp32", 1)([x.numpy()]), Program(graph)(x))


@pytest.mark.skipif(not processor.int8_pays(), reason="without instructions for bytes, sums of 16 bits saturate")
def test_eight_bits_are_what_the_pass_says() -> None:
    graph = serving_graph(graph_of(IMAGE["fused"]), CPU)
    x = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    quantized = in_int8(graph, find_ranges(graph, (x,)))
    (expected,), (wide,) = Program(quantized)(x), Program(graph)(x)
    error = (expected - wide).norm() / wide.norm()
    assert 1e-4 < error < 0.03
    for name, session in SESSIONS.items():
        found = torch.from_numpy(session(to_onnx(quantized).SerializeToString(), "int8", 1)([x.numpy()])[0])
        assert (found - expected).norm() / wide.norm() < 0.5 * error, name


def _padded(*sizes: int, mode: str = "constant", value: float = 0.0) -> Callable[..., Any]:
    return lambda m, x: F.conv2d(F.pad(F.relu(x), sizes, mode, value), m.weight, None, 2, (1, 0)).relu()


PADDED = {  # what is padded, and whether the convolution takes it
    "alike": (_padded(1, 1, 1, 1), True),
    "at the end": (_padded(0, 1, 0, 2), True),
    "one axis": (_padded(3, 1), True),
    "cut": (_padded(-1, 1, 0, 0), False),
    "ones": (_padded(1, 1, 1, 1, value=1.0), False),
    "reflected": (_padded(1, 1, 1, 1, mode="reflect"), False),
    "channels too": (lambda m, x: F.conv2d(F.pad(x[:, :2], (1, 1, 0, 1, 1, 1)), m.weight).relu(), False),
}


@pytest.mark.parametrize("case", PADDED)
def test_zeros_around_a_convolution_in_eight_bits_are_its_own(case: str) -> None:
    function, taken = PADDED[case]
    graph = serving_graph(graph_of(function), CPU)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    kinds = {"fp32": graph, **({"int8": in_int8(graph, find_ranges(graph, (x,)))} if processor.int8_pays() else {})}
    for precision, each in kinds.items():
        model = to_onnx(each)
        feeding = [next(n for n in model.graph.node if n.op_type == "Conv").input[0]]
        for node in reversed(model.graph.node):  # what the convolution is made from
            if set(node.output) & set(feeding):
                feeding += node.input
        assert ("Pad" not in {n.op_type for n in model.graph.node if set(n.output) & set(feeding)}) == (
            taken and precision == "int8"
        )
        (expected,) = Program(each)(x)
        for name, session in SESSIONS.items():
            found = torch.from_numpy(session(model.SerializeToString(), precision, 1)([x.numpy()])[0])
            limit = 1e-5 if precision == "fp32" else 0.02
            assert (found - expected).norm() <= limit * expected.norm(), (name, precision)


def test_what_no_rule_covers_is_named() -> None:
    graph = Graph((InputSpec("x", (3,)),), {}, (Node("y", "aten.acosh.default", (Ref("x"),)),), ("y",))
    with pytest.raises((UntranslatableError, KeyError), match="acosh"):
        to_onnx(graph)
    with pytest.raises(UntranslatableError, match="divisor"):
        to_onnx(graph_of(lambda m, x: F.avg_pool2d(x, 2, divisor_override=3)))


def test_small_weights_are_zero_and_equal_ones_stored_once() -> None:
    graph = graph_of(lambda m, x: F.conv2d(x, m.weight) + F.conv2d(x, m.weight, padding=0))
    graph = graph.with_tensors({"weight": graph.tensors["weight"].index_fill(0, torch.tensor([0]), 1e-40)})
    stored = [t for t in to_onnx(graph).graph.initializer if list(t.dims) == [6, 4, 3, 3]]
    assert len(stored) == 1
    assert not np.frombuffer(stored[0].raw_data, np.float32).reshape(6, -1)[0].any()
