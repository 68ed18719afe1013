"""Forged artifacts: whole, with matching checksums, but for the one thing that the loader must refuse."""

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save

from redpp_serve.files import deterministic_zip
from redpp_serve.graph.artifact import ENTRIES, build
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref

Edit = Callable[[dict[str, Any]], Any]


def tiny() -> Graph:
    """relu(x @ w.T + b) for x (N, 8); w (16, 8) has four distinct values and so is stored as a codebook."""
    w = (torch.arange(128) % 4).float().view(16, 8) - 1.5
    nodes = (
        Node("h", "aten.linear.default", (Ref("x"), Ref("w"), Ref("b"))),
        Node("y", "aten.relu.default", (Ref("h"),)),
    )
    return Graph((InputSpec("x", (8,)),), {"w": w, "b": torch.linspace(-1, 1, 16)}, nodes, ("y",))


def entries(data: bytes) -> dict[str, bytes]:
    """An artifact's files by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def forged(graph: Edit | bytes | None = None, weights: bytes | None = None, manifest: Edit | None = None) -> bytes:
    """`tiny` with its graph document edited in place (or replaced), other weights, and the checksums to match."""
    files = entries(build(tiny(), {"name": "tiny"}).data)
    if isinstance(graph, bytes):
        files["graph.json"] = graph
    elif graph is not None:
        document = json.loads(files["graph.json"])
        graph(document)
        files["graph.json"] = json.dumps(document).encode()
    files["weights.safetensors"] = weights if weights is not None else files["weights.safetensors"]
    listing = json.loads(files["manifest.json"])
    listing["sha256"] = {name: hashlib.sha256(files[name]).hexdigest() for name in ENTRIES[1:]}
    if manifest is not None:
        manifest(listing)
    files["manifest.json"] = json.dumps(listing).encode()
    return deterministic_zip(files)


def tensors(**changed: torch.Tensor | None) -> bytes:
    """The weights file of `tiny`, some tensors changed, added or (None) left out; ``__`` in a name stands for ``:``."""
    stored: dict[str, torch.Tensor | None] = {
        "b": torch.linspace(-1, 1, 16),
        "w:codebook": torch.tensor([-1.5, -0.5, 0.5, 1.5]),
        "w:indices": torch.full((32,), 0b11100100, dtype=torch.uint8),
    }
    stored.update({name.replace("__", ":"): tensor for name, tensor in changed.items()})
    return save({name: tensor for name, tensor in stored.items() if tensor is not None})


def safetensors_bytes(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header (JSON or bytes), true to the format only as far as the header is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body
