"""Keep the state of a long computation in a file, so that an interrupted run goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from redpp_serve.files import write_atomically
from redpp_serve.graph.graph import Graph


class Checkpoint:
    """A file of tensors and values that only the computation which wrote it can read.

    Args:
        path: the file; with None nothing is kept.
        key: `fingerprint` of everything that decides the result.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and values kept last; None where there are none, or another run's, or damaged ones."""
        if self._path is None:
            return None
        try:
            with safe_open(self._path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self._key:
                    return None
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names}, json.loads(metadata["values"])
        except (SafetensorError, OSError, KeyError, ValueError):
            return None  # a checkpoint only saves time: a damaged one is made again

    def keep(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Replace the file by these tensors and values, which JSON must be able to hold."""
        if self._path is not None:
            metadata = {"key": self._key, "values": json.dumps(values)}
            data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata=metadata)
            write_atomically(self._path, data)


def fingerprint(graphs: Iterable[Graph], tensors: Iterable[Tensor], *rest: object) -> str:
    """Return a digest of graphs, tensors and anything else whose ``repr`` says what it is."""
    digest = hashlib.sha256(repr(rest).encode())
    all_tensors = list(tensors)
    for graph in graphs:
        digest.update(repr((graph.inputs, graph.nodes, graph.outputs, sorted(graph.tensors))).encode())
        all_tensors += [tensor for _, tensor in sorted(graph.tensors.items())]
    for tensor in all_tensors:
        digest.update(repr((tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def frontier_of(checkpoint: Path) -> Path:
    """Return the file that keeps the frontier of the run with a checkpoint."""
    return checkpoint.with_name(checkpoint.name.removesuffix(".inputs.safetensors") + ".frontier.json")
