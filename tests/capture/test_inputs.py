"""Inputs as users write them, and samples of them."""

import pytest
import torch

from redpp_serve.capture.inputs import ALIASES, DTYPES, parse_input, sample
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec


def test_shape_alone_is_float32() -> None:
    assert parse_input("3x224x224", 0) == InputSpec("input_0", (3, 224, 224), "float32")
    assert parse_input(" 3X8x8 ", 2) == InputSpec("input_2", (3, 8, 8), "float32")
    assert parse_input("128:int64", 1) == InputSpec("input_1", (128,), "int64")


@pytest.mark.parametrize("name", [*DTYPES, *ALIASES])
def test_dtypes_and_aliases(name: str) -> None:
    spec = parse_input(f"4x5:{name}", 0)
    assert spec.dtype == ALIASES.get(name, name)
    assert isinstance(getattr(torch, spec.dtype), torch.dtype)


def test_short_names() -> None:
    short = {"fp32": "float32", "fp16": "float16", "int": "int64", "bf16": "bfloat16", "half": "float16"}
    assert {name: parse_input(f"2:{name}", 0).dtype for name in short} == short


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "not a shape"),
        ("0x3", "a size is zero"),
        ("3x-4", "not a shape"),
        ("3,224,224", "not a shape"),
        ("3x", "not a shape"),
        ("x3", "not a shape"),
        ("3xx3", "not a shape"),
        ("3.5x2", "not a shape"),
        ("٣x٣", "not a shape"),
        ("3x4;rm", "not a shape"),
        ("3x4:", "dtype '' is not known"),
        ("3x4:complex64", "dtype 'complex64' is not known"),
        ("3x4:load", "dtype 'load' is not known"),
        ("3x4:float32:int64", "is not known"),
        ("99999x99999", "9999800001 elements"),
        ("9" * 5000, "not a shape"),
    ],
)
def test_garbage_is_refused(text: str, found: str) -> None:
    with pytest.raises(RedppError, match=found) as error:
        parse_input(text, 0)
    assert "--input 3x224x224" in error.value.do


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample(dtype: str) -> None:
    spec = InputSpec("x", (3, 50), dtype)
    (x,) = sample([spec], 4, torch.Generator().manual_seed(0))
    (again,) = sample([spec], 4, torch.Generator().manual_seed(0))
    assert x.shape == (4, 3, 50) and x.dtype is getattr(torch, dtype) and torch.equal(x, again)
    if x.is_floating_point():
        assert abs(x.double().mean()) < 0.2 and 0.8 < x.double().std() < 1.2
    else:
        assert sorted(x.unique().tolist()) == [0, 1]


def test_inputs_differ_from_each_other() -> None:
    spec = InputSpec("x", (10,))
    first, second = sample([spec, spec], 2, torch.Generator().manual_seed(0))
    assert not torch.equal(first, second)


def test_integers_up_to_a_given_one() -> None:
    specs = [InputSpec("ids", (500,), "int64"), InputSpec("mask", (500,), "bool")]
    ids, mask = sample(specs, 2, torch.Generator().manual_seed(0), largest=9)
    assert ids.unique().tolist() == list(range(10))
    assert mask.dtype is torch.bool


def test_empty_batch_is_refused() -> None:
    with pytest.raises(RedppError, match="batch of 0"):
        sample([InputSpec("x", (1,))], 0, torch.Generator())
