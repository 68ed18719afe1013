"""Files that a loader must refuse. Those that attack do so by creating ``marker``, whose absence proves them inert."""

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A small network whose class pickles by reference to this file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Reduces:
    """Unpickling this creates ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.marker, "w")


class RunsOnLoad(nn.Module):
    """A module whose TorchScript form writes ``marker`` while it is loaded, not while it is saved."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = str(marker)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.marker = state[0]
        self.training = state[1]
        self.weight = torch.zeros(1)
        torch.save(self.marker, self.marker)


def poisoned_pickle(path: Path, marker: Path, *, legacy: bool = False) -> Path:
    """A checkpoint whose tensors have an attacking object beside them."""
    content = {"state_dict": Net().state_dict(), "epoch": Reduces(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def torchscript(path: Path, module: nn.Module) -> Path:
    """``module`` scripted and saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
    return path


def exported(path: Path) -> Path:
    """`Net` as an exported program."""
    with path.open("wb") as file:
        torch.export.save(torch.export.export(Net().eval(), (torch.zeros(2, 1, 8, 8),)), file)
    return path


def poisoned_export(path: Path, marker: Path) -> Path:
    """An exported program whose example inputs are an attacking pickle."""
    poison = io.BytesIO()
    torch.save(Reduces(marker), poison)
    clean = exported(path.with_suffix(".clean"))
    return rewritten(clean, path, lambda name, data: poison.getvalue() if "sample_inputs" in name else data)


def rewritten(source: Path, path: Path, change: Callable[[str, bytes], bytes], compress: int = 0) -> Path:
    """The zip ``source`` with ``change(name, bytes)`` in place of each entry's bytes."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compress) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return path


def saved_on_gpu(source: Path, path: Path) -> Path:
    """A torch.save zip with ``cuda:0`` as the place of its storages, as saving on a GPU writes it."""
    here, there = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    return rewritten(source, path, lambda name, data: data.replace(here, there) if name.endswith("data.pkl") else data)


def with_entry(source: Path, path: Path, name: str, data: bytes = b"x") -> Path:
    """The zip ``source`` and one entry more, which may have any name, also one that is there already."""
    path.write_bytes(source.read_bytes())
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")
        archive.writestr(name, data)
    return path


def safetensors(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> Path:
    """A safetensors file from its parts; ``length`` overrides the header length that the file declares."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(begin: int, end: int, size: int = 2) -> dict[str, Any]:
    """One tensor of a safetensors header: ``size`` numbers of float32 in bytes ``begin`` to ``end``."""
    return {"dtype": "F32", "shape": [size], "data_offsets": [begin, end]}


# header, data, and the header length to declare where it is not the true one
SAFETENSORS: dict[str, tuple[dict[str, Any] | bytes, bytes, int | None]] = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), None),
    "same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), None),
    "out of range": ({"a": entry(0, 8)}, bytes(4), None),
    "far out of range": ({"a": entry(1 << 62, (1 << 62) + 8)}, bytes(8), None),
    "size against shape": ({"a": entry(0, 8, size=3)}, bytes(8), None),
    "overflowing shape": ({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 8]}}, bytes(8), None),
    "hole": ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), None),
    "giant header": ({"a": entry(0, 8)}, bytes(8), (1 << 63) - 1),
    "header beyond the file": ({"a": entry(0, 8)}, bytes(8), 10_000),
    "header no json": (b"{not json at all", bytes(8), None),
    "unknown dtype": ({"a": {**entry(0, 8), "dtype": "X9"}}, bytes(8), None),
}
