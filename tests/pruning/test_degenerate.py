"""Layers that are dead, constant, saturated, doubled, empty, alone or of extreme scale go through every stage."""

from dataclasses import replace

import pytest
import torch

from redpp_serve.channels.coupling import couple
from redpp_serve.graph.executor import Program
from redpp_serve.options import Options
from redpp_serve.pruning.effort import Effort
from redpp_serve.pruning.fit import Fitting, quick_fit, reconstruct
from redpp_serve.pruning.judge import Reference
from redpp_serve.pruning.matching import SynthesisBudget, smooth_noise
from redpp_serve.pruning.observation import observe, select
from redpp_serve.pruning.pipeline import prune
from redpp_serve.pruning.repair import repair_batch_norm
from tests.support.networks import network, trained

EFFORT = Effort(SynthesisBudget(12, 6, 2, 4, 6), frontier_points=2, pace=1e-4)
WIDTH = 6


def changed(kind, **values):
    """A network with tensors overwritten by a number: whole ones, or as many first rows as a dict says."""
    graph = trained(kind, WIDTH)
    tensors = {name: tensor.clone() for name, tensor in graph.tensors.items()}
    for key, value in values.items():
        tensor = tensors[key.replace("__", ".")]
        for rows, number in value.items() if isinstance(value, dict) else [(len(tensor), value)]:
            tensor[:rows] = number
    return graph.with_tensors(tensors)


def with_relu6(graph):
    nodes = (replace(n, op="aten.relu6.default") if n.op == "aten.relu.default" else n for n in graph.nodes)
    return replace(graph, nodes=tuple(nodes))


def times(graph, factor, *names):
    return graph.with_tensors({name: factor * graph.tensors[name] for name in names})


def doubled(kind):
    """Every channel twice."""
    graph = trained(kind, WIDTH)
    half = torch.arange(WIDTH) % (WIDTH // 2)
    rows = {n: t for n, t in graph.tensors.items() if n.startswith("inner")}
    return graph.with_tensors({name: tensor[half] for name, tensor in rows.items()})


def cases():
    for rows, name in ((WIDTH // 2, "half"), (WIDTH - 1, "all but one"), (WIDTH, "all")):
        off = {"inner_bn__weight": {rows: 0.0}, "inner_bn__bias": {rows: -1.0}}
        yield f"{name} of the channels dead", changed("residual", **off)
        yield f"{name} of the channels constant", changed("chain", **{**off, "inner_bn__bias": {rows: 2.0}})
        full = {"inner_bn__weight": {rows: 1e-6}, "inner_bn__bias": {rows: 50.0}}
        yield f"{name} of the channels at the limit of ReLU6", with_relu6(changed("depthwise", **full))
    for kind in ("chain", "bare", "mlp"):
        yield f"{kind}: every channel twice", doubled(kind)
        yield f"{kind}: producer of zeros", changed(kind, inner__weight=0.0)
        yield f"{kind}: reader of zeros", changed(kind, second__weight=0.0)
        yield f"{kind}: head of zeros", changed(kind, head__weight=0.0)
        yield f"{kind}: one channel", network(kind, 1)
    graph = trained("chain", WIDTH)
    yield "nothing but zeros", graph.with_tensors({n: 0 * t for n, t in graph.tensors.items() if n.endswith("weight")})
    for factor in (1e-20, 1e20):
        yield (
            f"values of {factor:g} between two layers",
            times(times(network("mlp", WIDTH), factor, "inner.weight", "inner.bias"), 1 / factor, "second.weight"),
        )
        yield f"outputs of {factor:g}", times(trained("residual", WIDTH), factor, "head.weight", "head.bias")
        first = times(network("bare", WIDTH), factor, "inner.weight")
        yield f"convolutions at {factor:g}", times(first, 1 / factor, "head.weight")
        half = network("mlp", WIDTH)
        half.tensors["inner.weight"][: WIDTH // 2] *= factor
        half.tensors["inner.bias"][: WIDTH // 2] *= factor
        half.tensors["second.weight"][:, : WIDTH // 2] /= factor
        yield f"half of the channels at {factor:g}", half
    yield "statistics of nothing", changed("chain", inner_bn__running_var=0.0)


CASES = dict(cases())


def require_finite(graph, inputs, what):
    for name, tensor in graph.tensors.items():
        assert tensor.isfinite().all(), (what, name)
    for value in Program(graph)(*inputs):
        assert value.isfinite().all(), what


@pytest.mark.parametrize("name", CASES)
def test_every_step_gives_numbers(name):
    graph = CASES[name]
    coupling, inputs, other = couple(graph), smooth_noise(graph.inputs, 12, 0), smooth_noise(graph.inputs, 6, 1)
    observed = observe(coupling, inputs)
    selections = select(observed)
    for channel_set in coupling.open:
        chosen = selections[channel_set.name]
        assert sorted(chosen.order.tolist()) == list(range(channel_set.channels)), "an order names every channel once"
        assert chosen.curve.isfinite().all() and chosen.curve.diff().max() <= 1e-9
    reference = Reference(graph, other)
    for share, check, most in ((0.2, other, 2400), (0.7, (), 2400), (0.5, other, 0)):
        kept = {s.name: selections[s.name].kept(max(1, int(share * s.channels))) for s in coupling.open}
        quick = quick_fit(observed, kept)
        require_finite(quick, other, "quick fit")
        fitted, records = reconstruct(Fitting(graph, coupling, inputs, check, most_unknowns=most), kept, quick)
        require_finite(fitted, other, "reconstruction")
        assert all(0 <= record.error < float("inf") for record in records)
    repaired = repair_batch_norm(fitted, graph, inputs, coupling.kept(kept))
    require_finite(repaired, other, "repair")
    assert reference.error(repaired) < float("inf")


@pytest.mark.parametrize("name", CASES)
def test_the_whole_run_gives_numbers(name):
    graph = CASES[name]
    options = Options(keep=0.5, round_to=1, distil=0.0, max_error=10.0, accept_unmeasured=True)
    result = prune(graph, options, effort=EFFORT)
    require_finite(result.pruned, smooth_noise(graph.inputs, 4, 2), "result")
    assert 0 <= result.verify.output_error < 2 and all(0 <= share.error < 2 for share in result.shares)
    for record in result.layers:
        assert record.merge.kept >= 1 and record.pruned_shape[0] == record.merge.kept


def test_channels_that_tell_nothing_go_first_and_nothing_is_lost():
    """Dead and constant channels, and the second of two equal ones, are worth nothing beside the others."""
    for name in ("half of the channels dead", "half of the channels constant", "chain: every channel twice"):
        graph = CASES[name]
        coupling, inputs = couple(graph), smooth_noise(graph.inputs, 24, 0)
        observed = observe(coupling, inputs)
        selection = select(observed)["inner"]
        assert float(selection.curve[WIDTH // 2]) < 1e-6, name
        if "constant" in name:  # what they add to the rim of a padded convolution is not the same as inside
            continue
        quick = quick_fit(observed, {"inner": selection.kept(WIDTH // 2)})
        assert Reference(graph, smooth_noise(graph.inputs, 8, 1)).error(quick) < 2e-3, name
