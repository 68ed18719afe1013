"""Bodies of requests: what is accepted becomes exactly the sent tensor, what is refused says why."""

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.payload import BadRequest, parse
from tests.support.served import PREPROCESS, SHAPE, npy, picture

X = (InputSpec("x", SHAPE),)
TWO = (InputSpec("a", (2,)), InputSpec("b", (3,), "int64"))
VALUES = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)


def npz(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


FORMS = [
    npy(VALUES),
    bytearray(npy(VALUES)),
    npy(VALUES[None]),
    npy(np.asfortranarray(VALUES)),
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
]


def test_every_form_of_the_same_input_gives_the_same_tensor() -> None:
    for number, body in enumerate(FORMS):
        for key in ("body", "data"):
            (tensor,) = parse({key: body}, X, None)
            assert tensor.dtype == torch.float32 and tensor.is_contiguous(), number
            assert torch.equal(tensor, torch.from_numpy(VALUES)), number


def test_several_inputs() -> None:
    for body in (
        npz(a=np.ones(2), b=np.arange(3)),
        {"inputs": {"a": [1, 1], "b": [0, 1, 2]}},
        {"inputs": [[1, 1], [0, 1, 2]]},
        [[1, 1], [0, 1, 2]],
    ):
        a, b = parse({"body": body}, TWO, None)
        assert a.tolist() == [1.0, 1.0] and a.dtype == torch.float32, body
        assert b.tolist() == [0, 1, 2] and b.dtype == torch.int64, body


def test_an_image_goes_through_the_declared_preprocessing() -> None:
    for kind in ("PNG", "JPEG"):
        data = picture(kind=kind)
        (tensor,) = parse({"body": data}, X, PREPROCESS)
        assert torch.equal(tensor, PREPROCESS.image(data)), kind


I64 = np.iinfo("int64")
SAFE = [
    ("float32", (2,), np.array([1, 2], "uint8")),
    ("float32", (2,), np.array([True, False])),
    ("float32", (), np.array(3.0)),
    ("float16", (2,), np.array([1.5, -2.0])),
    ("float16", (2,), np.array([65504.0, -65504.0])),
    ("bfloat16", (2,), np.array([1.5, -2.0])),
    ("int8", (2,), np.array([-128, 127])),
    ("int32", (2,), np.array([1, -2])),
    ("int32", (2,), np.array([True, False])),
    ("int64", (2,), np.array([I64.min, I64.max])),
    ("int64", (1,), np.array([I64.max], "uint64")),
    ("int64", (0,), np.array([], "int8")),
    ("uint8", (2,), np.array([0, 255])),
    ("bool", (2,), np.array([True, False])),
]


def test_safe_conversions_keep_every_value() -> None:
    for dtype, shape, array in SAFE:
        bodies = [npy(array), *([json.dumps(array.tolist())] if array.size else [])]
        for body in bodies:
            (tensor,) = parse({"body": body}, (InputSpec("x", shape, dtype),), None)
            assert tensor.dtype == getattr(torch, dtype) and tuple(tensor.shape) == shape, (dtype, array)
            assert tensor.tolist() == array.tolist(), (dtype, array)


UNSAFE = [
    ("int64", npy(np.array([1.0, 2.0])), "float64, expected int64"),
    ("int64", [1.0, 2.0], "float64, expected int64"),
    ("bool", npy(np.array([1, 0])), "int64, expected bool"),
    ("uint8", npy(np.array([0, -1])), "out of range"),
    ("uint8", [-1, 0], "out of range"),
    ("uint8", [0, 256], "out of range"),
    ("int8", npy(np.array([1, 128])), "out of range"),
    ("int8", npy(np.array([-129, 1], "int16")), "out of range"),
    ("int32", [-(2**31) - 1, 0], "out of range"),
    ("int64", npy(np.array([1, 2**63 + 1], dtype="uint64")), "out of range"),
    ("float16", npy(np.array([1.0, 1e6])), "beyond float16"),
    ("float16", npy(np.array([1.0, 65520.0])), "beyond float16"),
    ("float32", npy(np.array([1.0, np.nan])), "NaN"),
    ("float32", npy(np.array([1.0, -np.inf])), "NaN"),
    ("float32", b"[1, NaN]", "NaN"),
    ("float32", b"[1, 1e999]", "NaN"),
    ("float32", b"[1, 1e39]", "beyond float32"),
    ("float32", npy(np.array([1j, 1])), "complex128"),
    ("float32", [1, 10**400], "out of range"),
    ("bfloat16", [1.0, 3.4e38], "beyond bfloat16"),
]


def test_unsafe_conversions_are_refused() -> None:
    for dtype, body, message in UNSAFE:
        with pytest.raises(BadRequest, match=message):
            parse({"body": body}, (InputSpec("x", (2,), dtype),), None)
            pytest.fail(f"{dtype} took {body!r}")


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
    "batch of two": ({"body": npy(np.stack([VALUES] * 2))}, r"\(2, 3, 8, 8\)"),
    "truncated": ({"body": GOOD[:-5]}, "763 bytes of data, expected 768"),
    "header only": ({"body": GOOD[:6]}, "unreadable header"),
    "trailing": ({"body": GOOD + b"x"}, "769 bytes"),
    "huge claim": ({"body": header("(999999, 999999, 999999)")}, "expected"),
    "huge claim of one kind": ({"body": header("(3, 8, 8)", "'<U999999999'")}, "unreadable header"),
    "negative": ({"body": header("(-1, 8, 8)")}, "expected"),
    "code in header": ({"body": header("__import__('os')")}, "unreadable header"),
    "nested header": ({"body": header("(" * 4000)}, "unreadable header"),
    "objects": ({"body": npy(np.array([{}], dtype=object))}, "dtype object"),
    "structured": ({"body": npy(np.zeros(3, dtype=[("a", "f4")]))}, "dtype"),
    "strings": ({"body": npy(np.array(["a"]))}, "dtype <U1"),
    "ragged": ({"body": [[[1.0] * 8] * 8, [[1.0] * 8] * 8, [[1.0] * 8] * 7 + [[1.0]]]}, "unequal"),
    "string among numbers": ({"body": [[["1"] + [1.0] * 7] * 8] * 3}, "type str"),
    "null": ({"body": [[[None] * 8] * 8] * 3}, "NoneType"),
    "nothing": ({"body": []}, r"\(0,\)"),
    "number": ({"body": b"5"}, r"\(\)"),
    "other key": ({"body": {"input": [1]}}, 'keys input, expected the key "inputs"'),
    "other name": ({"body": {"inputs": {"y": [1]}}}, "with y, expected x"),
    "five names": ({"body": {"inputs": {name: [1] for name in "abcde"}}}, "with a, b, c, d and 1 more, expected x"),
    "many names": ({"body": {"inputs": {name: [1] for name in "abcdef"}}}, "with a, b, c, d and 2 more, expected x"),
    "no name": ({"body": {"inputs": {}}}, "with nothing, expected x"),
    "image": ({"body": picture()}, "declares no preprocessing"),
    "zip": ({"body": b"PK\x03\x04 and no more"}, "cannot be read"),
}


def test_bad_bodies_are_refused_with_what_was_found() -> None:
    for name, (item, message) in BAD_BODIES.items():
        with pytest.raises(BadRequest, match=message):
            parse(item, X, None)
            pytest.fail(f"{name} was taken")


def test_names_of_several_inputs_are_checked() -> None:
    for body in (npz(a=np.ones(2)), npz(a=np.ones(2), c=np.ones(3)), {"inputs": {"a": [1, 1]}}):
        with pytest.raises(BadRequest, match="expected a, b"):
            parse({"body": body}, TWO, None)
    with pytest.raises(BadRequest, match="expected 2 entries"):
        parse({"body": [[1, 1]]}, TWO, None)
    with pytest.raises(BadRequest, match="expected .npz or JSON with a, b"):
        parse({"body": npy(np.ones(2))}, TWO, None)


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
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        damaged = data.copy()
        damaged[random.integers(4, len(data))] ^= 1 << random.integers(8)
        try:
            parse({"body": damaged}, X, None)
        except BadRequest:
            refused += 1
    assert refused > 200
