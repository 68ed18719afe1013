"""Reconstructive merging: fewer channels, and readers whose weights are fitted to make up for the ones that left.

Exact merging is the special case in which a channel equals another. Here a channel may be any linear combination
of the kept ones. Which are kept follows from a pivoted selection on the channels' second moments, weighted by what
the readers do with them; the readers' new weights are the ridge least-squares solution that maps the *pruned*
network's kept channels to the *original* network's outputs, so that errors do not pile up. The activations come
from inputs matched to the network's own batch-norm statistics, so no data is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph.channels import InnerChannels
from ..graph.layers import Layer
from ..graph.rewrite import columns_of, keep_channels, round_up
from ..runtime.batch_norm import is_inference_norm
from ..runtime.graph import Graph, Ref
from ..runtime.program import Program

RIDGE = 1e-4  # of the mean diagonal of the second moments
_MAX_UNKNOWNS = 6000  # for one output; beyond, all columns of a channel are fitted alike
_CHUNK_VALUES = 2**26  # features held at once

Width = Callable[[Tensor], int]  # from the error curve of `select_channels` to a number of channels


@dataclass(frozen=True)
class Reconstruction:
    """What merging did to one set of inner channels; ``error`` is the relative RMS error of the readers' outputs."""

    layer: str
    channels: int
    kept: int
    error: float


@dataclass(frozen=True)
class Moments:
    """Second moments of a reader's input features u, channel-major, and of its output y in the original network.

    ``uu`` (d, d) and ``uy`` (d, n_out) are centred; ``u`` (channels * taps,) and ``y`` (n_out,) are means; ``yy`` is
    the total variance of y. d is channels * taps. With ``per_tap`` False the taps are samples: d is channels, and
    ``uy`` is empty.
    """

    uu: Tensor
    uy: Tensor
    u: Tensor
    y: Tensor
    yy: float
    per_tap: bool


def keep_ratio(ratio: float) -> Width:
    """Keep that share of every set of channels."""
    return lambda curve: max(1, round(ratio * (len(curve) - 1)))


def within(tolerance: float) -> Width:
    """Keep the fewest channels whose predicted relative RMS error stays within ``tolerance``."""
    return lambda curve: int((curve.sqrt() > tolerance).sum())


def reconstruct(
    graph: Graph,
    original: Graph,
    sets: Sequence[InnerChannels],
    inputs: tuple[Tensor, ...],
    width: Width,
    round_to: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    rows: Mapping[str, Tensor] | None = None,
) -> tuple[Graph, list[Reconstruction]]:
    """Narrow each set of inner channels in order of execution.

    Args:
        graph: the network to narrow (possibly already hashed and merged).
        original: the network whose outputs are the target; same node names.
        sets: inner channels of ``graph``.
        inputs: (images, ...) for each network input, on the device to compute on.
        width: how many channels to keep, given the error that remains after each number of kept channels.
        round_to: widths are multiples of this.
        rows: by layer, which of the original's output channels ``graph`` still has, where exact merging took some.
    """
    done = []
    for position, inner in enumerate(sets):
        readers = [(layer, columns_of(graph.tensors[layer.weight], inner.channels)) for layer, _ in inner.consumers]
        moments = [
            gather_moments(graph, original, layer, inner.channels, inputs, (rows or {}).get(layer.name))
            for layer, _ in readers
        ]
        order, curve = select_channels([(m, w) for m, (_, w) in zip(moments, readers)], inner.channels)
        keep = round_up(width(curve), round_to, inner.channels)
        error = 0.0
        if keep < inner.channels:
            graph, error = _narrow(graph, inner, order[:keep].sort().values, moments, readers)
        done.append(Reconstruction(inner.producer.name, inner.channels, keep, error))
        progress(position + 1, len(sets))
    return graph, done


def gather_moments(
    graph: Graph, original: Graph, layer: Layer, channels: int, inputs: tuple[Tensor, ...], rows: Tensor | None = None
) -> Moments:
    """Run both networks chunk by chunk and accumulate in float64; no activation of the whole set is kept."""
    per_tap = math.prod(graph.tensors[layer.weight].shape[1:]) <= _MAX_UNKNOWNS
    mine = Program(graph, [layer.node.args[0].name]).to(inputs[0].device)
    theirs = Program(original, [layer.node.name]).to(inputs[0].device)
    unknowns = math.prod(graph.tensors[layer.weight].shape[1:]) if per_tap else channels
    chunk = max(1, min(32, _CHUNK_VALUES // (unknowns * layer.positions)))
    most_rows = max(2048, 4 * unknowns) * chunk // 8 + 1
    sums: list[Tensor] | None = None
    count = y_count = images = 0
    for part in zip(*(x.split(chunk) for x in inputs)):
        with torch.no_grad():
            value = mine(*part)[0]
            u = _thin(_features(value, layer, channels, per_tap), most_rows).double()
            y = _output_rows(theirs(*part)[0], layer).double()
            y = y if rows is None else y[:, rows.to(y.device)]
            columns = u if per_tap else _features(value.mean(0, keepdim=True), layer, channels, True).double()
        if per_tap:
            y = _thin(y, most_rows)  # the same rows as u
        uy = u.T @ y if per_tap else u.new_zeros(0)
        parts = [u.T @ u, uy, u.sum(0), columns.mean(0) * len(value), y.sum(0), (y**2).sum()]
        sums = parts if sums is None else [a.add_(b) for a, b in zip(sums, parts)]
        count, y_count, images = count + len(u), y_count + len(y), images + len(value)
    assert sums is not None
    u, y = sums[2] / count, sums[4] / y_count
    uy = sums[1] / count - torch.outer(u, y) if per_tap else sums[1]
    means = u if per_tap else sums[3] / images
    return Moments(sums[0] / count - torch.outer(u, u), uy, means, y, float(sums[5] / y_count - (y**2).sum()), per_tap)


def select_channels(readers: Sequence[tuple[Moments, Tensor]], channels: int) -> tuple[Tensor, Tensor]:
    """In which order channels are worth keeping, and what error remains after each.

    Greedy with deflation (pivoted Gram-Schmidt): each step takes the channel whose part that the earlier ones do
    not explain carries most of the readers' outputs. Ends at numerical rank; the rest follows in index order.

    Args:
        readers: for each its moments and its weight (n_out, channels, columns).

    Returns:
        order (channels,) int64; curve (channels + 1,) float64, entry k the predicted share of the readers' output
        variance that k kept channels lose.
    """
    gram = torch.zeros(channels, channels, dtype=torch.float64)
    use = torch.zeros_like(gram)
    for m, weight in readers:
        blocks = m.uu.cpu().view(channels, len(m.uu) // channels, channels, -1)
        gram += torch.diagonal(blocks, dim1=1, dim2=3).mean(-1)
        w = weight.double().transpose(0, 1).reshape(channels, -1)
        use += w @ w.T / max(m.yy, 1e-30)
    values, vectors = torch.linalg.eigh(use)
    carried = gram @ (vectors * values.clamp_min(0).sqrt())  # (channels, rank): covariance with what the readers use
    total = float((use * gram).sum())
    floor = 1e-10 * float(gram.diagonal().max())
    residual, free = gram.clone(), torch.ones(channels, dtype=torch.bool)
    order, curve = [], [total]
    while True:
        diagonal = residual.diagonal().clamp_min(floor)
        usable = free & (residual.diagonal() > floor)
        gain = torch.where(usable, torch.linalg.vector_norm(carried, dim=1).square() / diagonal, -1.0)
        pivot = int(gain.argmax())
        if gain[pivot] <= 0:
            break
        column = residual[:, pivot] / diagonal[pivot].sqrt()
        carried.addr_(column, carried[pivot] / diagonal[pivot].sqrt(), alpha=-1)
        residual.addr_(column, column, alpha=-1)
        free[pivot] = False
        order.append(pivot)
        curve.append(max(curve[-1] - float(gain[pivot]), 0.0))
    curve += [0.0] * (channels + 1 - len(curve))
    order += free.nonzero().view(-1).tolist()
    return torch.tensor(order), torch.tensor(curve, dtype=torch.float64) / max(total, 1e-30)


def _narrow(
    graph: Graph,
    inner: InnerChannels,
    kept: Tensor,
    moments: Sequence[Moments],
    readers: Sequence[tuple[Layer, Tensor]],
) -> tuple[Graph, float]:
    weights, constants, errors = {}, {}, []
    for m, (layer, weight) in zip(moments, readers):
        new, constant, error = _fit(m, kept.to(m.u.device), weight.to(m.u.device))
        old = graph.tensors[layer.weight]
        weights[layer.weight] = new.reshape(len(weight), -1, *old.shape[2:]).to(old)
        constants[layer.node.name] = constant
        errors.append(error)
    narrowed = keep_channels(graph, inner, kept, weights)
    for layer, _ in readers:
        narrowed = _add_constant(narrowed, layer, constants[layer.node.name])
    return narrowed, max(errors)


def _fit(m: Moments, kept: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """A reader's new weight (n_out, k, columns), its new bias (n_out,), and its relative RMS error."""
    n_out, _, taps = weight.shape
    columns = (kept[:, None] * taps + torch.arange(taps, device=kept.device)).view(-1)
    rows = columns if m.per_tap else kept
    kept_uu = m.uu[rows][:, rows]
    ridge = RIDGE * kept_uu.diagonal().mean().clamp_min(1e-30)
    damped = kept_uu + ridge * torch.eye(len(rows), dtype=m.uu.dtype, device=m.uu.device)
    weight = weight.double()
    if m.per_tap:
        before = weight[:, kept].reshape(n_out, -1).T
        new = before + torch.linalg.solve(damped, m.uy[rows] - kept_uu @ before)  # damped towards the old weights
        lost = m.yy - float((new * (2 * m.uy[rows] - kept_uu @ new)).sum())
        return new.T.reshape(n_out, len(kept), taps), m.y - new.T @ m.u[rows], _relative(lost, m.yy)
    mix = torch.eye(len(m.uu), dtype=m.uu.dtype, device=m.uu.device)[
        rows
    ]  # (k, channels): each channel from the kept ones
    mix += torch.linalg.solve(damped, m.uu[rows] - kept_uu @ mix)  # those themselves stay as they are
    explained = mix.T @ m.uu[rows]
    gap = m.uu - explained - explained.T + mix.T @ kept_uu @ mix
    lost = float(torch.einsum("oct,cd,odt->", weight, gap, weight))
    new = torch.einsum("kc,oct->okt", mix, weight)
    return new, m.y - new.reshape(n_out, -1) @ m.u[columns], _relative(lost, m.yy)


def _relative(lost: float, total: float) -> float:
    return math.sqrt(max(lost, 0.0) / max(total, 1e-30))


def _add_constant(graph: Graph, layer: Layer, bias: Tensor) -> Graph:
    """Give a reader that bias: in its own, in the mean of the batch norm that alone reads it, or in a new one."""
    if layer.bias:
        return graph.with_tensors({layer.bias: bias.to(graph.tensors[layer.bias])})
    users = graph.users().get(layer.node.name, [])
    mean = users[0].args[3].name if len(users) == 1 and is_inference_norm(users[0]) else None
    if mean and len(graph.users()[mean]) == 1 and layer.node.name not in graph.outputs:
        return graph.with_tensors({mean: (graph.tensors[mean].double() - bias.cpu()).to(graph.tensors[mean])})
    name = f"{layer.node.name}.bias"
    node = graph.node(layer.node.name)
    args = (*node.args[:2], Ref(name), *node.args[3:])
    return graph.with_tensors({name: bias.to(graph.tensors[layer.weight])}).with_nodes(
        {node.name: replace(node, args=args)}
    )


def _features(value: Tensor, layer: Layer, channels: int, per_tap: bool) -> Tensor:
    """The reader's input as rows (samples, channels * taps), or (samples, channels) with taps as samples."""
    if layer.is_conv and per_tap:
        u = F.unfold(value, layer.shape[2:], layer.dilation, layer.padding, layer.stride)
        return u.transpose(1, 2).reshape(-1, u.shape[1])
    if layer.is_conv:
        return value.movedim(1, -1).reshape(-1, channels)
    rows = value.reshape(-1, value.shape[-1])
    return rows if per_tap else rows.view(len(rows), channels, -1).transpose(1, 2).reshape(-1, channels)


def _output_rows(value: Tensor, layer: Layer) -> Tensor:
    return value.movedim(1, -1).reshape(-1, value.shape[1]) if layer.is_conv else value.reshape(-1, value.shape[-1])


def _thin(rows: Tensor, most: int) -> Tensor:
    """At most about ``most`` rows, evenly spread."""
    return rows[:: -(-len(rows) // most)]
