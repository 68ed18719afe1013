"""Whether the entries of channels that have several keep their order where entries of an axis are taken or moved."""

from __future__ import annotations

import torch
from torch import Tensor


def misaligned(row: Tensor, taken: Tensor) -> Tensor:
    """Channels whose entries ``taken`` treats unlike those of other channels of the same size.

    Channels are merged entry by entry, the first with the first, so each must stand in the same order everywhere.

    Args:
        row: (size,) int64, whose entry each position of an axis is.
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
    for root, position in zip(inverse[taken].tolist(), rank[taken].tolist()):
        sequences.setdefault(root, []).append(position)
    patterns: dict[int, set[tuple[int, ...]]] = {}
    for root, sequence in sequences.items():
        patterns.setdefault(int(counts[root]), set()).add(tuple(sequence))
    mixed = torch.tensor([size for size, found in patterns.items() if len(found) > 1 and size > 1], dtype=torch.int64)
    return roots[torch.isin(counts, mixed)]
