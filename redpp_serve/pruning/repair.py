"""Batch-norm repair: after channels left or weights moved, each norm gives its channels the mean and deviation that
they had in the original network, on synthetic inputs.

A norm's output is ``(x - mean) / sqrt(variance + eps)`` before its affine part. Where x now has mean m and deviation
s, and the original's output had mean c and deviation d, the statistics that restore it are
``sqrt(variance + eps) = s / d`` and ``mean = m - c s / d``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..runtime.batch_norm import is_inference_norm
from ..runtime.graph import Graph, Node, Ref
from ..runtime.program import Program, value_shapes

_CHUNK_BYTES = 2**28  # of the norms' inputs held at once
_DEAD = 1e-3  # a deviation, in units of the stored one, that says nothing about a channel's scale
_MOST_CHANGE = 4.0  # of a channel's scale, either way


def repair_batch_norm(
    graph: Graph,
    original: Graph,
    inputs: tuple[Tensor, ...],
    kept: Callable[[str], dict[int, Tensor]],
    passes: int = 3,
) -> Graph:
    """Reset the running statistics of inference batch norms to what restores the original's normalised outputs.

    A channel that hardly varies in either network keeps its scale and has its mean repaired; one whose statistics are
    not finite keeps both; a scale changes at most 4 times either way. Norms whose statistics are computed, or shared
    by several calls, stay.

    Args:
        graph: the network to repair; its nodes have the names of those of ``original``.
        original: the network whose statistics are the target.
        inputs: (images, ...) for each network input, on the device to compute on.
        kept: for a value's name the positions of the original's value that ``graph`` still has, by axis.
        passes: runs of ``graph`` over the inputs. Each measures all norms at once and resets all of them, so that the
            k-th norm in order of execution is exact after k passes, and in practice all are nearly so after few.
    """
    norms = _repairable(graph, original, kept)
    if not norms or not len(inputs[0]):
        return graph
    targets = {}
    for norm, (mean, deviation) in zip(norms, _normalised(original, [original.node(n.name) for n in norms], inputs)):
        where = kept(norm.args[0].name).get(1)
        pick = (lambda t: t) if where is None else (lambda t, at=where: t[at.cpu()])
        targets[norm.name] = pick(mean), pick(deviation)
    first = graph  # changes are bounded against what came in, over all passes together
    for _ in range(min(passes, len(norms))):
        changed: dict[str, Tensor] = {}
        for norm, measured in zip(norms, _normalised(graph, norms, inputs)):
            changed |= _reset(graph, first, norm, measured, targets[norm.name])
        graph = graph.with_tensors(changed)
    return graph


def _repairable(graph: Graph, original: Graph, kept: Callable[[str], dict[int, Tensor]]) -> list[Node]:
    """Norms that both networks have, with stored statistics of their own and channels that correspond."""
    users, theirs = graph.users(), {node.name: node for node in original.nodes}
    found = []
    for node in graph.nodes:
        other = theirs.get(node.name)
        if not is_inference_norm(node) or other is None or not is_inference_norm(other):
            continue
        stored = all(
            isinstance(ref, Ref) and ref.name in of.tensors for n, of in ((node, graph), (other, original)) for ref in n.args[3:5]
        )
        if not stored or any(len(users[ref.name]) > 1 for ref in node.args[3:5]):
            continue
        where = kept(node.args[0].name).get(1)
        channels = len(original.tensors[other.args[3].name]) if where is None else len(where)
        if channels == len(graph.tensors[node.args[3].name]):
            found.append(node)
    return found


@torch.no_grad()
def _normalised(graph: Graph, norms: Sequence[Node], inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """For each norm the float64 mean and deviation (channels,) of its output before the affine part, on the CPU."""
    device = inputs[0].device
    program = Program(graph, [norm.args[0].name for norm in norms]).to(device)
    stored = [tuple(t.to(device) for t in _stored(graph, norm)) for norm in norms]
    sizes = value_shapes(graph)
    images = 4 * sum(math.prod(sizes[norm.args[0].name]) for norm in norms if norm.args[0].name in sizes)
    chunk = max(1, min(32, _CHUNK_BYTES // max(images, 1)))
    sums = [torch.zeros(2, len(mean), dtype=torch.float64, device=device) for mean, _ in stored]
    counts = [0] * len(norms)
    for part in zip(*(x.split(chunk) for x in inputs)):
        for k, (value, (mean, _)) in enumerate(zip(program(*part), stored)):
            dims = [d for d in range(value.dim()) if d != 1]
            # about the stored mean, so that the squares of a channel far from zero do not cancel
            centred = value - mean.to(value.dtype).view(-1, *[1] * (value.dim() - 2))
            sums[k][0] += centred.sum(dims, dtype=torch.float64)
            sums[k][1] += centred.square().sum(dims, dtype=torch.float64)
            counts[k] += value.numel() // value.shape[1]
    found = []
    for (total, squares), count, (_, deviation) in zip(sums, counts, stored):
        mean = total / count
        spread = (squares / count - mean**2).clamp_min(0).sqrt()
        found.append(((mean / deviation).cpu(), (spread / deviation).cpu()))
    return found


def _stored(graph: Graph, norm: Node) -> tuple[Tensor, Tensor]:
    """The float64 mean and deviation that a norm normalises by."""
    mean, variance = (graph.tensors[ref.name].double() for ref in norm.args[3:5])
    return mean, (variance + norm.args[7]).sqrt()


def _reset(
    graph: Graph, first: Graph, norm: Node, measured: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """The two statistics of a norm, by tensor name, that turn its ``measured`` output into the ``target``."""
    mean, deviation = (t.cpu() for t in _stored(graph, norm))
    base = _stored(first, norm)[1].cpu()
    (m, s), (c, d) = measured, target
    telling = (s * deviation > _DEAD * base) & (d > _DEAD)
    scale = torch.where(telling, deviation * s / d.clamp_min(_DEAD), base)
    scale = scale.clamp(base / _MOST_CHANGE, base * _MOST_CHANGE)
    eps = norm.args[7]
    new_variance = (scale**2 - eps).clamp_min(0)
    new_mean = mean + m * deviation - c * (new_variance + eps).sqrt()
    usable = new_mean.isfinite() & new_variance.isfinite()
    changed = {}
    for ref, new in zip(norm.args[3:5], (new_mean, new_variance)):
        old = graph.tensors[ref.name]
        changed[ref.name] = torch.where(usable.to(old.device), new.to(old), old)
    return changed
