"""Fitted readers make up for channels that others determine, in every kind of set, and means are preserved."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from redpp_serve.channels.coupling import couple
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Ref
from redpp_serve.graph.layers import find_layers
from redpp_serve.pruning import fit as module
from redpp_serve.pruning.fit import Epilogue, Fitting, epilogue, quick_fit, reconstruct, then
from redpp_serve.pruning.matching import smooth_noise
from redpp_serve.pruning.observation import images_for, observe, select
from tests.support.judging import compare_outputs
from tests.support.networks import Builder, inner_of, network, plant

KINDS = ("chain", "residual", "flatten", "mlp", "tokens", "branches", "bare", "gate", "concat", "stream")


def network_of(kind, width=8):
    """The kinds of `networks.network`, and a squeeze-excite block, a concatenation, a residual stream of that width."""
    if kind not in ("gate", "concat", "stream"):
        return network(kind, width)
    b = Builder(3, 6, 5, seed=3)
    hidden = b.relu(b.norm(b.conv("x", "inner", 3, width, bias=False), "inner_bn", width))
    if kind == "gate":
        pooled = b.op("pooled", "mean.dim", Ref(hidden), [2, 3], True)
        gate = b.conv(b.relu(b.conv(pooled, "squeeze", width, 3, 1)), "excite", 3, width, 1)
        hidden = b.op("gated", "mul.Tensor", Ref(hidden), Ref(b.op("gate", "sigmoid.default", Ref(gate))))
        return b.graph(b.linear(b.mean(b.relu(b.conv(hidden, "reader", width, 6))), "head", 6, 3))
    if kind == "concat":
        other = b.relu(b.conv("x", "other", 3, 5))
        joined = b.op("joined", "cat.default", [Ref(other), Ref(hidden)], 1)
        return b.graph(b.linear(b.mean(b.relu(b.conv(joined, "reader", width + 5, 6))), "head", 6, 3))
    for k in range(2):
        branch = b.relu(b.norm(b.conv(hidden, f"first{k}", width, 6, bias=False), f"first{k}_bn", 6))
        branch = b.norm(b.conv(branch, f"second{k}", 6, width, bias=False), f"second{k}_bn", width)
        hidden = b.relu(b.add(hidden, branch))
    return b.graph(b.linear(b.mean(hidden), "head", width, 3))


def scaled_copies(graph, name="inner"):
    """Make the second half of a set's channels 0.5 to 2 times the first: through ReLU, so dependent after it."""
    channel_set = inner_of(graph, name)
    half = channel_set.channels // 2
    graph = plant(graph, {half + k: k for k in range(half)}, name)
    factors = torch.ones(channel_set.channels)
    factors[half:] = torch.linspace(0.5, 2, half)
    names = {part.tensor for part in channel_set.parts}
    normed = {f"{n}_bn.{part}" for n in channel_set.producers for part in ("weight", "bias")} & names
    bare = {f"{name}.weight", f"{name}.bias"} & names
    changed = {t: graph.tensors[t] * factors.view(-1, *[1] * (graph.tensors[t].dim() - 1)) for t in normed or bare}
    return graph.with_tensors(changed)


class Case:
    """A network that is observed once and narrowed in several ways."""

    def __init__(self, graph, images=48, original=None):
        self.graph, self.inputs, self.coupling = graph, smooth_noise(graph.inputs, images, 0), couple(graph)
        self.observed = observe(self.coupling, self.inputs)
        self.selections = select(self.observed)
        check = smooth_noise(graph.inputs, 24, 11)
        self.fitting = Fitting(original or graph, self.coupling, self.inputs, check)

    def kept(self, share, only=("inner",)):
        sets = [s for s in self.coupling.open if not only or s.name in only]
        return {s.name: self.selections[s.name].kept(max(1, round(share * s.channels))) for s in sets}

    def narrowed(self, share, only=("inner",), **how):
        """The narrowed and fitted network, and the records."""
        kept = self.kept(share, only)
        return reconstruct(replace(self.fitting, **how), kept, quick_fit(self.observed, kept))

    def all_but(self, *layers):
        """Weights of all other layers, to be frozen."""
        return {layer.weight for layer in find_layers(self.graph) if layer.node.name not in layers}


@cache
def random_case(kind):
    return Case(network_of(kind, 10), 40)


def fits(case, share):
    """The least-squares fit, and that of layers with too many unknowns."""
    for name, how in (("least squares", {}), ("scales", {"most_unknowns": 0})):
        yield name, *case.narrowed(share, **how)


def test_all_kinds_have_the_set():
    for kind in KINDS:
        assert inner_of(network_of(kind, 8)).channels == 8, kind
    assert len(inner_of(network_of("stream")).producers) == 3 and len(inner_of(network_of("gate")).readers) == 2


def test_half_of_the_channels_are_multiples_of_the_others():
    for kind in KINDS:
        case = Case(scaled_copies(network_of(kind, 12)), 192 if kind == "flatten" else 48)
        held_out = smooth_noise(case.graph.inputs, 8, 9)
        for name, narrow, (record,) in fits(case, 0.5):
            assert (record.layer, record.kept, record.channels) == ("inner", 6, 12), kind
            assert record.error < 2e-3 and len(narrow.tensors["inner.weight"]) == 6, (kind, name)
            assert compare_outputs(case.graph, narrow, held_out).error < 1e-3, (kind, name)


def test_equal_channels_with_equal_depthwise_filters():
    case = Case(plant(network("depthwise", 12), {6 + k: k for k in range(6)}))
    narrow, (record,) = case.narrowed(0.5)
    held_out = smooth_noise(case.graph.inputs, 8, 9)
    assert record.kept == 6 and compare_outputs(case.graph, narrow, held_out).error < 1e-3


def test_any_linear_combination_can_go():
    b = Builder(3, 6, 5, seed=4)
    graph = b.graph(b.conv(b.conv("x", "inner", 3, 10, bias=False), "reader", 10, 4))
    mix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    graph.tensors["inner.weight"][5:] = torch.einsum("ab,bijk->aijk", mix, graph.tensors["inner.weight"][:5])
    narrow, (record,) = Case(graph).narrowed(0.5)
    assert record.kept == 5 and compare_outputs(graph, narrow, smooth_noise(graph.inputs, 8, 9)).error < 1e-3


def normed(graph, name, inputs):
    """The value of a layer, or of the norm behind it, as float64 rows; and the norm's name."""
    norm = [n.name for n in graph.users().get(name, []) if n.op == "aten.batch_norm.default"]
    value = Program(graph, [norm[0] if norm else name])(*inputs)[0].double()
    return (value.movedim(1, -1) if value.dim() == 4 else value).flatten(0, -2), norm[0] if norm else None


def test_the_mean_of_every_readers_output_is_preserved():
    """The constant goes into a bias, a batch norm's mean or a new bias, also with padding and flatten."""
    for kind in (*KINDS, "depthwise"):
        case = random_case(kind)
        for name, narrow, _ in fits(case, 0.3):
            for reader in inner_of(case.graph).readers:
                got, expected = (normed(g, reader.node, case.inputs)[0].mean(0) for g in (narrow, case.graph))
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=f"{kind} {name} {reader.node}")


def test_the_error_reported_is_the_one_measured():
    for kind in ("chain", "flatten", "tokens", "bare", "branches", "gate", "concat"):
        case = random_case(kind)
        for name, narrow, (record,) in fits(case, 0.4):
            errors = []
            for reader in inner_of(case.graph).readers:
                (new, _), (old, norm) = (normed(g, reader.node, case.inputs) for g in (narrow, case.graph))
                if reader.node == "right":  # it also makes up for the error of the branch that it is added to
                    new_left, old_left = (normed(g, "left", case.inputs)[0] for g in (narrow, case.graph))
                    old = old + old_left - new_left
                if norm:  # weigh channels as the norm's input does
                    scale = (case.graph.tensors[f"{norm}.running_var"] + 1e-5).sqrt() / case.graph.tensors[
                        f"{norm}.weight"
                    ]
                    new, old = new * scale, old * scale
                errors.append(float((new - old).norm() / (old - old.mean(0)).norm()))
            assert record.error > 0.01 and record.error == pytest.approx(max(errors), rel=1e-3), (kind, name)


def test_fitted_readers_do_much_better_than_readers_that_only_lose_columns():
    for kind in KINDS:
        case = Case(network_of(kind, 16))
        kept, held_out = case.kept(10 / 16), smooth_noise(case.graph.inputs, 16, 3)
        start = quick_fit(case.observed, kept)
        fitted, _ = reconstruct(case.fitting, kept, start)
        graphs = (case.coupling.narrow(kept), start, fitted)
        cut, quick, full = (compare_outputs(case.graph, g, held_out).error for g in graphs)
        assert quick < 0.9 * cut and full < 0.75 * cut, kind


def test_errors_of_several_sets_do_not_pile_up_because_the_target_is_the_original():
    """The reader behind a narrowed (here: damaged) stem is fitted to what the intact network gives."""
    original = network("chain", 8)
    damaged = original.with_tensors({"inner_bn.weight": 0.9 * original.tensors["inner_bn.weight"]})
    case = Case(damaged, 64, original)
    fitted, _ = case.narrowed(7 / 8)
    errors = [compare_outputs(original, graph, case.inputs).error for graph in (fitted, damaged)]
    assert errors[0] < 0.8 * errors[1]


def test_a_branch_makes_up_for_the_error_of_the_stream_it_is_added_to():
    """The stream is damaged before the branch, and only the branch's last layer is fitted.

    An output that shows what is added keeps the fit from making up for anything else.
    """
    graph = network_of("stream", 8)
    shift = 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    errors = {}
    for outputs in (graph.outputs, (*graph.outputs, "second0_bn")):
        original = replace(graph, outputs=outputs)
        case = Case(original.with_tensors({"inner_bn.bias": graph.tensors["inner_bn.bias"] + shift}), original=original)
        fitted, _ = case.narrowed(0.9, ("first0",), frozen=case.all_but("second0"))
        names = ["inner_bn_relu_second0_bn_relu"]
        new, old = (Program(g, names)(*case.inputs)[0] for g in (fitted, graph))
        errors[len(outputs)] = float((new - old).norm() / old.norm())
    assert errors[1] < 0.93 * errors[2]


def test_layers_that_lost_nothing_are_fitted_to_the_errors_they_read():
    case = Case(network_of("stream", 16), 96)
    held_out = smooth_noise(case.graph.inputs, 16, 5)
    some, _ = case.narrowed(0.4, ("first0",), frozen=case.all_but("second0"))
    every, _ = case.narrowed(0.4, ("first0",))
    assert compare_outputs(case.graph, every, held_out).error < compare_outputs(case.graph, some, held_out).error
    assert torch.equal(some.tensors["head.weight"], case.graph.tensors["head.weight"])


def test_all_sets_at_once():
    """A reader that was given a bias may itself be a producer that was narrowed."""
    for kind in (*KINDS, "depthwise"):
        case = Case(network_of(kind, 12), 64)
        for share in (0.3, 0.7):
            narrow, records = case.narrowed(share, only=())
            widths = {s.name: (max(1, round(share * s.channels)), s.channels) for s in case.coupling.open}
            assert {r.layer: r.kept for r in records} == {n: kept for n, (kept, all_) in widths.items() if kept < all_}
            assert compare_outputs(case.graph, narrow, smooth_noise(case.graph.inputs, 16, 1)).error < 1, (kind, share)
            again = {s.name: s.channels for s in couple(narrow).open}
            assert all(again.get(r.layer, r.kept) == r.kept for r in records), kind


def test_nothing_narrowed_is_nothing_done():
    case, kept = Case(network("chain", 6), 8), {"inner": torch.arange(6)}
    start = quick_fit(case.observed, kept)
    assert all(torch.equal(start.tensors[name], tensor) for name, tensor in case.graph.tensors.items())
    assert reconstruct(case.fitting, kept, start) == (start, [])


def test_rows_that_exact_merging_took_are_left_out_of_the_target():
    """The network to narrow has lost the reader's last two outputs already."""
    graph, gone = network("bare", 8), {"second": torch.arange(6)}
    first = couple(graph)
    case = Case(first.narrow(gone), 24, graph)
    fitted, (record,) = case.narrowed(5 / 8, merged=first.kept(gone))
    new, old = Program(fitted, ["second"])(*case.inputs)[0], Program(graph, ["second"])(*case.inputs)[0][:, :6]
    error = float((new - old).norm() / (old - old.mean((0, 2, 3), keepdim=True)).norm())
    assert record.error == pytest.approx(error, rel=1e-3)


def test_two_narrowings_compose():
    first, second = {"a": {1: torch.tensor([0, 2, 5])}, "b": {0: torch.tensor([4])}}, {"a": {1: torch.tensor([0, 2])}}
    kept = then(lambda name: first.get(name, {}), lambda name: {**second, "c": {2: torch.tensor([1])}}.get(name, {}))
    expected = {"a": {1: [0, 5]}, "b": {0: [4]}, "c": {2: [1]}, "d": {}}
    assert {name: {axis: at.tolist() for axis, at in kept(name).items()} for name in "abcd"} == expected


def test_a_constant_does_not_go_into_a_batch_norm_that_others_use_or_whose_input_is_an_output():
    b = Builder(4, 5, 5)
    reader = b.conv(b.relu(b.conv("x", "inner", 4, 8)), "reader", 8, 3, bias=False)
    first = b.norm(reader, "bn", 3)
    tensors = [Ref(f"bn.{k}") for k in ("weight", "bias", "running_mean", "running_var")]
    b.op("again", "batch_norm.default", Ref("x2"), *tensors, False, 0.1, 1e-5, True)
    b.nodes.insert(-1, type(b.nodes[0])("x2", "aten.slice.Tensor", (Ref("x"), 1, 0, 3)))
    shared = b.graph(first, "again")
    b.nodes = b.nodes[:-2]
    shown = b.graph(first, reader)
    for graph in (shared, shown):
        case = Case(graph, 30)
        narrow, _ = case.narrowed(0.25)
        assert torch.equal(narrow.tensors["bn.running_mean"], graph.tensors["bn.running_mean"])
        got, expected = (normed(g, "reader", case.inputs)[0].mean(0) for g in (narrow, graph))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_what_follows_a_layer():
    graph = network_of("stream", 8)
    shapes = value_shapes(graph)
    found = {name: epilogue(graph, graph.node(name), shapes) for name in ("second0", "first0", "head")}
    assert found["second0"] == Epilogue("second0_bn", "inner_bn_relu")
    assert found["first0"] == Epilogue("first0_bn", None)  # an activation lies between
    assert found["head"] == Epilogue(None, None)
    late = [node for node in graph.nodes if node.name in ("inner_bn", "inner_bn_relu")]
    nodes = [node for node in graph.nodes if node not in late]
    behind = nodes.index(graph.node("second0")) + 1
    reordered = replace(graph, nodes=(*nodes[:behind], *late, *nodes[behind:]))
    assert epilogue(reordered, graph.node("second0"), shapes) == Epilogue("second0_bn", None)  # not computed yet
    other_shape = {**shapes, "inner_bn_relu": (1, 8, 1, 1)}
    assert epilogue(graph, graph.node("second0"), other_shape) == Epilogue("second0_bn", None)


def test_the_planted_network_notices_a_wrong_fit(monkeypatch):
    solve, case = module.solve, Case(scaled_copies(network_of("chain", 12)), 16)
    held_out = smooth_noise(case.graph.inputs, 8, 9)
    for wrong in (lambda new, constant: (new, 0 * constant + 0.1), lambda new, constant: (new.flip(0), constant)):

        def solve_wrongly(fit, start, check, wrong=wrong):
            new, constant, lost = solve(fit, start, check)
            return *wrong(new, constant), lost

        monkeypatch.setattr(module, "solve", solve_wrongly)
        narrow, _ = case.narrowed(0.5, frozen=case.all_but("second"))
        assert compare_outputs(case.graph, narrow, held_out).error > 1e-2


def test_the_same_inputs_give_the_same_bytes():
    case = Case(network_of("stream", 10), 16)
    (a, _), (b, _) = (case.narrowed(0.4, only=()) for _ in range(2))
    assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())


def test_layers_with_more_unknowns_get_more_images():
    assert images_for(288, 196, 256) == 165  # eight samples for each unknown, the root of the positions from an image
    assert images_for(27, 12544, 256) == 48 and images_for(27, 12544, 20) == 20
    assert images_for(2304, 49, 256) == 256 and images_for(512, 1, 10**6) == 4096
    numbers = [images_for(unknowns, 64, 10**6) for unknowns in range(1, 4000, 97)]
    assert numbers == sorted(numbers)


def test_inputs_of_another_family_decide_how_far_a_fit_goes():
    """Of a layer with more unknowns than there are samples, the fit helps the inputs it saw and no others."""
    case = Case(network_of("flatten", 12), 16)
    kept, held_out = case.kept(0.5), smooth_noise(case.graph.inputs, 64, 3)
    quick = quick_fit(case.observed, kept)
    errors = {}
    for name, how in (("alone", {"check": ()}), ("checked", {})):
        fitted, _ = reconstruct(replace(case.fitting, **how), kept, quick)
        errors[name] = compare_outputs(case.graph, fitted, held_out).error
    assert errors["checked"] < errors["alone"]
    assert errors["checked"] < 1.02 * compare_outputs(case.graph, quick, held_out).error
