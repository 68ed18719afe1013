"""What narrowing writes anew: numbers in calls, orders of shuffles, and the positions that stay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redpp_serve.channels.coupling import couple
from redpp_serve.graph.graph import Node
from tests.support.networks import Builder, few
from tests.support.rule_networks import OPEN, R, gap, head, items, some_kept, without


def narrowed(case, **kept):
    coupling = couple(OPEN[case][0]())
    return coupling.narrow({name: torch.tensor(stay) for name, stay in kept.items()})


def test_nothing_kept_back_gives_the_same_graph():
    for case, (build, _) in OPEN.items():
        graph = build()
        whole = couple(graph).narrow({})
        assert whole.nodes == graph.nodes and whole.tensors.keys() == graph.tensors.keys(), case


def test_names_and_tensors_that_do_not_take_part_stay():
    graph = OPEN["residual"][0]()
    narrow = couple(graph).narrow({"inner": torch.tensor([1, 5])})
    assert [n.name for n in narrow.nodes] == [n.name for n in graph.nodes]
    same = {k for k, t in graph.tensors.items() if narrow.tensors[k] is t}
    assert set(graph.tensors) - same == {"inner.weight", "inner.bias", "outer.weight"}
    assert torch.equal(narrow.tensors["inner.weight"], graph.tensors["inner.weight"][[1, 5]])
    assert torch.equal(narrow.tensors["outer.weight"], graph.tensors["outer.weight"][:, [1, 5]])


def test_groups_are_counted_anew():
    assert narrowed("grouped", first=[0, 2, 3]).node("grouped").args[6] == 3
    assert narrowed("depthwise_multiplier", first=[7]).node("depthwise").args[6] == 1
    assert narrowed("transposed_grouped", first=[1]).node("up").args[6] == 1
    assert narrowed("group_norm", first=[0, 2]).node("gn").args[1] == 2


def test_pieces_keep_what_lies_in_them():
    narrow = narrowed("split_in_two", **{"first": [0, 3, 4], "first[2]": [2]})
    assert narrow.node("split").args[1:] == ([3, 1], 1)
    assert narrowed("chunk_and_multiply", first=[1, 2]).node("chunk").args[1:] == ([2, 2], 1)
    sliced = narrowed("sliced", **{"first": [1], "first[2]": [0, 1, 5]})
    assert sliced.node("front").args[1:] == (1, 0, 1) and sliced.node("back").args[1:] == (1, 1, 4)
    assert sliced.node("part").args[1:] == (1, 0, 3)


def test_sizes_of_reshapes_follow():
    narrow = narrowed("attention_operator", q=[0, 2])
    assert narrow.node("q_split").args[1] == [-1, 5, 2, 4] and narrow.node("joined").args[1] == [-1, 5, 8]
    assert narrowed("unflattened", first=[0, 2, 5]).node("wide").args[2] == [1, 3, 1]
    assert narrowed("squeeze_excite_of_linears", trunk=[3]).node("shaped").args[1] == [-1, 1, 1, 1]


def test_padding_of_channels_follows_the_channels_it_meets():
    narrow = narrowed("padded_shortcut", stem=[0, 1, 3], wide=[0, 2, 3])
    assert narrow.node("pad").args[1] == [0, 0, 0, 0, 1, 2]


@given(st.sampled_from([2, 4]), st.integers(0, 100), st.booleans())
@few
def test_a_shuffle_of_what_is_left_is_one_indexing(groups, seed, operator):
    b = Builder(4, 6, 6, seed=seed)
    x = b.relu(b.conv("x", "first", 4, 8))
    if operator:
        x = b.op("shuffled", "channel_shuffle.default", R(x), groups)
    else:
        x = b.op("view", "reshape.default", R(x), [-1, groups, 8 // groups, 6, 6])
        x = b.op("swap", "permute.default", R(x), [0, 2, 1, 3, 4])
        x = b.op("shuffled", "reshape.default", R(x), [-1, 8, 6, 6])
    coupling = couple(head(b, x, 8))
    kept = some_kept(coupling, seed)
    narrow = coupling.narrow(kept)
    if len(kept["first"]) < 8:
        assert narrow.node("shuffled").op == "aten.index_select.default"
        assert not {"view", "swap"} & {n.name for n in narrow.nodes}
    assert gap(without(coupling, kept), narrow) < 1e-12
    again = couple(narrow)
    assert [c.channels for c in again.open] == [c.channels for c in again.sets[:-1] if c.channels > 1]


def test_a_shuffle_is_narrowed_twice():
    coupling = couple(OPEN["shuffle_operator"][0]())
    once = coupling.narrow({"first": torch.tensor([0, 1, 4, 6, 7])})
    twice = couple(once).narrow({"first": torch.tensor([1, 2, 4])})
    assert gap(coupling.narrow({"first": torch.tensor([1, 4, 7])}), twice) == 0


def test_a_shuffle_of_tokens_beside_channels():
    """The permuted axis is not that of the channels."""
    b = Builder(4, 6, 6)
    x = b.op("last", "flatten.using_ints", R(b.conv("x", "first", 4, 5)), 2)
    x = b.op("swap", "transpose.int", R(x), 1, 2)
    x = b.op("view", "reshape.default", R(x), [-1, 4, 9, 5])
    x = b.op("back", "reshape.default", R(b.op("swap2", "transpose.int", R(x), 1, 2)), [-1, 36, 5])
    x = b.op("half", "slice.Tensor", R(x), 1, 0, 18)
    coupling = couple(b.graph(b.linear(b.op("mean", "mean.dim", R(x), [1]), "head", 5, 3)))
    kept = {"first": torch.tensor([0, 3])}
    assert gap(without(coupling, kept), coupling.narrow(kept)) < 1e-12


def test_positions_that_stay_by_value_and_tensor():
    coupling = couple(OPEN["flatten_into_linear"][0]())
    positions = coupling.kept({"first": torch.tensor([0, 3]), "fc": torch.tensor([6])})
    assert {k: v.tolist() for k, v in positions("first.weight").items()} == {0: [0, 3]}
    assert {k: v.tolist() for k, v in positions("bn").items()} == {1: [0, 3]}
    assert positions("fc.weight")[1].tolist() == [*range(36), *range(108, 144)]
    assert positions("fc.weight")[0].tolist() == [6]
    assert positions("head.bias") == {} and positions("x") == {} and positions("nothing of the sort") == {}


def test_a_computed_size_gives_way_to_the_channels():
    b = Builder(4, 6, 6)
    x = b.relu(b.conv("x", "first", 4, 8))
    batch = b.op("batch", "sym_size.int", R(x), 0)
    channels = b.op("channels", "sym_size.int", R(x), 1)
    y = b.op("flat", "reshape.default", R(x), [R(batch), R(channels), 36])
    coupling = couple(b.graph(b.linear(b.op("mean", "mean.dim", R(y), [2]), "head", 8, 3)))
    kept = {"first": torch.tensor([1, 2, 6])}
    assert coupling.narrow(kept).node("flat").args[1] == [R("batch"), -1, 36]
    assert gap(without(coupling, kept), coupling.narrow(kept)) < 1e-12


@pytest.mark.parametrize("sizes", [[-1, R("channels"), 36]])
def test_two_computed_sizes_close_the_channel_set(sizes):
    b = Builder(4, 6, 6)
    x = b.relu(b.conv("x", "first", 4, 8))
    b.op("channels", "sym_size.int", R(x), 1)
    y = b.op("flat", "reshape.default", R(x), sizes)
    coupling = couple(b.graph(b.linear(b.op("mean", "mean.dim", R(y), [2]), "head", 8, 3)))
    assert coupling.sets[0].closed == "the narrowed network would not run: flat computes two of its sizes"


def test_split_by_a_size_is_written_as_sizes():
    b = Builder(4, 6, 6)
    x = b.conv("x", "first", 4, 8)
    items(b, b.op("split", "split.Tensor", R(x), 3, 1), "a", "b", "c")
    y = b.op("cat", "cat.default", [R("c"), R("a"), R("b")], 1)
    coupling = couple(head(b, b.relu(y), 8))
    kept = {"first": torch.tensor([0, 3, 4, 7])}
    narrow = coupling.narrow(kept)
    assert narrow.node("split") == Node("split", "aten.split_with_sizes.default", (R("first"), [1, 2, 1], 1))
    assert gap(without(coupling, kept), narrow) < 1e-12
