"""The judge: centred errors for each output and family, the worst of which counts, and classes only where there are."""

import math

import numpy as np
import pytest
import torch

from redpp_serve.errors import GateFailed, RedppError
from redpp_serve.graph.class_scores import class_outputs
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec, Ref
from redpp_serve.options import Options
from redpp_serve.pruning.judge import Agreement, CentredError, Difference, Head, Reference, squared_error
from redpp_serve.pruning.matching import smooth_noise
from redpp_serve.pruning.verification import check_gate
from redpp_serve.statistics.binomial import clopper_pearson
from tests.support.networks import Builder, network

A, B = "family a", "family b"


def error_of(*pairs):
    sums = CentredError()
    for expected, got in pairs:
        sums.add(torch.tensor(expected), torch.tensor(got))
    return sums.value()


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_the_centred_error_of_known_matrices():
    expected = [[1.0, 10.0], [3.0, 10.0]]  # about its mean: 1 each side in the first column, nothing in the second
    for got, error in (
        (expected, 0.0),
        ([[2.0, 9.0], [4.0, 9.0]], 0.0),  # a constant is no information lost
        ([[2.0, 10.0], [2.0, 10.0]], 1.0),  # the same answer to everything
        ([[3.0, 10.0], [1.0, 10.0]], 4.0),  # the opposite
        ([[1.0, 10.0], [3.0, 12.0]], 1.0),
    ):
        assert error_of((expected, got)) == pytest.approx(error, abs=1e-12)


def test_the_centred_error_is_that_of_the_covariances_however_the_inputs_come():
    expected, got = 3 * random(40, 5, 2) + 100, 3 * random(40, 5, 2) + 0.3 * random(40, 5, 2, seed=1) + 90
    difference = got - expected
    centred = [float(np.square(x - x.mean(0)).sum()) for x in (difference, expected)]
    whole = error_of((expected, got))
    assert whole == pytest.approx(centred[0] / centred[1], rel=1e-9) and whole < 0.02
    assert error_of((expected[:7], got[:7]), (expected[7:], got[7:])) == pytest.approx(whole, rel=1e-9)
    plain = np.square(difference).sum() / np.square(expected).sum()
    assert plain < 0.02 and np.square(expected - expected.mean(0)).sum() < 0.01 * np.square(expected).sum()


def test_an_output_that_never_varies_is_not_centred():
    expected = np.tile([2.0, 0.0], (6, 1))
    assert error_of((expected, expected)) == 0.0 == error_of((0 * expected, 0 * expected))
    assert error_of((expected, 1.5 * expected)) == pytest.approx(0.25)
    assert error_of((0 * expected, expected)) > 1e6  # silence became noise
    assert error_of(([[3.0]], [[6.0]])) == 1.0  # nor is that of a single input


def test_scales_do_not_matter():
    expected, got = random(20, 3), random(20, 3) + 0.1 * random(20, 3, seed=1)
    known = error_of((expected, got))
    for scale in (1e-20, 1e20):
        assert error_of((scale * expected, scale * got)) == pytest.approx(known, rel=1e-9)


def test_not_a_number_stays_one():
    expected, got = random(8, 3), random(8, 3)
    for bad in (math.nan, math.inf):
        broken = got.copy()
        broken[3, 1] = bad
        assert math.isnan(error_of((expected, broken)))
    pairs = [([torch.zeros(2, 1), torch.ones(2, 1)], [torch.zeros(2, 1), torch.full((2, 1), math.nan)])]
    assert math.isnan(squared_error(pairs))
    head, broken_head = Head("y", {A: 0.1, B: 0.2}), Head("z", {A: math.nan, B: 0.1})
    for heads in ((head, broken_head), (broken_head, head)):
        found = Difference(heads, 8)
        assert math.isnan(found.error) and not found.known
        with pytest.raises(GateFailed, match="nan"):
            check_gate(Options(max_error=10.0), found, None)


def test_the_worst_output_counts_and_integers_do_not():
    pairs = [
        (
            [torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [-2.0]]), torch.tensor([[1], [2]])],
            [torch.tensor([[1.1], [-1.1]]), torch.tensor([[3.0], [-3.0]]), torch.tensor([[7], [9]])],
        )
    ]
    assert squared_error(pairs) == pytest.approx(0.25) and squared_error([]) == 0.0


def scaled(graph, factor, name="head.weight"):
    return graph.with_tensors({name: graph.tensors[name] * torch.tensor(factor)})


def two_heads(*extra):
    """Outputs (N, 3) and (N, 2) of the same values, each times a number for every one of them."""
    b = Builder(3)
    first = b.op("first", "mul.Tensor", Ref("x"), b.tensor("a", torch.ones(3)))
    b.op("two", "slice.Tensor", Ref("x"), 1, 0, 2)
    return b.graph(first, b.op("second", "mul.Tensor", Ref("two"), b.tensor("b", torch.ones(2))))


def test_every_output_and_every_family_has_its_error_and_the_worst_is_the_error():
    graph, generator = two_heads(), torch.Generator().manual_seed(0)
    some = torch.randn(40, 3, generator=generator)
    other = torch.randn(30, 3, generator=generator) * torch.tensor([0.0, 0.0, 1.0]) + 7
    reference = Reference(graph, {A: (some,), B: (other,)})
    damaged = graph.with_tensors({"a": torch.tensor([1.0, 1.0, 1.5]), "b": torch.tensor([0.8, 0.8])})
    found = reference.compare(damaged)
    first, second = found.heads
    assert (first.output, second.output) == ("output_0", "output_1") and found.images == 70 == reference.images
    centred = some - some.mean(0)
    assert first.errors[A] == pytest.approx(0.5 * float(centred[:, 2].norm() / centred.norm()), rel=1e-5)
    assert first.errors[B] == pytest.approx(0.5, rel=1e-5) and second.errors[A] == pytest.approx(0.2, rel=1e-5)
    assert first.error == first.errors[B] == found.error == reference.error(damaged)
    assert found.interval == (first.errors[A], first.errors[B])
    assert reference.compare(graph).error == 0 and reference.compare(Program(damaged)).heads == found.heads


def test_the_error_is_known_where_the_families_agree_within_a_factor_of_two():
    for errors, known in (
        ((0.2, 0.39), True),
        ((0.2, 0.41), False),
        ((0.0, 0.01), True),  # small whatever the ratio
        ((0.001, 0.02), False),
        ((0.3,), True),
    ):
        head = Head("y", dict(zip((A, B), errors, strict=False)))
        assert head.known == known and Difference((Head("x", {A: 0.1, B: 0.1}), head), 5).known == known
        assert ("unknown on real inputs" in str(Difference((head,), 5))) != known
    nothing = Difference((), 5)
    assert (nothing.error, nothing.interval, nothing.known, nothing.top1) == (0.0, (0.0, 0.0), True, None)


def test_families_take_turns_among_the_inputs():
    graph = network("mlp")
    few, many = torch.arange(10.0).reshape(2, 5), 100 + torch.arange(20.0).reshape(4, 5)
    reference = Reference(graph, {A: (few,), B: (many,)})
    assert reference.inputs[0].equal(torch.stack([few[0], many[0], few[1], many[1]]))
    assert reference.on("cpu", 8) is reference and reference.on("cpu", 3).families.keys() == {A, B}
    x = smooth_noise(graph.inputs, 9, 0)
    assert Reference(graph, x).error(scaled(graph, 1.5)) == pytest.approx(0.5, rel=1e-5)
    assert list(Reference(graph, x).compare(graph).heads[0].errors) == ["held-out"]


def test_an_original_without_numbers_is_refused():
    graph = network("mlp")
    x = smooth_noise(graph.inputs, 4, 0)
    Reference(graph, x).require_finite("noise")
    with pytest.raises(RedppError, match="own output is NaN or infinite on noise"):
        Reference(scaled(graph, math.inf), x).require_finite("noise")


def linear_then(*ops, outputs=1):
    """A Linear of five outputs, and operators behind it."""
    b = Builder(4)
    value = b.linear("x", "scores", 4, 5)
    for k, (op, *args) in enumerate(ops):
        value = b.op(f"then{k}", op, Ref(value), *args)
    return b.graph(value)


def pooled():
    b = Builder(3, 6, 6)
    return b.graph(b.mean(b.conv("x", "maps", 3, 4)))


def detector(classes=True):
    """Scores of three classes and a box of four numbers for each input."""
    b = Builder(4)
    scores, box = b.linear("x", "scores", 4, 3), b.linear("x", "box", 4, 4)
    return b.graph(b.op("classes", "softmax.int", Ref(scores), -1) if classes else scores, box)


CLASSES = [
    ("logits", linear_then(), [True]),
    ("pooled logits", pooled(), [True]),
    ("logits of another shape in between", linear_then(("reshape.default", [-1, 5])), [True]),
    ("logits with a temperature", linear_then(("mul.Tensor", 2.0)), [True]),
    ("softmax", linear_then(("softmax.int", 1)), [True]),
    ("logarithms of a softmax", linear_then(("log_softmax.int", 1)), [True]),
    ("softmax, flattened", linear_then(("softmax.int", 1), ("flatten.using_ints", 1)), [True]),
    ("several labels by sigmoid", linear_then(("sigmoid.default",)), [False]),
    ("an embedding behind a ReLU", linear_then(("relu.default",)), [False]),
    ("a regression by tanh", linear_then(("tanh.default",)), [False]),
    ("one number", linear_then(("slice.Tensor", 1, 0, 1)), [False]),
    ("one number by softmax", linear_then(("slice.Tensor", 1, 0, 1), ("softmax.int", 1)), [False]),
    ("a class for each token", network("tokens"), [False]),
    ("a map of classes", network("bare"), [False]),
    ("classes and boxes", detector(), [True, False]),
    ("classes and boxes, told by the names of their layers", detector(classes=False), [True, False]),
    ("two heads of logits, which may be anything", network("branches"), [False, False]),
]


@pytest.mark.parametrize(("graph", "expected"), [case[1:] for case in CLASSES], ids=[case[0] for case in CLASSES])
def test_what_is_a_classification(graph, expected):
    assert class_outputs(graph) == dict(zip(graph.output_names, expected, strict=True))
    x = smooth_noise(graph.inputs, 6, 0)
    found = Reference(graph, x).compare(graph)
    assert [bool(head.agreement) for head in found.heads] == expected
    assert found.agreement == (1.0 if any(expected) else None)


def test_boxes_do_not_vote_and_the_worst_family_of_classes_counts():
    graph = detector()
    x = smooth_noise(graph.inputs, 32, 0)
    moved = scaled(graph, -1.0, "box.weight")
    assert Reference(graph, x).compare(moved).agreement == 1.0 and Reference(graph, x).error(moved) > 1.9
    with torch.no_grad():
        classes = Program(graph)(*x)[0].argmax(1)
    tensors = {
        "scores.weight": graph.tensors["scores.weight"].index_fill(0, torch.tensor(0), 0.0),
        "scores.bias": graph.tensors["scores.bias"].index_fill(0, torch.tensor(0), -100.0),
    }
    blind = graph.with_tensors(tensors)  # never says class 0
    groups = {name: (x[0][rows],) for name, rows in ((A, classes != 0), (B, classes >= 0))}
    found = Reference(graph, groups).compare(blind)
    lost = int((classes == 0).sum())
    assert lost > 0 and found.heads[0].agreement[A].share == 1.0
    assert found.top1 == Agreement(32 - lost, 32) and found.agreement == 1 - lost / 32


def test_an_agreement_says_how_sure_it_is():
    assert Agreement(16, 16).interval == clopper_pearson(16, 16)
    assert str(Agreement(16, 16)) == "16 of 16, so at least 79%"
    low, high = clopper_pearson(45, 50)
    assert str(Agreement(45, 50)) == f"90.0% ({low:.0%} to {high:.0%})"


def test_integers_are_no_outputs_to_compare():
    b = Builder(4)
    b.inputs = [InputSpec("ids", (4,), "int64")]
    b.op("rows", "embedding.default", b.tensor("table", b.random(3, 6)), Ref("ids"))
    head = b.linear(b.op("sum", "mean.dim", Ref("rows"), [1]), "head", 6, 3)
    graph = b.graph(b.op("best", "argmax.default", Ref(head), 1), head)
    found = Reference(graph, smooth_noise(graph.inputs, 5, 0)).compare(scaled(graph, 1.5))
    assert [h.output for h in found.heads] == ["output_1"] and found.error == pytest.approx(0.5, rel=1e-4)
