"""Observe which channels the others follow from, and rank them by that.

One streaming pass over synthetic inputs gathers the channels' second moments (`observe`). From these follow, without
another pass, the order in which channels are worth keeping (`select`) and a fit of the readers of any narrower network
(`fit.quick_fit`). Channels come first that the others predict poorly, weighted by what their readers do with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from redpp_serve.channels.coupling import ChannelSet, Coupling, Reader
from redpp_serve.channels.narrowing import Kept
from redpp_serve.graph.executor import value_shapes
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import CONVOLUTIONS, is_convolution, window
from redpp_serve.pruning.piecewise import Piecewise, chunk_size
from redpp_serve.runtime.moments import Moments

_SAMPLES = 256  # positions per input, unless a set has many channels
_SPECTRUM_IMAGES = 8
_FEWEST_IMAGES, _SAMPLES_PER_UNKNOWN = 48, 8

Reading = tuple[str, str]  # name of a channel set, and of a value that is read


@dataclass(frozen=True)
class Observed:
    """Second moments of a network's channels, float64 on the CPU.

    Attributes:
        coupling: the network and its channel sets.
        grams: by set and value, covariance of the channels (channels, channels), the mean over a channel's entries.
        entries: by set and value, how a channel's m entries correlate, (m, m).
        taps: by reader, how its input at one tap of the kernel correlates with that at another, (taps, taps).
        means: by value, its mean over the inputs.
        power: by reader, its output's variance, summed over its channels.
    """

    coupling: Coupling
    grams: dict[Reading, Tensor] = field(default_factory=dict)
    entries: dict[Reading, Tensor] = field(default_factory=dict)
    taps: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    power: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """Order in which the channels of one set are worth keeping.

    Attributes:
        order: channels (channels,) int64, the most needed first.
        curve: (channels + 1,) float64; entry k is the predicted share of the readers' output variance that is lost
            with the first k channels alone, so the first entry is 1.
    """

    order: Tensor
    curve: Tensor

    def kept(self, width: int) -> Tensor:
        """Return the channels that stay at a width, (width,) int64 ascending."""
        return self.order[:width].sort().values


def observe(
    coupling: Coupling, inputs: Sequence[Tensor], progress: Callable[[int, int], None] = lambda done, total: None
) -> Observed:
    """Run the network once over the inputs and keep sums over the values.

    Args:
        coupling: network and its channel sets.
        inputs: (images, ...) for each network input, on the device to compute on.
        progress: called with the number of readers done and in all.
    """
    graph = coupling.graph
    place = {node.name: k for k, node in enumerate(graph.nodes)}
    readers: dict[str, list[tuple[ChannelSet, Reader]]] = {}
    for channel_set in coupling.open:
        for reader in channel_set.readers:
            readers.setdefault(reader.node, []).append((channel_set, reader))
    found = Observed(coupling)
    run = Piecewise(graph, inputs, chunk_size(graph, len(inputs[0])))
    shapes = value_shapes(graph)
    for done, node in enumerate(sorted(readers, key=place.__getitem__), start=1):
        channels = max(channel_set.channels for channel_set, _ in readers[node])
        images = images_for(channels, position_count(shapes[node], output_axis(graph, node)), run.images)
        run.advance(place[node], images)
        _observe_reader(found, run, readers[node], images)
        progress(done, len(readers))
    return found


def position_count(shape: Sequence[int], axis: int) -> int:
    """Return how many positions one input has in a value (1, ...) whose channels lie along axis 1 or -1."""
    return math.prod(shape[2:] if axis == 1 else shape[1:-1])


def images_for(unknowns: int, positions: int, images: int) -> int:
    """Return how many of the images a fit of a layer needs: neighbouring positions of one tell much the same."""
    return min(images, max(_FEWEST_IMAGES, math.ceil(_SAMPLES_PER_UNKNOWN * unknowns / math.sqrt(positions))))


def _observe_reader(found: Observed, run: Piecewise, readers: Sequence[tuple[ChannelSet, Reader]], most: int) -> None:
    graph, node, value = found.coupling.graph, readers[0][1].node, readers[0][1].value
    sums = {(s.name, value): _Sums(reader, run.device) for s, reader in readers if (s.name, value) not in found.grams}
    spectrum = _Spectrum(graph, node)
    axis, images, count = output_axis(graph, node), 0, 0
    mean = total = square = torch.zeros((), dtype=torch.float64, device=run.device)
    for x, y in run.values([value, node], most):
        mean, images = mean + x.double().sum(0), images + len(x)
        rows = samples(y, axis).double()
        total, square, count = total + rows.sum(0), square + rows.square().sum(0), count + len(rows)
        spectrum.add(x)
        for entry in sums.values():
            entry.add(x)
    found.means[value] = (mean / images).cpu()
    found.power[node] = float((square / count - (total / count).square()).sum().clamp_min(0))
    found.taps[node] = spectrum.correlation().cpu()
    for key, entry in sums.items():
        found.grams[key], found.entries[key] = (x.cpu() for x in entry.centred())


def with_moments(observed: Observed, moments: Moments, merged: Kept) -> Observed:
    """Return the same observation with the second moments that a serving original has added up, where it has them.

    Args:
        observed: of the network to narrow, over synthetic inputs.
        moments: of the original network.
        merged: positions of the original's values that the network to narrow still has.
    """
    grams, entries = dict(observed.grams), dict(observed.entries)
    taps, means, power = dict(observed.taps), dict(observed.means), dict(observed.power)
    for channel_set in observed.coupling.open:
        for reader in channel_set.readers:
            served, spread_of = moments.values.get(reader.value), moments.values.get(reader.node)
            covariance = served.covariance() if served else None
            if served is None or covariance is None:
                continue
            stay = next(iter(merged(reader.value).values()), torch.arange(len(covariance)))
            covariance, mean = covariance[stay][:, stay], served.mean()[stay]
            blocks = covariance[reader.positions[:, None, :, None], reader.positions[None, :, None, :]]
            m = reader.positions.shape[1]
            grams[channel_set.name, reader.value] = blocks.diagonal(dim1=2, dim2=3).sum(-1) / m
            cross = blocks.diagonal(dim1=0, dim2=1).sum(-1)
            entries[channel_set.name, reader.value] = cross / cross.diagonal().mean().clamp_min(1e-300)
            axis = reader.axis - 1 if reader.axis > 0 else means[reader.value].dim() - 1
            shape = [-1 if d == axis else 1 for d in range(means[reader.value].dim())]
            means[reader.value] = mean.view(shape).expand(means[reader.value].shape).contiguous()
            if reader.node in moments.patches:
                taps[reader.node] = moments.patches[reader.node].tap_correlation()
            if spread_of is not None:
                power[reader.node] = float(spread_of.variance().sum())
    return Observed(observed.coupling, grams, entries, taps, means, power)


class _Sums:
    """Sums over samples of the channels of one set in one value."""

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.axis, self.positions = reader.axis, reader.positions.T.flatten().to(device)
        self.channels, self.m = reader.positions.shape
        self.count = 0
        self.gram = self.cross = self.means = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, value: Tensor) -> None:
        rows = samples(value, self.axis, spread(value, self.axis, max(_SAMPLES, self.channels // 4)))
        chosen = rows[:, self.positions].double().view(len(rows), self.m, self.channels)
        flat = chosen.flatten(0, 1)
        self.gram = self.gram + flat.T @ flat
        if self.m > 1:
            across = chosen.transpose(0, 1).flatten(1)
            self.cross = self.cross + across @ across.T
        self.means = self.means + chosen.sum(0)
        self.count += len(rows)

    def centred(self) -> tuple[Tensor, Tensor]:
        means = self.means / self.count
        gram = (self.gram / self.count - means.T @ means) / self.m
        cross = self.cross / self.count - means @ means.T if self.m > 1 else gram.new_ones(1, 1)
        return gram, cross / cross.diagonal().mean().clamp_min(1e-300)


class _Spectrum:
    """Power spectrum of a convolution's input, summed over channels; it tells how neighbours correlate.

    The taps of a transposed convolution count as uncorrelated: an output position reads few of them.
    """

    def __init__(self, graph: Graph, node: str) -> None:
        call = graph.node(node)
        self.kernel: tuple[int, ...] = ()
        self.dilation: tuple[int, ...] = ()
        if call.op in CONVOLUTIONS:
            self.kernel = tuple(graph.tensors[call.args[1].name].shape[2:])
            self.dilation = window(call, self.kernel).dilation
        self.left = _SPECTRUM_IMAGES if math.prod(self.kernel) > 1 else 0
        self.power: Tensor | None = None

    def add(self, value: Tensor) -> None:
        if self.left <= 0:
            return
        value = value[: self.left].double()
        self.left -= len(value)
        self.size = [2 * n for n in value.shape[2:]]  # padded, so that offsets do not wrap around
        axes = tuple(range(2, value.dim()))
        centred = value - value.mean((0, *axes), keepdim=True)
        for part in centred.split(1 if len(axes) > 2 else len(centred)):  # eight times a volume is a lot of memory
            power = torch.fft.rfftn(part, s=self.size, dim=axes).abs().square().sum((0, 1))
            self.power = power if self.power is None else self.power + power

    def correlation(self) -> Tensor:
        if self.power is None:
            return torch.eye(math.prod(self.kernel), dtype=torch.float64)
        by_offset = torch.fft.irfftn(self.power, s=self.size, dim=tuple(range(len(self.size)))).cpu()
        by_offset = by_offset / by_offset.flatten()[0].clamp_min(1e-300)
        taps = [torch.arange(n) * d for n, d in zip(self.kernel, self.dilation, strict=True)]
        places = [grid.flatten() for grid in torch.meshgrid(*taps, indexing="ij")]
        offsets = [place[:, None] - place for place in places]
        near = torch.stack([o.abs() < n // 2 for o, n in zip(offsets, self.size, strict=True)]).all(0)
        return torch.where(near, by_offset[tuple(o % n for o, n in zip(offsets, self.size, strict=True))], 0.0)


def output_axis(graph: Graph, node: str) -> int:
    """Return the channel axis of a reader's output: 1 behind a convolution, else the last one."""
    return 1 if is_convolution(graph.node(node)) else -1


def spread(value: Tensor, axis: int, most: int, jitter: bool = False) -> Tensor:
    """Return indices of evenly spread positions of a value, roughly ``most`` per image.

    A position is an image and a place in it; they are numbered row by row.

    Args:
        value: (N, ...).
        axis: the axis of its channels.
        most: positions per image.
        jitter: shift each position by less than the step, always alike. Behind a transposed convolution equal steps
            may meet the same taps again and again.
    """
    count = value.numel() // value.shape[axis]
    step = -(-count // (most * len(value)))
    picks = torch.arange(0, count, step, device=value.device)
    if jitter and step > 1:
        shift = torch.randint(step, picks.shape, generator=torch.Generator().manual_seed(0)).to(picks.device)
        picks = (picks + shift).clamp_max(count - 1)
    return picks


def samples(value: Tensor, axis: int, picks: Tensor | None = None) -> Tensor:
    """Return a value (N, ...) as rows (samples, channels), all of them or those picked."""
    if axis == 1 and value.dim() > 2:
        value = value.flatten(2)
        if picks is None:
            return value.transpose(1, 2).flatten(0, 1)
        return value[picks // value.shape[2], :, picks % value.shape[2]]
    rows = value.flatten(0, -2) if axis in (-1, value.dim() - 1) else value.movedim(axis, -1).flatten(0, -2)
    return rows if picks is None else rows[picks]


def select(observed: Observed) -> dict[str, Selection]:
    """Rank the channels of every open set."""
    found = {}
    for channel_set in observed.coupling.open:
        uses: dict[str, Tensor] = {}
        for reader in channel_set.readers:
            columns = _columns(observed, channel_set.name, reader)
            use = columns @ columns.T / max(observed.power[reader.node], 1e-30)
            uses[reader.value] = uses[reader.value] + use if reader.value in uses else use
        readings = [(observed.grams[channel_set.name, value], use) for value, use in uses.items()]
        found[channel_set.name] = Selection(*select_channels(readings))
    return found


def _columns(observed: Observed, channel_set: str, reader: Reader) -> Tensor:
    """Express a reader's weights (channels, ...) for each channel in terms of uncorrelated parts of its entries."""
    weight = observed.coupling.graph.tensors[reader.tensor].double().cpu().movedim(reader.dim, 0)
    columns = weight[reader.positions.flatten()].reshape(*reader.positions.shape, -1)
    columns = torch.einsum("cmr,mn->cnr", columns, _root(observed.entries[channel_set, reader.value]))
    taps = observed.taps[reader.node]
    return (columns.reshape(len(columns), -1, len(taps)) @ _root(taps)).flatten(1)


def _root(correlation: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(correlation)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def select_channels(readings: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Order channels by what they add for the readers, and predict the error that remains after each.

    Greedy with deflation (pivoted Cholesky): each step takes the channel whose part that the earlier ones do not
    explain carries most of what the readers use. It ends at numerical rank; the rest follows in index order.

    Args:
        readings: for each value that is read, the channels' second moments and the readers' use of them, the sum of
            w w^T, both (channels, channels) float64.

    Returns:
        the order and the curve of a `Selection`.
    """
    states = [_Deflated(gram, use) for gram, use in readings]
    channels = len(readings[0][0])
    free = torch.ones(channels, dtype=torch.bool)
    total = sum(state.total for state in states)
    order: list[int] = []
    curve = [total]
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
