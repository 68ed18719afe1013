"""Each operator's rule: which sets it leaves open, and that these can go without harm to what others compute."""

import functools

import pytest
import torch

from redpp_serve.channels import rules
from redpp_serve.channels.coupling import couple
from redpp_serve.channels.walk import OWN
from redpp_serve.graph.graph import Node
from redpp_serve.graph.operators import ALLOWED
from tests.support.networks import Builder
from tests.support.rule_networks import OPEN, R, gap, head, items, some_kept, widths_of, with_copies, without

EXACT = 1e-12


@functools.cache
def coupled(case):
    return couple(OPEN[case][0]())


def test_the_sets_of_each_network():
    for case, (_, expected) in OPEN.items():
        assert widths_of(coupled(case)) == expected, case


@pytest.mark.parametrize("case", OPEN)
def test_narrowing_is_dropping_the_readers_columns(case):
    coupling = coupled(case)
    for seed in range(4):
        kept = some_kept(coupling, seed)
        whole, narrow = without(coupling, kept), coupling.narrow(kept)
        for batch in (1, 3):
            assert gap(whole, narrow, batch) < EXACT, (seed, batch)


@pytest.mark.parametrize("case", OPEN)
def test_a_narrowed_network_has_the_same_sets(case):
    coupling = coupled(case)
    kept = {c.name: torch.arange(c.channels - 1) for c in coupling.open if c.channels > 2}  # a single group is none
    again = {c.name: c.channels for c in couple(coupling.narrow(kept)).sets if c.name in kept}
    assert again == {name: len(stay) for name, stay in kept.items()}


@pytest.mark.parametrize("case", OPEN)
def test_a_copy_in_every_part_computes_the_same_and_a_copy_in_all_but_one_does_not(case):
    """The parts are complete, and none is there for nothing: moving a copy's columns to its original tells."""
    coupling = couple(OPEN[case][0]().to(torch.float64))
    for channel_set in coupling.open:
        planted = coupling.with_tensors(with_copies(coupling, channel_set, {1: 0}).tensors)
        assert gap(planted.graph, moved(planted, channel_set)) < 1e-9
        for part in (p for p in channel_set.parts if p.tensor != "k.bias"):  # a softmax takes away what all keys share
            value = planted.graph.tensors[part.tensor]
            index = part.positions[1]
            noise = torch.rand(value.index_select(part.dim, index).shape, generator=torch.Generator().manual_seed(1))
            other = value.index_copy(part.dim, index, value.index_select(part.dim, index) + 1 + noise.double())
            changed = planted.with_tensors({part.tensor: other})
            assert gap(changed.graph, moved(changed, channel_set)) > 1e-9, part.tensor


def moved(coupling, channel_set):
    """The network where the readers' columns of channel 1 are added to those of channel 0 and are zero themselves."""
    tensors = {}
    for reader in {(r.tensor, r.dim): r for r in channel_set.readers}.values():
        weight, (first, second) = coupling.graph.tensors[reader.tensor], reader.positions[:2]
        weight = weight.index_add(reader.dim, first, weight.index_select(reader.dim, second))
        tensors[reader.tensor] = weight.index_fill(reader.dim, second, 0)
    return coupling.graph.with_tensors(tensors)


def then(*steps):
    """first (8 channels) -> the steps, each a function of the builder and a value -> a classifier of ``n`` channels."""

    def build(n=8):
        b = Builder(4, 6, 6)
        x = b.conv("x", "first", 4, 8)
        for step in steps:
            x = step(b, x)
        return head(b, x, n)

    return build


def op(name, *args, n="y"):
    return lambda b, x: b.op(n, name, R(x), *args)


def _plus_input(b, x):
    return b.add(x, b.op("twice", "cat.default", [R("x"), R("x")], 1))


def _computed_weight(b, x):
    weight = b.op("standard", "mul.Tensor", b.tensor("w", b.random(4, 8, 1, 1)), 2.0)
    x = b.op("second", "conv2d.default", R(x), R(weight), None)
    return b.conv(x, "third", 4, 8)


def _trained_norm(b, x):
    return b.op("bn", "batch_norm.default", R(x), None, None, None, None, True, 0.1, 1e-5, True)


def _outer(b, x):
    plane = b.conv(x, "plane", 8, 6, 1)
    other = b.op("swap", "permute.default", R(b.op("pool", "mean.dim", R(plane), [2, 3], True)), [0, 2, 3, 1])
    return b.op("outer", "mul.Tensor", R(b.op("pool2", "mean.dim", R(x), [3], True)), R(other))


def _layer_norm(b, x):
    y = b.op("last", "permute.default", R(x), [0, 2, 3, 1])
    y = b.op("ln", "layer_norm.default", R(y), [8], b.tensor("ln.weight", b.random(8)), None, 1e-5)
    return b.op("first_again", "permute.default", R(y), [0, 3, 1, 2])


def _one_of_two_products(b, x):
    y = b.op("tokens", "flatten.using_ints", R(x), 2)
    y = b.op("gram", "matmul.default", R(y), R(b.op("swap", "transpose.int", R(y), 1, 2)))
    return b.op("image", "unsqueeze.default", R(b.linear(y, "mix", 8, 6)), 2)


def _wide(b, x):
    return b.op("wide", "permute.default", R(b.linear(b.conv(x, "c", 8, 5), "over_width", 6, 4)), [0, 3, 2, 1])


def _computed_norm(b, x):
    scale = b.op("softplus", "softplus.default", b.tensor("raw", b.random(8)))
    statistics = b.tensor("mean", b.random(8)), b.tensor("var", b.random(8) ** 2 + 1)
    return b.op("bn", "batch_norm.default", R(x), R(scale), None, *statistics, False, 0.1, 1e-5, True)


def _scaled_by_mean(b, x):
    return b.op("scaled", "mul.Tensor", R(x), R(b.op("y", "mean.dim", R(x), [1], True)))


def _one_more(b, x):
    one = b.op("one", "unsqueeze.default", R(b.op("y", "select.int", R(x), 1, 2)), 1)
    return b.op("cat", "cat.default", [R(x), R(one)], 1)


def _reflected(b, x):
    return b.op("y", "pad.default", R(b.op("last", "permute.default", R(x), [0, 2, 3, 1])), [1, 1, 0, 0], "reflect")


def _taken_alone(b, x):
    one = b.op("one", "slice.Tensor", R(x), 1, 3, 4)
    return b.op("cat", "cat.default", [R(x), R(b.op("view", "reshape.default", R(one), [-1, 1, 6, 6]))], 1)


def _taken_apart(b, x):
    one = [R(b.op(f"one{k}", "slice.Tensor", R(x), 1, k, k + 1)) for k in range(2)]
    return b.op("cat", "cat.default", [*one, R(b.op("rest", "slice.Tensor", R(x), 1, 2, 8))], 1)


def _halves_normed(b, x):
    halves = items(b, b.op("chunk", "chunk.default", R(x), 2, 1), "half0", "half1")
    normed = [b.op(f"gn{k}", "group_norm.default", R(h), 1, None, None, 1e-5, True) for k, h in enumerate(halves)]
    return b.op("cat", "cat.default", [R(y) for y in normed], 1)


def _cut_inside_groups(b, x):
    x = b.conv(x, "groups", 8, 8, groups=4)
    return b.op("cut", "slice.Tensor", R(x), 1, 1, 7)


def _shuffled_groups(b, x):
    order = b.tensor("order", torch.tensor([1, 0, 2, 3, 4, 5, 6, 7]))
    return b.op("mixed", "index_select.default", R(b.conv(x, "groups", 8, 8, groups=4)), 1, order)


CLOSED = {  # the whole list of reasons, word for word
    "an output": (then(), {"head": "is an output of the network"}),
    "unknown operator": (
        then(op("pixel_unshuffle.default", 1)),
        {"first": "is read by pixel_unshuffle (y), whose coupling is not known"},
    ),
    "softmax": (then(op("softmax.int", 1)), {"first": "goes through a softmax over channels (y)"}),
    "running sum": (then(op("cumsum.default", 1)), {"first": "goes through a cumsum over channels (y)"}),
    "mean over channels": (then(_scaled_by_mean), {"first": "is summed over channels by mean (y)"}),
    "layer norm": (then(_layer_norm), {"first": "is normalised across channels (ln)"}),
    "one group": (
        then(op("group_norm.default", 1, None, None, 1e-5, True)),
        {"first": "is normalised across channels (y)"},
    ),
    "flip": (then(op("flip.default", [1])), {"first": "is moved among channels by flip (y)"}),
    "roll of everything": (then(op("roll.default", [1])), {"first": "is moved among channels by roll (y)"}),
    "select": (then(_one_more), {"first": "is taken apart by select (y)"}, 9),
    "steps": (then(op("slice.Tensor", 1, 0, 8, 2)), {"first": "is read in steps (y)"}, 4),
    "index": (
        then(lambda b, x: b.op("y", "index.Tensor", R(x), [None, b.tensor("places", torch.tensor([7, 0, 1]))])),
        {"first": "is indexed (y)"},
        3,
    ),
    "added to the input": (then(_plus_input), {"first": "meets values that are no channels (first_twice)"}),
    "computed weight": (
        then(_computed_weight),
        {"first": "is read by standard: its weight is computed or used elsewhere"},
    ),
    "norm in training": (then(_trained_norm), {"first": "its batch norm uses the batch's own statistics (bn)"}),
    "computed norm": (then(_computed_norm), {"first": "its batch norm is shared or computed (bn)"}),
    "outer product": (
        then(_outer),
        {"first": "is broadcast over other channels (outer)", "plane": "is broadcast over other channels (outer)"},
    ),
    "product of channels": (then(_one_of_two_products), {"first": "is contracted with another value (gram)"}),
    "channel alone": (then(_taken_alone), {"first[2]": "has a single channel"}, 9),
    "channels alone": (then(_taken_apart), {"first": "is all that one0 consists of"}),
    "cut inside its groups": (then(_cut_inside_groups), {"first": "is taken apart or reordered inside (cut)"}, 6),
    "groups reordered inside": (then(_shuffled_groups), {"first": "is taken apart or reordered inside (mixed)"}),
    "one group each": (then(_halves_normed), {"first": "is normalised across channels (gn0)"}),
    "reflected beside channels": (then(_reflected), {"first": "is read by pad (y), whose coupling is not known"}, 6),
    "single channel": (
        lambda n: head((b := Builder(4, 6, 6)), b.conv("x", "first", 4, 1), n),
        {"first": "has a single channel"},
        1,
    ),
}


@pytest.mark.parametrize("case", CLOSED)
def test_what_is_closed_has_the_right_reason(case):
    build, expected, *n = CLOSED[case]
    coupling = couple(build(*n) if n else build(8))
    assert {c.name: c.closed for c in coupling.sets if c.name in expected} == expected


def test_nothing_of_a_closed_set_changes():
    b = Builder(4, 6, 6)
    stem = b.relu(_layer_norm(b, b.conv("x", "stem", 4, 8)))
    graph = head(b, b.add(stem, b.conv(b.relu(b.conv(stem, "inner", 8, 6)), "outer", 6, 8)), 8)
    coupling = couple(graph)
    assert widths_of(coupling) == {"inner": 6}
    narrow = coupling.narrow({"inner": torch.tensor([0, 4])})
    changed = {k for k, v in graph.tensors.items() if narrow.tensors[k].shape != v.shape}
    assert changed == {"inner.weight", "inner.bias", "outer.weight"}


def test_a_layer_that_cannot_take_part_says_why():
    b = Builder(4, 6, 6)
    x = b.linear(b.conv("x", "first", 4, 8), "over_width", 6, 6)
    x = b.conv(b.conv(x, "depthwise", 8, 8, groups=8), "grouped", 8, 8, groups=2)
    assert couple(head(b, x, 8)).closed_layers == {
        "over_width": "it mixes positions, not channels",
        "depthwise": "depthwise: its channels are those of its input",
        "grouped": "grouped: a group of its channels goes with that of its input",
        "head": "is an output of the network",
    }


def test_a_convolution_over_another_axis_closes_what_it_reads():
    b = Builder(4, 6, 6)
    x = b.op("last", "permute.default", R(b.conv("x", "first", 4, 8)), [0, 2, 3, 1])
    coupling = couple(b.graph(b.linear(b.mean(b.conv(x, "second", 6, 5)), "head", 5, 3)))
    assert coupling.sets[0].closed == "is read by second: it reads another axis than that of the channels"
    assert coupling.closed_layers["second"] == "it reads another axis than that of the channels"


def test_the_networks_input_in_groups_leaves_the_layer_alone():
    b = Builder(4, 6, 6)
    coupling = couple(head(b, b.conv(b.conv("x", "first", 4, 8, groups=2), "second", 8, 6), 6))
    assert widths_of(coupling) == {"second": 6}


def test_a_free_parameter_is_a_part():
    coupling = couple(OPEN["affine_parameters"][0]())
    assert {(p.tensor, p.dim) for p in coupling.open[0].parts} == {
        ("first.weight", 0),
        ("first.bias", 0),
        ("gamma", 0),
        ("place", 1),
    }


def test_sizes_that_follow_the_batch_are_kept_apart_from_channels():
    b = Builder(4, 6, 6)
    x = b.conv("x", "first", 4, 8)
    batch = b.op("batch", "sym_size.int", R("x"), 0)
    b.nodes.append(Node("rows", "py.mul", (R(batch), 36)))
    y = b.op("tokens", "reshape.default", R(b.op("last", "permute.default", R(x), [0, 2, 3, 1])), [R("rows"), 8])
    y = b.op("back", "reshape.default", R(b.linear(y, "second", 8, 5)), [R(batch), 36, 5])
    coupling = couple(b.graph(b.linear(b.op("mean", "mean.dim", R(y), [1]), "head", 5, 3)))
    assert widths_of(coupling) == {"first": 8, "second": 5}
    kept = some_kept(coupling, 1)
    assert gap(without(coupling, kept), coupling.narrow(kept)) < EXACT


def ignoring(rule):
    """The rule without what it does to labels."""
    return lambda walk, node: walk.spread(walk.along(walk.value(node.args[0]), 1), 1, walk.shapes[node.name])


def unshuffled(walk, node):
    return walk.value(node.args[0])


MUTANTS = {
    "groups are no channels": ("group_norm", "aten.group_norm.default", ignoring),
    "the shuffle forgets its order": ("shuffle_operator", "aten.channel_shuffle.default", lambda rule: unshuffled),
    "adds do not join": ("residual", "aten.add.Tensor", ignoring),
    "gates do not join": ("squeeze_excite", "aten.mul.Tensor", ignoring),
    "columns of the wrong operand": (
        "concatenation",
        "aten.cat.default",
        lambda rule: lambda walk, node: rule(walk, node).flip(1),
    ),
    "slopes are shared": ("prelu", "aten.prelu.default", ignoring),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_rule_is_noticed(monkeypatch, mutant):
    """Either the trial on shapes closes the sets, or the drop test sees another function."""
    case, name, change = MUTANTS[mutant]
    build, expected = OPEN[case]
    monkeypatch.setitem(rules.RULES, name, change(rules.RULES[name]))
    coupling = couple(build())
    if widths_of(coupling) == expected:
        kept = {c.name: torch.arange(c.channels)[1::2] for c in coupling.open}
        assert gap(without(coupling, kept), coupling.narrow(kept)) > 1e-6


def test_every_operator_with_weights_of_its_own_has_a_rule():
    assert set(OWN) <= set(rules.RULES)


def test_every_rule_is_for_an_operator_that_an_artifact_may_call():
    assert set(rules.RULES) <= ALLOWED


def test_other_names_for_the_same_convolution():
    b = Builder(4, 6, 6)
    weight, bias = b.tensor("first.weight", b.random(8, 4, 3, 3) / 6), b.tensor("first.bias", b.random(8))
    x = b.op("first", "convolution.default", R("x"), weight, bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    weight = b.tensor("depthwise.weight", b.random(8, 1, 3, 3))
    x = b.op("depthwise", "convolution.default", R(x), weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 8)
    weight = b.tensor("up.weight", b.random(8, 5, 2, 2) / 5)
    x = b.op("up", "convolution.default", R(x), weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)
    weight = b.tensor("same.weight", b.random(6, 5, 3, 3) / 6)
    x = b.op("same", "conv2d.padding", R(x), weight, None, [1, 1], "same", [1, 1], 1)
    coupling = couple(head(b, x, 6))
    assert widths_of(coupling) == {"first": 8, "up": 5, "same": 6}
    kept = some_kept(coupling, 4)
    assert gap(without(coupling, kept), coupling.narrow(kept)) < EXACT


def test_one_dimensional_convolutions():
    b = Builder(4, 9)
    weight = b.tensor("first.weight", b.random(8, 4, 3) / 4)
    x = b.op("first", "conv1d.default", R("x"), weight, None, [1], [1], [1], 1)
    weight = b.tensor("up.weight", b.random(8, 5, 2) / 3)
    x = b.op("up", "conv_transpose1d.default", R(x), weight, None, [2], [0], [0], 1, [1])
    x = b.op("pool", "adaptive_avg_pool1d.default", R(b.op("max", "max_pool1d.default", R(x), [2], [2])), [1])
    coupling = couple(b.graph(b.linear(b.flatten(x), "head", 5, 3)))
    assert widths_of(coupling) == {"first": 8, "up": 5}
    kept = some_kept(coupling, 0)
    assert gap(without(coupling, kept), coupling.narrow(kept)) < EXACT
