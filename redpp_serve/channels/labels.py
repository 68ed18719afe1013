"""Labels of channels: integers in a union-find, with the reasons why some of them must stay.

A value's labels say which channel each of its entries belongs to. Along axes where they do not change they are an
expanded view, so they take little memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_Array = np.ndarray[Any, np.dtype[np.int64]]


class Labels:
    """A union-find over labels, worked on in whole arrays. Label 0 means "not a channel" and is never merged."""

    NONE = 0

    def __init__(self) -> None:
        self._parent: _Array = np.zeros(1024, np.int64)  # grows by doubling
        self._count = 1
        self._notes: list[tuple[_Array, str, bool]] = []  # labels, reason, whether it closes them

    def fresh(self, count: int) -> Tensor:
        """Make ``count`` new labels, each alone, (count,) int64."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros(max(count, len(self._parent)), np.int64)])
        self._parent[start : self._count] = np.arange(start, self._count)
        return torch.arange(start, self._count)

    def find(self, labels: Tensor) -> Tensor:
        """Return the representative of each label, in the same shape; repetitions stay views."""
        return torch.from_numpy(np.asarray(self._find(once(labels).numpy()))).expand(labels.shape)

    def _find(self, labels: _Array) -> _Array:
        roots: _Array = self._parent[labels]
        while not np.array_equal(higher := self._parent[roots], roots):
            roots = higher
        return roots

    def union(self, a: Tensor, b: Tensor, reason: str = "meets values that are no channels") -> None:
        """Join the labels pairwise (broadcast). A label that meets NONE is closed instead, with the reason."""
        x, y = (t.numpy() for t in _pairs(a, b))
        for one, other in ((x, y), (y, x)):
            alone = one[(other == self.NONE) & (one != self.NONE)]
            if len(alone):
                self._notes.append((alone, reason, True))
        both = (x != self.NONE) & (y != self.NONE)
        x, y = x[both], y[both]
        met = np.concatenate([x, y])
        while len(x):
            x, y = self._find(x), self._find(y)
            apart = x != y
            x, y = x[apart], y[apart]
            np.minimum.at(self._parent, np.maximum(x, y), np.minimum(x, y))
        self._parent[met] = self._find(met)

    def tie(self, labels: Tensor, dim: int, reason: str) -> None:
        """Join all labels along a dimension; the reason is kept for those whose channel set has nothing else left."""
        labels = once(labels)
        if labels.shape[dim] < 2:
            return
        roots = self.find(labels)
        moved = (roots != roots.narrow(dim, 0, 1)).any(dim).unsqueeze(dim).expand(labels.shape)
        if bool(moved.any()):
            self._notes.append((np.unique(roots[moved].numpy()), reason, False))
            self.union(labels, labels.narrow(dim, 0, 1), reason)

    def close(self, labels: Tensor, reason: str) -> None:
        """Note that these channels must stay."""
        found = np.unique(self._find(once(labels).numpy()))
        found = found[found != self.NONE]
        if len(found):
            self._notes.append((found, reason, True))

    def reasons(self) -> tuple[dict[int, str], dict[int, str]]:
        """Return, by representative, why a label must stay, and why it was tied to others: the first reason given."""
        closed: dict[int, str] = {}
        tied: dict[int, str] = {}
        for labels, reason, closes in self._notes:
            for root in np.unique(self._find(labels)).tolist():
                (closed if closes else tied).setdefault(root, reason)
        return closed, tied


def once(labels: Tensor) -> Tensor:
    """Drop the repetitions of expanded dimensions, which become 1 long."""
    for dim, step in enumerate(labels.stride()):
        if step == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct pairs of unequal labels that meet when two arrays are broadcast together."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    a, b = a.expand(shape), b.expand(shape)
    for dim in range(a.dim()):
        if a.stride(dim) == 0 and b.stride(dim) == 0 and a.shape[dim] > 1:
            a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
    a, b = a.reshape(-1), b.reshape(-1)
    differ = a != b
    a, b = a[differ], b[differ]
    if not len(a):
        return a, b
    both = torch.unique((a << 32) + b)
    return both >> 32, both & 0xFFFFFFFF


def misaligned(row: Tensor, taken: Tensor) -> Tensor:
    """Find channels whose entries ``taken`` treats unlike those of other channels of the same size.

    Channels are merged entry by entry, the first with the first, so each must stand in the same order everywhere.

    Args:
        row: (size,) int64, the representative that each position of an axis belongs to.
        taken: (n,) int64, the positions that go on, in their new order.

    Returns:
        Representatives (k,) int64.
    """
    by_root = torch.argsort(row, stable=True)
    roots, inverse, counts = torch.unique(row, return_inverse=True, return_counts=True)
    if len(roots) in (1, len(row)):
        return row[:0]
    rank = torch.empty_like(row)
    rank[by_root] = torch.arange(len(row)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    sequences: dict[int, list[int]] = {}
    for root, position in zip(inverse[taken].tolist(), rank[taken].tolist(), strict=True):
        sequences.setdefault(root, []).append(position)
    patterns: dict[int, set[tuple[int, ...]]] = {}
    for root, sequence in sequences.items():
        patterns.setdefault(int(counts[root]), set()).add(tuple(sequence))
    mixed = torch.tensor([size for size, found in patterns.items() if len(found) > 1 and size > 1], dtype=torch.int64)
    found: Tensor = roots[torch.isin(counts, mixed)]
    return found
