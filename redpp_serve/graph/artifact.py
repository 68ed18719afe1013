"""The artifact: one deterministic zip of a graph, its weights and a manifest. Loading it runs no code from it.

``manifest.json`` holds the format, a description and the SHA-256 of the rest; ``graph.json`` operator calls over the
allow-list of `operators`; ``weights.safetensors`` the tensors; ``samples.safetensors``, where it is there, a few
synthetic inputs on which engines are checked. Entries are stored uncompressed with a fixed time
stamp, so equal content gives equal bytes. A weight with few distinct values is stored as its codebook and packed
indices.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.files import deterministic_zip
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ranges, Ref, Size, numbered_outputs
from redpp_serve.graph.operators import ALLOWED, resolve
from redpp_serve.graph.tensor_file import read_safetensors
from redpp_serve.graph.weights import decode, encode

FORMAT = 1
ENTRIES = ("manifest.json", "graph.json", "weights.safetensors")
SAMPLES = "samples.safetensors"  # an entry that may be missing
_LOCAL_HEADER = struct.Struct("<26sHH")  # of a zip entry; the last two are the bytes of its name and of its extra field
_MOST_DOCUMENT = 32 << 20  # bytes; that of a network of ten thousand operations has 3 MB
_INT64 = torch.iinfo(torch.int64)
_MEMORY_FORMATS = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")


@dataclass(frozen=True)
class Artifact:
    """A built artifact.

    Attributes:
        data: the bytes of the file.
        description: the manifest's description of the graph, with the size of the stored weights as ``bytes``.
    """

    data: bytes
    description: dict[str, Any]


@dataclass(frozen=True)
class LoadedArtifact:
    """What `load` finds in an artifact.

    Attributes:
        graph: the network.
        description: the manifest's description of the graph.
        samples: a few inputs (images, ...), one tensor for each network input; empty where the artifact has none.
    """

    graph: Graph
    description: dict[str, Any]
    samples: tuple[Tensor, ...] = ()


def build(graph: Graph, description: dict[str, Any], samples: Sequence[Tensor] = ()) -> Artifact:
    """Pack a graph, a description, which must be JSON, and a few inputs (images, ...) into an artifact."""
    from safetensors.torch import save  # noqa: PLC0415 - absent where archives are only loaded

    stored: dict[str, Tensor] = {}
    encodings: dict[str, Any] = {}
    for name, tensor in sorted(graph.tensors.items()):
        packed = encode(tensor)
        if packed is None:
            stored[name] = tensor.detach().cpu().contiguous().clone()
        else:
            stored[f"{name}:codebook"], stored[f"{name}:indices"] = packed.codebook, packed.indices
            encodings[name] = {"bits": packed.bits, "shape": list(tensor.shape)}
    weights = save(stored)
    document = {**calls_document(graph), "encodings": encodings}
    if graph.buffers is not None:
        document["buffers"] = sorted(graph.buffers & graph.tensors.keys())
    if graph.names_outputs:
        document["output_names"] = list(graph.output_names)
    if graph.classes is not None:
        document["classes"] = sorted(graph.classes)
    graph_bytes = _dump(document)
    description = {**description, "bytes": sum(t.numel() * t.element_size() for t in stored.values())}
    parts = {"graph.json": graph_bytes, "weights.safetensors": weights}
    if samples:
        named = {spec.name: x.detach().cpu().contiguous() for spec, x in zip(graph.inputs, samples, strict=True)}
        parts[SAMPLES] = save(named)
    manifest = {
        "format": FORMAT,
        "description": description,
        "sha256": {name: _digest(content) for name, content in parts.items()},
    }
    return Artifact(deterministic_zip({"manifest.json": _dump(manifest), **parts}), description)


def calls_document(graph: Graph) -> dict[str, Any]:
    """Return the graph without its tensors as plain data: inputs, calls and outputs."""
    return {
        "inputs": [_input_to_json(i) for i in graph.inputs],
        "nodes": [
            {
                "name": n.name,
                "op": n.op,
                "args": _to_json(n.args),
                "kwargs": {k: _to_json(v) for k, v in n.kwargs.items()},
            }
            for n in graph.nodes
        ],
        "outputs": list(graph.outputs),
    }


def _input_to_json(spec: InputSpec) -> dict[str, Any]:
    """Return an input as plain data, without what is unknown or does not vary."""
    document: dict[str, Any] = {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}
    known = {"ranges": spec.ranges, "limits": spec.limits}
    if spec.varying:
        document["varying"] = [{"axis": axis, **asdict(size)} for axis, size in spec.varying]
    return {**document, **{key: [list(pair) for pair in pairs] for key, pairs in known.items() if pairs}}


def load(source: Path | bytes) -> LoadedArtifact:
    """Read and check an artifact.

    Raises:
        RedppError: not an artifact, damaged, or calling an operator that is not on the allow-list or that this
            release of torch lacks.
    """
    try:
        with (
            io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file,
            zipfile.ZipFile(file) as archive,
        ):
            infos = {i.filename: i for i in archive.infolist()}
            if sorted(archive.namelist()) not in (sorted(ENTRIES), sorted((*ENTRIES, SAMPLES))):
                raise ValueError(f"entries {archive.namelist()[:6]}")
            if any(i.file_size > _MOST_DOCUMENT for name, i in infos.items() if name.endswith(".json")):
                raise ValueError(f"a manifest or graph of more than {_MOST_DOCUMENT >> 20} MiB")
            if any(i.compress_type != zipfile.ZIP_STORED for i in infos.values()):
                raise ValueError("compressed entries")
            manifest, document = (archive.read(name) for name in ENTRIES[:2])
            digests = {ENTRIES[1]: _digest(document)}
            tensors = {}
            for name in (ENTRIES[2], SAMPLES):
                if name in infos:
                    tensors[name], digests[name] = read_safetensors(*_stored(file, infos[name]))
        found = json.loads(manifest)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, this version reads {FORMAT}")
        for name, digest in digests.items():
            if found["sha256"][name] != digest:
                raise ValueError(f"{name} does not match its SHA-256")
        graph = _parse(json.loads(document), tensors[ENTRIES[2]])
        return LoadedArtifact(graph, {**found["description"]}, _samples(graph, tensors.get(SAMPLES)))
    except RedppError:
        raise
    except Exception as error:  # damaged or hostile bytes: the parsers' exceptions have no common class
        detail = f"{error}" if not isinstance(error, KeyError) else f"missing or unknown {error}"
        raise RedppError(
            f"the artifact{'' if isinstance(source, bytes) else f' {source}'} cannot be read: {detail}",
            "an unchanged model.redpp written by redpp-serve",
            "package the model again, or fetch the file again if it was copied",
        ) from error


def _stored(file: BinaryIO, info: zipfile.ZipInfo) -> tuple[BinaryIO, int]:
    """Go to where the content of an entry that is not compressed begins; return the file and the content's bytes."""
    if file.seek(0, os.SEEK_END) < info.header_offset + info.file_size:
        raise ValueError(f"an entry {info.filename} that ends past the end of the file")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    names = _LOCAL_HEADER.unpack(header)[1:]
    if not header.startswith(b"PK\3\4"):
        raise ValueError(f"no entry {info.filename} where its index says")
    file.seek(sum(names), os.SEEK_CUR)
    return file, info.file_size


def _samples(graph: Graph, stored: dict[str, Tensor] | None) -> tuple[Tensor, ...]:
    """Return the stored inputs, as the network declares them and as many of each."""
    if stored is None:
        return ()
    found = tuple(stored[spec.name] for spec in graph.inputs)
    shapes = [(x.shape[1:], x.dtype) for x in found]
    if (
        shapes != [(spec.shape, _dtype(spec.dtype)) for spec in graph.inputs]
        or len({len(x) for x in found}) != 1
        or not len(found[0])
    ):
        raise ValueError("samples that are no inputs of the network")
    return found


def _parse(document: dict[str, Any], stored: dict[str, Tensor]) -> Graph:
    """Build the graph of ``graph.json``, in which every value is defined once and before it is read."""
    tensors = _decoded(document["encodings"], stored)
    inputs = tuple(map(_parse_input, document["inputs"]))
    known: set[str] = set(tensors)
    for spec in inputs:
        _define(spec.name, known)
    nodes = tuple(_parse_node(entry, known) for entry in document["nodes"])
    outputs = document["outputs"]
    if not inputs or not isinstance(outputs, list) or not outputs:
        raise ValueError("a graph without inputs or outputs")
    if set(outputs) - known:
        raise ValueError("outputs that nothing defines")
    buffers = document.get("buffers")
    if buffers is not None and not (isinstance(buffers, list) and set(buffers) <= tensors.keys()):
        raise ValueError("buffers that are not stored")
    names, classes = _output_names(document)
    return Graph(
        inputs, tensors, nodes, tuple(outputs), None if buffers is None else frozenset(buffers), names, classes
    )


def _output_names(document: dict[str, Any]) -> tuple[tuple[str, ...], frozenset[str] | None]:
    """Return the outputs' names, and those of class scores where they are told; packages of old have neither."""
    names = document.get("output_names", numbered_outputs(len(document["outputs"])))
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("names of outputs that are no texts")
    if len(names) != len(document["outputs"]) or len(set(names)) != len(names):
        raise ValueError("names of outputs that are not one for each")
    classes = document.get("classes")
    if classes is not None and not (isinstance(classes, list) and set(classes) <= set(names)):
        raise ValueError("class scores that are no output")
    return tuple(names), None if classes is None else frozenset(classes)


def _parse_input(entry: dict[str, Any]) -> InputSpec:
    spec = InputSpec(entry["name"], tuple(entry["shape"]), entry["dtype"])
    if not all(type(size) is int and size > 0 for size in spec.shape):
        raise ValueError(f"input {str(spec.name)[:60]!r} has a shape of other than sizes")
    _dtype(spec.dtype)
    varying = tuple((size.pop("axis"), Size(**size)) for size in map(dict, entry.get("varying", ())))
    for axis, size in varying:
        numbers = (axis, size.low, size.high, size.step)
        if not (all(type(n) is int for n in numbers) and 0 <= axis < len(spec.shape) and 0 < size.low <= size.high):
            raise ValueError(f"input {str(spec.name)[:60]!r} has sizes of other than ascending whole numbers")
        if size.step < 1 or not isinstance(size.symbol, str):
            raise ValueError(f"input {str(spec.name)[:60]!r} has sizes in steps of other than whole numbers")
    return replace(spec, ranges=_ranges(entry, "ranges"), limits=_ranges(entry, "limits"), varying=varying)


def _ranges(entry: dict[str, Any], key: str) -> Ranges:
    """Read the ranges of an input, which are whole numbers in the range of int64, as many as its entries at most."""
    found = tuple((low, high) for low, high in entry.get(key, ()))
    if len(found) > math.prod(entry["shape"]) or not all(
        type(low) is int and type(high) is int and _INT64.min <= low <= high <= _INT64.max for low, high in found
    ):
        raise ValueError(f"input {str(entry['name'])[:60]!r} has {key} of other than ascending whole numbers")
    return found


def _decoded(encodings: dict[str, Any], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = dict(stored)
    for name, spec in encodings.items():
        codebook, indices = tensors.pop(f"{name}:codebook"), tensors.pop(f"{name}:indices")
        if name in tensors:
            raise ValueError(f"tensor {name[:60]!r} is stored twice")
        tensors[name] = decode(codebook, indices, spec["bits"], spec["shape"])
    return tensors


def _parse_node(entry: dict[str, Any], known: set[str]) -> Node:
    """Build a node that reads known values alone, and add its own value to them."""
    if entry["op"] not in ALLOWED:
        raise ValueError(f"operator {str(entry['op'])[:60]!r} is not on the allow-list")
    args, kwargs = tuple(map(_from_json, entry["args"])), {k: _from_json(v) for k, v in entry["kwargs"].items()}
    node = Node(entry["name"], entry["op"], args, kwargs)
    if unknown := set(node.refs()) - known:
        raise ValueError(f"node {str(node.name)[:60]!r} reads values that nothing defines: {sorted(unknown)[:3]}")
    _define(node.name, known)
    resolve(node.op)
    return node


def _define(name: Any, known: set[str]) -> None:
    if not isinstance(name, str) or name in known:
        raise ValueError(f"the name {str(name)[:60]!r} is not a text or is defined twice")
    known.add(name)


def _to_json(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"an argument of type {type(value).__name__} has no place in an artifact")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "ref":
        return Ref(str(content))
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "dtype":
        return _dtype(content)
    if kind == "memory_format" and content in _MEMORY_FORMATS:
        return getattr(torch, content)
    raise ValueError(f"unknown constant {kind!r}")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {str(name)[:40]!r}")
    return dtype


def _dump(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
