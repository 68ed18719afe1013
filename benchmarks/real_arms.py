"""Every way of pruning that `benchmarks.real` compares, brought to an operating point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import folding, magnitude
from benchmarks.baselines.coupled import NORMS, CoupledNetwork
from benchmarks.baselines.inversion import invert
from benchmarks.baselines.widths import cost_model, layer_macs, spreads
from benchmarks.real_data import fitting_images, stored
from benchmarks.real_networks import NETWORKS, load_graph, load_module
from redpp_serve.graph.graph import Graph
from redpp_serve.options import Options
from redpp_serve.pruning.families import Scale
from redpp_serve.pruning.inputs import Sources
from redpp_serve.pruning.pipeline import prune
from redpp_serve.runtime.moments import Adder, Moments, fingerprint
from redpp_serve.stages import Stages

ROUND_TO = 8
NEAR = 0.02  # share of the multiply-accumulates by which a peer may miss a point
FEW, MANY = 48, 500  # unlabelled inputs that a user may have, and requests that a server may have observed
INVERTED_STEPS = 40


@dataclass(frozen=True)
class Candidate:
    """One pruned network.

    Attributes:
        network: the pruned network.
        setting: which of the arm's settings made it; empty where there is one.
        reported: what the tool says of its own result.
        stages: the tool's stages, with their seconds.
    """

    network: Graph | nn.Module
    setting: str = ""
    reported: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)


class UnavailableError(Exception):
    """This version of the code, or this network, lacks what the arm needs."""


@dataclass(frozen=True)
class Arm:
    """``run(network, point)`` yields a candidate for each setting; the best one is reported, with hindsight.

    Attributes:
        title: in tables.
        kind: ``ours`` or ``peer``.
        data: the real inputs that it sees, in words; empty for none.
        version: raise it when a change of the benchmark's code changes figures.
        run: makes the candidates.
        prepare: makes, untimed, the inputs that a user would already have.
    """

    title: str
    kind: str
    data: str
    version: int
    run: Callable[[str, str], Iterator[Candidate]]
    prepare: Callable[[str], object] = lambda network: None


def point_options(point: str) -> dict[str, float]:
    """Return the fields of `Options` that a point such as ``macs=0.80``, ``keep=0.5`` or ``default`` stands for."""
    if point == "default":
        return {}
    name, _, value = point.partition("=")
    return {{"macs": "target_macs", "keep": "keep"}[name]: float(value)}


def _ours(title: str, inputs: int = 0, moments: int = 0) -> Arm:
    @cache
    def known(network: str) -> Sources:
        found = NETWORKS[network]
        return Sources(
            (fitting_images(network, inputs),) if inputs else (),
            Scale(*found.scale) if found.scale else None,
            _moments(network, moments) if moments else None,
        )

    def run(network: str, point: str) -> Iterator[Candidate]:
        stages = Stages(quiet=False)
        options = Options(**point_options(point), max_error=None if point == "default" else 10.0)
        pruned = prune(load_graph(network), options, stages=stages, sources=known(network))
        yield Candidate(pruned.pruned, "", asdict(pruned.verify), stages.to_json())

    data = f"{inputs} unlabelled inputs" if inputs else f"moments of {moments} requests" if moments else ""
    return Arm(title, "ours", data, 1, run, known)


def _moments(network: str, count: int) -> Moments:
    """Return what a server that observes ``count`` requests would hand on."""
    graph = load_graph(network)
    adder = Adder(graph)
    for one in fitting_images(network, count).split(1):
        adder.add((one,))
    return adder.sums.moments(fingerprint(graph))


def _widths(network: str, point: str) -> Iterator[tuple[str, dict[str, int]]]:
    module, example = _subject(network)
    model = cost_model(CoupledNetwork(module, example), example)
    total = sum(layer_macs(module, example).values())
    yield from spreads(model, _removed(point) * total, ROUND_TO, NEAR * total)


def _subject(network: str) -> tuple[nn.Module, Tensor]:
    return load_module(network), torch.zeros(1, *NETWORKS[network].shape)


def _removed(point: str) -> float:
    wanted = point_options(point).get("target_macs")
    if wanted is None:
        raise UnavailableError("peers take a share of the multiply-accumulates")
    return 1 - wanted


def _l1(network: str, point: str) -> Iterator[Candidate]:
    module, example = _subject(network)
    for spread, widths in _widths(network, point):
        yield Candidate(magnitude.prune_uniformly(module, example, widths, "l1"), f"{spread}, one ratio")
    removed = _removed(point) * sum(layer_macs(module, example).values())
    found = magnitude.prune_globally(module, example, removed, ROUND_TO, "l1")
    yield Candidate(found, "all sets, global ranking")


def _recalibrated(
    arm: Callable[[str, str], Iterator[Candidate]], images: Callable[[str], Tensor]
) -> Callable[[str, str], Iterator[Candidate]]:
    def run(network: str, point: str) -> Iterator[Candidate]:
        _require_norms(network)
        for found in arm(network, point):
            assert isinstance(found.network, nn.Module)
            yield Candidate(folding.estimate_statistics(found.network, images(network)), found.setting)

    return run


def _require_norms(network: str) -> None:
    if not any(isinstance(m, NORMS) for m in load_module(network).modules()):
        raise UnavailableError("no batch norm to recalibrate")


def _photographs(network: str) -> Tensor:
    return fitting_images(network, FEW)


def _inverted(network: str) -> Tensor:
    """The peers' own synthetic images, (FEW, ...)."""
    _require_norms(network)
    module, shape = load_module(network), NETWORKS[network].shape
    name = f"inverted-{network}-{INVERTED_STEPS}"
    return torch.from_numpy(stored(name, lambda: invert(module, shape, FEW, INVERTED_STEPS).numpy()))


def _folded(repair: bool) -> Callable[[str, str], Iterator[Candidate]]:
    def run(network: str, point: str) -> Iterator[Candidate]:
        module, example = _subject(network)
        for spread, widths in _widths(network, point):
            for name, normalise in (("weights as they are", False), ("normalised weights", True)):
                labels = folding.fold_labels(module, example, widths, normalise)
                found = folding.fold(module, example, labels, normalise and repair, repair=repair)
                yield Candidate(found, f"{spread}, {name}")

    return run


def _peer(
    title: str,
    run: Callable[[str, str], Iterator[Candidate]],
    images: Callable[[str], Tensor] | None = None,
    data: str = "",
) -> Arm:
    if images is None:
        return Arm(title, "peer", data, 1, run)
    return Arm(title, "peer", data, 1, _recalibrated(run, images), images)


ARMS = {
    "ours": _ours("redpp-serve"),
    "ours_inputs": _ours("redpp-serve", inputs=FEW),
    "ours_moments": _ours("redpp-serve", moments=MANY),
    "ceiling": _ours("redpp-serve, ceiling", inputs=MANY),
    "l1": _peer("Torch-Pruning, L1", _l1),
    "l1_synthetic": _peer("Torch-Pruning, L1, batch norms recalibrated on synthetic images", _l1, _inverted),
    "l1_inputs": _peer("Torch-Pruning, L1, batch norms recalibrated", _l1, _photographs, f"{FEW} unlabelled inputs"),
    "fold_ar": _peer("model folding, Fold-AR", _folded(repair=True)),
    "fold_dir": _peer("model folding, Fold-DIR", _folded(repair=False), _inverted),
}
