"""Describing a file and what could be pruned in it, without changing or writing anything."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpp_serve.capture import Captured
from redpp_serve.capture.hugging_face import suggested_arch
from redpp_serve.capture.shards import refuse_single_shard, weights_in
from redpp_serve.capture.sniff import FileKind, refusal, scan, shorten, sniff
from redpp_serve.channels.coupling import ChannelSet, Coupling, couple
from redpp_serve.errors import printable
from redpp_serve.graph.class_scores import class_outputs
from redpp_serve.graph.executor import output_types
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import (
    find_layers,
    find_products,
    mac_count,
    parameter_count,
    product_macs,
    value_and_tensor_shapes,
)
from redpp_serve.graph.ranges import in_words
from redpp_serve.graph.sizes import in_words as sizes_in_words
from redpp_serve.layer_times import LayerTimes
from redpp_serve.pruning.constant_channels import find_constants
from redpp_serve.pruning.widths import ShapeModel
from redpp_serve.report.data import Layer, LayerMerge
from redpp_serve.report.formats import count, size
from redpp_serve.report.text import layer_table

_WEIGHTS = (FileKind.STATE_DICT, FileKind.LEGACY_STATE_DICT, FileKind.SAFETENSORS, FileKind.INDEX)
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
    path = weights_in(path)
    refuse_single_shard(path)
    kind = sniff(path)
    if not kind.loadable:
        raise refusal(path, kind)
    facts: dict[str, Any] = {"file": path.name, "kind": kind.value, "bytes": path.stat().st_size}
    if kind.runs_code:
        names = scan(path).unsafe if kind in (FileKind.MODULE, FileKind.OBJECTS) else ()
        facts["runs code"] = "when loaded" + (f": {shorten(names)}" if names else "")
    arch = suggested_arch(path.parent) if kind in _WEIGHTS else None
    flags = f"--arch {arch or 'torchvision:NAME'} " if kind in _WEIGHTS else "--trust-file " if kind.runs_code else ""
    what = "the network that these weights belong to and its" if kind in _WEIGHTS else "its"
    shown = shlex.quote(printable(path))
    step = (
        f"next: redpp-serve inspect {shown} {flags}--input 3x224x224\n      (with {what} input shape) to see its layers"
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
    macs = mac_count(graph)
    share = ShapeModel(coupling).touched_macs() / max(1, macs)
    scores = class_outputs(graph)
    facts = {
        **captured.source,
        "inputs": ", ".join(map(_input, graph.inputs)),
        "outputs": ", ".join(
            _described(name, shape[1:], str(dtype).removeprefix("torch.")) + (" (class scores)" if scores[name] else "")
            for name, (shape, dtype) in output_types(graph).items()
        ),
        "operations": len(graph.nodes),
        "parameters": parameter_count(graph),
        "MACs": macs,
        "products": _products_fact(graph),
        "constant channels": _constants_fact(coupling),
        "can be narrowed": f"{len(coupling.open)} of {len(coupling.sets)} sets of coupled channels; "
        f"the layers that they touch are {share:.0%} of the MACs",
    }
    if times:
        facts["timed in"] = str(times)
    records = [*_layer_records(coupling, times), *_computed_records(graph)]
    sets = [_set_record(c) for c in coupling.sets] if channels else None
    return Inspection(facts, records, captured.messages, "next: redpp-serve package with the same arguments", sets)


def _layer_records(coupling: Coupling, times: LayerTimes | None) -> list[Layer]:
    graph = coupling.graph
    return [
        Layer(
            name=layer.name,
            op=layer.node.op.split(".")[1],
            shape=list(layer.shape),
            parameters=graph.tensors[layer.weight].numel() + (layer.outputs if layer.bias else 0),
            macs=layer.macs,
            ms=_milliseconds(times, layer.name),
            merge=LayerMerge(channels=layer.outputs, reason=coupling.closed_layers.get(layer.name, layer.stays)),
        )
        for layer in find_layers(graph)
    ]


def _computed_records(graph: Graph) -> list[Layer]:
    """Describe the convolutions and Linear whose weight is computed or read in other ways, which stay as they are."""
    shapes = value_and_tensor_shapes(graph)
    return [
        Layer(
            name=product.node.name,
            op=product.node.op.split(".")[1],
            shape=list(shapes[product.node.args[1].name]),
            parameters=0,
            macs=product.macs(shapes),
            ms=None,
            merge=LayerMerge(channels=shapes[product.node.args[1].name][0], reason=product.reason),
        )
        for product in find_products(graph)
        if product.reason
    ]


def _products_fact(graph: Graph) -> str | None:
    """Say how many of the MACs multiply computed values; None where there are none."""
    calls = len(find_products(graph))
    return f"{count(product_macs(graph))} of the MACs multiply computed values, in {calls} calls" if calls else None


def _input(spec: InputSpec) -> str:
    text = f"{spec.name} {sizes_in_words(spec)} {spec.dtype}"
    if not spec.holds_integers:
        return text
    return f"{text} {in_words(spec.ranges)}" if spec.ranges else f"{text} of unknown range"


def _constants_fact(coupling: Coupling) -> str | None:
    """Say how many channels do not depend on the input, as behind a mask; None where all do."""
    constant = find_constants(coupling).count
    every = sum(c.channels for c in coupling.open)
    return f"{constant} of {every}, from weights of zero: packaging leaves them out exactly" if constant else None


def _described(name: str, shape: Sequence[int], dtype: str) -> str:
    return f"{name} {'x'.join(map(str, shape)) or 'a number'} {dtype}"


def _milliseconds(times: LayerTimes | None, layer: str) -> float | None:
    seconds = times.layers.get(layer) if times else None
    return None if seconds is None else round(seconds * 1e3, 4)


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
