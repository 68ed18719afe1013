"""Coupling as a whole: over random networks, what it calls a channel set can be narrowed, permuted and merged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redpp_serve.channels.coupling import couple, matches, unmatched
from redpp_serve.graph.graph import Ref
from redpp_serve.pruning.merging import merge_exact
from tests.support.networks import Builder, difference, few
from tests.support.random_networks import BLOCKS, build, random_networks
from tests.support.rule_networks import OPEN, R, gap, head, permuted, some_kept, widths_of, with_copies, without

EXACT = 1e-12
some = settings(few, max_examples=25)


@given(random_networks(), st.integers(0, 1000), st.sampled_from([1, 3]))
@some
def test_narrowing_any_network_is_dropping_the_readers_columns(graph, seed, batch):
    coupling = couple(graph)
    kept = some_kept(coupling, seed)
    assert coupling.open
    assert gap(without(coupling, kept), coupling.narrow(kept), batch) < EXACT
    assert not any("would not run" in c.closed for c in coupling.sets)


@given(random_networks(), st.data())
@few
def test_the_channels_of_a_channel_set_can_be_permuted(graph, data):
    """If a tensor were missing from a channel set, this would change the outputs."""
    coupling = couple(graph.to(torch.float64))
    channel_set = data.draw(st.sampled_from(coupling.open))
    order = torch.tensor(data.draw(st.permutations(range(channel_set.channels))))
    assert gap(coupling.graph, permuted(coupling, channel_set, order)) < 1e-9


@given(random_networks(), st.integers(0, 1000))
@some
def test_planted_copies_are_merged_and_nothing_else(graph, seed):
    coupling = couple(graph.to(torch.float64))
    generator, planted = torch.Generator().manual_seed(seed), 0
    for channel_set in coupling.open:
        order = torch.randperm(channel_set.channels, generator=generator).tolist()
        copies = dict(zip(order[: channel_set.channels // 3], order[channel_set.channels // 3 :], strict=False))
        coupling = coupling.with_tensors(with_copies(coupling, channel_set, copies).tensors)
        planted += len(copies)
    merged = merge_exact(coupling, 1)
    assert merged.removed == planted
    assert difference(coupling.graph, merged.graph) < 1e-9


@given(random_networks())
@few
def test_every_channel_that_a_layer_creates_is_in_one_channel_set(graph):
    coupling = couple(graph)
    seen = {}
    for channel_set in coupling.sets:
        assert (
            channel_set.channels == len(channel_set.parts[0].positions)
            and channel_set.producers[0] == channel_set.name.partition("[")[0]
        )
        for part in channel_set.parts:
            for position in part.positions.flatten().tolist():
                assert seen.setdefault((part.tensor, part.dim, position), channel_set.name) == channel_set.name
                assert 0 <= position < graph.tensors[part.tensor].shape[part.dim]
    created = {p for channel_set in coupling.sets for p in channel_set.producers}
    for name in created:
        rows = graph.tensors[f"{name}.weight"].shape[0]
        assert all((f"{name}.weight", 0, row) in seen for row in range(rows))


@given(random_networks())
@settings(few, max_examples=6)
def test_the_same_network_gives_the_same_sets(graph):
    one, two = couple(graph), couple(graph)
    assert [(c.name, c.channels, c.producers, c.closed) for c in one.sets] == [
        (c.name, c.channels, c.producers, c.closed) for c in two.sets
    ]
    for a, b in zip(one.sets, two.sets, strict=True):
        pairs = zip((*a.parts, *a.readers), (*b.parts, *b.readers), strict=True)
        assert all(torch.equal(p.positions, q.positions) for p, q in pairs)


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_each_block_alone(block):
    coupling = couple(build([block], 1, flat=True))
    assert coupling.open, block
    for channel_set in coupling.open:  # one channel set at a time leaves the others whole
        kept = {channel_set.name: torch.arange(channel_set.channels)[::2]}
        assert gap(without(coupling, kept), coupling.narrow(kept)) < EXACT


def test_a_copy_in_one_producer_of_a_residual_add_is_not_merged():
    coupling = couple(OPEN["residual"][0]())
    (channel_set,) = (c for c in coupling.open if c.name == "stem")
    assert channel_set.producers == ("stem", "outer")
    own = [p for p in channel_set.parts if p.tensor.startswith(("stem", "bn0"))]
    one = type(channel_set)(
        channel_set.name, channel_set.channels, channel_set.producers, tuple(own), channel_set.readers
    )
    half = with_copies(coupling, one, {3: 1})
    assert merge_exact(coupling.with_tensors(half.tensors), 1).removed == 0
    both = with_copies(coupling, channel_set, {3: 1})
    assert merge_exact(coupling.with_tensors(both.tensors), 1).removed == 1


def test_the_sets_come_in_order_of_execution_with_all_that_goes_with_them():
    coupling = couple(OPEN["squeeze_excite"][0]())
    trunk, squeeze, last = coupling.sets
    assert (trunk.name, squeeze.name, last.name) == ("trunk", "squeeze", "head")
    assert trunk.producers == ("trunk", "excite")
    assert {(r.tensor, r.dim, r.axis) for r in trunk.readers} == {("squeeze.weight", 1, 1), ("head.weight", 1, 1)}
    assert {p.tensor for p in trunk.parts} == {
        "trunk.weight",
        "trunk.bias",
        "excite.weight",
        "excite.bias",
        "bn.weight",
        "bn.bias",
        "bn.running_mean",
        "bn.running_var",
    }
    assert last.closed and not coupling.closed_layers.get("trunk")


def test_a_channel_is_a_group_a_head_or_all_its_positions():
    size = {
        case: {p.positions.shape[1] for c in couple(OPEN[case][0]()).open[:1] for p in (*c.parts, *c.readers)}
        for case in ("grouped", "attention_operator", "flatten_into_linear", "patch_merging")
    }
    flat = {"flatten_into_linear": {1, 36}, "patch_merging": {1, 4}}
    assert size == {"grouped": {2, 3}, "attention_operator": {4}, **flat}


@pytest.mark.parametrize(
    ("pattern", "closed"),
    [
        ("trunk", "excluded"),
        ("exc*", "excluded"),
        ("squeeze", "squeeze, which goes with it, is excluded"),
        ("bn", "bn, which goes with it, is excluded"),
        ("head", "head, which goes with it, is excluded"),
        ("other", ""),
    ],
)
def test_exclude_names_any_layer_of_the_channel_set(pattern, closed):
    coupling = couple(OPEN["squeeze_excite"][0](), [pattern])
    assert coupling.sets[0].closed == closed
    if closed:
        assert "trunk" not in widths_of(coupling) and coupling.closed_layers["trunk"] == closed


def test_patterns_that_name_no_layer_are_told():
    graph = OPEN["squeeze_excite"][0]()
    assert unmatched(graph, ["trunk", "fc*"]) == ["--exclude fc* names no layer"]
    assert matches("stage.0.conv", ["stage.*"]) and not matches("stage", ["stage.*"])


def test_a_channel_set_whose_narrowed_network_would_not_run_is_closed_and_the_others_stay_open():
    b = Builder(4, 6, 6)
    x = b.relu(b.conv(b.conv("x", "first", 4, 8), "second", 8, 6))
    b.op("zero", "mul.Scalar", R(b.op("plane", "mean.dim", R("x"), [1], True)), 0.0)
    x = b.op("cat", "cat.default", [R(x), R("zero")], 1)
    start = b.op("five", "slice.Tensor", R(x), 1, 0, 7)
    b.nodes.append(type(b.nodes[0])("end", "py.add", (7, 0)))
    y = b.op("cut", "slice.Tensor", R(start), 1, 0, R("end"))
    coupling = couple(head(b, y, 7))
    assert widths_of(coupling) == {"first": 8}
    assert coupling.sets[1].closed == "the narrowed network would not run: a slice computes its bounds"
    assert coupling.closed_layers["second"] == coupling.sets[1].closed


def test_two_calls_of_one_weight_are_two_readers_of_the_same_columns():
    coupling = couple(OPEN["tied_readers"][0]().to(torch.float64))
    channel_set = coupling.open[0]
    assert (
        channel_set.producers == ("first", "other") and [r.tensor for r in channel_set.readers] == ["second.weight"] * 2
    )
    planted = coupling.with_tensors(with_copies(coupling, channel_set, {4: 2, 5: 2}).tensors)
    merged = merge_exact(planted, 1)
    assert merged.removed == 2 and gap(planted.graph, merged.graph) < 1e-12


def test_an_empty_part_in_another_order_closes_its_channels():
    """A shifted window of the input's own size leaves an empty part over."""
    b = Builder(3, 4, 4)
    empty = b.op("empty", "slice.Tensor", Ref(b.conv("x", "inner", 3, 4)), 2, 4, 8)
    turned = b.op("turned", "index_select.default", Ref(empty), 1, b.tensor("order", torch.tensor([1, 0, 2, 3])))
    coupling = couple(
        b.graph(b.linear(b.mean(b.op("all", "cat.default", [Ref("inner"), Ref(turned)], 2)), "head", 4, 2))
    )
    inner, head = coupling.sets
    assert "would not run" in inner.closed and head.closed
