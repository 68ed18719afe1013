"""Bodies of requests: what is accepted becomes exactly the sent tensor, what is refused says why."""

import base64
import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from redpp_serve.capture.preprocessing import choose_preprocess
from redpp_serve.graph.graph import InputSpec, Size
from redpp_serve.handlers.payload import BadRequest, parse, parse_items
from tests.support.served import PREPROCESS, SHAPE, npy, picture

X = (InputSpec("x", SHAPE),)
TWO = (InputSpec("a", (2,)), InputSpec("b", (3,), "int64"))
VALUES = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)


def npz(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


def encoded(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


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
        npz(b=np.arange(3), a=np.ones(2)),
        {"inputs": {"a": [1, 1], "b": [0, 1, 2]}},
        {"inputs": {"b": [0, 1, 2], "a": [1, 1]}},
        {"inputs": [[1, 1], [0, 1, 2]]},
        [[1, 1], [0, 1, 2]],
    ):
        a, b = parse({"body": body}, TWO, None)
        assert a.tolist() == [1.0, 1.0] and a.dtype == torch.float32, body
        assert b.tolist() == [0, 1, 2] and b.dtype == torch.int64, body


def test_an_image_goes_through_the_declared_preprocessing() -> None:
    for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF"):
        data = picture(kind=kind)
        (tensor,) = parse({"body": data}, X, PREPROCESS)
        assert torch.equal(tensor, PREPROCESS.image(data)), kind


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 3)])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32", "float16"])
def test_a_network_of_bytes_takes_images(shape: tuple[int, ...], dtype: str) -> None:
    spec = InputSpec("x", shape, dtype)
    preprocess, _ = choose_preprocess("bytes", None, (spec,))
    assert preprocess is not None
    (tensor,) = parse({"body": picture()}, (spec,), preprocess)
    assert tensor.shape == shape and str(tensor.dtype) == f"torch.{dtype}"
    pixels = np.asarray(Image.open(io.BytesIO(picture())))
    assert (tensor.numpy() == (pixels if shape[2] == 3 else pixels.transpose(2, 0, 1))).all()


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
    "wrong shape": ({"body": npy(VALUES[:2])}, r"\(2, 8, 8\), expected \(3, 8, 8\), or \(N, 3, 8, 8\)"),
    "batch of two": ({"body": npy(np.stack([VALUES] * 2))}, "2 items, expected one"),
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
    short, other = npz(a=np.ones(2)), npz(a=np.ones(2), c=np.ones(3))
    long = npz(a=np.ones(2), b=np.arange(3), c=np.ones(3))
    for body in (short, other, long, {"inputs": {"a": [1, 1]}}, {"inputs": {"a": [1, 1], "b": [0, 1, 2], "c": [1]}}):
        with pytest.raises(BadRequest, match="expected a, b"):
            parse({"body": body}, TWO, None)
    with pytest.raises(BadRequest, match="expected 2 entries"):
        parse({"body": [[1, 1]]}, TWO, None)
    with pytest.raises(BadRequest, match="expected .npz, JSON or a form with a, b"):
        parse({"body": npy(np.ones(2))}, TWO, None)


def test_integers_that_the_network_cannot_read_are_refused() -> None:
    ids = (InputSpec("ids", (3,), "int64", ((0, 9),), ((-10, 9),)),)
    columns = (InputSpec("ids", (2, 2), "int32", limits=((0, 9), (0, 4))),)
    assert parse({"body": {"inputs": [-10, 9, 0]}}, ids, None)[0].tolist() == [-10, 9, 0]
    assert parse({"body": {"inputs": [[9, 4], [0, 0]]}}, columns, None)[0].tolist() == [[9, 4], [0, 0]]
    with pytest.raises(BadRequest, match="input 'ids' with values from 0 to 10, expected -10 to 9"):
        parse({"body": npy(np.array([0, 10, 3]))}, ids, None)
    with pytest.raises(BadRequest, match=r"input 'ids' with value 5 at \[1, 1\], expected 0 to 4"):
        parse({"body": {"inputs": [[9, 4], [0, 5]]}}, columns, None)


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


def test_an_archive_of_many_entries_is_refused_before_its_table_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number in range(70_000):  # so many that the table's size stands in the record for large archives
            archive.writestr(zipfile.ZipInfo(f"{number}"), b"")
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("the table was read"))
    with pytest.raises(BadRequest, match="list of entries has"):
        parse({"body": stream.getvalue()}, X, None)


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


def test_inputs_of_several_sizes() -> None:
    height, length = Size("H", 8, 24, 8), Size("L", 2, 5)
    picture = (InputSpec("x", (2, 16), varying=((1, height),)),)
    for columns in (8, 16, 24):
        values = np.zeros((2, columns), np.float32)
        for body in (npy(values), npy(values[None]), {"inputs": values.tolist()}):
            assert parse({"body": body}, picture, None)[0].shape == (2, columns)
    for shape in ((2, 9), (2, 32), (3, 8), (0, 2, 8), (2, 2, 9), (8,)):
        with pytest.raises(BadRequest, match=r"expected 2xH, H of 8\.\.24/8"):
            parse({"body": npy(np.zeros(shape, np.float32))}, picture, None)
    long = (InputSpec("x", (4,), varying=((0, Size("L", 4, 40_000)),)),)
    assert parse({"body": npz(compressed=True, x=np.zeros(40_000))}, long, None)[0].shape == (40_000,)
    pair = tuple(InputSpec(name, (3,), "int64", varying=((0, length),)) for name in ("ids", "mask"))
    assert [x.shape for x in parse({"body": {"inputs": {"ids": [1] * 4, "mask": [1] * 4}}}, pair, None)] == [(4,)] * 2
    with pytest.raises(BadRequest, match="inputs with L of 4 and of 5 in one request, expected the same"):
        parse({"body": {"inputs": {"ids": [1] * 4, "mask": [1] * 5}}}, pair, None)


def test_an_image_becomes_the_nearest_size() -> None:
    side = Size("S", 16, 64, 16)
    wide = InputSpec("x", (3, 32, 32), varying=((1, Size("H", 16, 64, 16)), (2, Size("W", 16, 64, 8))))
    square = InputSpec("x", (3, 32, 32), varying=((1, side), (2, side)))
    image = io.BytesIO()
    Image.fromarray(np.zeros((40, 90, 3), np.uint8)).save(image, "PNG")
    for spec, shape in ((wide, (3, 48, 64)), (square, (3, 64, 64))):
        preprocess, _ = choose_preprocess("crop", None, [spec])
        (x,) = parse({"body": image.getvalue()}, (spec,), preprocess)
        assert x.shape == shape


def test_a_leading_dimension_counts_items() -> None:
    several = np.stack([VALUES, -VALUES, 2 * VALUES])
    for body in (npy(several), npz(x=several), several.tolist(), {"inputs": {"x": several.tolist()}}):
        found = parse_items({"body": body}, X, None)
        assert not found.one and not found.listed and torch.equal(found.tensors[0], torch.from_numpy(several))
    pair = parse_items({"body": npz(a=np.ones((3, 2)), b=np.arange(9).reshape(3, 3))}, TWO, None)
    assert [x.shape for x in pair.tensors] == [(3, 2), (3, 3)]
    with pytest.raises(BadRequest, match="2 and 1 items, expected as many in each"):
        parse_items({"body": npz(a=np.ones((2, 2)), b=np.arange(3))}, TWO, None)
    with pytest.raises(BadRequest, match="3 items, expected one"):
        parse({"body": npy(several)}, X, None)


def test_instances_list_items_of_any_kind() -> None:
    image = picture()
    items = [VALUES.tolist(), {"x": VALUES.tolist()}, encoded(npy(VALUES)), encoded(image), {"x": encoded(image)}]
    found = parse_items({"body": {"instances": items}}, X, PREPROCESS)
    shown = PREPROCESS.image(image)
    assert found.listed
    assert torch.equal(found.tensors[0], torch.stack([torch.from_numpy(VALUES)] * 3 + [shown] * 2))
    two = parse_items({"body": {"instances": [{"a": [1, 2], "b": encoded(npy(np.arange(3)))}] * 2}}, TWO, None)
    assert [x.tolist() for x in two.tensors] == [[[1, 2]] * 2, [[0, 1, 2]] * 2]
    for wrong in ([], "abc", [VALUES[:1].tolist()], [npy(VALUES).hex()], [np.stack([VALUES] * 2).tolist()]):
        with pytest.raises(BadRequest, match="expected"):
            parse_items({"body": {"instances": wrong}}, X, PREPROCESS)


def test_files_in_base64() -> None:
    for document in (encoded(npy(VALUES)), {"inputs": encoded(npy(VALUES))}, {"inputs": {"x": encoded(npy(VALUES))}}):
        (tensor,) = parse({"body": json.dumps(document)}, X, None)
        assert torch.equal(tensor, torch.from_numpy(VALUES))
    for wrong in ("", "?", "é", "AAAA", 3, base64.b64encode(npy(VALUES)).decode()[:-2]):
        with pytest.raises(BadRequest, match="expected"):
            parse({"body": {"inputs": {"b64": wrong}}}, X, None)


def test_a_form_with_one_file_for_each_input() -> None:
    a, b = parse({"a": npy(np.ones(2)), "b": b"[0, 1, 2]"}, TWO, None)
    assert a.tolist() == [1.0, 1.0] and b.tolist() == [0, 1, 2]
    (tensor,) = parse({"picture": picture()}, X, PREPROCESS)
    assert torch.equal(tensor, PREPROCESS.image(picture()))
    named = (InputSpec("data", (2,)), InputSpec("body", (1,)))
    assert [x.tolist() for x in parse({"body": b"[3]", "data": "[1, 2]"}, named, None)] == [[1, 2], [3]]
    with pytest.raises(BadRequest, match="a form with a, c, expected a, b"):
        parse({"a": b"[1, 2]", "c": b"[1]"}, TWO, None)


def test_bytes_are_pixels_that_are_normalised_or_refused() -> None:
    image = picture()
    pixels = np.asarray(Image.open(io.BytesIO(image))).transpose(2, 0, 1)
    wanted = PREPROCESS.image(image)
    for body in (npy(pixels), npy(pixels.astype("int64")), npz(x=pixels), pixels.tolist(), encoded(npy(pixels))):
        (tensor,) = parse({"body": body}, X, PREPROCESS)
        assert torch.equal(tensor, wanted)
    assert torch.equal(parse_items({"body": npy(pixels[None].repeat(2, 0))}, X, PREPROCESS).tensors[0][1], wanted)
    with pytest.raises(BadRequest, match="declares no preprocessing"):
        parse({"body": npy(pixels)}, X, None)
    for beyond in (pixels.astype("int32") + 1000, pixels.astype("int32") - 300):
        with pytest.raises(BadRequest, match="expected pixels of 0 to 255"):
            parse({"body": npy(beyond)}, X, PREPROCESS)
    kept, _ = choose_preprocess("bytes", None, X)
    assert torch.equal(parse({"body": npy(pixels)}, X, kept)[0], torch.from_numpy(pixels.astype("float32")))
