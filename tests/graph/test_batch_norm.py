"""Folding keeps the function, in float64 to the last digits, and leaves alone what it cannot fold."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.graph.passes import fold_batch_norm, is_inference_norm, scale_and_shift

CONV, LINEAR, NORM = "aten.conv2d.default", "aten.linear.default", "aten.batch_norm.default"


def tensors(n_out: int, weight: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {
        "w": random(n_out, *weight),
        "b": random(n_out),
        "gamma": random(n_out),
        "beta": random(n_out),
        "mean": random(n_out),
        "var": random(n_out).square() + 0.01,
    }


def norm(name: str, source: str, affine: bool = True, training: bool = False) -> Node:
    weights = (Ref("gamma"), Ref("beta")) if affine else (None, None)
    return Node(name, NORM, (Ref(source), *weights, Ref("mean"), Ref("var"), training, 0.1, 1e-3, True))


def conv_norm(bias: bool = True, affine: bool = True, groups: int = 1) -> Graph:
    args = (Ref("x"), Ref("w"), Ref("b") if bias else None, [2, 2], [1, 1], [1, 1], groups)
    spec = InputSpec("x", (4, 6, 5), "float64")
    return Graph((spec,), tensors(8, (4 // groups, 3, 3)), (Node("c", CONV, args), norm("y", "c", affine)), ("y",))


def linear_norm(shape: tuple[int, ...] = (6,), n_out: int = 8) -> Graph:
    nodes = (Node("l", LINEAR, (Ref("x"), Ref("w"))), norm("y", "l"))
    return Graph((InputSpec("x", shape, "float64"),), tensors(n_out, (shape[-1],)), nodes, ("y",))


def assert_same(before: Graph, after: Graph, norms: int = 0) -> None:
    x = torch.randn(3, *before.inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(Program(before)(x), Program(after)(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert sum(node.op == NORM for node in after.nodes) == norms
    assert after.outputs == before.outputs


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(bias: bool, affine: bool, groups: int) -> None:
    before = conv_norm(bias, affine, groups)
    after = fold_batch_norm(before)
    assert_same(before, after)
    assert len(after.nodes) == 1 and set(after.tensors) == {"w.folded.weight", "w.folded.bias"}


def test_scale_or_shift_alone() -> None:
    for k in (1, 2):
        before = conv_norm()
        args = [None if i == k else a for i, a in enumerate(before.nodes[1].args)]
        before = before.with_nodes({"y": replace(before.nodes[1], args=tuple(args))})
        assert_same(before, fold_batch_norm(before))


def test_linear() -> None:
    assert_same(linear_norm(), fold_batch_norm(linear_norm()))


def test_linear_over_tokens_is_left_alone() -> None:
    """Its features are the last axis, batch norm's the second: as many tokens as features must not fool the fold."""
    before = linear_norm((8, 6), n_out=8)
    assert_same(before, fold_batch_norm(before), norms=1)


def test_a_convolution_that_others_read_is_left_alone() -> None:
    before = conv_norm()
    shared = replace(before, nodes=(*before.nodes, Node("z", "aten.add.Tensor", (Ref("c"), Ref("y")))), outputs=("z",))
    assert_same(shared, fold_batch_norm(shared), norms=1)
    output = replace(before, outputs=("y", "c"))
    assert_same(output, fold_batch_norm(output), norms=1)


def test_a_weight_used_twice_is_folded_for_each_use() -> None:
    before = conv_norm()
    nodes = (*before.nodes, replace(before.nodes[0], name="c2"), norm("y2", "c2", affine=False))
    twice = replace(before, nodes=nodes, outputs=("y", "y2"))
    after = fold_batch_norm(twice)
    assert_same(twice, after)
    assert len(after.tensors) == 4


def test_batch_norm_after_batch_norm_or_on_the_input_stays() -> None:
    before = replace(conv_norm(), nodes=(*conv_norm().nodes, norm("z", "y", affine=False)), outputs=("z",))
    assert_same(before, fold_batch_norm(before), norms=1)
    alone = Graph((InputSpec("x", (8, 2, 2), "float64"),), tensors(8, (1,)), (norm("y", "x"),), ("y",))
    assert_same(alone, fold_batch_norm(alone), norms=1)


@pytest.mark.parametrize("computed", ["w", "gamma", "b"])
def test_computed_parameters_are_left_alone(computed: str) -> None:
    """As by weight standardization or spectral norm."""
    before = conv_norm()
    half = Node("half", "aten.mul.Tensor", (Ref(computed), 0.5))
    read = [replace(n, args=tuple(Ref("half") if a == Ref(computed) else a for a in n.args)) for n in before.nodes]
    before = replace(before, nodes=(half, *read))
    assert_same(before, fold_batch_norm(before), norms=1)


def test_batch_statistics_are_no_affine_map() -> None:
    args = norm("y", "c", training=True).args
    free = Node("y", NORM, (args[0], None, None, None, None, True, *args[6:]))
    assert is_inference_norm(norm("y", "c"))
    assert not is_inference_norm(free) and not is_inference_norm(norm("y", "c", training=True))
    before = replace(conv_norm(), nodes=(conv_norm().nodes[0], free))
    assert fold_batch_norm(before).nodes == before.nodes


def test_scale_and_shift_against_torch() -> None:
    graph = conv_norm()
    scale, shift = scale_and_shift(graph, graph.nodes[1])
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    t = graph.tensors
    expected = torch.nn.functional.batch_norm(x, t["mean"], t["var"], t["gamma"], t["beta"], eps=1e-3)
    torch.testing.assert_close(x * scale[:, None, None] + shift[:, None, None], expected, rtol=1e-12, atol=1e-12)


def test_half_precision_is_rounded_once() -> None:
    before = conv_norm().to(torch.float16)
    after = fold_batch_norm(before)
    assert {t.dtype for t in after.tensors.values()} == {torch.float16}
    exact = fold_batch_norm(before.to(torch.float64))
    for name, tensor in after.tensors.items():
        assert torch.equal(tensor, exact.tensors[name].half())


def test_graphs_without_batch_norm_are_returned_as_they_are() -> None:
    before = replace(conv_norm(), nodes=conv_norm().nodes[:1], outputs=("c",)).pruned_of_unused()
    assert vars(fold_batch_norm(before)) == vars(before)
