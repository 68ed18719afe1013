"""Inputs as users write them, and samples of them."""

import pytest
import torch

from redpp_serve.capture.inputs import ALIASES, DTYPES, parse_input, parse_sizes, require_used, sample
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec, Size


def test_shape_alone_is_float32() -> None:
    assert parse_input("3x224x224", 0) == InputSpec("input_0", (3, 224, 224), "float32")
    assert parse_input(" 3X8x8 ", 2) == InputSpec("input_2", (3, 8, 8), "float32")
    assert parse_input("128:int64", 1) == InputSpec("input_1", (128,), "int64")


def test_inputs_of_one_number_have_no_sizes() -> None:
    assert parse_input(":int64:0..9", 0) == InputSpec("input_0", (), "int64", ((0, 9),))
    assert parse_input("age=scalar", 0) == parse_input("age=:float32", 0) == InputSpec("age", (), "float32")
    (x,) = sample([parse_input("scalar:int64:3..5", 0)], 50, torch.Generator().manual_seed(0))
    assert x.shape == (50,) and sorted(x.unique().tolist()) == [3, 4, 5]


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
        ("3x4:float32:0..1", "a range for float32"),
        ("3x4:bool:0..1", "a range for bool"),
        ("4:int64:", "is no range"),
        ("4:int64:5", "is no range"),
        ("4:int64:9..0", "is no range"),
        ("4:int64:0..9;rm", "is no range"),
        ("4:int64:0..99999999999999999999", "is no range"),
        ("4:uint8:0..256", "is no range"),
        ("4:int64:0..9,0..4", "it has 2 ranges"),
        (":int64:0..9,0..4", "it has 2 ranges"),
        ("int64", "not a shape"),
        (":", "dtype '' is not known"),
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


def test_integers_of_their_range() -> None:
    specs = [InputSpec("ids", (500,), "int64", ((-3, 9),)), InputSpec("mask", (500,), "bool")]
    columns = InputSpec("columns", (400, 2), "int32", ((0, 4), (7, 9)))
    ids, mask, rows = sample([*specs, columns], 2, torch.Generator().manual_seed(0))
    assert ids.unique().tolist() == list(range(-3, 10))
    assert mask.dtype is torch.bool
    assert [rows[..., k].unique().tolist() for k in (0, 1)] == [[0, 1, 2, 3, 4], [7, 8, 9]]


def test_sizes_that_vary() -> None:
    sizes = parse_sizes(["H=224..1024/32", "w=10..20", "L=8..515/8"])
    assert sizes == {"H": Size("H", 224, 1024, 32), "W": Size("W", 10, 20), "L": Size("L", 8, 512, 8)}
    spec = parse_input("3xHxW:uint8:0..255", 0, sizes)
    assert (spec.shape, spec.ranges) == ((3, 480, 14), ((0, 255),))
    assert spec.varying == ((1, sizes["H"]), (2, sizes["W"]))
    assert parse_input("l:int64", 1, sizes) == InputSpec("input_1", (64,), "int64", varying=((0, sizes["L"]),))
    require_used(sizes, [spec, parse_input("L", 1, sizes)])
    with pytest.raises(RedppError, match="no --input has L"):
        require_used(sizes, [spec])


@pytest.mark.parametrize(
    "text", ["H", "H=", "H=5", "H=9..5", "H=0..5", "H=1..5/0", "X=1..5", "HW=1..5", "H=1..5/", "H=-1..5", "H=1..5;rm"]
)
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(RedppError, match="--range"):
        parse_sizes([text])


def test_a_letter_needs_its_sizes_once() -> None:
    with pytest.raises(RedppError, match="--range"):
        parse_sizes(["H=1..5", "h=1..6"])
    for text, found in (("3xH", "nothing says which sizes H"), ("HHx3", "not a shape"), ("3xX", "not a shape")):
        with pytest.raises(RedppError, match=found):
            parse_input(text, 0)
    with pytest.raises(RedppError, match="elements"):
        parse_input("HxH", 0, parse_sizes(["H=8..99999"]))


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("20:int64:0..999", ((0, 999),)),
        ("20:int:-5..5", ((-5, 5),)),
        ("3x8x8:uint8:0..255", ((0, 255),)),
        ("2:int32:0..9,1..4", ((0, 9), (1, 4))),
        ("4x2:int64:0..9,1..4", ((0, 9), (1, 4))),
        ("2x2:int64:0..1,0..2,0..3,0..4", ((0, 1), (0, 2), (0, 3), (0, 4))),
    ],
)
def test_ranges(text: str, ranges: tuple[tuple[int, int], ...]) -> None:
    assert parse_input(text, 0).ranges == ranges


def test_empty_batch_is_refused() -> None:
    with pytest.raises(RedppError, match="batch of 0"):
        sample([InputSpec("x", (1,))], 0, torch.Generator())
