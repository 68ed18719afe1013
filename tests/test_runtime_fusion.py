"""Fused convolutions give what the graph gives, and only what is safe to fuse is fused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from redpp_serve.runtime.artifact import build
from redpp_serve.runtime.onednn import available
from redpp_serve.runtime.fusion import fuse_epilogues
from redpp_serve.runtime.graph import Graph, InputSpec, Node, Ref
from redpp_serve.runtime.layer_ops import FUSED_CONV2D
from redpp_serve.runtime.ops import ALLOWED
from redpp_serve.runtime.program import Program

pytestmark = pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN")
CONV, ADD, RELU = "aten.conv2d.default", "aten.add.Tensor", "aten.relu.default"


def graph(*nodes: Node, outputs: tuple[str, ...] = ("y",)) -> Graph:
    g = torch.Generator().manual_seed(0)
    tensors = {"w": torch.randn(4, 4, 3, 3, generator=g), "b": torch.randn(4, generator=g),
               "dw": torch.randn(4, 1, 3, 3, generator=g), "c": torch.randn(4, 1, 1, generator=g)}  # fmt: skip
    return Graph((InputSpec("x", (4, 7, 5)),), tensors, nodes, outputs)


def conv(name: str, source: str, weight: str = "w", *rest: object) -> Node:
    return Node(name, CONV, (Ref(source), Ref(weight), Ref("b"), *(rest or ([1, 1], [1, 1]))))


def relu(name: str, source: str) -> Node:
    return Node(name, RELU, (Ref(source),))


def add(name: str, a: str, b: str) -> Node:
    return Node(name, ADD, (Ref(a), Ref(b)))


def assert_same(before: Graph, fused: int, operators: int) -> None:
    after = fuse_epilogues(before)
    assert (sum(n.op == FUSED_CONV2D for n in after.nodes), len(after.nodes)) == (fused, operators)
    for batch in (1, 3):
        x = torch.randn(batch, 4, 7, 5, generator=torch.Generator().manual_seed(batch))
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.contiguous(memory_format=layout)
            exact = Program(before.to(torch.float64))(x.double())
            for got, want in zip(Program(after)(given), exact, strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
            assert torch.equal(given, x)  # nothing is added in place


@pytest.mark.parametrize("op", ["relu", "relu6", "silu", "hardswish", "hardsigmoid"])
def test_activations(op: str) -> None:
    assert_same(graph(conv("c1", "x"), Node("y", f"aten.{op}.default", (Ref("c1"),))), 1, 1)


@pytest.mark.parametrize(
    "rest",
    [([2, 2], [0, 0]), ([1, 2], [1, 0], [2, 1]), ([2], [1]), ([1, 1], [1, 1], [1, 1], 1), ([1, 1],)],
    ids=str,
)
def test_geometries(rest: tuple[object, ...]) -> None:
    assert_same(graph(conv("c1", "x", "w", *rest), relu("y", "c1")), 1, 1)


def test_depthwise_and_without_bias() -> None:
    assert_same(graph(conv("c1", "x", "dw", [1, 1], [1, 1], [1, 1], 4), relu("y", "c1")), 1, 1)
    assert_same(graph(Node("c1", CONV, (Ref("x"), Ref("w"))), relu("y", "c1")), 1, 1)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("rectified", [False, True])
def test_residual(swapped: bool, rectified: bool) -> None:
    pair = ("r", "c2") if swapped else ("c2", "r")
    nodes = [conv("c1", "x"), relu("r", "c1"), conv("c2", "r"), add("s" if rectified else "y", *pair)]
    assert_same(graph(*nodes, *([relu("y", "s")] if rectified else [])), 2, 2)


def test_two_convolutions_in_one_sum() -> None:
    """One of them takes the sum; the other must still be computed before."""
    for pair in (("c1", "c2"), ("c2", "c1")):
        assert_same(graph(conv("c1", "x"), conv("c2", "x"), add("s", *pair), relu("y", "s")), 2, 2)
        assert_same(graph(conv("c1", "x"), conv("c2", "c1"), add("s", *pair), relu("y", "s")), 2, 2)


def test_what_others_read_is_kept() -> None:
    assert_same(graph(conv("c1", "x"), relu("r", "c1"), add("y", "r", "c1")), 1, 3)
    assert_same(graph(conv("c1", "x"), relu("y", "c1"), outputs=("y", "c1")), 1, 2)
    assert_same(graph(conv("c1", "x"), add("y", "c1", "c1")), 1, 2)


def test_sums_that_broadcast_or_scale_are_kept() -> None:
    assert_same(graph(conv("c1", "x"), add("y", "c1", "c")), 1, 2)
    assert_same(graph(conv("c1", "x"), Node("y", ADD, (Ref("c1"), 2.0))), 1, 2)
    scaled = replace(add("y", "c1", "r"), kwargs={"alpha": 2})
    assert_same(graph(relu("r", "x"), conv("c1", "x"), scaled), 1, 3)
    pooled = Node("p", "aten.mean.dim", (Ref("x"), [2, 3], True))
    assert_same(graph(pooled, conv("c1", "x"), add("y", "c1", "p")), 1, 3)


def test_an_activation_other_than_relu_after_a_sum_is_kept() -> None:
    silu = Node("y", "aten.silu.default", (Ref("s"),))
    assert_same(graph(relu("r", "x"), conv("c1", "x"), add("s", "c1", "r"), silu), 1, 3)


def test_computed_and_half_precision_weights_are_left_alone() -> None:
    computed = Node("v", "aten.mul.Tensor", (Ref("w"), 2.0))
    assert_same(graph(computed, conv("c1", "x", "v"), relu("y", "c1")), 0, 3)
    half = graph(conv("c1", "x"), relu("y", "c1")).to(torch.float16)
    assert fuse_epilogues(half).nodes == half.nodes


def test_no_file_can_name_the_fused_operator(tmp_path: Path) -> None:
    assert FUSED_CONV2D not in ALLOWED
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        build(fuse_epilogues(graph(conv("c1", "x"), relu("y", "c1"))), {})
