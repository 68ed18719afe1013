"""Every way of pruning that the quality benchmark compares, under one signature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor, nn

from redpp_serve.graph.graph import Graph

from . import folding, magnitude, merging, ours
from .subject import Subject
from .widths import spreads

ROUND_TO = 8
NEAR = 0.02  # share of the open sets' multiply-accumulates by which a point may miss its target
DISTIL_SECONDS = 45.0  # the share of the default 60 that comes before the codebooks
_SEEDS = 3

Candidates = Iterator[tuple[str, nn.Module | Graph]]  # each setting's name and what it makes of the network


@dataclass(frozen=True)
class Method:
    """``run(subject, ratio)`` yields a network for each of the method's settings; the most accurate one is reported,
    which favours whoever has several. ``kind`` is ``baseline`` (no data), ``ceiling`` (real images) or ``ours``.
    Raise ``version`` when a change of the code changes figures: cells of older versions are measured again.
    """

    title: str
    kind: str
    version: int
    run: Callable[[Subject, float], Candidates]


def _spreads(subject: Subject, ratio: float) -> Iterator[tuple[str, dict[str, int]]]:
    open_macs = subject.cost.open_macs
    return spreads(subject.cost, ratio * open_macs, ROUND_TO, NEAR * open_macs)


def _random(subject: Subject, ratio: float) -> Candidates:
    for spread, widths in _spreads(subject, ratio):
        for seed in range(_SEEDS):
            yield f"{spread}, seed {seed}", merging.random_channels(subject.module, subject.example, widths, seed)


def _magnitude(importance: str) -> Callable[[Subject, float], Candidates]:
    def run(subject: Subject, ratio: float) -> Candidates:
        module, example = subject.module, subject.example
        for spread, widths in _spreads(subject, ratio):
            yield f"{spread}, one ratio", magnitude.prune_uniformly(module, example, widths, importance)
        removed = ratio * subject.cost.open_macs
        yield "all sets, global ranking", magnitude.prune_globally(module, example, removed, ROUND_TO, importance)

    return run


def _cluster_mean(subject: Subject, ratio: float) -> Candidates:
    for spread, widths in _spreads(subject, ratio):
        yield f"{spread}, weights as they are", merging.cluster_mean(subject.module, subject.example, widths)
        yield f"{spread}, norms in the rows", merging.cluster_mean(subject.module, subject.example, widths, absorb=True)


@lru_cache(maxsize=32)
def _folded(subject: Subject, ratio: float) -> list[tuple[str, bool, dict[str, Tensor]]]:
    """Each setting's name, whether it normalises weights, and its labels; both repairs start from the same ones."""
    found = []
    for spread, widths in _spreads(subject, ratio):
        for name, normalise in (("weights as they are", False), ("normalised weights", True)):
            labels = folding.fold_labels(subject.module, subject.example, widths, normalise)
            found.append((f"{spread}, {name}", normalise, labels))
    return found


def _fold_ar(subject: Subject, ratio: float) -> Candidates:
    for name, normalise, labels in _folded(subject, ratio):
        yield name, folding.fold(subject.module, subject.example, labels, normalise, repair=True)


def _fold_dir(subject: Subject, ratio: float) -> Candidates:
    for name, _, labels in _folded(subject, ratio):
        folded = folding.fold(subject.module, subject.example, labels)
        yield name, folding.estimate_statistics(folded, subject.synthetic)


def _least_squares(subject: Subject, ratio: float) -> Candidates:
    yield "", ours.least_squares(subject, subject.target_macs(ratio), ROUND_TO)


def _ceiling(subject: Subject, ratio: float) -> Candidates:
    yield "", ours.least_squares(subject, subject.target_macs(ratio), ROUND_TO, real=True)


def _distilled(subject: Subject, ratio: float) -> Candidates:
    yield "", ours.distilled(subject, subject.target_macs(ratio), ROUND_TO, DISTIL_SECONDS)


def _with_codebooks(subject: Subject, ratio: float) -> Candidates:
    graph, storage = ours.with_codebooks(subject, subject.target_macs(ratio), ROUND_TO, DISTIL_SECONDS)
    yield storage, graph


METHODS = {
    "random": Method("random channels", "baseline", 1, _random),
    "l1": Method("L1 (Torch-Pruning)", "baseline", 1, _magnitude("l1")),
    "fpgm": Method("FPGM (Torch-Pruning)", "baseline", 1, _magnitude("fpgm")),
    "cluster_mean": Method("means of clusters", "baseline", 1, _cluster_mean),
    "fold_ar": Method("model folding, Fold-AR", "baseline", 1, _fold_ar),
    "fold_dir": Method("model folding, Fold-DIR", "baseline", 1, _fold_dir),
    "ceiling": Method("least squares on real images", "ceiling", 1, _ceiling),
    "least_squares": Method("redpp-serve, least squares", "ours", 1, _least_squares),
    "distilled": Method("redpp-serve, + distillation", "ours", 1, _distilled),
    "codebooks": Method("redpp-serve, + final codebooks", "ours", 1, _with_codebooks),
}
