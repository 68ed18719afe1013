"""The Triton model repository: both versions, one configuration, and a copy of the serving code in each version.

It runs on a stock Triton Inference Server with the Python back end and torch where this project is not installed. Its
config.pbtxt is written as text: the protobuf classes belong to Triton's client, which packaging does not need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import output_types
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.sizes import ends, resized
from redpp_serve.options import Serving
from redpp_serve.packaging.mar import ARTIFACT, check_name, serving_sources
from redpp_serve.packaging.templates import render
from redpp_serve.runtime.serving_graph import batch_buckets
from redpp_serve.variants import NAMES, VARIANTS

CONFIG, LABELS = "config.pbtxt", "labels.txt"
ANY_SIZE = -1  # Triton's word for a size that differs between requests; it batches those of equal shapes alone
TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_FP32",
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}


class Word(str):
    """A value without quotes, such as an enumeration's."""


def build_repository(
    name: str,
    artifacts: Mapping[str, bytes],
    config: Mapping[str, Any],
    sample: Sequence[np.ndarray[Any, Any]],
    labels: Sequence[str] = (),
) -> dict[str, bytes]:
    """Return path below the repository -> bytes for all files; equal arguments give equal bytes.

    Args:
        name: the model's name in URLs.
        artifacts: variant's name -> artifact.
        config: from `triton_config`.
        sample: one input without batch for each of the network's, for Triton to warm up with.
        labels: the name of each class, where the configuration names their file.

    Raises:
        RedppError: a name that cannot be used.
    """
    check_name(name)
    files = {f"{name}/{CONFIG}": to_text(config).encode()}
    files |= {f"{name}/{path}": content for path, content in warmup_files(sample).items()}
    if labels:
        files[f"{name}/{LABELS}"] = "".join(f"{label}\n" for label in labels).encode()
    model = render("model.py", artifact=ARTIFACT).encode()
    for variant in VARIANTS:
        own = {"model.py": model, ARTIFACT: artifacts[variant.name], **serving_sources()}
        files.update({f"{name}/{variant.triton_version}/{path}": content for path, content in own.items()})
    return files


def warmup_files(sample: Sequence[np.ndarray[Any, Any]]) -> dict[str, bytes]:
    """Return path below the model's folder -> bytes of one input without batch for each of the network's."""
    return {f"warmup/{_warmup_file(index)}": array.tobytes() for index, array in enumerate(sample)}


def triton_config(
    name: str, inputs: Sequence[InputSpec], outputs: Sequence[InputSpec], serving: Serving, labelled: bool = False
) -> dict[str, Any]:
    """Return the configuration that both versions share, as a message for `to_text` and `to_json`.

    Args:
        name: the name of the model and of its folder.
        inputs: names, shapes without batch, torch dtypes. bfloat16 travels as float32, since NumPy has none.
        outputs: the same for the outputs.
        serving: the largest batch, how long a request waits for others, threads, precision and engine of each instance.
        labelled: whether the file `LABELS` names the classes of the first output.

    Raises:
        RedppError: a dtype that Triton does not know.
    """
    given = [_tensor(spec) for spec in outputs]
    if labelled:
        given[0]["label_filename"] = LABELS
    parameters = {"threads": serving.threads, "precision": serving.precision, "engine": serving.engine}
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": serving.batch_size,
        "input": [_tensor(spec) for spec in inputs],
        "output": given,
        "version_policy": {"all": {}},
        # Every GPU gets an instance; a machine without one gets an instance on the CPU.
        "instance_group": [{"count": 1, "kind": Word("KIND_AUTO")}],
        "dynamic_batching": {
            # Not the smaller buckets: two of three waiting requests would go ahead, and the third wait alone.
            "preferred_batch_size": [serving.batch_size],
            "max_queue_delay_microseconds": 1000 * serving.max_batch_delay_ms,
            # No queue policy: with any, Triton 2.51 lets all waiting requests of a busy model lie for half a second now
            # and then (measured: every 30th to 100th, throughput halved). A gateway has to limit the queue.
        },
        "parameters": [{"key": key, "value": {"string_value": str(value)}} for key, value in parameters.items()],
        "model_warmup": [_warmup(size, inputs) for size in batch_buckets(serving.batch_size)],
    }


def output_specs(graphs: Mapping[str, Graph]) -> tuple[InputSpec, ...]:
    """Return the outputs as clients name them, which both variants must share.

    Args:
        graphs: the network of each variant, by the variant's name.

    Returns:
        Name, shape without batch and dtype; `ANY_SIZE` for a size that differs between inputs of several sizes.

    Raises:
        RedppError: the pruned network's differ from the original's.
    """
    original, pruned = (_outputs(graphs[name]) for name in NAMES)
    if original != pruned:
        raise RedppError(
            f"outputs {pruned} of the pruned network",
            f"those of the original, {original}",
            "report this with the model and the command",
        )
    return original


def _outputs(graph: Graph) -> tuple[InputSpec, ...]:
    others = ([resized(spec, sizes) for spec in graph.inputs] for sizes in ends(graph.inputs))
    every = [output_types(each, "cpu") for each in (graph, *(replace(graph, inputs=tuple(o)) for o in others))]
    found = []
    for name, (_, dtype) in every[0].items():
        shapes = zip(*(types[name][0][1:] for types in every), strict=True)
        shape = tuple(sizes[0] if len(set(sizes)) == 1 else ANY_SIZE for sizes in shapes)
        found.append(InputSpec(name, shape, str(dtype).removeprefix("torch.")))
    return tuple(found)


def to_text(message: Mapping[str, Any], indent: str = "") -> str:
    """Write protobuf's text format: mappings are messages, lists repeated fields, texts are quoted but for a `Word`."""
    lines = []
    for key, value in message.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                inner = to_text(one, indent + "  ")
                lines.append(f"{indent}{key} {{\n{inner}{indent}}}\n" if inner else f"{indent}{key} {{}}\n")
            else:
                lines.append(f"{indent}{key}: {_scalar(one)}\n")
    return "".join(lines)


def to_json(message: Any) -> Any:
    """Return the message as Triton hands it to a model: maps are objects by their keys."""
    if isinstance(message, list):
        entries = [to_json(one) for one in message]
        is_map = bool(entries) and all(isinstance(e, dict) and set(e) == {"key", "value"} for e in entries)
        return {e["key"]: e["value"] for e in entries} if is_map else entries
    return {key: to_json(value) for key, value in message.items()} if isinstance(message, Mapping) else message


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str) or isinstance(value, Word):
        return str(value)
    return '"' + "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else _escaped(c) for c in value) + '"'


def _escaped(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode())


def _tensor(spec: InputSpec) -> dict[str, Any]:
    if spec.dtype not in TYPES:
        raise RedppError(
            f"{spec.name!r} of dtype {spec.dtype}",
            f"one of {', '.join(TYPES)}",
            "convert it inside the network, and package that",
        )
    varying = dict(spec.varying)
    dims = [ANY_SIZE if axis in varying else size for axis, size in enumerate(spec.shape)]
    # Scalars need dims [1] and reshape [].
    shape = {"dims": dims} if spec.shape else {"dims": [1], "reshape": {"shape": []}}
    return {"name": spec.name, "data_type": Word(TYPES[spec.dtype]), **shape}


def _warmup(size: int, inputs: Sequence[InputSpec]) -> dict[str, Any]:
    """Return a batch of ``size`` equal requests for Triton to run before a version is ready.

    They hold a real input: zeros may have no finite output, and then Triton would refuse to load the model.
    """
    values = [
        {
            "key": spec.name,
            "value": {
                "data_type": Word(TYPES[spec.dtype]),
                "dims": list(spec.shape) or [1],
                "input_data_file": _warmup_file(index),
            },
        }
        for index, spec in enumerate(inputs)
    ]
    return {"name": f"batch of {size}", "batch_size": size, "inputs": values}


def _warmup_file(index: int) -> str:
    return f"input_{index}"
