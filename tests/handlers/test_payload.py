"""Bodies of requests: what is accepted becomes exactly the sent tensor, what is refused says why."""

import io
import json
import tracemalloc
import zipfile

import numpy
import pytest
import torch

from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.payload import BadRequest, parse
from tests.support.served import PREPROCESS, SHAPE, npy, picture

X = (InputSpec("x", SHAPE),)
TWO = (InputSpec("a", (2,)), InputSpec("b", (3,), "int64"))
VALUES = numpy.random.default_rng(0).standard_normal(SHAPE, dtype=numpy.float32)


def npz(compressed: bool = False, **arrays: numpy.ndarray) -> bytes:
    stream = io.BytesIO()
    (numpy.savez_compressed if compressed else numpy.savez)(stream, **arrays)
    return stream.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        npy(VALUES),
        bytearray(npy(VALUES)),
        npy(VALUES[None]),
        npy(numpy.asfortranarray(VALUES)),
        npy(VALUES.astype(">f4")),
        npy(VALUES.astype("float64")),
        npz(x=VALUES),
        npz(anything=VALUES),
        npz(compressed=True, x=VALUES),
        VALUES.tolist(),
        [VALUES.tolist()],
        {"inputs": VALUES.tolist()},
        {"inputs": {"x": VALUES.tolist()}},
        json.dumps(VALUES.tolist()).encode(),
        json.dumps({"inputs": VALUES.tolist()}),
    ],
)
def test_every_form_of_the_same_input_gives_the_same_tensor(body: object) -> None:
    for key in ("body", "data"):
        (tensor,) = parse({key: body}, X, None)
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        torch.testing.assert_close(tensor, torch.from_numpy(VALUES), rtol=0, atol=0)


@pytest.mark.parametrize(
    "body",
    [
        npz(a=numpy.ones(2), b=numpy.arange(3)),
        {"inputs": {"a": [1, 1], "b": [0, 1, 2]}},
        {"inputs": [[1, 1], [0, 1, 2]]},
        [[1, 1], [0, 1, 2]],
    ],
)
def test_several_inputs(body: object) -> None:
    a, b = parse({"body": body}, TWO, None)
    assert a.tolist() == [1.0, 1.0] and a.dtype == torch.float32
    assert b.tolist() == [0, 1, 2] and b.dtype == torch.int64


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_goes_through_the_declared_preprocessing(kind: str) -> None:
    data = picture(kind=kind)
    (tensor,) = parse({"body": data}, X, PREPROCESS)
    torch.testing.assert_close(tensor, PREPROCESS.image(data))


@pytest.mark.parametrize(
    ("spec", "array"),
    [
        (InputSpec("x", (2,)), numpy.array([1, 2], dtype="uint8")),
        (InputSpec("x", (2,)), numpy.array([True, False])),
        (InputSpec("x", (2,), "float16"), numpy.array([1.5, -2.0], dtype="float64")),
        (InputSpec("x", (2,), "bfloat16"), numpy.array([1.5, -2.0])),
        (InputSpec("x", (2,), "int32"), numpy.array([1, -2])),
        (InputSpec("x", (2,), "uint8"), numpy.array([0, 255])),
        (InputSpec("x", (2,), "bool"), numpy.array([True, False])),
        (InputSpec("x", ()), numpy.array(3.0)),
    ],
)
def test_safe_conversions(spec: InputSpec, array: numpy.ndarray) -> None:
    for body in (npy(array), array.tolist()):
        if isinstance(body, float):
            body = json.dumps(body)
        (tensor,) = parse({"body": body}, (spec,), None)
        assert tensor.dtype == getattr(torch, spec.dtype) and tuple(tensor.shape) == spec.shape
        assert tensor.tolist() == array.tolist()


@pytest.mark.parametrize(
    ("spec", "body", "message"),
    [
        (InputSpec("x", (2,), "int64"), npy(numpy.array([1.0, 2.0])), "float64, expected int64"),
        (InputSpec("x", (2,), "int64"), [1.0, 2.0], "float64, expected int64"),
        (InputSpec("x", (2,), "bool"), npy(numpy.array([1, 0])), "int64, expected bool"),
        (InputSpec("x", (2,), "int8"), npy(numpy.array([1, 300])), "out of range"),
        (InputSpec("x", (2,), "int64"), npy(numpy.array([1, 2**63 + 1], dtype="uint64")), "out of range"),
        (InputSpec("x", (2,), "float16"), npy(numpy.array([1.0, 1e6])), "beyond float16"),
        (InputSpec("x", (2,)), npy(numpy.array([1.0, numpy.nan])), "NaN"),
        (InputSpec("x", (2,)), npy(numpy.array([1.0, -numpy.inf])), "NaN"),
        (InputSpec("x", (2,)), b"[1, NaN]", "NaN"),
        (InputSpec("x", (2,)), b"[1, 1e999]", "NaN"),
        (InputSpec("x", (2,)), b"[1, 1e39]", "beyond float32"),
        (InputSpec("x", (2,)), npy(numpy.array([1j, 1])), "complex128"),
        (InputSpec("x", (2,)), [1, 10**400], "out of range"),
    ],
)
def test_unsafe_conversions_are_refused(spec: InputSpec, body: object, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parse({"body": body}, (spec,), None)


def header(shape: str, dtype: str = "'<f4'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


GOOD = npy(VALUES)
BAD_BODIES = {
    "no body": ({}, "empty body"),
    "empty": ({"body": b""}, "empty body"),
    "none": ({"body": None}, "empty body"),
    "a form": ({"[1,2]": b""}, "Content-Type"),
    "text": ({"body": b"hello"}, "no known kind"),
    "not UTF-8": ({"body": b"\xff\xfe\x00garbage"}, "no known kind"),
    "pickle": ({"body": b"\x80\x04\x95\x05\x00\x00\x00"}, "no known kind"),
    "deep JSON": ({"body": b"[" * 200_000}, "no known kind"),
    "deep lists": ({"body": b"[" * 500 + b"]" * 500}, "500 dimensions"),
    "wrong shape": ({"body": npy(VALUES[:2])}, r"\(2, 8, 8\), expected \(3, 8, 8\) or \(1, 3, 8, 8\)"),
    "batch of two": ({"body": npy(numpy.stack([VALUES] * 2))}, r"\(2, 3, 8, 8\)"),
    "truncated": ({"body": GOOD[:-5]}, "763 bytes of data, expected 768"),
    "header only": ({"body": GOOD[:6]}, "unreadable header"),
    "trailing": ({"body": GOOD + b"x"}, "769 bytes"),
    "huge claim": ({"body": header("(999999, 999999, 999999)")}, "expected"),
    "huge claim of one kind": ({"body": header("(3, 8, 8)", "'<U999999999'")}, "unreadable header"),
    "negative": ({"body": header("(-1, 8, 8)")}, "expected"),
    "code in header": ({"body": header("__import__('os')")}, "unreadable header"),
    "nested header": ({"body": header("(" * 4000)}, "unreadable header"),
    "objects": ({"body": npy(numpy.array([{}], dtype=object))}, "dtype object"),
    "structured": ({"body": npy(numpy.zeros(3, dtype=[("a", "f4")]))}, "dtype"),
    "strings": ({"body": npy(numpy.array(["a"]))}, "dtype <U1"),
    "ragged": ({"body": [[[1.0] * 8] * 8, [[1.0] * 8] * 8, [[1.0] * 8] * 7 + [[1.0]]]}, "unequal"),
    "string among numbers": ({"body": [[["1"] + [1.0] * 7] * 8] * 3}, "type str"),
    "null": ({"body": [[[None] * 8] * 8] * 3}, "NoneType"),
    "nothing": ({"body": []}, r"\(0,\)"),
    "number": ({"body": b"5"}, r"\(\)"),
    "other key": ({"body": {"input": [1]}}, 'keys input, expected the key "inputs"'),
    "other name": ({"body": {"inputs": {"y": [1]}}}, "with y, expected x"),
    "image": ({"body": picture()}, "declares no preprocessing"),
    "zip": ({"body": b"PK\x03\x04 and no more"}, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_refused_with_what_was_found(name: str) -> None:
    item, message = BAD_BODIES[name]
    with pytest.raises(BadRequest, match=message):
        parse(item, X, None)


def test_names_of_several_inputs_are_checked() -> None:
    for body in (npz(a=numpy.ones(2)), npz(a=numpy.ones(2), c=numpy.ones(3)), {"inputs": {"a": [1, 1]}}):
        with pytest.raises(BadRequest, match="expected a, b"):
            parse({"body": body}, TWO, None)
    with pytest.raises(BadRequest, match="expected 2 entries"):
        parse({"body": [[1, 1]]}, TWO, None)
    with pytest.raises(BadRequest, match="expected .npz or JSON with a, b"):
        parse({"body": npy(numpy.ones(2))}, TWO, None)


def test_a_decompression_bomb_is_cut_off() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", bytes(50_000_000))
    assert len(stream.getvalue()) < 100_000
    tracemalloc.start()
    with pytest.raises(BadRequest, match="more than"):
        parse({"body": stream.getvalue()}, X, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_damaged_archives_never_raise_anything_else() -> None:
    data = bytearray(npz(compressed=True, x=VALUES))
    random = numpy.random.default_rng(1)
    refused = 0
    for _ in range(300):
        damaged = data.copy()
        damaged[random.integers(4, len(data))] ^= 1 << random.integers(8)
        try:
            parse({"body": damaged}, X, None)
        except BadRequest:
            refused += 1
    assert refused > 200
