"""Describing a file and what could be pruned in it, without changing or writing anything."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpp_serve.capture import Captured
from redpp_serve.capture.sniff import FileKind, refusal, scan, shorten, sniff
from redpp_serve.channels.coupling import ChannelSet, Coupling, couple
from redpp_serve.graph.layers import find_layers, mac_count, parameter_count
from redpp_serve.layer_times import LayerTimes
from redpp_serve.report.data import Layer, LayerMerge
from redpp_serve.report.formats import count, printable, size
from redpp_serve.report.text import layer_table

_WEIGHTS = (FileKind.STATE_DICT, FileKind.LEGACY_STATE_DICT, FileKind.SAFETENSORS)
_SHOW = {"bytes": size, "parameters": count, "MACs": count}
_WIDTH = 110
_DIGEST_SHOWN = 16  # of 64 characters, enough to tell files apart by eye


@dataclass(frozen=True)
class Inspection:
    """What is known of a file.

    Attributes:
        facts: texts and numbers by name.
        layers: a record for each layer, if the network was captured.
        notes: lines for the user.
        next_step: what to do next.
        sets: a record for each set of coupled channels, if they were asked for.
    """

    facts: dict[str, Any]
    layers: list[Layer]
    notes: list[str]
    next_step: str
    sets: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and texts, with keys in lower case without spaces."""
        facts = {key.lower().replace(" ", "_"): value for key, value in self.facts.items()}
        found = {**facts, "notes": self.notes, "layers": [layer.to_json() for layer in self.layers]}
        return found if self.sets is None else {**found, "channel_sets": self.sets}

    def to_text(self) -> str:
        """Return facts, the table of layers or channel sets with reasons, and the next step, for the terminal."""
        width = max(map(len, self.facts))
        lines = [f"{key:<{width}}  {_shown(key, value)}" for key, value in self.facts.items() if value is not None]
        lines += [f"{'note':<{width}}  {printable(note)}" for note in self.notes]
        if self.sets is not None:
            lines += ["", *_set_lines(self.sets)]
        elif self.layers:
            lines += ["", layer_table(self.layers)]
        return "\n".join([*lines, "", self.next_step])


def describe_file(path: Path) -> Inspection:
    """Describe the bytes of a file without loading them.

    Raises:
        RedppError: this program cannot load such a file.
    """
    kind = sniff(path)
    if not kind.loadable:
        raise refusal(path, kind)
    facts: dict[str, Any] = {"file": path.name, "kind": kind.value, "bytes": path.stat().st_size}
    if kind.runs_code:
        names = scan(path).unsafe if kind in (FileKind.MODULE, FileKind.OBJECTS) else ()
        facts["runs code"] = "when loaded" + (f": {shorten(names)}" if names else "")
    flags = "--arch torchvision:NAME " if kind in _WEIGHTS else "--trust-file " if kind.runs_code else ""
    what = "the network that these weights belong to and its" if kind in _WEIGHTS else "its"
    step = (
        f"next: redpp-serve inspect {path} {flags}--input 3x224x224\n      (with {what} input shape) to see its layers"
    )
    return Inspection(facts, [], [], step)


def describe_network(
    captured: Captured, exclude: tuple[str, ...], channels: bool = False, times: LayerTimes | None = None
) -> Inspection:
    """Describe the layers of a captured network: which could be narrowed, and why the others could not.

    Args:
        captured: the network.
        exclude: shell patterns of layer names that must not change.
        channels: also list every channel set.
        times: the times of its layers, where they were taken.
    """
    graph = captured.graph
    coupling = couple(graph, exclude)
    layers = find_layers(graph)
    touched = touched_layers(coupling)
    share = sum(layer.macs for layer in layers if layer.name in touched) / max(1, mac_count(graph))
    facts = {
        **captured.source,
        "inputs": ", ".join(f"{'x'.join(map(str, i.shape))} {i.dtype}" for i in graph.inputs),
        "operations": len(graph.nodes),
        "parameters": parameter_count(graph),
        "MACs": mac_count(graph),
        "can be narrowed": f"{len(coupling.open)} of {len(coupling.sets)} sets of coupled channels; "
        f"the layers that they touch are {share:.0%} of the MACs",
    }
    if times:
        facts["timed in"] = str(times)
    records = [
        Layer(
            name=layer.name,
            op=layer.node.op.split(".")[1],
            shape=list(layer.shape),
            parameters=graph.tensors[layer.weight].numel() + (layer.shape[0] if layer.bias else 0),
            macs=layer.macs,
            ms=_milliseconds(times, layer.name),
            merge=LayerMerge(channels=layer.shape[0], reason=coupling.closed_layers.get(layer.name, "")),
        )
        for layer in layers
    ]
    sets = [_set_record(c) for c in coupling.sets] if channels else None
    return Inspection(facts, records, captured.messages, "next: redpp-serve package with the same arguments", sets)


def _milliseconds(times: LayerTimes | None, layer: str) -> float | None:
    seconds = times.layers.get(layer) if times else None
    return None if seconds is None else round(seconds * 1e3, 4)


def touched_layers(coupling: Coupling) -> set[str]:
    """Return the names of the layers whose cost falls when open sets are narrowed."""
    tensors = {
        tensor for c in coupling.open for tensor in (*(p.tensor for p in c.parts), *(r.tensor for r in c.readers))
    }
    return {layer.name for layer in find_layers(coupling.graph) if layer.weight in tensors}


def _set_record(found: ChannelSet) -> dict[str, Any]:
    readers = dict.fromkeys(reader.tensor.removesuffix(".weight") for reader in found.readers)
    producers = set(found.producers)
    others = dict.fromkeys(part.tensor.rpartition(".")[0] for part in found.parts)
    return {
        "name": found.name,
        "channels": found.channels,
        "producers": list(found.producers),
        "readers": list(readers),
        "with": [name for name in others if name not in producers],
        "closed": found.closed,
    }


def _set_lines(sets: list[dict[str, Any]]) -> list[str]:
    """Return a block for each channel set: its channels, who writes and who reads them, and why they stay, if so."""
    lines = []
    for found in sets:
        state = f"closed: {found['closed']}" if found["closed"] else "open"
        lines.append(f"{printable(found['name'])}: {found['channels']} channels, {state}")
        for key, word in (("producers", "written by"), ("with", "with"), ("readers", "read by")):
            if found[key]:
                text = printable(f"{word} {', '.join(found[key])}")
                lines += textwrap.wrap(
                    text, _WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
                )
    return lines


def _shown(key: str, value: Any) -> str:
    if key == "sha256":
        return str(value)[:_DIGEST_SHOWN]
    return _SHOW[key](value) if key in _SHOW else printable(value)
