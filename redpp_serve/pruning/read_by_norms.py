"""What batch norms tell about inputs that they read as they are: mean and deviation of each feature.

A network of tables often begins with a batch norm. Its running statistics are those of the data that it was trained
on, such as a column around 5000 beside one around 0.5, and inputs that are made without data must have them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, Node, once_per_graph
from redpp_serve.graph.passes import is_inference_norm
from redpp_serve.graph.ranges import blank
from redpp_serve.pruning.families import TABLE, kind_of
from redpp_serve.pruning.read_by_constants import read_by_constants

_FIRST_TAG, _LAST_TAG = 2**22, 2**24  # whole numbers that float32 holds, far from values that layers add


@dataclass(frozen=True)
class Statistics:
    """Statistics of an input.

    Attributes:
        channel: the channel of the batch norm that each number of the input goes to, (numbers,) int64.
        mean: of each channel, (channels,) float64.
        deviation: of each channel, (channels,) float64.
    """

    channel: Tensor
    mean: Tensor
    deviation: Tensor

    def give_to(self, inputs: Tensor) -> Tensor:
        """Return inputs (N, ...) moved and scaled so that their channels have these statistics."""
        flat, count = inputs.double().flatten(1), len(inputs) * self.channel.bincount(minlength=len(self.mean))
        zeros = torch.zeros_like(self.mean)
        centred = flat - (zeros.index_add(0, self.channel, flat.sum(0)) / count)[self.channel]
        power = zeros.index_add(0, self.channel, centred.square().sum(0)) / count
        scale = self.deviation / power.sqrt().clamp_min(1e-9)
        return (centred * scale[self.channel] + self.mean[self.channel]).view_as(inputs).to(inputs.dtype)


@torch.no_grad()
def read_by_norms(graph: Graph, norms: Sequence[Node]) -> Mapping[str, Statistics]:
    """Return the statistics of each float32 or float64 input that one of the batch norms reads whole and unchanged.

    Other views, other orders of dimensions and values beside it do not matter. The network runs twice on numbered
    positions, once with negative numbers: what comes to a batch norm as the same position both times has not changed.
    """
    wide = [s for s in graph.inputs if s.dtype in ("float32", "float64")]
    sizes = [math.prod(spec.shape) for spec in wide]
    total = sum(sizes)
    if not norms or not wide or total > _LAST_TAG - _FIRST_TAG:
        return {}
    program = Program(graph, [norm.args[0].name for norm in norms])
    positions = torch.arange(total, dtype=torch.float64)
    runs = []
    for tags in (positions + _FIRST_TAG, positions - _LAST_TAG):
        made = {spec.name: blank(spec, 1, "cpu") for spec in graph.inputs}
        for spec, part in zip(wide, tags.split(sizes), strict=True):
            made[spec.name] = part.view(1, *spec.shape).to(getattr(torch, spec.dtype))
        runs.append(program(*made.values()))
    found: dict[str, Statistics] = {}
    for norm, first, second in zip(norms, *runs, strict=True):
        place = first.double() - _FIRST_TAG
        unchanged = (place == second.double() + _LAST_TAG) & (place >= 0) & (place < total) & (place == place.floor())
        channels = torch.arange(first.shape[1]).view(1, -1, *[1] * (first.dim() - 2)).expand_as(first)[unchanged]
        channel = torch.full((total,), -1).scatter(0, place[unchanged].long(), channels)
        mean, variance = (graph.tensors[norm.args[k].name].double().cpu() for k in (3, 4))
        for spec, part in zip(wide, channel.split(sizes), strict=True):
            if bool((part >= 0).all()):
                found.setdefault(spec.name, Statistics(part, mean, variance.clamp_min(0).sqrt()))
    return found


@once_per_graph
def known_statistics(graph: Graph) -> Mapping[str, Statistics]:
    """Return what the trained batch norms of a network, and the constants before its first layer, tell of its inputs.

    Constants tell the columns of rows, which they bring to about mean 0 and deviation 1.
    """
    tables, found = {spec.name for spec in graph.inputs if kind_of(spec) == TABLE}, {}
    for name, affine in read_by_constants(graph).items():
        if affine.in_order and name in tables:
            columns = torch.arange(len(affine.scale))
            found[name] = Statistics(columns, -affine.shift / affine.scale, 1 / affine.scale.abs())
    return {**found, **read_by_norms(graph, trained_norms(graph)[0])}


def as_read_by_norms(graph: Graph, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give inputs whose statistics are known mean and deviation of each feature."""
    known = known_statistics(graph)
    pairs = zip(graph.inputs, inputs, strict=True)
    return tuple(known[spec.name].give_to(x) if spec.name in known else x for spec, x in pairs)


def trained_norms(graph: Graph) -> tuple[list[Node], str]:
    """Return the batch norms whose stored statistics tell something about the inputs, and what is wrong with the rest.

    Left out are norms that still have the mean 0 and variance 1 they were made with, and those with NaN or infinity:
    inputs matched to these would suit no network.
    """
    norms = [node for node in graph.nodes if is_inference_norm(node)]
    statistics = {node.name: [graph.tensors[node.args[k].name] for k in (3, 4)] for node in norms}
    broken = {name for name, pair in statistics.items() if not all(bool(t.isfinite().all()) for t in pair)}
    untrained = {name for name, (mean, var) in statistics.items() if bool((mean == 0).all() & (var == 1).all())}
    found = [(untrained, "look untrained (mean 0, variance 1)"), (broken, "are NaN or infinite")]
    doubts = [f"the statistics of {len(names)} of {len(norms)} batch norms {what}" for names, what in found if names]
    return [node for node in norms if node.name not in broken | untrained], " and ".join(doubts)
