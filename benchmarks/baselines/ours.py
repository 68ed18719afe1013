"""This project's own pruning, brought to a given cost: the one place where the benchmark calls it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache

from redpp_serve.channels.coupling import couple
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import find_layers
from redpp_serve.pruning.choose import Narrowed, Narrower
from redpp_serve.pruning.distillation import Lesson, distil, schedule
from redpp_serve.pruning.final_codebooks import hash_within
from redpp_serve.pruning.judge import Reference
from redpp_serve.pruning.repair import repair_batch_norm
from redpp_serve.pruning.steps import CODEBOOK_DISTIL_SHARE, CODEBOOK_SHARE, LEAST_CODEBOOK_ERROR
from redpp_serve.pruning.widths import NarrowingPath, narrowing_path

from .subject import Subject

_HELD_OUT = 32  # of the real images: on these widths are chosen


@dataclass(frozen=True)
class _Ready:
    """A network observed on a set of images, and the order in which its channel sets give up channels."""

    narrower: Narrower
    path: NarrowingPath


@lru_cache(maxsize=4)
def _ready(subject: Subject, real: bool, round_to: int) -> _Ready:
    fit, judging = (subject.synthetic,), subject.prepared.families
    if real:
        fit, judging = (subject.real[:-_HELD_OUT],), {"real": (subject.real[-_HELD_OUT:],)}
    narrower = Narrower(Reference(subject.graph, judging), couple(subject.graph), lambda name: {}, fit)
    return _Ready(narrower, narrowing_path(narrower.coupling, narrower.set_errors(), round_to))


@lru_cache(maxsize=4)
def _narrowed(subject: Subject, target_macs: int, round_to: int, real: bool) -> Narrowed:
    ready = _ready(subject, real, round_to)
    point = min(ready.path.points, key=lambda p: abs(p.cost - target_macs))
    return ready.narrower.build(point.widths)


def least_squares(subject: Subject, target_macs: int, round_to: int, real: bool = False) -> Graph:
    """Selection, widths and least squares on synthetic images, or on real ones of the training set."""
    return _narrowed(subject, target_macs, round_to, real).graph


@lru_cache(maxsize=2)
def distilled(subject: Subject, target_macs: int, round_to: int, seconds: float) -> Graph:
    """Least squares, then distillation on the same synthetic images with a budget in seconds."""
    narrowed, narrower = _narrowed(subject, target_macs, round_to, False), _ready(subject, False, round_to).narrower
    return _trained(subject, narrower.reference, narrowed, seconds)


def _trained(
    subject: Subject, reference: Reference, narrowed: Narrowed, seconds: float, codebooks: Collection[str] = ()
) -> Graph:
    lesson = Lesson(narrowed.graph, reference, (subject.synthetic,), narrowed.kept, frozenset(codebooks))
    return distil(lesson, schedule(narrowed.graph, subject.graph, seconds, subject.pace, reference.images)).graph


def with_codebooks(subject: Subject, target_macs: int, round_to: int, seconds: float) -> tuple[Graph, str]:
    """The distilled network with the final codebooks that the product gives it, and how many bits an index takes."""
    graph = distilled(subject, target_macs, round_to, seconds)
    narrowed, narrower = _narrowed(subject, target_macs, round_to, False), _ready(subject, False, round_to).narrower
    reference = narrower.reference
    budget = max(CODEBOOK_SHARE * reference.error(graph), LEAST_CODEBOOK_ERROR)
    found = hash_within(graph, find_layers(graph), reference.inputs, budget)
    graph = repair_batch_norm(found.graph, subject.graph, narrower.inputs, narrowed.kept)
    books = [layer.weight for layer in find_layers(graph)]
    tuned = _trained(subject, reference, replace(narrowed, graph=graph), seconds * CODEBOOK_DISTIL_SHARE, books)
    four = sum(h.weight.numel() for h in found.hashed.values() if h.codebook.size <= 16)
    return tuned, f"{four / sum(h.weight.numel() for h in found.hashed.values()):.0%} of the weights in 4 bits"
