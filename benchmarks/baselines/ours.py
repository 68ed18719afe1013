"""This project's own pruning, brought to a given cost: the one place where the benchmark calls it."""

from __future__ import annotations

from torch import Tensor

from redpp_serve.graph.channels import find_inner_channels
from redpp_serve.graph.rewrite import round_up
from redpp_serve.pruning.distil import distil
from redpp_serve.pruning.reconstruct import keep_ratio, reconstruct
from redpp_serve.runtime.graph import Graph

from .subject import Subject

_HELD_OUT = 32  # synthetic images that decide which weights distillation keeps
_KEEPS = [k / 100 for k in range(1, 101)]


def least_squares(subject: Subject, target_macs: int, round_to: int, images: Tensor | None = None) -> Graph:
    """Selection and least squares on synthetic images, or on ``images`` (n, ...) where those are given."""
    graph = subject.graph
    sets, _ = find_inner_channels(graph)
    inputs = subject.synthetic[:-_HELD_OUT] if images is None else images

    def macs(keep: float) -> float:
        widths = {s.producer.name: round_up(max(1, round(keep * s.channels)), round_to, s.channels) for s in sets}
        return subject.macs - subject.cost.removed(widths)

    keep = min(_KEEPS, key=lambda k: abs(macs(k) - target_macs))
    return reconstruct(graph, graph, sets, (inputs,), keep_ratio(keep), round_to)[0]


def distilled(subject: Subject, target_macs: int, round_to: int, seconds: float) -> Graph:
    """Least squares, then distillation on the same synthetic images with a budget in seconds."""
    pruned = least_squares(subject, target_macs, round_to)
    learn, held_out = subject.synthetic[:-_HELD_OUT], subject.synthetic[-_HELD_OUT:]
    return distil(pruned, subject.graph, (learn,), (held_out,), lambda name: {}, seconds=seconds).graph
