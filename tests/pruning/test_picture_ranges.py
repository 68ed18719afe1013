"""Where nothing in a network tells the range of its pictures, its scores do, or both ranges judge."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.options import Options
from redpp_serve.pruning.families import Scale, structured
from redpp_serve.pruning.inputs import Sources, prepare
from redpp_serve.pruning.matching import SynthesisBudget
from redpp_serve.pruning.picture_ranges import AS_BYTES, AS_UNIT, possible_ranges
from redpp_serve.pruning.pipeline import prune
from redpp_serve.pruning.scales import Found, read_scales

PICTURE = InputSpec("x", (3, 16, 16))


def classifier(spread: float, loudest: float = 1.0, last: nn.Module | None = None) -> nn.Module:
    """Make a classifier whose scores have a spread over pictures of 0 to ``loudest``, as training leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten())
        net.extend([nn.Linear(288, 4), *([last] if last else [])])
    with torch.no_grad():
        net[0].weight /= loudest
        scores = nn.Sequential(*net[:6])(loudest * structured(PICTURE, 24, 3, "surfaces")).double()
        centred = scores - scores.mean(1, keepdim=True)
        factor = spread / float(centred.var(0).mean().sqrt())
        net[5].weight *= factor
        net[5].bias *= factor
    return net.eval()


def graph_of(net: nn.Module, *specs: InputSpec, classes: bool = True) -> Graph:
    graph = capture(net, specs or (PICTURE,), [])
    return replace(graph, classes=frozenset(graph.output_names) if classes else frozenset())


@pytest.mark.parametrize("last", [None, nn.Softmax(1), nn.LogSoftmax(1)], ids=["scores", "softmax", "log softmax"])
@pytest.mark.parametrize(("loudest", "scale"), [(1.0, AS_UNIT), (255.0, AS_BYTES)])
@pytest.mark.parametrize("spread", [1.5, 3.0])
def test_the_spread_of_scores_tells_bytes_from_0_to_1(
    spread: float, loudest: float, scale: Scale, last: nn.Module | None
) -> None:
    assert possible_ranges(graph_of(classifier(spread, loudest, last)), PICTURE, 0) == (scale,)
    assert read_scales(graph_of(classifier(spread, loudest, last))) == Found({"x": scale})


class Sharper(nn.Module):
    """The same picture with its edges stronger, and a little brighter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


def test_both_ranges_are_possible_where_there_are_no_scores_or_they_fit_neither() -> None:
    both = (AS_UNIT, AS_BYTES)
    assert possible_ranges(graph_of(Sharper().eval(), classes=False), PICTURE, 0) == both
    faint = classifier(0.1)
    with torch.no_grad():
        faint[5].weight /= 2000
    assert possible_ranges(graph_of(faint), PICTURE, 0) == both


def test_one_range_is_enough_where_outputs_follow_the_amplitude() -> None:
    net = Sharper().eval()
    nn.init.zeros_(net.first.bias)
    nn.init.zeros_(net.second.bias)
    assert possible_ranges(graph_of(net, classes=False), PICTURE, 0) == (AS_UNIT,)


@pytest.mark.parametrize(("loudest", "scale"), [(1.0, AS_UNIT), (255.0, AS_BYTES)])
def test_real_pictures_and_what_is_declared_tell(loudest: float, scale: Scale) -> None:
    graph, real = graph_of(Sharper().eval(), classes=False), loudest * structured(PICTURE, 8, 5, "scenes")
    assert read_scales(graph, real=(real,)) == Found({"x": scale})
    assert read_scales(graph, declared=Scale((0.5,), (0.25,))) == Found({"x": Scale((0.5,), (0.25,))})


def test_both_ranges_are_fitted_and_judge() -> None:
    graph = graph_of(Sharper().eval(), classes=False)
    made = prepare(graph, Sources(), SynthesisBudget(16, 4, 2, 4))
    loud = {name: float(x.max()) > 2 for name, (x,) in made.families.items()}
    assert loud == {name: name.endswith(" as bytes") for name in loud} and 2 * sum(loud.values()) == len(loud) >= 4
    assert int((made.fit[0].flatten(1).amax(1) > 2).sum()) == len(made.fit[0]) / 2
    assert "--preprocess" in made.note and made.kind_known and not made.unread
    told = prepare(graph, Sources(scale=AS_UNIT), SynthesisBudget(16, 4, 2, 4))
    assert not any(name.endswith("bytes") for name in told.families) and "--preprocess" not in told.note


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw pictures (count, 3, 16, 16) of 0 to 255: discs, squares, bars or rings in any colour on any other."""
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    labels = torch.randint(0, 4, (count,), generator=draw)
    centre, radius = 5 + 6 * torch.rand(count, 2, 1, 1, generator=draw), 3 + 2 * torch.rand(count, 1, 1, generator=draw)
    u, v = (y - centre[:, 0]) / radius, (x - centre[:, 1]) / radius
    square = u.square() + v.square()
    ring, block, bar = (square < 1) & (square > 0.4), torch.maximum(u.abs(), v.abs()) < 0.85, v.abs() < 0.35
    marks = torch.stack([square < 1, block, bar & (u.abs() < 1), ring])
    mark = marks[labels, torch.arange(count)][:, None]
    ground = 255 * torch.rand(count, 3, 1, 1, generator=draw)
    colour = (ground + 90 + 75 * torch.rand(count, 3, 1, 1, generator=draw)) % 255
    noise = 8 * torch.randn(count, 3, 16, 16, generator=draw)
    return (torch.where(mark, colour, ground) + noise).clamp(0, 255).round(), labels


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A classifier of `shapes` as bytes, without a norm or a constant inside."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 4)),
    )
    images, labels = shapes(3000, 1)
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    draw = torch.Generator().manual_seed(2)
    for _ in range(500):
        mine = torch.randint(0, len(images), (64,), generator=draw)
        optimiser.zero_grad()
        F.cross_entropy(net(images[mine]), labels[mine]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
    return net.eval()


def as_unit(net: nn.Module) -> nn.Module:
    """Return the same network for pictures of 0 to 1."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        net[0].weight *= 255  # type: ignore[index, operator]
    return net


@pytest.mark.exhaustive
@pytest.mark.parametrize("loudest", [255.0, 1.0])
def test_the_reported_error_holds_on_pictures_without_norms_or_constants(trained: nn.Module, loudest: float) -> None:
    images, labels = shapes(1000, 9)
    x = images * (loudest / 255)
    graph = capture(trained if loudest == 255 else as_unit(trained), [InputSpec("x", (3, 16, 16))], [])
    result = prune(graph, Options(distil=0, time_budget=30))
    original, pruned = (Program(each)(x)[0] for each in (result.original, result.pruned))
    centred = original - original.mean(0)
    error = float((pruned - pruned.mean(0) - centred).norm() / centred.norm())
    right = [float((y.argmax(1) == labels).double().mean()) for y in (original, pruned)]
    assert right[0] > 0.85 and result.verify.output_error >= 0.7 * error, (right, error, result.verify.output_error)
    assert right[1] > right[0] - 0.03
