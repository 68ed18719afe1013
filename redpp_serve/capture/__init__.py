"""From a file to a graph: sniff the bytes, load without running code, build the architecture, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redpp_serve.capture.arch import build, load_into, preprocess_hints
from redpp_serve.capture.export import capture
from redpp_serve.capture.load import load_file
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph, InputSpec

__all__ = ["Captured", "capture_file"]


@dataclass(frozen=True)
class Captured:
    """A captured network.

    Attributes:
        graph: the network.
        source: where it came from: file, kind, sha256 and arch.
        messages: lines for the user about choices made on the way.
        hints: the preprocessing that the architecture declares, if any.
    """

    graph: Graph
    source: dict[str, Any]
    messages: list[str] = field(default_factory=list)
    hints: dict[str, Any] | None = None


def capture_file(
    path: Path,
    inputs: Sequence[InputSpec],
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Captured:
    """Load a file and capture the network in it.

    Args:
        path: state_dict (.pt, .pth, .safetensors), pickled module, TorchScript or .pt2; told apart by its bytes.
        inputs: one entry for each input of the network, without the batch dimension.
        arch: ``torchvision:NAME``, ``timm:NAME`` or ``file.py:factory``; needed for a state_dict.
        arch_args: keyword arguments of the architecture.
        trust: load formats that can run code.

    Raises:
        RedppError: see `load.load_file`, `arch.build`, `arch.load_into`, `export.capture`.
    """
    loaded = load_file(path, trust=trust)
    messages = list(loaded.messages)
    network = loaded.exported or loaded.module
    if loaded.state_dict is not None:
        if arch is None:
            raise RedppError(
                f"{path} holds weights only ({loaded.kind.value})",
                "the architecture that the weights belong to",
                "add --arch torchvision:NAME, --arch timm:NAME or --arch path/to/file.py:factory",
            )
        network = build(arch, dict(arch_args or {}))
        messages += load_into(network, loaded.state_dict)
        network.eval()  # weights have no mode to be told about
    elif arch is not None:
        messages.append(f"--arch {arch} is not needed: the file brings its own ({loaded.kind.value})")
    assert network is not None
    if not inputs:
        raise RedppError(
            "no --input was given",
            "the shape of one input without its batch dimension",
            "add --input 3x224x224 (repeat it for a network with several inputs)",
        )
    graph = capture(network, inputs, messages)
    source = {"file": path.name, "kind": loaded.kind.value, "sha256": loaded.sha256, "arch": arch}
    return Captured(graph, source, messages, preprocess_hints(network))
