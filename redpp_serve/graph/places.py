"""Where each channel's entries stand in many tensors, found with whole arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Places:
    """An index over arrays of representatives: ``rows[slot]`` (size,) says whose channel each entry is."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self._sorted: list[tuple[Tensor, Tensor, Tensor]] = []  # by slot: roots ascending, where each starts, positions
        pairs = []
        for slot, row in enumerate(rows):
            order = torch.argsort(row, stable=True)
            roots, counts = torch.unique_consecutive(row[order], return_counts=True)
            self._sorted.append((roots, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), order))
            pairs.append(torch.stack([roots, torch.full_like(roots, slot), counts], 1))
        every = torch.cat(pairs) if pairs else torch.empty(0, 3, dtype=torch.int64)
        every = every[torch.argsort(every[:, 0], stable=True)]
        roots, counts = torch.unique_consecutive(every[:, 0], return_counts=True)
        ends = counts.cumsum(0).tolist()
        self._slots = dict(zip(roots.tolist(), zip([0, *ends], ends)))
        self._every = every[:, 1:].contiguous().numpy()

    def signature(self, root: int) -> bytes:
        """Equal for channels that have as many entries as each other in each slot."""
        start, end = self._slots[root]
        return self._every[start:end].tobytes()

    def of(self, channels: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The slots of channels of one signature, with their positions (channels, entries) int64 ascending."""
        start, end = self._slots[channels[0]]
        wanted = torch.tensor(channels)
        for slot, count in self._every[start:end].tolist():
            roots, starts, order = self._sorted[slot]
            first = starts[torch.searchsorted(roots, wanted)]
            yield slot, order[first[:, None] + torch.arange(count)]
