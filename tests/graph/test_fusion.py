"""Fused layers give what the graph gives, in plain PyTorch and in the server's kernels; only what is safe is fused."""

from dataclasses import replace

import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import build, load
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.graph.operators import ALLOWED, FUSED_CONV2D, FUSED_LINEAR
from redpp_serve.graph.passes import fuse_epilogues
from redpp_serve.runtime.serving_graph import serving_program

CONV, ADD, RELU = "aten.conv2d.default", "aten.add.Tensor", "aten.relu.default"


def graph(*nodes: Node, outputs: tuple[str, ...] = ("y",)) -> Graph:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "w": torch.randn(4, 4, 3, 3, generator=g),
        "b": torch.randn(4, generator=g),
        "dw": torch.randn(4, 1, 3, 3, generator=g),
        "c": torch.randn(4, 1, 1, generator=g),
    }
    return Graph((InputSpec("x", (4, 7, 5)),), tensors, nodes, outputs)


def linear_graph(*nodes: Node) -> Graph:
    """Over vectors along the last of three dimensions."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "w": torch.randn(6, 6, generator=g),
        "b": torch.randn(6, generator=g),
        "row": torch.randn(1, 3, 6, generator=g),
    }
    return Graph((InputSpec("x", (3, 6)),), tensors, nodes, ("y",))


def linear(name: str, source: str) -> Node:
    return Node(name, "aten.linear.default", (Ref(source), Ref("w"), Ref("b")))


def conv(name: str, source: str, weight: str = "w", *rest: object) -> Node:
    return Node(name, CONV, (Ref(source), Ref(weight), Ref("b"), *(rest or ([1, 1], [1, 1]))))


def relu(name: str, source: str) -> Node:
    return Node(name, RELU, (Ref(source),))


def add(name: str, a: str, b: str) -> Node:
    return Node(name, ADD, (Ref(a), Ref(b)))


def assert_same(before: Graph, fused: int, operators: int) -> None:
    """The fused graph as it stands and with the CPU's kernels against the graph in float64."""
    after = fuse_epilogues(before)
    assert (sum(n.op in (FUSED_CONV2D, FUSED_LINEAR) for n in after.nodes), len(after.nodes)) == (fused, operators)
    programs = Program(after), serving_program(before, torch.device("cpu"))
    for batch in (1, 3):
        x = torch.randn(batch, *before.inputs[0].shape, generator=torch.Generator().manual_seed(batch))
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.contiguous(memory_format=layout) if x.dim() == 4 else x.clone()
            exact = Program(before.to(torch.float64))(x.double())
            for program in programs:
                for got, want in zip(program(given), exact, strict=True):
                    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
                assert torch.equal(given, x)  # nothing is added in place


ACTIVATIONS = [
    Node("y", f"aten.{op}.default", (Ref("s"),))
    for op in ("relu", "relu6", "silu", "sigmoid", "hardswish", "hardsigmoid", "gelu")
]
ACTIVATIONS += [
    Node("y", "aten.gelu.default", (Ref("s"),), {"approximate": "tanh"}),
    Node("y", "aten.hardtanh.default", (Ref("s"), 0.0, 6.0)),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda node: f"{node.op}{node.args[1:]}{node.kwargs}")
def test_activations(activation: Node) -> None:
    """Alone and behind a sum; oneDNN's sum takes ReLU alone along."""
    assert_same(graph(conv("s", "x"), activation), 1, 1)
    assert_same(graph(conv("c1", "x"), conv("c2", "x"), add("s", "c1", "c2"), activation), 2, 2)
    assert_same(linear_graph(linear("s", "x"), activation), 1, 1)
    assert_same(linear_graph(linear("l1", "x"), linear("l2", "l1"), add("s", "l1", "l2"), activation), 2, 2)


def test_other_clamps_are_kept() -> None:
    assert_same(graph(conv("s", "x"), Node("y", "aten.hardtanh.default", (Ref("s"), -1.0, 1.0))), 1, 2)
    assert_same(graph(conv("s", "x"), Node("y", "aten.tanh.default", (Ref("s"),))), 1, 2)


@pytest.mark.parametrize(
    "rest", [([2, 2], [0, 0]), ([1, 2], [1, 0], [2, 1]), ([2], [1]), ([1, 1], [1, 1], [1, 1], 1), ([1, 1],)], ids=str
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


def test_a_summand_that_is_one_for_all_rows_is_kept() -> None:
    """At batch size 1 it has the layer's shape."""
    row = Node("one", "aten.relu.default", (Ref("row"),))
    assert_same(linear_graph(row, linear("l1", "x"), add("y", "l1", "one")), 1, 3)


def test_a_summand_of_another_dtype_is_kept() -> None:
    wide = Node("wide", "aten._to_copy.default", (Ref("x"),), {"dtype": torch.float64})
    assert_same(linear_graph(wide, linear("l1", "x"), add("y", "l1", "wide")), 1, 3)


def test_computed_weights_and_stored_inputs_are_left_alone() -> None:
    computed = Node("v", "aten.mul.Tensor", (Ref("w"), 2.0))
    assert_same(graph(computed, conv("c1", "x", "v"), relu("y", "c1")), 0, 3)
    stored = Node("z", CONV, (Ref("image"), Ref("w"), Ref("b")))
    constant = graph(stored, Node("y", ADD, (Ref("x"), Ref("z")))).with_tensors({"image": torch.randn(1, 4, 9, 7)})
    assert_same(constant, 0, 2)


def test_other_precisions_are_fused_too() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        before = graph(conv("c1", "x"), relu("y", "c1")).to(dtype)
        x = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        (want,), (got,) = Program(before)(x), serving_program(before, torch.device("cpu"))(x)
        assert len(fuse_epilogues(before).nodes) == 1 and got.dtype == dtype
        torch.testing.assert_close(got, want)


def test_no_file_can_name_the_fused_operators() -> None:
    assert not {FUSED_CONV2D, FUSED_LINEAR} & ALLOWED
    with pytest.raises(RedppError, match="'fused.conv2d' is not on the allow-list"):
        load(build(fuse_epilogues(graph(conv("c1", "x"), relu("y", "c1"))), {}).data)
