"""The ONNX model of a network whose sizes vary computes what the network does, in both engines, at sizes unseen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.capture.export import capture
from redpp_serve.engines import onnx_sizes
from redpp_serve.engines.onnx_builder import to_onnx
from redpp_serve.engines.onnx_sizes import SizeError
from redpp_serve.engines.onnx_writer import UntranslatableError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Size
from redpp_serve.graph.quantization import find_ranges, in_int8
from redpp_serve.graph.sizes import drawn, resized
from redpp_serve.graph.symbolic import SymbolicSizes, symbolic_sizes
from redpp_serve.runtime.serving_graph import serving_graph
from tests.engines.test_onnx_builder import CPU, IMAGE, SESSIONS, Calls, close

PICTURE = InputSpec("x", (4, 8, 12), varying=((1, Size("H", 4, 24, 4)), (2, Size("W", 4, 24, 4))))
WORDS = InputSpec("x", (9, 8), varying=((0, Size("L", 2, 40)),))
FIXED = {"linear", "products", "attention", "layer norms", "rms norm", "resizes", "shapes", "batches", "slices", "made"}

SIZED: dict[str, tuple[InputSpec, Callable[[Calls, Tensor], Any]]] = {
    "resize to": (PICTURE, lambda m, x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear")),
    "resize by": (PICTURE, lambda m, x: F.interpolate(x, scale_factor=2.0) + F.interpolate(x, scale_factor=2)),
    "shrunk": (PICTURE, lambda m, x: F.interpolate(x, size=(x.shape[2] // 3, x.shape[3] // 2 + 1), mode="bilinear")),
    "padded to a multiple": (PICTURE, lambda m, x: F.pad(x, (0, -x.shape[3] % 16, 0, -x.shape[2] % 16))),
    "cut": (PICTURE, lambda m, x: x[:, :, : x.shape[2] // 2] + x.narrow(2, x.shape[2] // 2, x.shape[2] // 2)),
    "pyramid": (PICTURE, lambda m, x: F.adaptive_avg_pool2d(x, (3, 1)) + F.adaptive_avg_pool2d(x, (1, 2))),
    "tokens": (PICTURE, lambda m, x: x.flatten(2).transpose(1, 2).reshape(x.shape[0], -1, x.shape[3], 4)),
    "times a size": (PICTURE, lambda m, x: x.sum(3) / x.shape[3] + x.shape[2]),
    "places": (WORDS, lambda m, x: x + torch.arange(x.shape[1])[None, :, None] * m.matrix[0]),
    "causal": (WORDS, lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
    "spread": (WORDS, lambda m, x: x.std(1) + x.var(1, correction=0)),
    "repeated": (WORDS, lambda m, x: x[:, :1].repeat(1, x.shape[1], 1) + x.mean(1, keepdim=True).expand_as(x)),
    "made": (WORDS, lambda m, x: x + torch.zeros(x.shape[0], x.shape[1], 8) + torch.ones_like(x)),
}


def graph_of(spec: InputSpec, function: Callable[..., Any]) -> Graph:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return capture(Calls(function).eval(), [spec], [])


def computes_the_same(graph: Graph, spec: InputSpec, session: str, counts: int = 6) -> bool:
    run = SESSIONS[session](to_onnx(serving_graph(graph, CPU)).SerializeToString(), "fp32", 1)
    for k, sizes in enumerate(drawn([spec], counts, seed=3)):
        x = torch.randn(1 + k % 3, *resized(spec, sizes).shape, generator=torch.Generator().manual_seed(k))
        close(run([x.numpy()]), Program(graph)(x))
    return True


@pytest.mark.parametrize("name", SIZED)
def test_what_reads_a_size(name: str) -> None:
    spec, function = SIZED[name]
    graph = graph_of(spec, function)
    assert all(computes_the_same(graph, spec, session) for session in SESSIONS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted(IMAGE.keys() - FIXED))
def test_every_rule(name: str) -> None:
    graph = graph_of(PICTURE, IMAGE[name])
    if name == "adaptive pools":  # one of them takes a maximum
        with pytest.raises(UntranslatableError, match=r"adaptive_max_pool2d.* a size that varies"):
            to_onnx(graph)
        return
    assert all(computes_the_same(graph, PICTURE, session) for session in SESSIONS)


@pytest.mark.parametrize("session", SESSIONS)
def test_an_added_mask_that_hides_all_keys(session: str) -> None:
    """torch answers zero there; a plain softmax has no answer."""

    def attend(m: Calls, x: Tensor) -> Tensor:
        mask = torch.zeros_like(x[..., 0]).masked_fill(x[..., 0] < 0, -torch.inf)
        return F.scaled_dot_product_attention(x, x, x, mask[:, None])

    graph = graph_of(WORDS, attend)
    run = SESSIONS[session](to_onnx(graph).SerializeToString(), "fp32", 1)
    x = torch.randn(3, 5, 8)
    x[1, :, 0] = -1
    assert close(run([x.numpy()]), Program(graph)(x)) and not Program(graph)(x)[0][1].any()


def test_eight_bits_at_every_size() -> None:
    graph = graph_of(PICTURE, lambda m, x: F.interpolate(F.conv2d(x, m.weight, None, 2, 1), size=x.shape[2:]))
    x = torch.randn(8, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    narrow = in_int8(serving_graph(graph, CPU), find_ranges(serving_graph(graph, CPU), (x,)))
    run = SESSIONS["onnxruntime"](to_onnx(narrow).SerializeToString(), "int8", 1)
    for height, width in ((4, 24), (16, 8)):
        x = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(height))
        (expected,), (found,) = Program(narrow)(x), run([x.numpy()])
        assert found.shape == expected.shape and abs(expected - torch.from_numpy(found)).mean() < 0.02


def test_sizes_as_expressions() -> None:
    graph = graph_of(PICTURE, lambda m, x: F.conv2d(x, m.weight, None, 2).flatten(2))
    found = symbolic_sizes(graph)
    batch, channels, places = found.shapes[graph.outputs[0]]
    at = {symbol: {0: 5, 2: 20, 3: 8}[axis] for symbol, (_, axis) in found.places.items()}
    assert channels == 6 and batch.subs(at) == 5 and places.subs(at) == 9 * 3


def test_sizes_that_torch_does_not_derive(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(WORDS, lambda m, x: x.reshape(x.shape[0], -1, 4))
    found = symbolic_sizes(graph)
    wrong = SymbolicSizes({name: (1, *sizes[1:]) for name, sizes in found.shapes.items()}, found.places)
    monkeypatch.setattr(onnx_sizes, "symbolic_sizes", lambda graph: wrong)
    with pytest.raises(SizeError, match=r"of sizes \[\d, \d+, 4\] where torch derives \[1, "):
        to_onnx(graph)
    monkeypatch.setattr(onnx_sizes, "symbolic_sizes", lambda graph: 1 // 0)
    with pytest.raises(SizeError, match=r"cannot be followed: integer division"):
        to_onnx(graph)
