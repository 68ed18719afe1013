"""Which channels of a channel set to keep: those that the others follow from least, weighted by what their readers do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redpp_serve.channels.coupling import Reader
from redpp_serve.pruning.observation import Observed


@dataclass(frozen=True)
class Selection:
    """Of one channel set: ``order`` (channels,) int64, the most needed first; ``curve`` (channels + 1,) float64, entry k the
    predicted share of the readers' output variance that the first k channels lose (1 for none of them).
    """

    order: Tensor
    curve: Tensor

    def kept(self, width: int) -> Tensor:
        """The channels that stay at a width, (width,) int64 ascending."""
        return self.order[:width].sort().values


def select(observed: Observed) -> dict[str, Selection]:
    """The order and the error curve of every open channel set."""
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
    """What a reader does with each channel, (channels, ...), in terms of uncorrelated parts of a channel's entries."""
    weight = observed.coupling.graph.tensors[reader.tensor].double().cpu().movedim(reader.dim, 0)
    columns = weight[reader.positions.flatten()].reshape(*reader.positions.shape, -1)
    columns = torch.einsum("cmr,mn->cnr", columns, _root(observed.entries[channel_set, reader.value]))
    taps = observed.taps[reader.node]
    return (columns.reshape(len(columns), -1, len(taps)) @ _root(taps)).flatten(1)


def _root(correlation: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(correlation)
    return vectors * values.clamp_min(0).sqrt()


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
