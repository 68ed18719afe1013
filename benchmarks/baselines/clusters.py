"""Which channels of a channel set go together: k-means of what its layers do with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from .coupled import Member


def producer_rows(members: Sequence[Member]) -> Tensor:
    """(channels, features): the weights and biases of all the channel set's producers, which make each channel."""
    blocks = []
    for member in members:
        if member.is_producer:
            parts = [member.module.weight.data] + ([] if member.module.bias is None else [member.module.bias.data])
            blocks += [part[member.spots].flatten(1) for part in parts]
    return torch.cat(blocks, 1)


def norm_rows(members: Sequence[Member]) -> Tensor:
    """(channels, features): scale and shift of the channel set's batch norms."""
    blocks = [
        part.data[m.spots].flatten(1)
        for m in members
        if m.is_norm
        for part in (m.module.weight, m.module.bias)
        if part is not None
    ]
    return torch.cat(blocks, 1) if blocks else torch.zeros(len(members[0].spots), 0)


def reader_columns(members: Sequence[Member]) -> Tensor:
    """(channels, features): what the channel set's readers do with each channel."""
    return torch.cat([m.module.weight.data.transpose(0, 1)[m.spots].flatten(1) for m in members if not m.out], 1)


def cluster(features: Tensor, count: int, seed: int = 0) -> Tensor:
    """Labels (channels,) of at most ``count`` clusters. Distances are those of the features; the work is done in as
    many dimensions as there are channels."""
    if count >= len(features):
        return torch.arange(len(features))
    rows = features.double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)  # rows = vectors sqrt(values) times an orthogonal matrix
    points = vectors * values.clamp_min(0).sqrt()
    with threadpool_limits(1):  # many short parallel loops, which wait for one another on a busy machine
        found = KMeans(count, n_init=10, random_state=seed).fit(points.numpy())
    return torch.from_numpy(found.labels_).long()
