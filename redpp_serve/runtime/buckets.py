"""Batch buckets: the batch sizes that a worker is ready for, and which of them serves a number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batch_buckets(batch_size: int) -> list[int]:
    """The batch sizes to be ready for: powers of two below the largest batch, and that."""
    return sorted({2**k for k in range(batch_size.bit_length()) if 2**k < batch_size} | {batch_size})


def bucket_for(buckets: Sequence[int], rows: int) -> int:
    """The smallest of the ascending buckets that holds that many rows; the largest where none does."""
    return next((bucket for bucket in buckets if bucket >= rows), buckets[-1])


def chunks(rows: int, largest: int) -> Iterator[slice]:
    """Consecutive ranges of at most ``largest`` rows; one empty range where there are none."""
    for start in range(0, max(1, rows), largest):
        yield slice(start, min(rows, start + largest))
