"""Which channels of a class to keep: those that the others follow from least, weighted by what their readers do.

One streaming pass over the inputs gathers, for every value that a class is read from, the second moments of its
channels. From them follow an order of the channels with the error that remains after each (`select_channels`), and a
fit of the readers of any narrower network without another pass (`Observed.quick_fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..graph.classes import ChannelClass, Reader
from ..graph.coupling import Coupling
from ..runtime.batch_norm import is_inference_norm
from ..runtime.graph import Graph, Ref
from ..runtime.program import Program
from .piecewise import Piecewise, chunk_size

RIDGE = 1e-6  # of channels scaled to unit variance
_SAMPLES = 256  # positions of an input, unless a class has many channels


@dataclass(frozen=True)
class Selection:
    """Of one class: ``order`` (channels,) int64, the most needed first; ``curve`` (channels + 1,) float64, entry k the
    predicted share of the readers' output variance that the first k channels lose (1 for none of them)."""

    order: Tensor
    curve: Tensor

    def kept(self, width: int) -> Tensor:
        """The channels that stay at a width, (width,) int64 ascending."""
        return self.order[:width].sort().values


@dataclass(frozen=True)
class Observed:
    """What the inputs showed: ``grams``, for each class and value its channels' centred second moments (channels,
    channels) float64; ``means``, each value's mean over the inputs; ``power``, each reader's output variance."""

    coupling: Coupling
    grams: Mapping[tuple[str, str], Tensor]
    means: Mapping[str, Tensor]
    power: Mapping[str, float]

    def select(self) -> dict[str, Selection]:
        """The order and the error curve of every open class."""
        found = {}
        for group in self.coupling.open:
            uses: dict[str, Tensor] = {}
            for reader in group.readers:
                columns = columns_of(self.coupling.graph, reader).double().flatten(1)
                use = columns @ columns.T / max(self.power[reader.node], 1e-30)
                uses[reader.value] = uses.get(reader.value, 0) + use
            found[group.name] = Selection(*select_channels([(self.grams[group.name, v], use) for v, use in uses.items()]))
        return found

    def quick_fit(self, kept: Mapping[str, Tensor]) -> Graph:
        """The network with only those channels of those classes, its readers making up for the ones that left.

        Each channel that left is replaced by the linear combination of kept ones that predicts it best; means are
        preserved. The fit is to the activations of the whole network, so errors of several classes add up.
        """
        graph = self.coupling.graph
        weights: dict[str, Tensor] = {}
        nodes = {}
        for group in self.coupling.open:
            if group.name not in kept or len(kept[group.name]) == group.channels:
                continue
            for reader in group.readers:
                mix = mix_of(self.grams[group.name, reader.value], kept[group.name])
                old = weights.get(reader.tensor, graph.tensors[reader.tensor].double())
                weights[reader.tensor] = _mixed(old, reader, kept[group.name], mix)
                nodes[reader.node] = reader
        narrow, places = self.coupling.narrow(kept), self.coupling.kept_positions(kept)
        cut = {name: _cut(weight, places(name)).to(graph.tensors[name]) for name, weight in weights.items()}
        narrow = narrow.with_tensors(cut)
        for node, reader in nodes.items():
            shift = self._mean_shift(reader, weights[reader.tensor])
            rows = next(iter(places(node).values()), None)  # a reader's output has one axis of channels
            narrow = add_constant(narrow, node, shift if rows is None else shift[rows])
        return narrow

    def _mean_shift(self, reader: Reader, weight: Tensor) -> Tensor:
        """By how much the mean of a reader's output (n_out,) falls when it gets another weight."""
        graph, mean = self.coupling.graph, self.means[reader.value]
        node = graph.node(reader.node)
        spec = replace(graph.inputs[0], name=reader.value, shape=tuple(mean.shape))
        tensors = {ref: graph.tensors[ref].double().to(mean.device) for ref in node.refs() if ref in graph.tensors}
        means = []
        for tensor in (graph.tensors[reader.tensor], weight):
            one = Graph((spec,), {**tensors, reader.tensor: tensor.double().to(mean.device)}, (node,), (node.name,))
            (y,) = Program(one)(mean[None])
            means.append(samples(y, output_axis(graph, reader.node)).mean(0))
        return (means[0] - means[1]).cpu()


def observe(
    coupling: Coupling,
    inputs: Sequence[Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Observed:
    """Run the network once and gather what selection and quick fits need; no activation of the whole set is kept
    beyond those that later nodes need.

    Args:
        coupling: the network and its classes.
        inputs: (images, ...) for each network input, on the device to compute on.
    """
    graph = coupling.graph
    place = {node.name: k for k, node in enumerate(graph.nodes)}
    readings: dict[str, list[tuple[ChannelClass, Reader]]] = {}
    for group in coupling.open:
        for reader in group.readers:
            readings.setdefault(reader.node, []).append((group, reader))
    walk = Piecewise(graph, inputs, min(chunk_size(graph), max(1, len(inputs[0]) // 4)))
    grams: dict[tuple[str, str], Tensor] = {}
    means: dict[str, Tensor] = {}
    power: dict[str, float] = {}
    ordered = sorted(readings, key=place.__getitem__)
    for done, node in enumerate(ordered):
        walk.advance(place[node])
        value = readings[node][0][1].value
        fresh = [(group, reader) for group, reader in readings[node] if (group.name, value) not in grams]
        made = _gather(walk, node, value, output_axis(graph, node), fresh)
        power[node], means[value] = made[0], made[1]
        grams |= {(group.name, value): gram for (group, _), gram in zip(fresh, made[2])}
        progress(done + 1, len(ordered))
    return Observed(coupling, grams, means, power)


def _gather(
    walk: Piecewise, node: str, value: str, axis: int, readings: Sequence[tuple[ChannelClass, Reader]]
) -> tuple[float, Tensor, list[Tensor]]:
    """Variance of a node's output, mean of its input, and for each reading the channels' centred second moments."""
    grams = [_Gram(reader, group.channels) for group, reader in readings]
    mean, images, y_sum, y_square, y_count = 0.0, 0, 0.0, 0.0, 0
    for x, y in walk.values([value, node]):
        mean, images = mean + x.double().sum(0), images + len(x)
        rows = samples(y, axis).double()
        y_sum, y_square, y_count = y_sum + rows.sum(0), y_square + rows.square().sum(0), y_count + len(rows)
        for gram in grams:
            gram.add(x)
    variance = float((y_square / y_count - (y_sum / y_count).square()).sum().clamp_min(0))
    return variance, mean / images, [gram.centred() for gram in grams]


class _Gram:
    """Second moments of a class's channels in a value; where a channel has m entries, m samples of it with own means."""

    def __init__(self, reader: Reader, channels: int) -> None:
        self.axis, self.positions = reader.axis, reader.positions
        self.total = self.means = None
        self.most = max(_SAMPLES, channels // 4)
        self.count = 0

    def add(self, value: Tensor) -> None:
        rows = samples(value, self.axis, spread(value, self.axis, self.most))
        chosen = rows[:, self.positions.T.flatten().to(rows.device)].double()
        entries = chosen.view(len(rows), self.positions.shape[1], -1)  # (samples, m, channels)
        flat = entries.flatten(0, 1)
        total, means = flat.T @ flat, entries.sum(0)
        self.total = total if self.total is None else self.total.add_(total)
        self.means = means if self.means is None else self.means.add_(means)
        self.count += len(rows)

    def centred(self) -> Tensor:
        assert self.total is not None and self.means is not None
        means = self.means / self.count
        return ((self.total / self.count - means.T @ means) / len(means)).cpu()


def select_channels(readings: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """In which order channels are worth keeping, and what error remains after each.

    Greedy with deflation (pivoted Cholesky): each step takes the channel whose part that the earlier ones do not
    explain carries most of what the readers use. Ends at numerical rank; the rest follows in index order.

    Args:
        readings: for each value that is read, the channels' second moments and the readers' use of them, the sum of
            w w^T, both (channels, channels) float64.

    Returns:
        order (channels,) int64; curve (channels + 1,) float64, entry k the predicted share of the readers' output
        variance that k kept channels lose.
    """
    states = [_Deflated(gram, use) for gram, use in readings]
    channels = len(readings[0][0])
    free = torch.ones(channels, dtype=torch.bool)
    total = sum(state.total for state in states)
    order, curve = [], [total]
    while len(order) < channels:
        gain = torch.where(free, sum(state.gain() for state in states), -1.0)
        pivot = int(gain.argmax())
        if gain[pivot] <= 0:
            break
        for state in states:
            state.take(pivot)
        free[pivot] = False
        order.append(pivot)
        curve.append(max(curve[-1] - float(gain[pivot]), 0.0))
    curve += [0.0] * (channels + 1 - len(curve))
    order += free.nonzero().view(-1).tolist()
    shares = torch.tensor(curve, dtype=torch.float64) / max(total, 1e-300)
    shares[0] = 1.0
    return torch.tensor(order), shares


class _Deflated:
    """Second moments of the channels, less what the channels taken so far explain."""

    def __init__(self, gram: Tensor, use: Tensor) -> None:
        self.gram = gram
        values, vectors = torch.linalg.eigh(use)
        used = values > 1e-13 * values[-1].clamp_min(0)
        self.carried = gram @ (vectors[:, used] * values[used].sqrt())  # covariance with what the readers use
        self.total = max(float((use * gram).sum()), 0.0)
        self.residual = gram.diagonal().clone()
        self.floor = (1e-10 * self.residual).clamp_min(1e-14 * float(self.residual.max()))
        self.factor = torch.zeros_like(gram)
        self.rank = 0

    def gain(self) -> Tensor:
        """By how much the readers' error would fall, for each channel."""
        usable = self.residual > self.floor
        return torch.where(usable, self.carried.square().sum(1) / self.residual.clamp_min(1e-300), 0.0)

    def take(self, pivot: int) -> None:
        if self.residual[pivot] <= self.floor[pivot]:
            return
        root = self.residual[pivot].sqrt()
        done = self.factor[:, : self.rank]
        column = (self.gram[:, pivot] - done @ done[pivot]) / root
        self.carried.addr_(column, self.carried[pivot] / root, alpha=-1)
        self.residual -= column.square()
        self.factor[:, self.rank] = column
        self.rank += 1


def mix_of(gram: Tensor, kept: Tensor) -> Tensor:
    """How each channel follows from the kept ones, (k, channels): least squares, 0 and 1 for the kept ones themselves."""
    scale = gram.diagonal().clamp_min(1e-300).rsqrt()
    scale = torch.where(gram.diagonal() > 1e-14 * gram.diagonal().max(), scale, 0.0)
    correlation = gram * scale * scale[:, None]
    inner = correlation[kept][:, kept] + RIDGE * torch.eye(len(kept), dtype=gram.dtype)
    mix = torch.cholesky_solve(correlation[kept], torch.linalg.cholesky(inner))
    mix = mix * scale[kept][:, None] * (1 / scale).nan_to_num(posinf=0.0)
    mix[:, kept] = torch.eye(len(kept), dtype=gram.dtype)
    return mix


def columns_of(graph: Graph, reader: Reader) -> Tensor:
    """What a reader does with each channel: its weight as (channels, m, ...)."""
    weight = graph.tensors[reader.tensor].movedim(reader.dim, 0)
    return weight[reader.positions.flatten()].reshape(*reader.positions.shape, *weight.shape[1:])


def output_axis(graph: Graph, node: str) -> int:
    """The channel axis of a reader's output: 1 behind a convolution, the last one else."""
    return 1 if ".conv" in graph.node(node).op else -1


def spread(value: Tensor, axis: int, most: int) -> Tensor:
    """Which of a value's positions (one for each image and place, row by row) to use: at most about ``most`` an image."""
    count = value.numel() // value.shape[axis]
    return torch.arange(0, count, -(-count // (most * len(value))), device=value.device)


def samples(value: Tensor, axis: int, picks: Tensor | None = None) -> Tensor:
    """A value (N, ...) as rows (samples, channels), all of them or those picked."""
    if axis == 1 and value.dim() > 2:
        value = value.flatten(2)
        if picks is None:
            return value.transpose(1, 2).flatten(0, 1)
        return value[picks // value.shape[2], :, picks % value.shape[2]]
    rows = value.flatten(0, -2) if axis in (-1, value.dim() - 1) else value.movedim(axis, -1).flatten(0, -2)
    return rows if picks is None else rows[picks]


def add_constant(graph: Graph, node: str, constant: Tensor) -> Graph:
    """Add (n_out,) to a layer's output: in its bias, in the mean of the batch norm that alone reads it, or in a new bias."""
    call, users = graph.node(node), graph.users()
    bias = call.args[2] if len(call.args) > 2 else None
    if bias is not None:
        old = graph.tensors[bias.name]
        return graph.with_tensors({bias.name: (old.double() + constant.to(old.device)).to(old)})
    readers = users.get(node, [])
    mean = readers[0].args[3].name if len(readers) == 1 and is_inference_norm(readers[0]) else None
    if mean and len(users[mean]) == 1 and node not in graph.outputs:
        old = graph.tensors[mean]
        return graph.with_tensors({mean: (old.double() - constant.to(old.device)).to(old)})
    name = f"{node}.bias"
    args = (*call.args[:2], Ref(name), *call.args[3:])
    new = constant.to(graph.tensors[call.args[1].name])
    return graph.with_tensors({name: new}).with_nodes({node: replace(call, args=args)})


def _mixed(weight: Tensor, reader: Reader, kept: Tensor, mix: Tensor) -> Tensor:
    """A float64 weight at full width whose kept columns took over the others', which become 0."""
    moved = weight.movedim(reader.dim, 0).clone()
    positions = reader.positions
    columns = moved[positions.flatten()].reshape(*positions.shape, -1)
    moved[positions.flatten()] = 0.0
    taken = torch.einsum("kc,cmr->kmr", mix, columns)
    moved[positions[kept].flatten()] = taken.reshape(-1, *moved.shape[1:])
    return moved.movedim(0, reader.dim)


def _cut(tensor: Tensor, places: Mapping[int, Tensor]) -> Tensor:
    for axis, kept in places.items():
        tensor = tensor.index_select(axis, kept)
    return tensor.contiguous()
