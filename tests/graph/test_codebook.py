"""Packing of weights with few values: every bit survives, and sizes that do not fit are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from redpp_serve.graph.weights import decode, encode, index_bits

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BITS = {2: 1, 3: 2, 4: 2, 5: 4, 16: 4, 17: 8, 256: 8, 257: 16, 600: 16}


def of_values(values: int, count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """``count`` weights that take each of ``values`` random values at least once."""
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randperm(4 * values, generator=generator)[:values].sub(2 * values).to(dtype)
    indices = torch.cat([torch.arange(values), torch.randint(values, (count - values,), generator=generator)])
    return codebook[indices[torch.randperm(count, generator=generator)]]


def bits_of(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).tolist()


@pytest.mark.parametrize(("values", "bits"), BITS.items())
def test_round_trip_at_every_width_and_odd_length(values: int, bits: int) -> None:
    for count in (4 * values + 61, 4 * values + 64, 4 * values + 67):
        weight = of_values(values, count)
        packed = encode(weight)
        assert packed is not None and packed.bits == bits == index_bits(values)
        assert packed.indices.numel() == -(-count * bits // 8) and packed.codebook.numel() == values
        assert bits_of(decode(packed.codebook, packed.indices, packed.bits, [count])) == bits_of(weight)


def test_layout_of_the_indices() -> None:
    """Earlier weights lie in the lower bits; 16-bit indices are little-endian. Files depend on it."""
    packed = encode((torch.arange(64) % 4).float())
    assert packed is not None and packed.bits == 2 and packed.indices.tolist() == [0b11100100] * 16
    wide = encode(torch.arange(300).repeat(4).float())
    assert wide is not None and wide.bits == 16 and wide.codebook.tolist() == list(map(float, range(300)))
    assert wide.indices[-2:].tolist() == [299 % 256, 299 // 256]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 300), st.integers(0, 500), st.sampled_from(FLOATS), st.integers(0, 2**31))
def test_decoding_inverts_encoding_and_is_never_larger(values: int, extra: int, dtype: torch.dtype, seed: int) -> None:
    weight = of_values(values, values + extra, dtype, seed)
    packed = encode(weight)
    if packed is None:
        return
    stored = packed.indices.numel() + packed.codebook.numel() * packed.codebook.element_size()
    assert stored < weight.numel() * weight.element_size()
    decoded = decode(packed.codebook, packed.indices, packed.bits, weight.shape)
    assert decoded.dtype is dtype and bits_of(decoded) == bits_of(weight)


def test_signed_zeros_infinities_and_nan_keep_their_bits() -> None:
    weight = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45]).repeat(20)
    packed = encode(weight)
    assert packed is not None and packed.codebook.numel() == 6
    assert bits_of(decode(packed.codebook, packed.indices, packed.bits, [120])) == bits_of(weight)


def test_shape_and_strides_of_the_source() -> None:
    weight = of_values(7, 240).view(2, 3, 8, 5).to(memory_format=torch.channels_last)
    packed = encode(weight)
    assert packed is not None
    assert torch.equal(decode(packed.codebook, packed.indices, packed.bits, [2, 3, 8, 5]), weight)
    assert encode(of_values(7, 240).view(24, 10).t().requires_grad_()) is not None


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(63),
        torch.arange(200).float(),
        torch.zeros(100, dtype=torch.int64),
        torch.zeros(100, dtype=torch.bool),
        torch.randn((1 << 17) + 1, generator=torch.Generator().manual_seed(0)),
        torch.arange(1 << 18).float(),
    ],
    ids=["few weights", "all distinct", "integers", "booleans", "large and random", "large and distinct"],
)
def test_what_would_not_shrink_is_left_alone(weight: Tensor) -> None:
    assert encode(weight) is None


def test_a_large_weight_with_few_values_is_packed() -> None:
    weight = of_values(16, (1 << 17) + 3)
    packed = encode(weight)
    assert packed is not None and torch.equal(decode(packed.codebook, packed.indices, 4, weight.shape), weight)


INDICES = torch.zeros(32, dtype=torch.uint8)
REFUSED = {
    "too few bytes": (4, INDICES[:31], 2, [128]),
    "too many bytes": (4, INDICES, 2, [124]),
    "no such width": (4, INDICES, 3, [85]),
    "width zero": (4, INDICES, 0, [0]),
    "width not an integer": (4, INDICES, 2.0, [128]),
    "width true": (4, INDICES[:16], True, [128]),
    "two negative sizes": (4, INDICES, 2, [-16, -8]),
    "size not an integer": (4, INDICES, 2, [128.0]),
    "size a text": (4, INDICES, 2, "8"),
    "indices signed": (4, INDICES.char(), 2, [128]),
    "indices of two dimensions": (4, INDICES.view(2, 16), 2, [128]),
    "index past the codebook": (2, INDICES + 0b11, 2, [128]),
    "empty codebook": (0, INDICES, 2, [128]),
    "wide index past the codebook": (4, torch.full((256,), 255, dtype=torch.uint8), 16, [128]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    values, indices, bits, shape = REFUSED[case]
    with pytest.raises(ValueError):
        decode(torch.arange(values).float(), indices, bits, shape)


def test_a_codebook_of_more_dimensions_is_refused() -> None:
    with pytest.raises(ValueError):
        decode(torch.zeros(2, 2), INDICES, 2, [128])


def test_nothing_at_all() -> None:
    assert decode(torch.zeros(0), INDICES[:0], 8, [0, 5]).shape == (0, 5)
