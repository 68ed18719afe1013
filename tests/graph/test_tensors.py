"""The reader of safetensors: equal to the reference implementation on whole files, strict on others."""

import hashlib
import io
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from redpp_serve.graph import tensor_file
from redpp_serve.graph.tensor_file import DTYPES
from tests.attacks.artifacts import safetensors_bytes
from tests.attacks.files import SAFETENSORS, entry


def read_safetensors(data: bytes) -> dict[str, Tensor]:
    """Read a file that lies between other bytes, and hold its digest against hashlib's."""
    file = io.BytesIO(b"before" + data + b"behind")
    file.seek(6)
    read, digest = tensor_file.read_safetensors(file, len(data))
    assert digest == hashlib.sha256(data).hexdigest()
    return read


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_bit_for_bit(dtype: torch.dtype) -> None:
    raw = torch.arange(240, dtype=torch.uint8)
    tensor = (raw % 2).bool() if dtype is torch.bool else raw.view(dtype).view(-1, 3, 2)
    read = read_safetensors(save({"t": tensor}))["t"]
    assert read.dtype is dtype and read.shape == tensor.shape
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_scalars_empty_tensors_and_metadata() -> None:
    tensors = {"scalar": torch.tensor(-0.0), "empty": torch.zeros(0, 3), "x": torch.ones(2)}
    read = read_safetensors(save(tensors, {"format": "pt"}))
    assert set(read) == set(tensors) and all(torch.equal(read[k], tensors[k]) for k in tensors)
    assert torch.signbit(read["scalar"]) and read["empty"].shape == (0, 3)
    assert read_safetensors(save({})) == {}


def test_tensors_own_their_memory() -> None:
    data = save({"a": torch.ones(2), "b": torch.ones(2)})
    read = read_safetensors(data)
    read["a"].zero_()
    assert read["b"].sum() == 2 and read_safetensors(data)["a"].sum() == 2


def tensor(**changed: Any) -> dict[str, Any]:
    return {"a": {**entry(0, 8), **changed}}


ODD: dict[str, bytes] = {name: safetensors_bytes(*case) for name, case in SAFETENSORS.items()} | {
    "empty file": b"",
    "shorter than its length field": b"\0\0\0",
    "bytes behind the data": safetensors_bytes({"a": entry(0, 8)}, bytes(9)),
    "negative size": safetensors_bytes(tensor(shape=[-2]), bytes(8)),
    "two negative sizes": safetensors_bytes(tensor(shape=[-2, -1]), bytes(8)),
    "negative offsets": safetensors_bytes(tensor(data_offsets=[-8, 0]), bytes(8)),
    "offsets backwards": safetensors_bytes({"a": entry(8, 0)}, bytes(8)),
    "offsets of one number": safetensors_bytes(tensor(data_offsets=[0]), bytes(8)),
    "offsets of three numbers": safetensors_bytes(tensor(data_offsets=[0, 8, 8]), bytes(8)),
    "offsets not whole": safetensors_bytes(tensor(data_offsets=[0.0, 8.0]), bytes(8)),
    "offsets true": safetensors_bytes({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, True]}}, bytes(1)),
    "empty and huge": safetensors_bytes({"a": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}}),
    "empty, beyond 64 bits": safetensors_bytes({"a": {"dtype": "F32", "shape": [0, 1 << 80], "data_offsets": [0, 0]}}),
    "infinite size": safetensors_bytes(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', bytes(8)),
    "size a text": safetensors_bytes(tensor(shape="2"), bytes(8)),
    "size not whole": safetensors_bytes(tensor(shape=[2.0]), bytes(8)),
    "size true": safetensors_bytes({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, bytes(1)),
    "dtype not a text": safetensors_bytes(tensor(dtype=["F32"]), bytes(8)),
    "no dtype": safetensors_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "header a list": safetensors_bytes([entry(0, 8)], bytes(8)),
    "entry a number": safetensors_bytes({"a": 1}, bytes(8)),
    "hole at the start": safetensors_bytes({"a": entry(4, 12)}, bytes(12)),
    "header nested deep": safetensors_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "header of other bytes": safetensors_bytes(b"\xff\xfe{}"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_files_raise_and_give_nothing(case: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError, RecursionError)):
        read_safetensors(ODD[case])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_damage_is_refused_or_leaves_tensors_within_the_file(position: int, damage: bytes) -> None:
    whole = save({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.int64)})
    data = whole[:position] + damage + whole[position + len(damage) :]
    try:
        read = read_safetensors(data)
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    assert sum(t.numel() * t.element_size() for t in read.values()) <= len(data)


def test_a_name_given_twice_hides_nothing() -> None:
    header = json.dumps({"a": entry(0, 8)})[:-1] + "," + json.dumps({"a": entry(8, 16)})[1:]
    with pytest.raises(ValueError):
        read_safetensors(safetensors_bytes(header.encode(), bytes(16)))
