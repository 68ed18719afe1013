"""Which batch sizes a worker is ready for, and how rows are dealt to them."""

import pytest

from redpp_serve.runtime.buckets import batch_buckets, bucket_for, chunks


@pytest.mark.parametrize(("largest", "buckets"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_buckets_are_powers_of_two_and_the_largest(largest: int, buckets: list[int]) -> None:
    assert batch_buckets(largest) == buckets


@pytest.mark.parametrize(("rows", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (5, 6), (6, 6), (7, 6)])
def test_the_smallest_bucket_that_holds_the_rows(rows: int, bucket: int) -> None:
    assert bucket_for([1, 2, 4, 6], rows) == bucket


@pytest.mark.parametrize(("rows", "sizes"), [(0, [0]), (1, [1]), (4, [4]), (5, [4, 1]), (12, [4, 4, 4])])
def test_chunks_hold_each_row_once(rows: int, sizes: list[int]) -> None:
    found = list(chunks(rows, 4))
    assert [part.stop - part.start for part in found] == sizes
    assert [k for part in found for k in range(rows)[part]] == list(range(rows))
