"""From a file to a graph: sniff the bytes, load without running code, build the architecture, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from redpp_serve.capture.arch import build
from redpp_serve.capture.checkpoints import load_into
from redpp_serve.capture.export import capture
from redpp_serve.capture.hugging_face import is_part, parts_in_words, suggested_arch
from redpp_serve.capture.load import load_file
from redpp_serve.capture.onnx_network import OnnxNetwork
from redpp_serve.capture.onnx_reader import settle_inputs
from redpp_serve.capture.preprocess_hints import preprocess_hints
from redpp_serve.errors import RedppError
from redpp_serve.graph.class_scores import check_classes, class_outputs, may_hold_classes
from redpp_serve.graph.graph import Graph, InputSpec

__all__ = ["Captured", "capture_file"]


@dataclass(frozen=True)
class Captured:
    """A captured network.

    Attributes:
        graph: the network.
        source: where it came from: file, kind, sha256 and arch.
        messages: lines for the user about choices made on the way.
        hints: the preprocessing that the architecture or a file beside the weights declares, if any.
    """

    graph: Graph
    source: dict[str, Any]
    messages: list[str] = field(default_factory=list)
    hints: dict[str, Any] | None = None


def capture_file(  # noqa: PLR0913 - the options of the command, given by keyword
    path: Path,
    inputs: Sequence[InputSpec],
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust: bool = False,
    weights_key: str | None = None,
    input_args: Mapping[str, Any] | None = None,
    classes: tuple[str, ...] = (),
) -> Captured:
    """Load a file and capture the network in it.

    Args:
        path: state_dict (.pt, .pth, .safetensors), pickled module, TorchScript or .pt2, told apart by its bytes; or an
            index of several files, or a folder with one of these.
        inputs: one entry for each input of the network, without the batch dimension.
        arch: ``torchvision:NAME``, ``timm:NAME``, ``transformers:CLASS`` or ``file.py:factory``; for a state_dict.
        arch_args: keyword arguments of the architecture.
        trust: load formats that can run code.
        weights_key: which network to take of a file with several, see `load.load_file`.
        input_args: further arguments of forward, which stay as they are.
        classes: outputs that hold class scores, or ``none``; by default told from the network.

    Raises:
        RedppError: see `load.load_file`, `arch.build`, `checkpoints.load_into`, `export.capture`, `check_classes`.
    """
    loaded = load_file(path, trust=trust, key=weights_key)
    messages = list(loaded.messages)
    network = loaded.exported or loaded.module
    folder = path if path.is_dir() else path.parent
    if loaded.state_dict is not None:
        if arch is None:
            raise RedppError(
                f"{path} holds weights only ({loaded.kind.value})",
                "the architecture that the weights belong to",
                f"add --arch {suggested}, which its config.json names"
                if (suggested := suggested_arch(folder))
                else "add --arch torchvision:NAME, --arch timm:NAME or --arch path/to/file.py:factory",
            )
        network = build(arch, dict(arch_args or {}), folder)
        messages += load_into(network, loaded.state_dict, part=_in_transformers(arch) and is_part(network, folder))
        network.eval()  # weights have no mode to be told about
    elif arch is not None:
        messages.append(f"--arch {arch} is not needed: the file brings its own ({loaded.kind.value})")
    assert network is not None
    if isinstance(network, OnnxNetwork):
        inputs = settle_inputs(network, inputs)
        messages += network.messages
    if not inputs:
        raise RedppError(
            "no --input was given",
            "the shape of one input without its batch dimension",
            "add --input 3x224x224 (repeat it for a network with several inputs)",
        )
    try:
        graph = capture(network, inputs, messages, input_args)
    except RedppError as error:
        if not _in_transformers(arch) or not (parts := parts_in_words(type(network).__name__)):
            raise
        raise RedppError(error.found, error.expected, f"{error.do}; or take one part of it: {parts}") from error
    if classes:
        graph = replace(graph, classes=check_classes(graph, classes))
    elif not any(class_outputs(graph).values()) and (
        wide := [n for n, fits in may_hold_classes(graph).items() if fits]
    ):
        messages.append(
            f"nothing says that {' or '.join(wide)} holds class scores, so no agreement of classes is told; add "
            f"--classes {wide[0]} if it does"
        )
    source: dict[str, Any] = {"file": path.name, "kind": loaded.kind.value, "sha256": loaded.sha256, "arch": arch}
    if input_args:
        source["input_args"] = dict(input_args)
    return Captured(graph, source, messages, preprocess_hints(network, arch, path, messages))


def _in_transformers(arch: str | None) -> bool:
    return (arch or "").startswith("transformers:")
