"""Widths: costs are those of the narrowed networks, steps are the cheapest, errors pass through what was measured."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redpp_serve.channels.coupling import couple
from redpp_serve.graph.layers import find_layers, mac_count
from redpp_serve.pruning.fit import quick_fit
from redpp_serve.pruning.matching import smooth_noise
from redpp_serve.pruning.observation import observe, select
from redpp_serve.pruning.widths import (
    NarrowingPath,
    PathPoint,
    ShapeModel,
    measure_errors,
    narrowing_path,
    scaled_curve,
    search_error,
    uniform,
    unit,
)
from tests.pruning.test_fit import network_of
from tests.support.judging import compare_outputs
from tests.support.layer_networks import EXAMPLES
from tests.support.networks import KINDS, few, network, networks, seeds
from tests.support.rule_networks import OPEN


def falling(channels, scale=1.0):
    """Squared errors (channels + 1,) that fall with the width to 0 at full width."""
    return scale * (1 - torch.arange(channels + 1, dtype=torch.float64) / channels) ** 2


def errors_of(coupling, scale=1.0):
    return {
        channel_set.name: falling(channel_set.channels, scale * 2**-k) for k, channel_set in enumerate(coupling.open)
    }


@given(networks(), seeds)
@few
def test_shapes_and_costs_are_those_of_the_narrowed_network(graph, seed):
    coupling, generator = couple(graph), torch.Generator().manual_seed(seed)
    widths = {g.name: int(torch.randint(1, g.channels + 1, (), generator=generator)) for g in coupling.open}
    narrow = coupling.narrow({name: torch.arange(width) for name, width in widths.items()})
    model = ShapeModel(coupling)
    assert model.shapes(widths) == {layer.name: layer.shape for layer in find_layers(narrow)}
    assert model.macs(model.shapes(widths)) == mac_count(narrow)
    assert model.shapes({}) == model.full


@pytest.mark.parametrize("name", [*OPEN, *EXAMPLES])
def test_costs_of_every_kind_of_layer_and_product(name):
    graph = OPEN[name][0]() if name in OPEN else EXAMPLES[name].graph()
    coupling = couple(graph)
    widths = {g.name: g.channels - g.channels // 3 for g in coupling.open}
    narrow, model = coupling.narrow({name: torch.arange(width) for name, width in widths.items()}), ShapeModel(coupling)
    assert model.macs(model.full) == mac_count(graph)
    assert model.macs(model.shapes(widths)) == mac_count(narrow)


@pytest.mark.parametrize("kind", [*KINDS, "gate", "concat", "stream"])
@pytest.mark.parametrize("step", [1, 4])
def test_every_point_costs_less_and_loses_more(kind, step):
    coupling = couple(network_of(kind, 16))
    path = narrowing_path(coupling, errors_of(coupling), step)
    assert path.points[0].cost == mac_count(coupling.graph) and path.points[0].predicted == 0
    for before, after in pairwise(path.points):
        (changed,) = [name for name in before.widths if before.widths[name] != after.widths[name]]
        assert after.widths[changed] < before.widths[changed] and after.widths[changed] % step == 0
        assert after.cost < before.cost and after.predicted > before.predicted
        kept = {name: torch.arange(width) for name, width in after.widths.items()}
        assert after.cost == mac_count(coupling.narrow(kept))
        total = sum(float(errors_of(coupling)[name][width]) for name, width in after.widths.items())
        assert after.predicted == pytest.approx(math.sqrt(total))


def test_each_step_is_the_cheapest_there_is():
    coupling = couple(network_of("stream", 12))
    errors, model = errors_of(coupling), ShapeModel(coupling)
    path = narrowing_path(coupling, errors, 2)

    def price(widths, name, width):
        saved = model.macs(model.shapes(widths)) - model.macs(model.shapes({**widths, name: width}))
        return float(errors[name][width] - errors[name][widths[name]]) / saved

    for before, after in pairwise(path.points):
        ((name, width),) = after.widths.items() - before.widths.items()
        lowest = {n: path.points[-1].widths[n] for n in after.widths}
        others = [price(before.widths, n, k) for n, now in before.widths.items() for k in range(lowest[n], now, 2)]
        assert price(before.widths, name, width) <= min(others) * (1 + 1e-9)


def test_a_channel_set_whose_error_hardly_counts_goes_first():
    coupling = couple(network_of("chain", 16))
    errors = {"stem": falling(4), "inner": falling(16, 1e-12), "second": falling(4)}
    errors = {name: errors[name] for name in [channel_set.name for channel_set in coupling.open]}
    path = narrowing_path(coupling, errors, 2)
    alone = [p for p in path.points if p.widths["stem"] == p.widths["second"] == 4]
    assert alone[-1].widths["inner"] == 2 and alone[-1].predicted < 1e-5


def test_no_channel_set_falls_below_an_eighth_unless_the_outputs_hardly_need_it():
    coupling = couple(network("bare", 16))
    path = narrowing_path(coupling, errors_of(coupling), 1)
    assert path.points[-1].widths["inner"] == 2
    tiny = {name: curve * 1e-8 for name, curve in errors_of(coupling).items()}
    assert narrowing_path(coupling, tiny, 1).points[-1].widths["inner"] == 1


def test_channel_sets_smaller_than_two_steps_stay_and_are_named():
    coupling = couple(network_of("chain", 16))
    path = narrowing_path(coupling, errors_of(coupling), 8)
    assert set(path.left) >= {"stem", "second"} and "two steps of 8" in path.left["stem"]
    assert all(set(point.widths) == {"inner"} for point in path.points) and len(path.points) == 2
    assert len(narrowing_path(coupling, errors_of(coupling), 16).points) == 1


def test_another_cost_makes_other_steps():
    """Where only one layer costs anything, only the sets that shape it lose channels."""
    coupling = couple(network("bare", 16))
    path = narrowing_path(coupling, errors_of(coupling), 1, lambda shapes: float(math.prod(shapes.get("head", (0,)))))
    first, last = path.points[0].widths, path.points[-1].widths
    assert {name for name in first if last[name] < first[name]} == {"second"}


def test_the_first_point_within_a_cost():
    path = NarrowingPath(tuple(PathPoint({}, cost, 0.0) for cost in (100, 80, 50, 20)), {})
    assert [path.within(cost) for cost in (1000, 100, 99, 50, 49, 1)] == [0, 0, 1, 2, 3, 3]


@given(seeds, st.integers(4, 64))
@few
def test_the_scaled_curve_passes_through_what_was_measured(seed, channels):
    generator = torch.Generator().manual_seed(seed)
    curve = torch.rand(channels + 1, generator=generator, dtype=torch.float64).sort(descending=True).values
    at = sorted({max(1, round(share * channels)) for share in (0.25, 0.5, 0.75)})
    measured = dict(
        zip(at, sorted(torch.rand(3, generator=generator, dtype=torch.float64).tolist(), reverse=True), strict=True)
    )
    scaled = scaled_curve(curve, measured)
    assert scaled[channels] == 0 and (scaled[1:] <= scaled[:-1]).all() and scaled.isfinite().all()
    for width, error in measured.items():
        assert scaled[width] >= error * (1 - 1e-9)  # more only where a wider network would be worse
    steady = scaled_curve(falling(channels), {k: 3 * float(falling(channels)[k]) for k in at})
    torch.testing.assert_close(steady, 3 * falling(channels), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["chain", "stream", "gate"])
def test_measured_errors_are_those_of_networks_with_one_channel_set_narrowed(kind):
    graph = network_of(kind, 12)
    observed, inputs = observe(couple(graph), smooth_noise(graph.inputs, 24, 0)), smooth_noise(graph.inputs, 8, 1)
    chosen = select(observed)
    errors = measure_errors(observed, chosen, inputs)
    assert list(errors) and set(errors) == {channel_set.name for channel_set in observed.coupling.open}
    for name, curve in errors.items():
        quarter = round((len(curve) - 1) / 4)
        narrow = quick_fit(observed, {name: chosen[name].kept(quarter)})
        assert float(curve[quarter]) >= compare_outputs(graph, narrow, inputs).error ** 2 * (1 - 1e-3)
        assert curve[-1] == 0 and (curve[1:] <= curve[:-1]).all()


def test_big_networks_are_measured_on_fewer_inputs():
    graph = network("bare", 8)
    observed, inputs = observe(couple(graph), smooth_noise(graph.inputs, 24, 0)), smooth_noise(graph.inputs, 16, 1)
    chosen = select(observed)
    few_inputs = measure_errors(observed, chosen, tuple(x[:5] for x in inputs))
    limited, plenty = (measure_errors(observed, chosen, inputs, probe_macs=macs) for macs in (1, 3e11))
    assert all(torch.equal(few_inputs[name], curve) for name, curve in limited.items())
    assert not any(torch.equal(plenty[name], curve) for name, curve in limited.items())


def test_units_and_uniform_widths():
    sets = couple(network("depthwise", 20)).open
    assert {channel_set.name: unit(channel_set, 8) for channel_set in sets}["inner"] == 8
    assert uniform(sets, 0.25, 8)["inner"] == 8 and uniform(sets, 0.25, 3)["inner"] == 6
    assert uniform(sets, 0.01, 1)["inner"] == 1 and uniform(sets, 1.0, 8)["inner"] == 20


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("limit", [0.0, 0.17, 0.5, 99.0])
def test_the_search_ends_at_the_last_point_within_the_limit(factor, limit):
    path = NarrowingPath(tuple(PathPoint({}, 100 - k, 0.01 * k) for k in range(101)), {})
    built = []
    real = lambda point: factor * point.predicted  # noqa: E731

    def measure(point):
        built.append(point)
        return real(point)

    index = search_error(path, measure, limit, rounds=8)
    assert index == max(k for k, point in enumerate(path.points) if real(point) <= limit)
    assert len(built) <= 8 and len({id(point) for point in built}) == len(built)


def test_the_search_builds_no_more_than_it_may():
    path = NarrowingPath(tuple(PathPoint({}, 100 - k, 0.01 * k) for k in range(101)), {})
    built = []
    index = search_error(path, lambda point: built.append(point) or point.predicted**3, 0.1, rounds=2)
    assert len(built) == 2 and path.points[index].predicted ** 3 <= 0.1
