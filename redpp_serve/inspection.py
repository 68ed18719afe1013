"""What a file is and what could be pruned in it, without changing or writing anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .capture import Captured
from .capture.sniff import refusal, scan, sniff
from .graph.channels import find_inner_channels
from .graph.layers import find_layers, mac_count, parameter_count
from .report.text import count, layer_table


@dataclass(frozen=True)
class Inspection:
    """Facts by name, and a record for each layer where the network could be captured."""

    facts: dict[str, Any]
    layers: list[dict[str, Any]]
    next_step: str

    def to_json(self) -> dict[str, Any]:
        return {**self.facts, "layers": self.layers}

    def to_text(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"{key:<{width}}  {value}" for key, value in self.facts.items() if value is not None]
        if self.layers:
            lines += ["", layer_table(self.layers)]
        return "\n".join([*lines, "", self.next_step])


def describe_file(path: Path) -> Inspection:
    """What the bytes are, without loading them.

    Raises:
        RedppError: nothing that this tool could ever load.
    """
    kind = sniff(path)
    if not kind.loadable:
        raise refusal(path, kind)
    facts: dict[str, Any] = {"file": path.name, "kind": kind.value, "bytes": path.stat().st_size}
    if kind.runs_code:
        unsafe = scan(path).unsafe if "pickle" in kind.value else ()
        facts["runs code"] = f"when loaded{': ' + ', '.join(unsafe[:5]) if unsafe else ''}; needs --trust-file"
    step = "add --input 3x224x224 (and --arch for a state_dict) to see its layers"
    return Inspection(facts, [], step)


def describe_network(captured: Captured, exclude: tuple[str, ...]) -> Inspection:
    """The layers of a captured network: which could be narrowed, and why the others could not."""
    graph = captured.graph
    sets, closed = find_inner_channels(graph, exclude)
    open_layers = {inner.producer.name: inner for inner in sets}
    layers = []
    for layer in find_layers(graph):
        layers.append({
            "name": layer.name, "op": layer.node.op.split(".")[1], "shape": list(layer.shape),
            "parameters": graph.tensors[layer.weight].numel(), "macs": layer.macs,
            "merge": {"channels": layer.shape[0], "reason": closed.get(layer.name, "")},
        })  # fmt: skip
    touched = {reader.name for inner in sets for reader in (inner.producer, *inner.depthwise, *(c for c, _ in inner.consumers))}
    share = sum(r["macs"] for r in layers if r["name"] in touched) / max(1, sum(r["macs"] for r in layers))
    facts = {
        **captured.source, "inputs": ", ".join(f"{'x'.join(map(str, i.shape))} {i.dtype}" for i in graph.inputs),
        "operations": len(graph.nodes), "parameters": count(parameter_count(graph)), "MACs": count(mac_count(graph)),
        "can be narrowed": f"outputs of {len(open_layers)} of {len(layers)} layers; they and their readers are {share:.0%} of the MACs",
    }  # fmt: skip
    facts["sha256"] = facts["sha256"][:16]
    for k, message in enumerate(captured.messages):
        facts[f"note {k + 1}"] = message
    return Inspection(facts, layers, "next: redpp-serve package with the same arguments")
