"""Pickles of tensors that claim far more than they store, or that make Python's own containers slow."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.attacks.bombs import HUGE, TUPLE_OF_TOP, Maker, called, dict_of, in_zip, legacy, text

PRIME = (1 << 61) - 1  # Python's hash of a whole number is its remainder by this one
SOME, MANY = 12_000, 60_000  # more than are read; as many of one hash take Python a minute


def long(value: int) -> bytes:
    """Push a whole number of any size."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def colliding(count: int, key: Callable[[int], bytes]) -> bytes:
    """Push a dict of so many keys."""
    return b"}(" + b"".join(key(k) + b"N" for k in range(1, count + 1)) + b"u"


def numbers(k: int) -> bytes:
    """Push a whole number whose hash is 0."""
    return long(k * PRIME)


def complexes(k: int) -> bytes:
    """Push a complex number whose hash is 0: the imaginary part's is multiplied by 1000003."""
    return called("builtins", "complex", b"G" + struct.pack(">d", -1000003.0 * k) + b"G" + struct.pack(">d", float(k)))


def pairs(count: int) -> bytes:
    """Push a list of pairs, as the first release of Python's OrderedDict was pickled."""
    return b"](" + b"".join(b"](" + numbers(k) + b"Ne" for k in range(1, count + 1)) + b"e"


def in_list(count: int) -> bytes:
    """Push a list of whole numbers whose hash is 0."""
    return b"](" + b"".join(map(numbers, range(1, count + 1))) + b"e"


def storage(kind: str = "FloatStorage", count: int = 4) -> bytes:
    """Push the storage of so many numbers in the entry ``data/0``."""
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu") + long(count) + b"tQ"


def with_data(value: bytes) -> Maker:
    """Make a torch.save file of one value, with 16 bytes in the entry ``data/0``."""

    def make(path: Path) -> None:
        in_zip(dict_of(value))(path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("x/data/0", bytes(16))

    return make


def many(value: Callable[[], bytes], write: Callable[[bytes], Maker] = in_zip) -> Maker:
    """Make a file of one value that has many parts, which are made when the file is."""

    def make(path: Path) -> None:
        write(dict_of(value()))(path)

    return make


def rebuilt(name: str, arguments: bytes, kind: str = "FloatStorage") -> bytes:
    """Push what a function of ``torch._utils`` makes of a storage and other arguments."""
    return called("torch._utils", name, storage(kind) + arguments)


def tensor(shape: bytes, strides: bytes, offset: bytes = b"K\x00") -> bytes:
    """Push a tensor of the storage, with a shape and strides of the file's choice."""
    hooks = called("collections", "OrderedDict", b"")
    return rebuilt("_rebuild_tensor_v2", offset + shape + strides + b"\x89" + hooks)


def layout(name: str) -> bytes:
    """Push one of torch's layouts."""
    return called("torch.serialization", "_get_layout", text(name))


def sparse(name: str, data: bytes) -> bytes:
    """Push a sparse tensor."""
    return called("torch._utils", "_rebuild_sparse_tensor", layout(name) + data)


def shared_views(count: int) -> bytes:
    """Push a dict of so many tensors that all show the same number 2**20 times."""
    one = tensor(long(1 << 20) + TUPLE_OF_TOP, b"K\x00" + TUPLE_OF_TOP)
    return b"}(" + b"".join(text(f"w{k}") + one for k in range(count)) + b"u"


ROW = b"K\x04" + TUPLE_OF_TOP
WIDE = HUGE + TUPLE_OF_TOP
ONE_STEP = b"K\x01" + TUPLE_OF_TOP
AFFINE = b"(ctorch\nper_tensor_affine\nG" + struct.pack(">d", 1.0) + b"K\x00t\x89" + b"}"
INDEX = rebuilt("_rebuild_tensor_v2", b"K\x00K\x01K\x01\x86K\x01K\x01\x86\x89}", "LongStorage")
POINTERS = rebuilt("_rebuild_tensor_v2", b"K\x00" + b"K\x02" + TUPLE_OF_TOP + ONE_STEP + b"\x89}", "LongStorage")

PICKLES: dict[str, Maker] = {
    "whole numbers of one hash": many(lambda: colliding(MANY, numbers)),
    "whole numbers of one hash in the old format": many(lambda: colliding(MANY, numbers), legacy),
    "negative numbers of one hash": many(lambda: colliding(MANY, lambda k: numbers(-k))),
    "tuples of one hash": many(lambda: colliding(SOME, lambda k: numbers(k) + TUPLE_OF_TOP)),
    "complex numbers of one hash": many(lambda: colliding(SOME, complexes)),
    "a set of one hash": many(lambda: called("builtins", "set", in_list(MANY))),
    "a counter of one hash": many(lambda: called("collections", "Counter", in_list(MANY))),
    "an ordered dict of one hash": many(lambda: called("collections", "OrderedDict", pairs(SOME))),
    "a thousand views of one number": with_data(shared_views(1000)),
    "quantized tensor of 64 GB": with_data(
        rebuilt("_rebuild_qtensor", b"K\x00" + WIDE + ONE_STEP + AFFINE, "QInt8Storage")
    ),
    "sparse tensor of 2**36 rows": with_data(
        sparse("torch.sparse_coo", b"(" + INDEX + tensor(ONE_STEP, ONE_STEP) + WIDE + b"t")
    ),
    "compressed tensor of 2**36 rows": with_data(
        sparse("torch.sparse_csr", b"(" + POINTERS + POINTERS + tensor(ROW, ONE_STEP) + HUGE + b"K\x04\x86t")
    ),
    "tensor without memory": with_data(
        called("torch._utils", "_rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n" + WIDE + ONE_STEP + b"\x89")
    ),
    "tensor beyond its storage": with_data(tensor(WIDE, ONE_STEP)),
    "large strides": with_data(tensor(ROW, WIDE)),
    "negative strides": with_data(tensor(ROW, b"J\xff\xff\xff\xff" + TUPLE_OF_TOP)),
    "strides that overflow": with_data(tensor(b"K\x02K\x02\x86", long(1 << 62) + long(1 << 62) + b"\x86")),
    "offset of 2**62": with_data(tensor(ROW, ONE_STEP, long(1 << 62))),
    "storage that claims 64 GB": with_data(
        called("torch._utils", "_rebuild_tensor_v2", storage(count=1 << 34) + b"K\x00" + WIDE + ONE_STEP + b"\x89}")
    ),
    "tensor whose state is larger": with_data(
        tensor(ROW, ONE_STEP) + b"(" + storage() + b"K\x00" + WIDE + ONE_STEP + b"tb"
    ),
}
# Just within the limits, so that following them takes seconds.
LONG: dict[str, Maker] = {
    "a million entries of the memo": many(
        lambda: b"K\x01" + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - k) for k in range(1_000_000))
    ),
    "just as many operations as are read": many(lambda: b"N0" * 1_499_990 + b"K\x01"),
    "a million short lists": many(lambda: b"](" + b"]" * 1_000_000 + b"e"),
}
# They load, and must not fail on the way.
HARMLESS: dict[str, Maker] = {
    "2**60 times nothing": with_data(tensor(b"K\x00" + long(1 << 60) + b"\x86", b"K\x00K\x00\x86")),
    "a thousand dimensions": with_data(tensor(b"(" + b"K\x01" * 1000 + b"t", b"(" + b"K\x01" * 1000 + b"t")),
}
