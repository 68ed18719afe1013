"""Exact merging: equal to the network it came from, and only what is equal everywhere goes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KINDS, Builder, difference, few, inner_of, many, network, networks, permuted, plant, seeds

from redpp_serve.graph.channels import find_inner_channels
from redpp_serve.graph.layers import find_layers
from redpp_serve.graph.rewrite import first_equal
from redpp_serve.pruning import merging
from redpp_serve.pruning.hashing import Target, hash_weight
from redpp_serve.pruning.merging import merge_exact

EXACT = 1e-9


def merge_all(graph, round_to=1):
    records = []
    for inner in find_inner_channels(graph)[0]:
        graph, record = merge_exact(graph, inner, round_to)
        records.append(record)
    return graph, records


def hashed(graph, values=5):
    weights = {
        layer.weight: hash_weight(graph.tensors[layer.weight], "kmeans", Target(values=values)).weight
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
def test_merging_keeps_the_function_and_removes_what_was_planted(case, round_to):
    graph, copies = case
    graph = graph.to(torch.float64)
    merged, record = merge_exact(graph, inner_of(graph), round_to)
    unique = record.channels - copies
    assert record.kept == min(record.channels, -(-unique // round_to) * round_to)
    assert len(merged.tensors["inner.weight"]) == record.kept
    assert difference(graph, merged) < EXACT


@given(networks())
@settings(few, max_examples=6)
def test_merging_a_hashed_network_keeps_its_function(graph):
    graph = hashed(graph, 2).to(torch.float64)
    merged, _ = merge_all(graph)
    assert difference(graph, merged) < EXACT


@given(networks())
@settings(few, max_examples=6)
def test_merging_twice_is_merging_once(graph):
    once, first = merge_all(hashed(graph, 2), 2)
    twice, second = merge_all(once, 2)
    assert [r.kept for r in second] == [r.kept for r in first]
    assert twice is once


@given(planted(), st.data())
@few
def test_the_order_of_channels_changes_nothing(case, data):
    graph = case[0].to(torch.float64)
    inner = inner_of(graph)
    shuffled = permuted(graph, torch.tensor(data.draw(st.permutations(range(inner.channels)))))
    (a, before), (b, after) = (merge_exact(g, inner_of(g), 1) for g in (graph, shuffled))
    assert before.kept == after.kept
    assert difference(a, b) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_without_redundancy_the_graph_is_the_same_object(kind):
    graph = network(kind)
    assert merge_all(graph)[0] is graph


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_that_differs_in_any_one_tensor_stays(kind):
    graph = plant(network(kind, 6), {4: 1})
    assert merge_exact(graph, inner_of(graph), 1)[1].kept == 5
    for name in inner_of(graph).per_channel:
        changed = graph.tensors[name].clone()
        changed[4] = torch.nextafter(changed[4], torch.tensor(9.0))
        other = graph.with_tensors({name: changed})
        assert merge_exact(other, inner_of(other), 1)[1].kept == 6, name


def test_a_copy_in_one_producer_of_a_residual_add_is_not_merged():
    graph = network("residual")
    weight = graph.tensors["second.weight"].clone()
    weight[1] = weight[0]
    for part in ("weight", "bias", "running_mean", "running_var"):
        graph.tensors[f"second_bn.{part}"][1] = graph.tensors[f"second_bn.{part}"][0]
    merged, records = merge_all(graph.with_tensors({"second.weight": weight}))
    assert merged.tensors["second.weight"].shape == weight.shape
    assert [r.layer for r in records] == ["inner"]


def test_several_readers_all_get_the_sum():
    graph = plant(network("branches", 4), {3: 0})
    merged, _ = merge_exact(graph, inner_of(graph), 1)
    for name in ("left.weight", "right.weight", "aux.weight"):
        old, new = graph.tensors[name], merged.tensors[name]
        torch.testing.assert_close(new, torch.stack([old[:, 0] + old[:, 3], old[:, 1], old[:, 2]], 1))


def test_a_flattened_channel_takes_its_columns_along():
    graph = plant(network("flatten", 3), {2: 0})
    old, new = graph.tensors["head.weight"], merge_exact(graph, inner_of(graph), 1)[0].tensors["head.weight"]
    torch.testing.assert_close(new, torch.cat([old[:, :6] + old[:, 12:], old[:, 6:12]], 1))


def test_channels_that_no_reader_uses_go_too():
    graph = network("branches", 6)
    for name in ("left.weight", "right.weight", "aux.weight"):
        graph.tensors[name][:, [1, 5]] = 0
    merged, record = merge_exact(graph, inner_of(graph), 1)
    assert record.kept == 4 and difference(graph, merged) < 1e-6
    graph.tensors["aux.weight"][:, 5] = 1e-20
    assert merge_exact(graph, inner_of(graph), 1)[1].kept == 5


def test_a_copy_is_used_even_where_its_first_is_not():
    graph = plant(network("chain", 6), {4: 1})
    graph.tensors["second.weight"][:, 1] = 0
    merged, record = merge_exact(graph, inner_of(graph), 1)
    assert record.kept == 5 and difference(graph, merged) < 1e-6


def test_copies_kept_for_the_width_keep_their_own_columns():
    graph = plant(network("chain", 8), {5: 1, 6: 1, 7: 1})
    old, new = graph.tensors["second.weight"], merge_exact(graph, inner_of(graph), 3)[0].tensors["second.weight"]
    assert new.shape[1] == 6 and torch.equal(new[:, 5], old[:, 5])
    torch.testing.assert_close(new[:, 1], old[:, 1] + old[:, 6] + old[:, 7])


def test_one_channel_stays_where_the_reader_uses_none():
    graph = network("chain", 5)
    graph.tensors["second.weight"].zero_()
    merged, record = merge_exact(graph, inner_of(graph), 1)
    assert record.kept == 1 and difference(graph, merged) < EXACT


def test_sets_narrower_than_the_rounding_step_are_left_alone():
    graph = plant(network("chain", 6), {1: 0, 2: 0, 3: 0})
    assert merge_exact(graph, inner_of(graph), 8)[0] is graph


def test_excluded_layers_keep_their_copies():
    graph = plant(network("chain", 8), {1: 0})
    found, _ = find_inner_channels(graph, ["second"])
    assert "inner" not in [inner.producer.name for inner in found]


def test_half_precision_sums_are_rounded_once():
    b = Builder(4)
    hidden = b.linear("x", "inner", 4, 3, bias=False)
    graph = b.graph(b.linear(hidden, "head", 3, 1, bias=False)).to(torch.float16)
    graph.tensors["inner.weight"][:] = 1
    graph.tensors["head.weight"][0] = torch.tensor([2048.0, 1.0, 1.0])  # 2048 + 1 is 2048 in half precision
    assert merge_exact(graph, inner_of(graph), 1)[0].tensors["head.weight"].tolist() == [[2050.0]]


def drop_last(columns_of):
    """Readers forget what the last channel added."""

    def wrong(weight, channels):
        columns = columns_of(weight, channels).clone()
        columns[:, -1] = 0
        return columns

    return wrong


def flip_first(columns_of):
    def wrong(weight, channels):
        columns = columns_of(weight, channels).clone()
        columns[:, 0] *= -1
        return columns

    return wrong


def weights_only(_):
    """Compares the first per-channel tensor alone: skips bias and batch norm."""
    return lambda tensors: first_equal(tensors[:1])


def one_equal_too_many(_):
    def wrong(tensors):
        first = first_equal(tensors)
        first[-2] = 0
        return first

    return wrong


MUTANTS = {"drop a summed column": ("columns_of", drop_last), "flip a sign": ("columns_of", flip_first),
           "skip batch norm": ("first_equal", weights_only), "merge a stranger": ("first_equal", one_equal_too_many)}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("kind", ["chain", "depthwise", "flatten", "branches"])
def test_the_comparison_notices_a_wrong_merge(monkeypatch, kind, mutant):
    graph = plant(network(kind, 6), {5: 1}).to(torch.float64)
    weight = graph.tensors["inner.weight"].clone()
    weight[3] = weight[2]  # equal weights under different batch norms
    graph = graph.with_tensors({"inner.weight": weight})
    merged, record = merge_exact(graph, inner_of(graph), 1)
    assert record.kept == 5 and difference(graph, merged) < EXACT
    name, change = MUTANTS[mutant]
    monkeypatch.setattr(merging, name, change(getattr(merging, name)))
    assert difference(graph, merge_exact(graph, inner_of(graph), 1)[0]) > 1e-4
