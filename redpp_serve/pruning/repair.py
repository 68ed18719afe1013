"""Repair batch norms after channels left or weights moved.

On synthetic inputs each norm gives its channels the mean and deviation that they had in the original network.

A norm's output is ``(x - mean) / sqrt(variance + eps)`` before its affine part. Where x now has mean m and deviation
s, and the original's output had mean c and deviation d, the statistics that restore it are
``sqrt(variance + eps) = s / d`` and ``mean = m - c s / d``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from redpp_serve.channels.narrowing import Kept
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.graph.passes import is_inference_norm

_CHUNK = 16  # inputs whose squares are summed at once
_LIVE_BYTES = 2**30  # memory for all values held at once; beyond it, fewer inputs are used
_DEAD = 1e-3  # a deviation below this, in units of the stored one, tells nothing about a channel's scale
_MOST_CHANGE = 4.0  # factor by which a channel's scale may change, either way


def repair_batch_norm(graph: Graph, original: Graph, inputs: tuple[Tensor, ...], kept: Kept) -> Graph:
    """Reset the running statistics of inference batch norms to what restores the original's normalised outputs.

    Each network runs once over the inputs: every norm is measured behind the repaired ones before it. Measuring all of
    them at once and repeating does not work, since each then makes up for what the others make up for too.

    A channel that hardly varies in either network keeps its scale and has its mean repaired; one whose statistics are
    not finite keeps both. Norms whose statistics are computed, or shared by several calls, do not change.

    Args:
        graph: network to repair; its node names are those of ``original``.
        original: network whose statistics are the target.
        inputs: (images, ...) for each network input, on the device to compute on; only the first of them are used
            where all would take more than 1 GiB.
        kept: positions of the original's values that ``graph`` still has.
    """
    norms = _repairable(graph, original, kept)
    if not norms or not len(inputs[0]):
        return graph
    images = max(1, _LIVE_BYTES // max(_live_bytes(original), 1))
    inputs = tuple(x[:images] for x in inputs)
    targets: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(norm: Node, value: Tensor) -> dict[str, Tensor]:
        where = kept(norm.args[0].name).get(1)
        mean, deviation = _normalised(original, original.node(norm.name), value)
        targets[norm.name] = (mean, deviation) if where is None else (mean[where.cpu()], deviation[where.cpu()])
        return {}

    def reset(norm: Node, value: Tensor) -> dict[str, Tensor]:
        return _reset(graph, norm, _normalised(graph, norm, value), targets[norm.name])

    names = {norm.name for norm in norms}
    _visit(original, [node for node in original.nodes if node.name in names], inputs, remember)
    return graph.with_tensors(_visit(graph, norms, inputs, reset))


@torch.no_grad()
def _visit(
    graph: Graph, norms: Sequence[Node], inputs: tuple[Tensor, ...], see: Callable[[Node, Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Run a graph up to its last norm; show ``see`` the input of each, and take over the tensors that it returns.

    The stretches between norms run as programs of their own, each on the values that live across its beginning.
    """
    live: dict[str, Any] = dict(zip((spec.name for spec in graph.inputs), inputs, strict=True))
    places = {node.name: k for k, node in enumerate(graph.nodes)}
    last = {name: k for k, node in enumerate(graph.nodes) for name in node.refs()}
    changed: dict[str, Tensor] = {}
    first, begin = graph.inputs[0].name, 0
    for norm in norms:
        end = places[norm.name]
        nodes = graph.nodes[begin:end]
        # The first input goes along: a program takes its device from it.
        made = [name for name in (*live, *(n.name for n in nodes)) if last.get(name, -1) >= end or name == first]
        specs = tuple(InputSpec(name, ()) for name in live)
        part = replace(graph, inputs=specs, nodes=nodes, tensors={**graph.tensors, **changed})
        live = dict(zip(made, Program(part, made).to(inputs[0].device)(*live.values()), strict=True))
        changed |= see(norm, live[norm.args[0].name])
        begin = end
    return changed


def _repairable(graph: Graph, original: Graph, kept: Kept) -> list[Node]:
    """Norms that both networks have, with stored statistics of their own and channels that correspond."""
    users, theirs = graph.users(), {node.name: node for node in original.nodes}
    found = []
    for node in graph.nodes:
        other = theirs.get(node.name)
        if not is_inference_norm(node) or other is None or not is_inference_norm(other):
            continue
        calls = ((node, graph), (other, original))
        stored = all(isinstance(ref, Ref) and ref.name in g.tensors for n, g in calls for ref in n.args[3:5])
        if not stored or any(len(users[ref.name]) > 1 for ref in node.args[3:5]):
            continue
        where = kept(node.args[0].name).get(1)
        channels = len(original.tensors[other.args[3].name]) if where is None else len(where)
        if channels == len(graph.tensors[node.args[3].name]):
            found.append(node)
    return found


def _live_bytes(graph: Graph) -> int:
    """Peak memory of one input's values in a run, each held until its last use."""
    sizes = {name: 4 * math.prod(shape) for name, shape in value_shapes(graph).items()}
    last = {name: k for k, node in enumerate(graph.nodes) for name in node.refs()}
    ends: dict[int, list[str]] = {}
    for name, k in last.items():
        ends.setdefault(k, []).append(name)
    live = most = 0
    for k, node in enumerate(graph.nodes):
        live += sizes.get(node.name, 0)
        most = max(most, live)
        live -= sum(sizes.get(name, 0) for name in ends.get(k, ()))
    return most


def _normalised(graph: Graph, norm: Node, value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (channels,) of a norm's output before its affine part, float64 on the CPU."""
    mean, deviation = _stored(graph, norm)
    dims = [d for d in range(value.dim()) if d != 1]
    count = value.numel() // value.shape[1]
    total = torch.zeros(2, len(mean), dtype=torch.float64, device=value.device)
    for part in torch.split(value, _CHUNK):
        # Sums are about the stored mean, so that the squares of a channel far from zero do not cancel.
        centred = part - mean.to(part).view(-1, *[1] * (value.dim() - 2))
        total[0] += centred.sum(dims, dtype=torch.float64)
        total[1] += centred.square_().sum(dims, dtype=torch.float64)
    centre, squares = (total / count).cpu()
    return centre / deviation, (squares - centre**2).clamp_min(0).sqrt() / deviation


def _stored(graph: Graph, norm: Node) -> tuple[Tensor, Tensor]:
    """Mean and deviation that a norm normalises by, float64 on the CPU."""
    mean, variance = (graph.tensors[ref.name].cpu().double() for ref in norm.args[3:5])
    return mean, (variance + norm.args[7]).sqrt()


def _reset(
    graph: Graph, norm: Node, measured: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Compute the two statistics of a norm, by tensor name, that turn its measured output into the target."""
    mean, deviation = _stored(graph, norm)
    (m, s), (c, d) = measured, target
    telling = (s > _DEAD) & (d > _DEAD)
    change = torch.where(telling, s / d.clamp_min(_DEAD), 1.0).clamp(1 / _MOST_CHANGE, _MOST_CHANGE)
    eps = norm.args[7]
    new_variance = ((deviation * change) ** 2 - eps).clamp_min(0)
    new_mean = mean + m * deviation - c * (new_variance + eps).sqrt()
    usable = new_mean.isfinite() & new_variance.isfinite()
    changed = {}
    for ref, new in zip(norm.args[3:5], (new_mean, new_variance), strict=True):
        old = graph.tensors[ref.name]
        changed[ref.name] = torch.where(usable.to(old.device), new.to(old), old)
    return changed
