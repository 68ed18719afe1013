"""Taking channels out, rounding widths, and telling equal channels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import KINDS, few, inner_of, many, network, outputs, seeds

from redpp_serve.graph.rewrite import columns_of, first_equal, keep_channels, round_up


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_some_channels_is_zeroing_the_readers_columns_of_the_others(kind):
    graph = network(kind, 9)
    inner, kept = inner_of(graph), torch.tensor([7, 0, 3])
    narrow, zeroed = {}, {}
    for layer, _ in inner.consumers:
        w = graph.tensors[layer.weight]
        columns = columns_of(w, 9)
        narrow[layer.weight] = columns[:, kept].reshape(len(w), -1, *w.shape[2:])
        mask = torch.zeros(9, 1)
        mask[kept] = 1
        zeroed[layer.weight] = (columns * mask).reshape(w.shape)
    small = keep_channels(graph, inner, kept, narrow)
    for mine, theirs in zip(outputs(small), outputs(graph.with_tensors(zeroed))):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert all(len(small.tensors[name]) == 3 for name in inner.per_channel)
    assert {
        k: v for k, v in graph.tensors.items() if k not in (*inner.per_channel, *narrow)
    }.items() <= small.tensors.items()


@given(st.integers(0, 300), st.integers(1, 64), st.integers(1, 300))
@many
def test_round_up_is_the_smallest_allowed_width(width, step, limit):
    got = round_up(min(width, limit), step, limit)
    allowed = [*range(step, limit, step), limit]
    assert got == min(a for a in allowed if a >= min(width, limit))


@given(seeds, st.integers(1, 12), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
@few
def test_first_equal_against_brute_force(seed, n, dtype):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randint(-1, 2, shape, generator=g).to(dtype) * 0.5 for shape in ((n,), (n, 2), (n, 1, 1, 2))]
    tensors[0][::2] *= -1  # makes negative zeros
    expected = [next(a for a in range(n) if all(torch.equal(t[a], t[b]) for t in tensors)) for b in range(n)]
    assert first_equal(tensors).tolist() == expected


def test_first_equal_compares_channels_not_memory_layout():
    t = torch.randn(6, 4, 3, 3)
    t[5] = t[1]
    strided = t.contiguous(memory_format=torch.channels_last)
    assert first_equal([strided]).tolist() == [0, 1, 2, 3, 4, 1]
