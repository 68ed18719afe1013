"""Eight bits for weights: a scale for each channel, and nothing rounded where the values are on a grid already."""

import pytest
import torch
from torch import Tensor

from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.graph.quantization import find_ranges, in_int8, quantizable, quantize_weight
from redpp_serve.options import HashTarget
from redpp_serve.pruning.hashing import hash_weight
from redpp_serve.runtime.serving_graph import serving_graph


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def rounding(weight: Tensor) -> float:
    """Return the largest error of a weight in eight bits, relative to the largest value of its channel."""
    levels, scale = quantize_weight(weight)
    back = levels.flatten(1).float() * scale[:, None]
    return float(((back - weight.flatten(1)).abs().amax(1) / weight.flatten(1).abs().amax(1).clamp_min(1e-30)).max())


def test_each_channel_has_127_levels_to_either_side() -> None:
    weight = gaussian(16, 8, 3, 3) * torch.logspace(-3, 3, 16)[:, None, None, None]
    levels, scale = quantize_weight(weight)
    assert levels.flatten(1).abs().amax(1).tolist() == [127] * 16
    torch.testing.assert_close(scale, weight.flatten(1).abs().amax(1) / 127)
    assert 0.3 / 127 < rounding(weight) <= 0.5001 / 127


@pytest.mark.parametrize(
    "levels",
    [[-90, 90, 4, 0], [2, 5, 7], [-3], [0], [10, 20, 30], [127, 126, -127], [13, 14, 100]],
    ids=lambda levels: " ".join(map(str, levels)),
)
def test_values_on_a_grid_stay(levels: list[int]) -> None:
    steps = torch.tensor([[0.37, 1.3e-6, 7.1e4]]).T
    weight = (torch.tensor(levels) * steps).repeat(1, 50)
    assert rounding(weight) < 1e-6


def test_a_channel_off_the_grid_is_rounded_alone() -> None:
    grid = torch.arange(-60.0, 60.0) * 0.01
    weight = torch.stack([grid * 5, gaussian(120) * 0.1, torch.zeros(120)])
    levels, scale = quantize_weight(weight)
    assert (levels.abs().amax(1).tolist(), float(scale[0])) == ([60, 127, 0], pytest.approx(0.05))
    assert torch.isfinite(scale).all() and (scale > 0).all()


@pytest.mark.parametrize("odd", [float("inf"), float("nan")])
def test_weights_that_are_no_numbers_end_nothing(odd: float) -> None:
    """Such a network is refused elsewhere, by what it gives."""
    levels, scale = quantize_weight(torch.tensor([[1.0, odd, 2.0], [3.0, 4.0, 5.0]]))
    assert levels[1].tolist() == [76, 102, 127] and not torch.isfinite(scale[0])


@pytest.mark.parametrize("values", [15, 255])
def test_a_uniform_codebook_is_what_eight_bits_compute_with(values: int) -> None:
    """Also behind a batch norm, which gives each channel a step of its own."""
    hashed = hash_weight(gaussian(32, 16, 3, 3), "uniform", HashTarget(values=values)).weight
    assert 0.6 * values < len(hashed.unique()) <= values  # the tails are thin
    norm = {"gain": gaussian(32), "shift": gaussian(32), "mean": gaussian(32), "var": gaussian(32).square() + 0.1}
    graph = Graph(
        (InputSpec("x", (16, 6, 6)),),
        {"w": hashed, **norm},
        (
            Node("c", "aten.conv2d.default", (Ref("x"), Ref("w"), None, [1, 1], [1, 1], [1, 1], 1)),
            Node("y", "aten.batch_norm.default", (Ref("c"), *map(Ref, norm), False, 0.1, 1e-5, True)),
        ),
        ("y",),
    )
    served = serving_graph(graph, torch.device("cpu"))
    (layer,) = quantizable(served)
    assert rounding(served.tensors[layer.args[2].name]) < 1e-6
    narrow = in_int8(served, find_ranges(served, [gaussian(4, 16, 6, 6)]))
    assert {t.dtype for t in narrow.tensors.values()} == {torch.int8, torch.float32}


def test_the_levels_of_a_uniform_codebook_lie_about_zero() -> None:
    weight = gaussian(4000).abs() + 0.5  # positive alone
    hashed = hash_weight(weight.view(1, -1), "uniform", HashTarget(values=255)).weight
    assert rounding(hashed) < 1e-6
