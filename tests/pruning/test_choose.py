"""The choice of widths: every target is met or refused in words, and the frontier holds what could be had."""

import itertools
import json
import math
import re
from types import SimpleNamespace

import pytest

from redpp_serve.channels.coupling import couple
from redpp_serve.errors import GateFailed, RedppError
from redpp_serve.graph.layers import mac_count
from redpp_serve.options import Options
from redpp_serve.pruning import choose as module
from redpp_serve.pruning.choose import Narrower, choose, frontier_record, known_widths, save_frontier
from redpp_serve.pruning.effort import Effort
from redpp_serve.pruning.judge import Reference
from redpp_serve.pruning.latency import Latency
from tests.support.networks import natural, trained, widths_of

FAR = float("inf")


def narrower_of(kind="residual", width=32):
    graph = trained(kind, width)
    return Narrower(Reference(graph, natural(graph, 16, 5)), couple(graph), lambda name: {}, natural(graph, 48))


@pytest.fixture(scope="module")
def narrower():
    return narrower_of()


def choice_of(narrower, left=FAR, points=4, widths=None, **options):
    how = Options(**{"round_to": 2, "time_budget": 1e6, **options})
    return choose(narrower, how, Effort(frontier_points=points), lambda: left, widths)


def share(narrower, graph):
    return mac_count(graph) / mac_count(narrower.reference.original)


def check_frontier(narrower, choice):
    """Sorted, the chosen network once, and costs and errors that are those of the networks."""
    macs = [point.macs for point in choice.points]
    assert macs == sorted(macs, reverse=True) and len(set(macs)) == len(macs)
    (chosen,) = (point for point in choice.points if point.chosen)
    assert chosen.graph is choice.narrowed.graph and chosen.macs == mac_count(choice.narrowed.graph)
    for point in choice.points:
        assert point.macs == mac_count(point.graph)
        assert point.error == pytest.approx(narrower.reference.error(point.graph), abs=1e-6)
    return macs


@pytest.mark.parametrize("target", [0.8, 0.5, 0.2])
def test_a_share_of_the_macs_is_met_and_not_wasted(narrower, target):
    choice = choice_of(narrower, target_macs=target)
    assert target - 0.12 < share(narrower, choice.narrowed.graph) <= target
    assert choice.reason == f"--target macs={target:g}" and not choice.cut_short
    assert widths_of(choice.narrowed.graph) == {**widths_of(narrower.reference.original), **choice.narrowed.widths}
    assert len(check_frontier(narrower, choice)) >= 3 and choice.points[0].macs == mac_count(
        narrower.reference.original
    )


def test_less_is_kept_at_a_higher_error(narrower):
    errors = [choice_of(narrower, points=2, target_macs=r).narrowed.error for r in (0.9, 0.6, 0.2)]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_the_flag_of_a_point_gives_that_point(narrower, monkeypatch, tmp_path):
    """From the file that a run keeps and from its report, for every point but the original."""
    monkeypatch.setattr(module, "paired_latency", latencies(lambda ratio: ratio))
    original, choice = narrower.reference.original, choice_of(narrower, target_macs=0.5)
    record = frontier_record(choice.points, original, "cpu", "a machine", 0.1)
    kept, report = tmp_path / "frontier.json", tmp_path / "report.json"
    save_frontier(kept, original, choice.points)
    report.write_text(json.dumps({"frontier": record}))
    assert [p["flag"] for p in record["points"]] == ["", *(f"--keep-point {k}" for k in range(1, len(choice.points)))]
    for number, point in enumerate(choice.points[1:], start=1):
        for files in ([kept, report], [tmp_path / "absent.json", report]):
            widths = known_widths(files, original, number)
            again = choice_of(narrower, widths=widths, keep_point=number)
            assert mac_count(again.narrowed.graph) == point.macs and again.reason == f"--keep-point {number}"
        if point.chosen:
            assert again.narrowed is choice.narrowed


def test_a_point_that_is_not_there_is_refused_in_words(narrower, tmp_path):
    original, kept, empty = narrower.reference.original, tmp_path / "frontier.json", tmp_path / "empty.json"
    points = choice_of(narrower, points=3, target_macs=0.5).points
    save_frontier(kept, original, points)
    empty.write_text("{}")
    other = trained("chain", 8)
    for files, graph, number, words in (
        ([], original, 1, "no earlier run is known"),
        ([empty], original, 1, "holds no frontier"),
        ([kept], other, 1, "is of another network"),
        ([kept], original, len(points), f"a point from 1 to {len(points) - 1}"),
    ):
        with pytest.raises(RedppError, match=words):
            known_widths(files, graph, number)


def test_a_target_out_of_reach_is_refused_with_one_that_is_not(narrower):
    with pytest.raises(
        GateFailed, match=r"--target macs=0\.001 cannot be reached: the narrowest network still has"
    ) as missed:
        choice_of(narrower, target_macs=0.001)
    value = float(re.search(r"--target macs=(0\.\d+)", missed.value.do).group(1))
    assert choice_of(narrower, points=2, target_macs=value).narrowed is not None


def test_a_share_of_every_channel_set(narrower):
    choice = choice_of(narrower, keep=0.5)
    assert choice.narrowed.widths == {
        name: width // 2 for name, width in widths_of(narrower.reference.original).items()
    }
    assert choice.reason == "50% of each channel set"
    check_frontier(narrower, choice)
    assert [record.kept for record in choice.narrowed.records] == list(choice.narrowed.widths.values())


@pytest.mark.parametrize("limit", [0.05, 0.3])
def test_an_error_budget_leaves_room_for_the_codebooks(narrower, limit):
    choice = choice_of(narrower, max_error=limit)
    error = narrower.reference.error(choice.narrowed.graph)
    assert error == choice.narrowed.error <= 0.9 * limit
    assert re.fullmatch(rf"error budget {limit:g}, \d networks built", choice.reason)
    check_frontier(narrower, choice)


def test_no_narrower_network_is_an_answer(narrower):
    choice = choice_of(narrower, max_error=0.0)
    assert choice.narrowed is None and "budget of 0" in choice.reason
    assert len(choice.points) == 4 and not any(point.chosen for point in choice.points)  # what could be had
    assert choice.points[0].graph is narrower.reference.original and choice.points[0].judged is None
    assert all(0 < point.error == narrower.reference.error(point.graph) for point in choice.points[1:])


def test_behind_the_deadlines_nothing_more_is_built(narrower, monkeypatch):
    built = []
    build = Narrower.build
    monkeypatch.setattr(Narrower, "build", lambda self, widths: built.append(1) or build(self, widths))
    late = choice_of(narrower, left=-1, max_error=0.3)
    assert late.cut_short and built == [] and late.narrowed is None and len(late.points) == 4


def test_the_frontier_is_fitted_where_that_takes_no_longer_than_its_share(monkeypatch):
    """By a clock on which each network takes a second."""
    narrower, clock = narrower_of("chain", 16), itertools.count()
    monkeypatch.setattr(module, "spent", lambda: float(next(clock)))
    for budget, fitted in ((1.0, False), (1000.0, True)):
        choice = choice_of(narrower, time_budget=budget, keep=0.5)
        assert choice.narrowed.seconds == 1.0
        others = [point for point in choice.points[1:] if not point.chosen]
        assert len(others) >= 2
        for point in others:
            graph = narrower.build(point.widths).graph if fitted else narrower.quick(point.widths)
            assert all(t.equal(graph.tensors[name]) for name, t in point.graph.tensors.items())


def test_known_widths_need_no_search(narrower, monkeypatch):
    monkeypatch.setattr(module, "narrowing_path", lambda *a, **k: pytest.fail("a search for known widths"))
    choice = choice_of(narrower, keep_point=3, widths={"inner": 10, "stem": 4})
    assert choice.reason == "--keep-point 3" and widths_of(choice.narrowed.graph) == {"inner": 10, "stem": 4}
    assert choice.narrowed.error == narrower.reference.error(choice.narrowed.graph)


def test_a_fit_without_a_number_never_wins(narrower, monkeypatch):
    """A fit or a repair may break a network; what was measured and found better counts."""

    def broken(graph):
        return graph.with_tensors({"head.bias": graph.tensors["head.bias"] * math.nan})

    fresh = Narrower(narrower.reference, narrower.coupling, lambda name: {}, narrower.inputs)
    fit = module.reconstruct
    monkeypatch.setattr(module, "repair_batch_norm", lambda graph, *_: broken(graph))
    kept = fresh.build({"inner": 8})
    assert kept.error == fresh.reference.error(kept.graph) < 1
    monkeypatch.setattr(module, "reconstruct", lambda *a: (broken(fit(*a)[0]), fit(*a)[1]))
    kept = fresh.build({"inner": 10})
    quick = fresh.quick({"inner": 10})
    assert all(t.equal(quick.tensors[name]) for name, t in kept.graph.tensors.items())
    assert kept.error == fresh.reference.error(quick)


def test_channel_sets_too_small_for_the_step_are_named():
    choice = choice_of(narrower_of("residual", 32), keep=0.5, round_to=16)
    assert set(choice.narrowed.widths) == {"inner"} and "stem" in choice.left


def latencies(ratio_of):
    """`paired_latency` with a ratio computed from the networks, and no clock."""

    def stub(graphs, batch=1, device="cpu", seconds=5.0):
        ratios = [ratio_of(mac_count(graph) / mac_count(graphs[0])) for graph in graphs]
        return [Latency(r, r, r, r, 0.9 * r, 1.1 * r, 5) for r in ratios]

    return stub


@pytest.fixture
def modelled(monkeypatch, narrower):
    """A latency model that takes MACs for seconds, and what the clock is to say."""

    def use(ratio_of):
        shapes = module.ShapeModel(narrower.coupling)
        model = SimpleNamespace(predict=lambda named: shapes.macs({**shapes.full, **named}))
        monkeypatch.setattr(module, "layer_model", lambda *_: model)
        monkeypatch.setattr(module, "paired_latency", latencies(ratio_of))

    return use


@pytest.mark.parametrize("ratio_of", [lambda r: r, lambda r: r**0.5, lambda r: 0.2 + 0.8 * r, lambda r: r**2])
@pytest.mark.parametrize("target", [0.8, 0.5])
def test_a_share_of_the_latency_is_met_by_the_clock_not_by_the_model(modelled, narrower, ratio_of, target):
    modelled(ratio_of)
    choice = choice_of(narrower, target_latency=target)
    reached = ratio_of(share(narrower, choice.narrowed.graph))
    assert target - 0.3 < reached <= target + 0.01 and choice.reason == f"--target latency={target:g}"
    check_frontier(narrower, choice)


def test_a_latency_out_of_reach_is_refused(modelled, narrower):
    modelled(lambda ratio: 0.7 + 0.3 * ratio)
    with pytest.raises(
        GateFailed, match=r"--target latency=0\.5 cannot be reached: the narrowest network still has 0\.7"
    ):
        choice_of(narrower, target_latency=0.5)


def test_the_record_of_a_frontier(monkeypatch, narrower):
    monkeypatch.setattr(module, "paired_latency", latencies(lambda ratio: ratio))
    points = choice_of(narrower, target_macs=0.5).points
    record = frontier_record(points, narrower.reference.original, "cpu", "a machine", 0.1)
    assert "a machine" in record["latency_on"] and "batch 1" in record["latency_on"]
    assert [p["macs"] for p in record["points"]] == [p.macs for p in points]
    for point in record["points"]:
        assert point["macs_ratio"] == pytest.approx(point["latency_ratio"])
        if point["macs_ratio"] < 1:
            assert point["latency_low"] < point["latency_ratio"] < point["latency_high"]
        else:  # the original needs no measurement against itself
            assert (point["latency_low"], point["latency_high"]) == (None, None)
    assert [p["chosen"] for p in record["points"]].count(True) == 1
    assert frontier_record([], narrower.reference.original, "cpu", "a machine", 0.1) == {}


def test_places_are_those_of_the_narrowed_networks_values(narrower):
    built = narrower.build({"inner": 8, "stem": 2})
    assert {axis: len(index) for axis, index in built.kept("inner.weight").items()} == {0: 8, 1: 2}
    assert {axis: len(index) for axis, index in built.kept("head.weight").items()} == {1: 2}
    assert built.kept("head.bias") == {}


@pytest.mark.parametrize("kind", ["residual", "depthwise", "flatten"])
def test_fitting_pays(kind):
    """Far closer to the original than the same channels without fitted readers."""
    narrower = narrower_of(kind)
    widths = {"inner": 16}
    cut = narrower.coupling.narrow(narrower.kept(widths))
    assert narrower.build(widths).error < 0.7 * narrower.reference.error(cut)


def test_a_network_is_built_once(narrower):
    first = narrower.build({"inner": 8, "stem": 4})
    narrower.build({"inner": 4})
    assert narrower.build({"stem": 4, "inner": 8}) is first
