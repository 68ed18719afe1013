"""A network run piece by piece gives what it gives at once, however little is kept between the pieces."""

from itertools import product

import torch

from redpp_serve.channels.coupling import couple
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Ref
from redpp_serve.pruning import piecewise as module
from redpp_serve.pruning.matching import smooth_noise
from redpp_serve.pruning.piecewise import Piecewise, chunk_size
from tests.support.networks import KINDS, Builder, network


def test_every_place_gives_the_same_values(monkeypatch):
    for kind, kept in product(KINDS, (10**9, 400, 0)):
        monkeypatch.setattr(module, "_KEPT_VALUES", kept)
        graph = network(kind, 4)
        inputs = smooth_noise(graph.inputs, 7, 0)
        names = [node.name for node in graph.nodes]
        expected = dict(zip(names, Program(graph, names)(*inputs), strict=True))
        run = Piecewise(graph, inputs, 3)
        for k, name in enumerate(names):
            run.advance(k)
            (value,) = zip(*run.values([name]), strict=True)
            assert torch.allclose(torch.cat(value), expected[name], atol=1e-6), (kind, kept, name)
        got = [torch.cat(parts) for parts in zip(*run.outputs(), strict=True)]
        pairs = zip(got, graph.outputs, strict=True)
        assert all(torch.allclose(a, expected[b], atol=1e-6) for a, b in pairs), (kind, kept)


def test_tensors_behind_the_place_may_change():
    graph = network("chain", 4)
    inputs = smooth_noise(graph.inputs, 5, 0)
    place = [node.name for node in graph.nodes].index("second")
    changed = graph.with_tensors({"second.weight": 2 * graph.tensors["second.weight"]})
    run = Piecewise(graph, inputs, 2)
    run.advance(place)
    run.use(changed)
    got = torch.cat([part[0] for part in run.outputs()])
    assert torch.allclose(got, Program(changed)(*inputs)[0], atol=1e-6)
    assert not torch.allclose(got, Program(graph)(*inputs)[0], atol=1e-3)


def test_nothing_before_the_place_runs_again(monkeypatch):
    graph = network("chain", 4)
    run = Piecewise(graph, smooth_noise(graph.inputs, 4, 0), 2)
    run.advance(5)
    damaged = graph.with_tensors({"stem.weight": graph.tensors["stem.weight"] * float("nan")})
    run.use(damaged)
    assert all(part[0].isfinite().all() for part in run.outputs())


def test_chunks_are_small_for_few_images_and_wide_networks(monkeypatch):
    graph = network("chain", 8)
    assert [chunk_size(graph, images) for images in (1, 8, 1000)] == [1, 2, 32]
    monkeypatch.setattr(module, "_CHUNK_VALUES", 600)
    assert chunk_size(graph, 1000) == 600 // (8 * 30)


def test_a_size_that_a_later_node_needs_is_kept_behind_the_tensors():
    """The first value that is kept says on which device the rest runs, and a batch size lies on none."""
    b = Builder(4, 6, 6)
    batch = Ref(b.op("batch", "sym_size.int", Ref("x"), 0))
    b.op("flat", "reshape.default", Ref(b.conv("x", "first", 4, 6)), [batch, 216])
    graph = b.graph(b.linear("flat", "head", 216, 3))
    inputs = smooth_noise(graph.inputs, 5, 0)
    run = Piecewise(graph, inputs, 2)
    run.advance([node.name for node in graph.nodes].index("flat"))
    got = torch.cat([part[0] for part in run.outputs()])
    assert torch.allclose(got, Program(graph)(*inputs)[0], atol=1e-6)


def test_nodes_before_the_place_that_nobody_reads_any_more_may_be_gone():
    b = Builder(4, 6, 6)
    batch = Ref(b.op("batch", "sym_size.int", Ref("x"), 0))
    x = b.relu(b.conv("x", "first", 4, 6))
    b.op("parts", "reshape.default", Ref(x), [batch, 2, 3, 6, 6])
    b.op("swapped", "transpose.int", Ref("parts"), 1, 2)
    b.op("shuffled", "reshape.default", Ref("swapped"), [batch, 6, 6, 6])
    graph = b.graph(b.linear(b.mean(b.conv("shuffled", "second", 6, 5)), "head", 5, 3))
    narrow = couple(graph).narrow({"first": torch.tensor([0, 2, 5])})
    assert "batch" not in {node.name for node in narrow.nodes}
    inputs = smooth_noise(graph.inputs, 5, 0)
    run = Piecewise(graph, inputs, 2)
    run.advance([node.name for node in graph.nodes].index("first"))
    run.use(narrow)
    got = torch.cat([part[0] for part in run.outputs()])
    assert torch.allclose(got, Program(narrow)(*inputs)[0], atol=1e-6)


def test_images_that_were_left_behind_catch_up():
    """Each stop asks for another number of images; what is given is what the whole network gives for the first."""
    for kind in KINDS:
        graph = network(kind, 4)
        inputs = smooth_noise(graph.inputs, 11, 0)
        names = [node.name for node in graph.nodes]
        expected = dict(zip(names, Program(graph, names)(*inputs), strict=True))
        run = Piecewise(graph, inputs, 3)
        for k, name in enumerate(names):
            images = (2, 11, 4, 1, 7)[k % 5]
            run.advance(k, images)
            got = torch.cat([value for (value,) in run.values([name], images)])
            assert images <= len(got) < images + 3, (kind, name)  # whole chunks
            assert torch.allclose(got, expected[name][: len(got)], atol=1e-6), (kind, name)
        got = [torch.cat(parts) for parts in zip(*run.outputs(), strict=True)]
        assert all(torch.allclose(a, expected[b], atol=1e-6) for a, b in zip(got, graph.outputs, strict=True)), kind


def test_images_left_behind_run_through_the_changed_tensors():
    """They are before the change, so it concerns them; those in front of it keep what they have."""
    graph = network("chain", 4)
    inputs = smooth_noise(graph.inputs, 6, 0)
    place = [node.name for node in graph.nodes].index("second")
    run = Piecewise(graph, inputs, 2)
    run.advance(place, 3)
    changed = graph.with_tensors({"stem.weight": 2 * graph.tensors["stem.weight"]})
    run.use(changed)
    got = torch.cat([part[0] for part in run.outputs()])
    before, after = (Program(g)(*inputs)[0] for g in (graph, changed))
    assert torch.allclose(got[:4], before[:4], atol=1e-6) and torch.allclose(got[4:], after[4:], atol=1e-6)
