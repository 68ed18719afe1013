"""Constant folding: the same function, with computed weights stored."""

import torch

from redpp_serve.channels.coupling import couple
from redpp_serve.graph.graph import Node, Ref
from redpp_serve.graph.passes import fold_constants
from tests.support.networks import Builder, outputs


def standardised():
    """A convolution whose weight is scaled by its own norm, and a Linear whose bias is two parts put together."""
    b = Builder(4, 6, 6)
    raw = b.tensor("raw", b.random(8, 4, 3, 3))
    norm = b.op("norm", "linalg_vector_norm.default", raw, 2, [1, 2, 3], True)
    weight = b.op("scaled", "div.Tensor", raw, Ref(norm))
    x = b.op("first", "conv2d.default", Ref("x"), Ref(weight), None, [1, 1], [1, 1], [1, 1], 1)
    bias = b.op("bias", "cat.default", [b.tensor("some", b.random(2)), b.tensor("others", b.random(3))])
    x = b.op("second", "linear.default", Ref(b.mean(b.relu(x))), b.tensor("second.weight", b.random(5, 8)), Ref(bias))
    return b.graph(b.linear(b.relu(x), "head", 5, 3))


def test_computed_weights_are_stored_and_their_channels_open():
    graph = standardised()
    folded = fold_constants(graph)
    assert [n.name for n in folded.nodes if n.name in ("norm", "scaled", "bias")] == []
    assert {"scaled", "bias"} <= folded.tensors.keys() and not {"raw", "norm", "some", "others"} & folded.tensors.keys()
    for a, b in zip(outputs(graph), outputs(folded), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert couple(graph).open == ()
    assert [c.channels for c in couple(folded).open] == [8, 5]


def test_what_would_grow_stays_computed():
    b = Builder(4, 6, 6)
    plane = b.op("plane", "expand.default", b.tensor("scale", b.random(1, 4, 1, 1)), [1, 4, 6, 6])
    graph = b.graph(b.linear(b.mean(b.op("y", "mul.Tensor", Ref("x"), Ref(plane))), "head", 4, 3))
    assert fold_constants(graph).nodes == graph.nodes


def test_several_results_and_values_that_depend_on_inputs_stay():
    b = Builder(4)
    pieces = b.op("pieces", "chunk.default", b.tensor("both", b.random(8)), 2)
    b.nodes.append(Node("one", "py.getitem", (Ref(pieces), 1)))
    b.nodes.append(Node("batch", "aten.sym_size.int", (Ref("x"), 0)))
    graph = b.graph(b.op("y", "add.Tensor", Ref("x"), Ref("one")))
    assert fold_constants(graph).nodes == graph.pruned_of_unused().nodes
