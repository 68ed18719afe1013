"""What synthetic inputs show of the channels that may go: one streaming pass gathers their second moments.

From these follow the order in which channels are worth keeping (`selection`) and a fit of the readers of any
narrower network (`quick_fit`), without another pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redpp_serve.channels.coupling import ChannelSet, Coupling, Reader
from redpp_serve.graph.graph import Graph, conv2d_geometry
from redpp_serve.pruning.piecewise import Piecewise, chunk_size

_SAMPLES = 256  # positions of an input, unless a channel set has many channels
_SPECTRUM_IMAGES = 8

Reading = tuple[str, str]  # a channel set, and a value or node that it is read from or by


@dataclass(frozen=True)
class Observed:
    """Second moments in float64, on the CPU.

    ``grams``: by channel set and value that it is read from, (channels, channels), centred, the mean over a channel's
    entries in the value. ``entries``: for the same, how a channel's m entries correlate, (m, m). ``taps``: by reader,
    how its input at one tap of the kernel correlates with that at another, (taps, taps). ``means``: by value, its mean
    over the inputs. ``power``: by reader, its output's variance, summed over its channels.
    """

    coupling: Coupling
    grams: Mapping[Reading, Tensor]
    entries: Mapping[Reading, Tensor]
    taps: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    power: Mapping[str, float]


def observe(
    coupling: Coupling, inputs: Sequence[Tensor], progress: Callable[[int, int], None] = lambda done, total: None
) -> Observed:
    """Run the network once over the inputs; what is kept of each value are sums over them.

    Args:
        coupling: the network and its sets.
        inputs: (images, ...) for each network input, on the device to compute on.
        progress: called with readers done and in all.
    """
    graph = coupling.graph
    place = {node.name: k for k, node in enumerate(graph.nodes)}
    readers: dict[str, list[tuple[ChannelSet, Reader]]] = {}
    for channel_set in coupling.open:
        for reader in channel_set.readers:
            readers.setdefault(reader.node, []).append((channel_set, reader))
    ordered = sorted(readers, key=place.__getitem__)
    found = Observed(coupling, {}, {}, {}, {}, {})
    run = Piecewise(graph, inputs, chunk_size(graph, len(inputs[0])))
    for done, node in enumerate(ordered):
        run.advance(place[node])
        _observe_reader(found, run, node, readers[node])
        progress(done + 1, len(ordered))
    return found


def _observe_reader(found: Observed, run: Piecewise, node: str, readers: Sequence[tuple[ChannelSet, Reader]]) -> None:
    graph, value = found.coupling.graph, readers[0][1].value
    sums = {
        (channel_set.name, value): _Sums(reader)
        for channel_set, reader in readers
        if (channel_set.name, value) not in found.grams
    }
    spectrum = _Spectrum(graph, node)
    axis, mean, total, square, images, count = output_axis(graph, node), 0.0, 0.0, 0.0, 0, 0
    for x, y in run.values([value, node]):
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


class _Sums:
    """Sums over samples of the channels of one channel set in one value."""

    def __init__(self, reader: Reader) -> None:
        self.axis, self.positions = reader.axis, reader.positions
        self.channels, self.m = reader.positions.shape
        self.count = 0
        self.gram = self.cross = self.means = 0.0

    def add(self, value: Tensor) -> None:
        rows = samples(value, self.axis, spread(value, self.axis, max(_SAMPLES, self.channels // 4)))
        chosen = rows[:, self.positions.T.flatten().to(rows.device)].double().view(len(rows), self.m, self.channels)
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
    """The power spectrum of a 2-D convolution's input, summed over channels: from it how neighbours correlate."""

    def __init__(self, graph: Graph, node: str) -> None:
        call = graph.node(node)
        self.kernel, self.dilation = (1, 1), (1, 1)
        if call.op == "aten.conv2d.default":
            self.kernel = tuple(graph.tensors[call.args[1].name].shape[2:])
            self.dilation = conv2d_geometry(call)[2]
        self.left = _SPECTRUM_IMAGES if self.kernel != (1, 1) else 0
        self.power: Tensor | None = None

    def add(self, value: Tensor) -> None:
        if self.left <= 0:
            return
        value = value[: self.left].double()
        self.left -= len(value)
        self.size = [2 * n for n in value.shape[2:]]  # padded, so that offsets do not wrap around
        centred = value - value.mean((0, 2, 3), keepdim=True)
        power = torch.fft.rfft2(centred, s=self.size).abs().square().sum((0, 1))
        self.power = power if self.power is None else self.power + power

    def correlation(self) -> Tensor:
        if self.power is None:
            return torch.eye(self.kernel[0] * self.kernel[1], dtype=torch.float64)
        by_offset = torch.fft.irfft2(self.power, s=self.size)
        by_offset = by_offset / by_offset[0, 0].clamp_min(1e-300)
        rows, columns = (torch.arange(n) * d for n, d in zip(self.kernel, self.dilation))
        y, x = (grid.flatten() for grid in torch.meshgrid(rows, columns, indexing="ij"))
        down, right = y[:, None] - y, x[:, None] - x
        near = (down.abs() < self.size[0] // 2) & (right.abs() < self.size[1] // 2)
        return torch.where(near, by_offset.cpu()[down % self.size[0], right % self.size[1]], 0.0)


def output_axis(graph: Graph, node: str) -> int:
    """The channel axis of a reader's output: 1 behind a convolution, the last one else."""
    return 1 if ".conv" in graph.node(node).op else -1


def spread(value: Tensor, axis: int, most: int) -> Tensor:
    """Which of a value's positions (an image and a place each, row by row) to use: at most about ``most`` an image."""
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
