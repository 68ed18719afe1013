"""Indices of the codebook Linear: their packing, the tables, and the inline assembly that decodes them.

A model of the instructions runs the assembly: every byte, every place, bit by bit.
"""

import re

import numpy as np
import pytest
import torch

from redpp_serve import kernels
from redpp_serve.kernels.codebook_linear.packing import TABLE_ROWS, decode_table, pack_indices, unpack_indices
from tests.support.ptx_model import run_ptx

pytest.importorskip("triton")

VALUES = {"prmt8": 8, "prmt16": 16}
WORDS = {"prmt8": (0, 1, 4, 5), "prmt16": tuple(range(8))}  # which of the table's words each is given


def assembly(decode: str) -> tuple[str, str]:
    from redpp_serve.kernels.codebook_linear import decode as module

    text, operands = (getattr(module, name) for name in (decode.upper(), f"{decode.upper()}_OPERANDS"))
    return text.value, operands.value


def decoded(decode: str, text: str, codebook: torch.Tensor, packed: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel's block becomes: bits of the low and of the high nibbles' values, for packed bytes (n, 4)."""
    table = decode_table(codebook, decode)[:, 0].numpy().view(np.uint32)
    words = [word for k in WORDS[decode] for word in [table[k]] * 4]  # one for each of the four bytes
    outputs = run_ptx(text, 4, [packed.numpy().view(np.uint32)[:, 0], *words])
    low, high = (np.stack(outputs[k : k + 2], 1).view(np.uint16) for k in (0, 2))
    return low, high


@pytest.mark.parametrize("decode", VALUES)
def test_every_byte_becomes_its_two_values(decode: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert_decodes(decode, dtype)


def assert_decodes(decode: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(VALUES[decode], generator=generator).to(dtype)
    index = torch.randint(0, VALUES[decode], (100_000, 4, 2), generator=generator)
    index[: VALUES[decode] ** 2, :, :] = torch.cartesian_prod(*[torch.arange(VALUES[decode])] * 2)[:, None]
    low, high = decoded(decode, assembly(decode)[0], codebook, (index[..., 0] | index[..., 1] << 4).to(torch.uint8))
    bits = codebook.view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(low, bits[index[..., 0].numpy()])
    assert np.array_equal(high, bits[index[..., 1].numpy()])


@pytest.mark.parametrize("decode", VALUES)
def test_operands_are_as_many_as_the_text_and_the_kernel_use(decode: str) -> None:
    text, operands = assembly(decode)
    named = operands.split(",")
    assert named[:4] == ["=r"] * 4 and named[4:] == ["r"] * (1 + 4 * len(WORDS[decode]))
    used = sorted({int(n) for n in re.findall(r"\$(\d+)", text)})
    assert used == [0, 1, 2, 3, 4, *range(5, len(named), 4)]
    declared = re.search(r"\.reg \.b32 (.*?);", text)
    assert declared is not None and set(declared[1].split(", ")) >= set(
        re.findall(r"(?<![\w$.])[a-z]\b(?!\d)", text.split(";", 1)[1])
    )


def test_the_model_notices_a_wrong_constant() -> None:
    text = assembly("prmt16")[0]
    index = torch.randint(0, 16, (4096, 4, 2), generator=torch.Generator().manual_seed(1))
    codebook = torch.randn(16, generator=torch.Generator().manual_seed(2)).half()
    packed = (index[..., 0] | index[..., 1] << 4).to(torch.uint8)
    right = decoded("prmt16", text, codebook, packed)
    for constant, other in (("0xca", "0xac"), ("0x6240", "0x6420"), ("0xd9c8", "0xc9d8"), ("$17", "$13")):
        assert constant in text
        wrong = decoded("prmt16", text.replace(constant, other), codebook, packed)
        assert not all(np.array_equal(a, b) for a, b in zip(right, wrong, strict=True)), constant


def test_the_pair_table_holds_both_values_of_a_byte() -> None:
    codebook = torch.randn(11, generator=torch.Generator().manual_seed(3)).half()
    table = decode_table(codebook, "pair").numpy().view(np.uint16).reshape(256, 2)
    bits = np.zeros(16, np.uint16)
    bits[:11] = codebook.view(torch.int16).numpy().view(np.uint16)
    byte = np.arange(256)
    assert np.array_equal(table[:, 0], bits[byte & 15]) and np.array_equal(table[:, 1], bits[byte >> 4])


def test_every_row_of_a_tile_has_the_same_words() -> None:
    table = decode_table(torch.randn(16).half(), "prmt16")
    assert table.shape == (8, TABLE_ROWS) and bool((table == table[:, :1]).all())


def test_tables_follow_a_codebook_that_changes() -> None:
    codebook = torch.zeros(4, dtype=torch.float16)
    before = decode_table(codebook, "pair")
    assert decode_table(codebook, "pair") is before
    codebook[1] = 1.0
    assert not torch.equal(decode_table(codebook, "pair"), before)


def test_unpacking_inverts_packing() -> None:
    for n_in in (0, 1, 63, 64, 65, 127, 128, 129, 300):
        index = torch.randint(0, 16, (5, n_in), generator=torch.Generator().manual_seed(n_in))
        packed = pack_indices(index)
        assert packed.dtype == torch.uint8 and packed.shape == (5, 64 * -(-n_in // 128)), n_in
        assert torch.equal(unpack_indices(packed, n_in).long(), index), n_in


def test_indices_that_cannot_be_packed_are_refused() -> None:
    for values in ([[16]], [[-1]], [1], [[1.0]], [[True]]):
        with pytest.raises(ValueError, match="pack_indices: index must"):
            raise AssertionError((values, pack_indices(torch.tensor(values))))


def test_a_large_codebook_weight_is_decoded_a_block_at_a_time() -> None:
    """Blocks of outputs, of which the last is smaller."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 9, (1100, 2048), generator=generator)
    x, codebook = torch.randn(2, 2048, generator=generator), torch.randn(9, generator=generator)
    found = kernels.codebook_linear(x, kernels.pack_indices(index), codebook)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, codebook[index]), rtol=1e-4, atol=1e-3)
