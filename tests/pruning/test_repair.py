"""Batch-norm repair: the original's normalised statistics come back, and nothing explodes on the way."""

import pytest
import torch

from redpp_serve.graph.executor import Program
from redpp_serve.pruning import repair as module
from redpp_serve.pruning.matching import smooth_noise
from redpp_serve.pruning.repair import repair_batch_norm
from tests.support.judging import compare_outputs
from tests.support.networks import calibrated, network
from tests.support.pairs import pair, whole

KINDS = ("chain", "residual", "depthwise", "branches")


def norms_of(graph):
    return [node for node in graph.nodes if node.op == "aten.batch_norm.default"]


@torch.no_grad()
def statistics(graph, norm, inputs):
    """Mean and deviation of a norm's output before its affine part, in float64 and in one piece."""
    graph = graph.to(torch.float64)
    (value,) = Program(graph, [norm.args[0].name])(*(x.double() for x in inputs))
    mean, variance = (graph.tensors[ref.name].view(-1, *[1] * (value.dim() - 2)) for ref in norm.args[3:5])
    value = ((value - mean) / (variance + norm.args[7]).sqrt()).transpose(0, 1).flatten(1)
    return value.mean(1), value.std(1, correction=0)


def test_every_norm_gets_the_statistics_of_its_original(monkeypatch):
    for kind in KINDS:
        monkeypatch.setattr(module, "_MOST_CHANGE", 100.0)
        narrow, graph, kept = pair(kind)
        inputs = smooth_noise(graph.inputs, 40, 0)
        repaired = repair_batch_norm(narrow, graph, inputs, kept)
        for norm in norms_of(graph):
            channels = kept(norm.name).get(1, slice(None))
            for got, expected in zip(statistics(repaired, norm, inputs), statistics(graph, norm, inputs), strict=True):
                torch.testing.assert_close(got, expected[channels], rtol=1e-3, atol=1e-3, msg=kind)
        assert {n for n in graph.tensors if not repaired.tensors[n].equal(narrow.tensors[n])} <= {
            n for n in graph.tensors if "running" in n
        }
        assert any(not repaired.tensors[n].equal(narrow.tensors[n]) for n in graph.tensors)


def test_the_targets_are_those_of_the_original_and_not_zero_and_one():
    graph = network("chain")
    inputs = smooth_noise(graph.inputs, 40, 0)  # whose statistics the random network does not store
    repaired = repair_batch_norm(graph, graph, inputs, whole)
    for name, tensor in graph.tensors.items():
        torch.testing.assert_close(repaired.tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_damage_by_scale_and_shift_is_undone():
    graph = calibrated(network("residual", 16), smooth_noise(network("residual").inputs, 64, 3))
    inputs, held_out = smooth_noise(graph.inputs, 64, 0), smooth_noise(graph.inputs, 32, 1)
    factors = torch.linspace(0.5, 2, 16).view(-1, 1, 1, 1)
    bad = graph.with_tensors(
        {
            "inner.weight": graph.tensors["inner.weight"] * factors,
            "second_bn.running_mean": graph.tensors["second_bn.running_mean"] + 0.5,
            "second.weight": graph.tensors["second.weight"] * 3,
        }
    )
    before = compare_outputs(graph, bad, held_out).error
    assert before > 0.3
    assert compare_outputs(graph, repair_batch_norm(bad, graph, inputs, whole), held_out).error < 1e-4


def test_chunks_do_not_matter(monkeypatch):
    narrow, graph, kept = pair("residual")
    inputs = smooth_noise(graph.inputs, 37, 0)
    one = repair_batch_norm(narrow, graph, inputs, kept)
    monkeypatch.setattr(module, "_CHUNK", 5)
    other = repair_batch_norm(narrow, graph, inputs, kept)
    for name in one.tensors:
        torch.testing.assert_close(one.tensors[name], other.tensors[name], rtol=1e-5, atol=1e-6)


def test_a_large_network_is_repaired_on_the_first_inputs(monkeypatch):
    narrow, graph, kept = pair("residual")
    inputs = smooth_noise(graph.inputs, 40, 0)
    # stem_bn_relu (4 channels) lives beside inner and inner_bn (8 each), and beside inner_bn and its ReLU
    assert module._live_bytes(graph) == 4 * 30 * (4 + 8 + 8)
    monkeypatch.setattr(module, "_LIVE_BYTES", 9 * module._live_bytes(graph) + 5)
    few, first = (
        repair_batch_norm(narrow, graph, inputs, kept),
        repair_batch_norm(narrow, graph, (inputs[0][:9],), kept),
    )
    assert all(few.tensors[n].equal(first.tensors[n]) for n in few.tensors)


def test_a_channel_far_from_zero_keeps_its_digits():
    graph = network("chain")
    far = {"inner_bn.running_mean": graph.tensors["inner_bn.running_mean"] + 3e3}
    graph = graph.with_tensors({**far, "stem_bn.bias": torch.full((4,), 1e3)})
    inputs = smooth_noise(graph.inputs, 32, 0)
    graph = calibrated(graph, inputs)
    repaired = repair_batch_norm(graph, graph, inputs, whole)
    old, new = (g.tensors["inner_bn.running_var"] for g in (graph, repaired))
    torch.testing.assert_close(new, old, rtol=1e-2, atol=0)


def test_a_dead_channel_keeps_its_scale_and_gets_its_mean():
    for where in ("graph", "original"):
        graph = network("chain")
        dead = graph.tensors["inner.weight"].clone()
        dead[3] = 0
        dead = graph.with_tensors({"inner.weight": dead})
        pairs = {"graph": (dead, graph), "original": (graph, dead)}
        inputs = smooth_noise(graph.inputs, 32, 0)
        repaired = repair_batch_norm(*pairs[where], inputs, whole)
        assert all(t.isfinite().all() for t in repaired.tensors.values())
        torch.testing.assert_close(
            repaired.tensors["inner_bn.running_var"][3], graph.tensors["inner_bn.running_var"][3]
        )
        norm = graph.node("inner_bn")
        got, expected = statistics(repaired, norm, inputs)[0][3], statistics(pairs[where][1], norm, inputs)[0][3]
        assert float(got) == pytest.approx(float(expected), abs=1e-3), where


def test_a_scale_changes_by_a_bounded_factor():
    graph = network("chain")
    inputs = smooth_noise(graph.inputs, 32, 0)
    bad = graph.with_tensors({"inner.weight": graph.tensors["inner.weight"] * 100, "inner.bias": torch.zeros(8)})
    repaired = repair_batch_norm(bad, graph, inputs, whole)
    ratio = (repaired.tensors["inner_bn.running_var"] / graph.tensors["inner_bn.running_var"]).sqrt()
    assert float(ratio.max()) == pytest.approx(4, rel=1e-3)


def test_what_is_not_finite_spreads_no_further():
    for value in (float("nan"), float("inf")):
        graph = network("residual")
        weight = graph.tensors["inner.weight"].clone()
        weight[2] = value
        bad = graph.with_tensors({"inner.weight": weight})
        repaired = repair_batch_norm(bad, graph, smooth_noise(graph.inputs, 16, 0), whole)
        assert all(repaired.tensors[n].isfinite().all() for n in repaired.tensors if "running" in n)
        assert float(repaired.tensors["inner_bn.running_var"][2]) == float(graph.tensors["inner_bn.running_var"][2])


def test_networks_without_norms_stay():
    for kind in ("mlp", "tokens", "bare"):
        graph = network(kind)
        assert repair_batch_norm(graph, graph, smooth_noise(graph.inputs, 4, 0), whole) is graph, kind


def test_norms_that_share_their_statistics_or_do_not_correspond_stay():
    narrow, graph, _ = pair("chain")
    inputs = smooth_noise(graph.inputs, 16, 0)
    unknown = repair_batch_norm(narrow, graph, inputs, whole)  # nothing says which channels are left
    assert unknown.tensors["inner_bn.running_mean"].equal(narrow.tensors["inner_bn.running_mean"])
    second = graph.node("second_bn")
    shared = graph.with_nodes(
        {
            "second_bn": type(second)(
                "second_bn", second.op, (*second.args[:3], *graph.node("stem_bn").args[3:5], *second.args[5:])
            )
        }
    )
    damaged = shared.with_tensors({n: 1.5 * t for n, t in shared.tensors.items() if n.endswith("weight")})
    repaired = repair_batch_norm(damaged, shared, inputs, whole)
    assert repaired.tensors["stem_bn.running_var"].equal(shared.tensors["stem_bn.running_var"])
    assert not repaired.tensors["inner_bn.running_var"].equal(shared.tensors["inner_bn.running_var"])


def test_the_given_graphs_do_not_change():
    narrow, graph, kept = pair("depthwise")
    before = {n: t.clone() for n, t in narrow.tensors.items()}
    repair_batch_norm(narrow, graph, smooth_noise(graph.inputs, 16, 0), kept)
    assert all(narrow.tensors[n].equal(t) for n, t in before.items())
