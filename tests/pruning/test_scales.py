"""The range of floats that a network reads follows from its batch norms, its constants or its scores, or is unknown."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.graph.graph import Graph, InputSpec, Ref
from redpp_serve.pruning.families import Scale, structured
from redpp_serve.pruning.inputs import Sources, prepare
from redpp_serve.pruning.matching import SynthesisBudget
from redpp_serve.pruning.read_by_constants import read_by_constants
from redpp_serve.pruning.scales import Found, estimate_scale, read_scales
from tests.support.networks import Builder, calibrated, network


def reads_images(channels):
    """Return a small network with batch norm for images of 24x24, not trained yet."""
    b = Builder(channels, 24, 24, seed=channels)
    b.inputs = [InputSpec("x", (channels, 24, 24))]
    x = b.relu(b.norm(b.conv("x", "stem", channels, 12), "stem_bn", 12))
    return b.graph(b.linear(b.mean(b.relu(b.norm(b.conv(x, "next", 12, 12), "next_bn", 12))), "head", 12, 3))


RANGES = [Scale((0.0,), (1.0,)), Scale((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), Scale((0.0,), (1 / 255,))]


@pytest.mark.parametrize("scale", RANGES)
def test_the_range_is_found_from_batch_norms_that_were_trained_in_it(scale):
    graph = reads_images(3)
    pictures = structured(graph.inputs[0], 16, 9, "scenes", scale)  # a family that the estimate does not use
    assert estimate_scale(calibrated(graph, (pictures,))) == scale


def test_the_range_of_a_standardised_grey_data_set_is_nearly_found():
    graph, scale = reads_images(1), Scale((0.3,), (0.35,))
    pictures = structured(graph.inputs[0], 16, 9, "scenes", scale)
    found = estimate_scale(calibrated(graph, (pictures,)))
    assert found.mean[0] == pytest.approx(0.3, abs=0.21) and found.std[0] == pytest.approx(0.35, abs=0.11)


def test_the_range_is_that_of_raw_pictures_where_nothing_tells():
    assert estimate_scale(network("mlp")) == Scale() == estimate_scale(network("chain"))  # no image, too small
    graph = reads_images(1)
    two = replace(graph, inputs=(*graph.inputs, InputSpec("y", (1, 24, 24))))
    assert estimate_scale(two) == Scale()


@pytest.mark.parametrize("scale", [Scale(), Scale((1.0,), (-1.0,)), Scale((0.1307,), (0.3081,))])
def test_the_range_of_a_classifier_without_batch_norm_follows_from_its_scores(scale):
    """Templates of marks tell marks from each other in their own range best, and surely, as trained networks do."""
    spec = InputSpec("x", (1, 16, 16))
    b = Builder(*spec.shape)
    templates = structured(spec, 10, 3, "glyphs", scale).flatten(1)
    weight = b.tensor("head.weight", 20 * templates)
    bias = b.tensor("head.bias", -10 * templates.square().sum(dim=1))
    graph = b.graph(b.op("head", "linear.default", Ref(b.flatten("x")), weight, bias))
    assert estimate_scale(graph) == scale


class Reads(nn.Module):
    """A layer, whose bias matters at one amplitude alone, behind a function of the input."""

    def __init__(self, before: Callable[[Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer = before, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.before(x))


def reads(before: Callable[[Tensor], Tensor], *shape: int, norm: bool = False, bias: bool = True) -> Graph:
    """Return a network that begins with a function of its input, a signal where it has one dimension."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if len(shape) == 1:
            layers = [
                nn.Unflatten(1, (1, -1)),
                nn.Conv1d(1, 8, 9, 4, bias=bias),
                nn.ReLU(),
                nn.Conv1d(8, 4, 9, 4, bias=bias),
            ]
            layers.insert(2, nn.BatchNorm1d(8)) if norm else None
        else:
            layers = [nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)]
        return capture(Reads(before, nn.Sequential(*layers)).eval(), [InputSpec("x", shape)], [])


MEAN, STD = torch.tensor([123.0, 116, 103])[:, None, None], torch.tensor([58.0, 57, 57])[:, None, None]
UNIT, BYTES, SIGNED = Scale((0.0,), (1.0,)), Scale((0.0,), (1 / 255,)), Scale((0.5,), (0.5,))


@pytest.mark.parametrize(
    ("before", "scale"),
    [
        (lambda x: x, UNIT),
        (lambda x: x * 2 - 1, UNIT),
        (lambda x: (x - 0.5).div(0.5), UNIT),
        (lambda x: (x - MEAN / 255) / (STD / 255), UNIT),
        (lambda x: 255 * x - MEAN, UNIT),
        (lambda x: 1 - x, UNIT),
        (lambda x: (x - 0.1307) / 0.3081, UNIT),
        (lambda x: (x + 1) / 2, SIGNED),
        (lambda x: x / 255, BYTES),
        (lambda x: x.flip(1) / 127.5 - 1, BYTES),
        (lambda x: (x - MEAN) / STD, BYTES),
        (lambda x: (x - 128) * (1 / 128), BYTES),
        (lambda x: x / 65535, Scale((0.0,), (1 / 65535,))),
        (lambda x: x - x.mean((2, 3), keepdim=True), UNIT),
        (lambda x: 255 / (x + 1), UNIT),
    ],
)
def test_constants_tell_the_range_of_images_without_batch_norm(
    before: Callable[[Tensor], Tensor], scale: Scale
) -> None:
    found = estimate_scale(reads(before, 3, 12, 12))
    assert found.mean == pytest.approx(scale.mean) and found.std == pytest.approx(scale.std)


def test_images_beside_other_inputs_have_a_range_of_their_own() -> None:
    graph = reads(lambda x: x / 255, 3, 12, 12)
    two = replace(graph, inputs=(InputSpec("y", (4,)), *graph.inputs))
    assert read_scales(two) == Found({"x": BYTES})
    assert read_scales(two, declared=SIGNED) == Found({"x": SIGNED})


def amplitude(graph: Graph, **given: object) -> float | None:
    """Return what the loudest sample of a signal is taken to be, None where nothing tells."""
    found = read_scales(graph, **given)
    assert (not found.scales) == (found.untold == graph.inputs)
    return 1 / found.scales["x"].std[0] if found.scales else None


@pytest.mark.parametrize(
    ("before", "loudest"),
    [
        (lambda x: x / 32768, 32768),
        (lambda x: x * 2**-15 * 3, 32768),
        (lambda x: x * 32768, 1),
        (lambda x: x[:, None] / 2**31, 2**31),
        (lambda x: x, None),
        (lambda x: x + 1, None),
    ],
)
def test_constants_tell_the_amplitude_of_signals(before: Callable[[Tensor], Tensor], loudest: float | None) -> None:
    wide = (lambda x: before(x)[:, 0]) if loudest == 2**31 else before
    assert amplitude(reads(wide, 400)) == loudest


def test_a_signal_without_a_sign_has_its_centre_away_from_0() -> None:
    ends = read_scales(reads(lambda x: (x - 128) / 128, 400)).scales["x"].apply(torch.tensor([[-1.0, 1.0]]))
    assert ends.tolist() == [[0, 256]]


@pytest.mark.parametrize("loudest", [1.0, 32768.0, 100.0])
def test_batch_norms_tell_the_amplitude_of_signals(loudest: float) -> None:
    graph = reads(lambda x: x, 400, norm=True)
    sounds = loudest * torch.cat([structured(graph.inputs[0], 8, 9, name) for name in ("speech", "tones")])
    assert amplitude(calibrated(graph, (sounds,))) == pytest.approx(loudest, rel=3)


def test_real_signals_tell_their_amplitude() -> None:
    graph = reads(lambda x: x, 400)
    assert amplitude(graph) is None
    real = 30000 * torch.linspace(-1, 1, 400).expand(3, 400)
    assert amplitude(graph, real=(real,)) == pytest.approx(30000, rel=0.01)


@pytest.mark.parametrize(
    "graph",
    [
        reads(lambda x: x, 400, bias=False),
        reads(lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-9), 400),
    ],
    ids=["no bias", "normalised"],
)
def test_where_outputs_follow_the_amplitude_any_will_do(graph: Graph) -> None:
    assert read_scales(graph) == Found({})


def test_a_network_on_signals_of_unknown_amplitude_has_nothing_to_judge_by() -> None:
    made = prepare(reads(lambda x: x, 400), Sources(), SynthesisBudget(8, 4, 2, 4))
    assert [spec.name for spec in made.unread] == ["x"] and not made.kind_known
    made = prepare(reads(lambda x: x / 32768, 400), Sources(), SynthesisBudget(8, 4, 2, 4))
    assert not made.unread and made.kind_known and 5000 < made.fit[0].abs().max() <= 32768


def test_noise_of_an_unknown_kind_has_the_amplitude_that_norms_constants_or_real_inputs_tell() -> None:
    b = Builder(5, 6)
    hidden = b.norm("x", "first", 5)
    graph = calibrated(b.graph(b.op("out", "relu.default", Ref(hidden))), (500 * torch.randn(64, 5, 6),))
    assert 1 / read_scales(graph).scales["x"].std[0] == pytest.approx(500, rel=1)
    plain = reads(lambda x: x, 2, 7, 7)
    real = 3 + 40 * torch.randn(20, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    scale = read_scales(plain, real=(real,)).scales["x"]
    assert (1 / scale.std[0], -scale.mean[0] / scale.std[0]) == (pytest.approx(40, 0.1), pytest.approx(3, 1))
    assert 1 / read_scales(reads(lambda x: x / 32768, 2, 7, 7)).scales["x"].std[0] == 32768


def test_constants_give_the_columns_of_a_table_mean_and_deviation() -> None:
    mean, std = torch.tensor([5000.0, 0.5, -40]), torch.tensor([1000.0, 0.01, 10])
    table = Reads(lambda x: (x - mean) / std, nn.Linear(3, 2)).eval()
    made = prepare(capture(table, [InputSpec("x", (3,))], []), Sources(), SynthesisBudget(200, 4, 2, 4))
    assert made.kind_known and not made.unread
    assert made.fit[0].mean(0).tolist() == pytest.approx(mean.tolist(), rel=0.3)
    assert made.fit[0].std(0).tolist() == pytest.approx(std.tolist(), rel=0.1)
    mixed = Reads(lambda x: x.flip(1) / std, nn.Linear(3, 2)).eval()
    (found,) = read_by_constants(capture(mixed, [InputSpec("x", (3,))], [])).values()
    assert not found.in_order
