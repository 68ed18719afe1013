"""Files that would take gigabytes or hours, or steer the terminal, if they were read in good faith."""

import io
import json
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.attacks.files import entry, rewritten, safetensors, with_entry

Maker = Callable[[Path], Any]

TUPLE_OF_TOP = b"\x85"
HUGE = b"\x8a\x05\x00\x00\x00\x00\x10"  # LONG1: 2**36


def in_zip(body: bytes, name: str = "x") -> Maker:
    """Make a torch.save file whose pickle is ``body``."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}/data.pkl", body)
            archive.writestr(f"{name}/version", "3\n")
            archive.writestr(f"{name}/byteorder", "little")

    return make


def text(value: str) -> bytes:
    """Push a text."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def called(module: str, name: str, arguments: bytes) -> bytes:
    """Push what a call gives."""
    return f"c{module}\n{name}\n".encode() + b"(" + arguments + b"tR"


def dict_of(value: bytes, key: bytes = text("w")) -> bytes:
    """A whole pickle of one dict with one entry."""
    return b"\x80\x02}" + key + value + b"s."


def legacy(body: bytes) -> Maker:
    """Make a file in the format before torch 1.6 whose object is ``body``."""

    def make(path: Path) -> None:
        head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + body + pickle.dumps([], 2))

    return make


def saved(content: Any) -> Maker:
    """Make a torch.save file."""
    return lambda path: torch.save(content, path)


def with_attributes(attributes: dict[str, Any]) -> Maker:
    """A state_dict whose dict object has attributes, which hide its methods."""
    state = OrderedDict(w=torch.ones(2))
    state.__dict__.update({"~" + name[1:]: value for name, value in attributes.items()})

    def make(path: Path) -> None:
        source = path.with_suffix(".whole")
        torch.save(state, source)
        names = {b"~" + name[1:].encode(): name.encode() for name in attributes}

        def change(name: str, data: bytes) -> bytes:
            for old, new in names.items() if name.endswith("data.pkl") else ():
                data = data.replace(old, new)
            return data

        rewritten(source, path, change)
        source.unlink()

    return make


def parameter_with(**attributes: Any) -> Maker:
    """A state_dict whose parameter has attributes, which hide its methods."""
    value = torch.nn.Parameter(torch.ones(2))
    value.__dict__.update(attributes)
    return saved({"w": value})


def header(content: Any, data: bytes = bytes(8), length: int | None = None) -> Maker:
    """Make a safetensors file."""
    return lambda path: safetensors(path, content, data, length)


def long_header(path: Path) -> None:
    """A header of 33 MiB, most of it spaces."""
    safetensors(path, b"{" + b" " * (33 << 20) + b"}", b"", None)


def many_names(count: int) -> Maker:
    """A header of so many names of empty tensors."""
    return header({f"layer{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}, b"")


def sparse(claim: dict[str, Any] | None = None, size: int = 1 << 36) -> Maker:
    """A file of 64 GiB that the disk does not hold."""

    def make(path: Path) -> None:
        safetensors(path, claim or {"a": entry(0, 8)}, b"", None)
        os.truncate(path, size)

    return make


def sparse_whole(path: Path) -> None:
    """A sparse file whose header claims all of it."""
    size = 1 << 34
    raw = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + size)


def many_entries(path: Path) -> None:
    """A zip of more entries than any network has tensors."""
    with zipfile.ZipFile(path, "w") as archive:
        for k in range(2000):
            archive.writestr(f"x/{k}", b"")


def bomb_of_pickle(path: Path) -> None:
    """A deflated pickle of 65 MiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + b"N0" * (33 << 20) + b"N.")
        archive.writestr("x/pad", os.urandom(10 << 20))


def wrong_sum(path: Path) -> None:
    """One flipped bit in the weights."""
    torch.save({"w": torch.full((64,), 0.5)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<f", 0.5) * 8) + 2] ^= 4
    path.write_bytes(data)


def cut(share: float) -> Maker:
    """A file whose end is missing."""

    def make(path: Path) -> None:
        torch.save({"w": torch.ones(1000)}, path)
        os.truncate(path, int(path.stat().st_size * share))

    return make


def changed_pickle(old: bytes, new: bytes) -> Maker:
    """A state_dict of four numbers with other bytes in its pickle."""

    def make(path: Path) -> None:
        source = path.with_suffix(".whole")
        torch.save({"w": torch.ones(4)}, source)
        rewritten(source, path, lambda name, data: data.replace(old, new) if name.endswith("data.pkl") else data)
        source.unlink()

    return make


def legacy_claim(path: Path) -> None:
    """A file in the format before torch 1.6 whose storage claims 2**35 numbers."""
    torch.save({"w": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    data, claim = path.read_bytes(), b"\x8a\x05\x00\x00\x00\x00\x08"
    path.write_bytes(data.replace(b"K\x04Ntq", claim + b"Ntq"))
    assert claim in path.read_bytes()


def zip_bomb(path: Path) -> None:
    """An entry of 64 MiB of zeros, deflated."""
    source = path.with_suffix(".whole")
    torch.save({"w": torch.ones(4)}, source)
    with_entry(source, path, "x/data/9", bytes(64 << 20))
    source.unlink()


def doubled(times: int, opcode: bytes = b"\x86") -> bytes:
    """Push a tuple that holds itself twice, so many times over."""
    return b")" + b"".join(b"q\x00h\x00" + opcode for _ in range(times))


HOSTILE: dict[str, Maker] = {
    "bytearray of 64 GB": in_zip(dict_of(called("builtins", "bytearray", HUGE))),
    "bytearray in the old format": legacy(dict_of(called("builtins", "bytearray", HUGE))),
    "bytearray through a tensor's maker": in_zip(
        dict_of(
            called(
                "torch._tensor",
                "_rebuild_from_type_v2",
                b"cbuiltins\nbytearray\nctorch\nTensor\n" + HUGE + TUPLE_OF_TOP + b"}",
            )
        )
    ),
    "storage of 64 GB": in_zip(dict_of(called("torch.storage", "UntypedStorage", HUGE))),
    "tensor of 64 GB": in_zip(dict_of(called("torch", "FloatTensor", HUGE))),
    "new tensor of 64 GB": in_zip(dict_of(b"ctorch\nFloatTensor\n" + HUGE + TUPLE_OF_TOP + b"\x81")),
    "slow codec": in_zip(dict_of(called("_codecs", "encode", text("a" * 1000) + text("idna")))),
    "key of 2**45 parts": in_zip(dict_of(b"K\x01", doubled(45))),
    "value of 2**45 parts": in_zip(dict_of(doubled(45))),
    "key of 2**45 parts in the old format": legacy(dict_of(b"K\x01", doubled(45))),
    "lists in lists": in_zip(dict_of(b"]" * 5000 + b"a" * 4999)),
    "tuples in tuples": in_zip(dict_of(b"K\x01", b"N" + TUPLE_OF_TOP * 200_000)),
    "memo of 2**31": in_zip(dict_of(b"K\x01r\xff\xff\xff\x7f")),
    "long of 2 GB": in_zip(dict_of(b"\x8b\xff\xff\xff\x7f")),
    "text of 4 GB": in_zip(dict_of(b"X\xff\xff\xff\xff")),
    "bytes of 2**62": in_zip(dict_of(b"\x8e" + struct.pack("<Q", 1 << 62))),
    "bytes of 2**62 in the old format": legacy(dict_of(b"\x8e" + struct.pack("<Q", 1 << 62))),
    "number of many digits": in_zip(dict_of(b"L" + b"9" * 100_000 + b"L\n")),
    "stack that is empty": in_zip(b"\x80\x0200000."),
    "mark that is not there": in_zip(b"\x80\x02tt."),
    "no end": in_zip(b"\x80\x02" + b"N" * 1000),
    "pickle of 65 MiB": bomb_of_pickle,
    "shape of 2**60": changed_pickle(b"K\x04\x85", b"\x8a\x08" + struct.pack("<q", 1 << 60) + b"\x85"),
    "storage of 2**60": changed_pickle(b"K\x04tq", b"\x8a\x08" + struct.pack("<q", 1 << 60) + b"tq"),
    "storage of 2**35 in the old format": legacy_claim,
    "stride of 0": saved({"w": torch.ones(1).expand(1 << 40)}),
    "offset beyond the storage": changed_pickle(b"QK\x00K\x04", b"QM\xff\xffK\x04"),
    "negative shape": changed_pickle(b"K\x04\x85", b"J\xff\xff\xff\xff\x85"),
    "tensor without numbers": saved({"w": torch.ones(1 << 20, 1 << 20, device="meta")}),
    "zip bomb": zip_bomb,
    "wrong sum": wrong_sum,
    "half of a file": cut(0.5),
    "file without its last bytes": cut(0.99),
    "giant header": header(b"{}", length=1 << 62),
    "header of nested lists": header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "header that is a number": header(b"{1}     "),
    "header without tensors": header({"__metadata__": {}}, b""),
    "negative offsets": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}),
    "offsets of text": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}),
    "shape of 2**60 in a header": header({"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 8]}}),
    "negative shape in a header": header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
    "endless floats in a header": header({"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 8]}}),
    "bytes after the last tensor": header({"a": entry(0, 8)}, bytes(4096)),
    "float4": header({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}),
    "long header": long_header,
    "sparse file": sparse(),
    "sparse file that is whole": sparse_whole,
    "link to itself": lambda path: path.symlink_to(path),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/full"),
    "all -inf": saved({"w": torch.full((4, 4), -torch.inf)}),
    "keys of numbers": saved({k: torch.ones(1) for k in range(10)}),
    "names that move the cursor": saved({"\x1b]0;owned\x07\x1b[2J": torch.full((2,), torch.nan)}),
    "names that forge lines": saved({"a\nredpp-serve: all is well\r\n": torch.full((2,), torch.nan)}),
    "names that turn around": saved({"\u202egnp.exe\u2066\u200f": torch.full((2,), torch.nan)}),
    "name with NUL": saved({"a\x00b": torch.full((2,), torch.nan), "\u009b31m": torch.full((2,), torch.nan)}),
}
# They load, or are refused by the architecture, and must not fail on the way.
ODD: dict[str, Maker] = {
    "metadata of numbers": lambda path: torch.save(_with_metadata({1: 2, "module.x": 3, "": "v"}), path),
    "parameter that hides detach": parameter_with(detach=1, numel=2, is_floating_point=4, dim=5),
    "dict that hides its methods": with_attributes({"items": 1, "values": 1, "keys": 1, "get": 1, "copy": 1}),
    "metadata that is a number": with_attributes({"_metadata": 5}),
}


def _with_metadata(metadata: Any) -> Any:
    state = OrderedDict({"module.w": torch.ones(2), "module.b": torch.ones(1)})
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


def read_by_pickletools(data: bytes) -> list[str]:
    """The operations of a pickle, to prove that a maker makes what it says."""
    return [operation.name for operation, _, _ in pickletools.genops(io.BytesIO(data))]
