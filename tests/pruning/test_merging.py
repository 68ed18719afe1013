"""Exact merging: equal to the network it came from, and only what is equal everywhere goes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redpp_serve.channels.coupling import couple
from redpp_serve.graph.graph import Ref
from redpp_serve.graph.layers import find_layers
from redpp_serve.options import HashTarget
from redpp_serve.pruning import merging
from redpp_serve.pruning.hashing import hash_weight
from redpp_serve.pruning.merging import first_equal, merge_exact
from tests.support.networks import (
    KINDS,
    Builder,
    difference,
    few,
    inner_of,
    many,
    network,
    networks,
    permuted,
    plant,
    seeds,
    widths_of,
)

EXACT = 1e-9


def merge_all(graph, round_to=1):
    return merge_exact(couple(graph), round_to)


def merge_one(graph, round_to=1, name="inner"):
    """Merges one class alone: the merged graph, and how many of its channels stayed."""
    coupling = couple(graph)
    only = replace(coupling, sets=tuple(c for c in coupling.sets if c.name == name))
    merged = merge_exact(only, round_to)
    channels = inner_of(graph, name).channels
    kept = len(merged.kept[name]) if merged.kept else channels
    assert channels - kept == merged.removed
    return merged.graph, kept


def hashed(graph, values=5):
    weights = {
        layer.weight: hash_weight(graph.tensors[layer.weight], "kmeans", HashTarget(values=values)).weight
        for layer in find_layers(graph)
    }
    return graph.with_tensors(weights)


@st.composite
def planted(draw, kinds=KINDS):
    """A random network with random copies planted in its inner channels, and how many."""
    width = draw(st.integers(3, 24))
    graph = network(draw(st.sampled_from(kinds)), width, draw(seeds))
    sources = draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=3, unique=True))
    targets = draw(
        st.lists(st.integers(0, width - 1), max_size=width, unique=True).filter(lambda t: not set(t) & set(sources))
    )
    return plant(graph, {t: sources[k % len(sources)] for k, t in enumerate(targets)}), len(targets)


@given(planted(), st.sampled_from([1, 2, 8]))
@many
@pytest.mark.exhaustive
def test_merging_keeps_the_function_and_removes_what_was_planted(case, round_to):
    graph, copies = case
    graph = graph.to(torch.float64)
    merged, kept = merge_one(graph, round_to)
    channels = inner_of(graph).channels
    assert kept == min(channels, -(-(channels - copies) // round_to) * round_to)
    assert len(merged.tensors["inner.weight"]) == kept
    assert difference(graph, merged) < EXACT


@given(networks())
@settings(few, max_examples=6)
def test_merging_a_hashed_network_keeps_its_function(graph):
    graph = hashed(graph, 2).to(torch.float64)
    assert difference(graph, merge_all(graph).graph) < EXACT


@given(networks())
@settings(few, max_examples=6)
@pytest.mark.exhaustive
def test_merging_until_nothing_is_equal_ends_and_then_gives_back_the_same_object(graph):
    """Classes are merged at once, so a merge can make channels of the sets behind it equal."""
    graph = hashed(graph, 2).to(torch.float64)
    widths = widths_of(graph)
    for _ in range(len(widths) + 1):
        merged = merge_all(graph, 2)
        assert merged.removed == sum(widths.values()) - sum(widths_of(merged.graph).values())
        assert difference(graph, merged.graph) < EXACT
        if not merged.removed:
            break
        graph, widths = merged.graph, widths_of(merged.graph)
    assert merged.graph is graph and merged.kept == {}


@given(planted(), st.data())
@few
@pytest.mark.exhaustive
def test_the_order_of_channels_changes_nothing(case, data):
    graph = case[0].to(torch.float64)
    shuffled = permuted(graph, torch.tensor(data.draw(st.permutations(range(inner_of(graph).channels)))))
    (a, before), (b, after) = (merge_one(g) for g in (graph, shuffled))
    assert before == after
    assert difference(a, b) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_without_redundancy_the_graph_is_the_same_object(kind):
    graph = network(kind)
    assert merge_all(graph).graph is graph


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_that_differs_in_any_one_tensor_stays(kind):
    graph = plant(network(kind, 6), {4: 1})
    assert merge_one(graph)[1] == 5
    for part in inner_of(graph).parts:
        changed = graph.tensors[part.tensor].clone()
        changed[4] = torch.nextafter(changed[4], torch.tensor(9.0))
        assert merge_one(graph.with_tensors({part.tensor: changed}))[1] == 6, part.tensor


def test_a_copy_in_one_producer_of_a_residual_add_is_not_merged():
    graph = network("residual")
    weight = graph.tensors["second.weight"].clone()
    weight[1] = weight[0]
    for part in ("weight", "bias", "running_mean", "running_var"):
        graph.tensors[f"second_bn.{part}"][1] = graph.tensors[f"second_bn.{part}"][0]
    merged = merge_all(graph.with_tensors({"second.weight": weight}))
    assert merged.graph.tensors["second.weight"].shape == weight.shape and merged.removed == 0


def test_a_copy_in_every_producer_of_a_residual_stream_goes_from_all_of_them():
    graph = plant(network("residual"), {3: 1}, "stem").to(torch.float64)
    merged = merge_all(graph)
    assert merged.kept["stem"].tolist() == [0, 1, 2] and set(merged.kept) == {"stem"}
    assert [len(merged.graph.tensors[f"{name}.weight"]) for name in ("stem", "second", "second_bn")] == [3, 3, 3]
    assert [merged.graph.tensors[f"{name}.weight"].shape[1] for name in ("inner", "head")] == [3, 3]
    assert difference(graph, merged.graph) < EXACT


def test_a_weight_that_two_calls_share_is_summed_once():
    b = Builder(3, 6, 6)
    hidden = b.relu(b.conv("x", "inner", 3, 4))
    first = b.conv(hidden, "reader", 4, 3, 1)
    b.op(
        "again",
        "conv2d.default",
        Ref(b.op("pooled", "max_pool2d.default", Ref(hidden), [2, 2])),
        *(Ref(f"reader.{part}") for part in ("weight", "bias")),
        [1, 1],
        [0, 0],
        [1, 1],
        1,
    )
    graph = plant(b.graph(first, "again"), {3: 0}).to(torch.float64)
    merged, kept = merge_one(graph)
    old = graph.tensors["reader.weight"]
    torch.testing.assert_close(
        merged.tensors["reader.weight"], torch.stack([old[:, 0] + old[:, 3], old[:, 1], old[:, 2]], 1)
    )
    assert kept == 3 and difference(graph, merged) < EXACT


def test_several_readers_all_get_the_sum():
    graph = plant(network("branches", 4), {3: 0})
    merged, _ = merge_one(graph)
    for name in ("left.weight", "right.weight", "aux.weight"):
        old, new = graph.tensors[name], merged.tensors[name]
        torch.testing.assert_close(new, torch.stack([old[:, 0] + old[:, 3], old[:, 1], old[:, 2]], 1))


def test_a_flattened_channel_takes_its_columns_along():
    graph = plant(network("flatten", 3), {2: 0})
    old, new = graph.tensors["head.weight"], merge_one(graph)[0].tensors["head.weight"]
    torch.testing.assert_close(new, torch.cat([old[:, :6] + old[:, 12:], old[:, 6:12]], 1))


def test_channels_that_no_reader_uses_go_too():
    graph = network("branches", 6)
    for name in ("left.weight", "right.weight", "aux.weight"):
        graph.tensors[name][:, [1, 5]] = 0
    merged, kept = merge_one(graph)
    assert kept == 4 and difference(graph, merged) < 1e-6
    graph.tensors["aux.weight"][:, 5] = 1e-20
    assert merge_one(graph)[1] == 5


def test_a_channel_with_a_zero_among_its_columns_stays():
    graph = network("branches", 6)
    for name in ("left.weight", "right.weight", "aux.weight"):
        graph.tensors[name][0, 1] = 0
    assert merge_all(graph).graph is graph


def test_a_copy_is_used_even_where_its_first_is_not():
    graph = plant(network("chain", 6), {4: 1})
    graph.tensors["second.weight"][:, 1] = 0
    merged, kept = merge_one(graph)
    assert kept == 5 and difference(graph, merged) < 1e-6


def test_copies_kept_for_the_width_keep_their_own_columns():
    graph = plant(network("chain", 8), {5: 1, 6: 1, 7: 1})
    old, new = graph.tensors["second.weight"], merge_one(graph, 3)[0].tensors["second.weight"]
    assert new.shape[1] == 6 and torch.equal(new[:, 5], old[:, 5])
    torch.testing.assert_close(new[:, 1], old[:, 1] + old[:, 6] + old[:, 7])


def test_one_channel_stays_where_the_reader_uses_none():
    graph = network("chain", 5)
    graph.tensors["second.weight"].zero_()
    merged, kept = merge_one(graph)
    assert kept == 1 and difference(graph, merged) < EXACT


def test_sets_narrower_than_the_rounding_step_are_left_alone():
    graph = plant(network("chain", 6), {1: 0, 2: 0, 3: 0})
    assert merge_one(graph, 8)[0] is graph


def test_excluded_layers_keep_their_copies():
    graph = plant(network("chain", 8), {1: 0})
    assert merge_exact(couple(graph), 1).removed == 1
    for name in ("inner", "second"):
        assert merge_exact(couple(graph, [name]), 1).graph is graph


def test_half_precision_sums_are_rounded_once():
    b = Builder(4)
    hidden = b.linear("x", "inner", 4, 3, bias=False)
    graph = b.graph(b.linear(hidden, "head", 3, 1, bias=False)).to(torch.float16)
    graph.tensors["inner.weight"][:] = 1
    graph.tensors["head.weight"][0] = torch.tensor([2048.0, 1.0, 1.0])  # 2048 + 1 is 2048 in half precision
    assert merge_one(graph)[0].tensors["head.weight"].tolist() == [[2050.0]]


def test_columns_are_summed_in_float64():
    """In float32, 1e8 takes up none of the ones that are added to it singly."""
    b = Builder(4)
    hidden = b.linear("x", "inner", 4, 3, bias=False)
    graph = b.graph(b.linear(hidden, "head", 3, 1, bias=False))
    graph.tensors["inner.weight"][:] = 1
    graph.tensors["head.weight"][0] = torch.tensor([1e8, 3.0, 3.0])
    assert merge_one(graph)[0].tensors["head.weight"].tolist() == [[float(torch.tensor(1e8 + 6))]]


def test_channels_that_differ_in_the_sign_of_a_zero_are_equal():
    graph = plant(network("chain", 6), {4: 1})
    weight = graph.tensors["inner.weight"].clone()
    weight[1, 0], weight[4, 0] = 0.0, -0.0
    merged, kept = merge_one(graph.with_tensors({"inner.weight": weight}))
    assert kept == 5 and difference(graph.with_tensors({"inner.weight": weight}), merged) < 1e-6


def drop_last(summed):
    """Readers forget what the last channel added."""

    def wrong(weight, dim, positions, first, stays):
        return summed(weight.index_fill(dim, positions[-1], 0.0), dim, positions, first, stays)

    return wrong


def flip_first(summed):
    def wrong(weight, dim, positions, first, stays):
        weight = weight.clone()
        weight.movedim(dim, 0)[positions[0]] *= -1
        return summed(weight, dim, positions, first, stays)

    return wrong


def weights_only(_):
    """Compares the first part alone: skips bias and batch norm."""
    return lambda tensors: first_equal(tensors[:1])


def one_equal_too_many(_):
    def wrong(tensors):
        first = first_equal(tensors)
        first[-2] = 0
        return first

    return wrong


MUTANTS = {
    "drop a summed column": ("_summed", drop_last),
    "flip a sign": ("_summed", flip_first),
    "skip batch norm": ("first_equal", weights_only),
    "merge a stranger": ("first_equal", one_equal_too_many),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("kind", ["chain", "depthwise", "flatten", "branches"])
def test_the_comparison_notices_a_wrong_merge(monkeypatch, kind, mutant):
    graph = plant(network(kind, 6), {5: 1}).to(torch.float64)
    weight = graph.tensors["inner.weight"].clone()
    weight[3] = weight[2]  # equal weights under different batch norms
    graph = graph.with_tensors({"inner.weight": weight})
    merged, kept = merge_one(graph)
    assert kept == 5 and difference(graph, merged) < EXACT
    name, change = MUTANTS[mutant]
    monkeypatch.setattr(merging, name, change(getattr(merging, name)))
    assert difference(graph, merge_one(graph)[0]) > 1e-4


@given(seeds, st.integers(1, 12), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
@few
def test_first_equal_against_brute_force(seed, n, dtype):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randint(-1, 2, shape, generator=g).to(dtype) * 0.5 for shape in ((n,), (n, 2), (n, 1, 1, 2))]
    tensors[0][::2] *= -1  # makes negative zeros
    expected = [next(a for a in range(n) if all(torch.equal(t[a], t[b]) for t in tensors)) for b in range(n)]
    assert first_equal(tensors).tolist() == expected


def test_first_equal_compares_channels_not_memory_layout():
    t = torch.randn(6, 4, 3, 3)
    t[5] = t[1]
    strided = t.contiguous(memory_format=torch.channels_last)
    assert first_equal([strided]).tolist() == [0, 1, 2, 3, 4, 1]
