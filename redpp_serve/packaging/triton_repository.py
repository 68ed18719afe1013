"""The Triton model repository: both versions, one configuration, and a copy of the serving code in each version.

Self-contained: it runs on a stock Triton with the Python back end and torch where this project is not installed.

config.pbtxt of a Triton model, written as text: the protobuf classes belong to Triton's client, not to this side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec
from redpp_serve.packaging.mar import ARTIFACT, check_name, serving_sources
from redpp_serve.runtime.serving_graph import batch_buckets

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


def warmup_file(index: int) -> str:
    """Name of the file in the model's ``warmup`` folder that holds the input of that index."""
    return f"input_{index}"


def triton_config(
    name: str,
    inputs: Sequence[InputSpec],
    outputs: Sequence[InputSpec],
    *,
    batch_size: int,
    max_batch_delay_ms: int,
    threads: int,
    precision: str = "fp32",
) -> dict[str, Any]:
    """The configuration that both versions share, as a message for `to_text` and `to_json`.

    Args:
        name: the model's, which is also its folder's.
        inputs, outputs: names, shapes without batch, torch dtypes. bfloat16 travels as float32: numpy has none.
        batch_size: rows of the largest batch.
        max_batch_delay_ms: how long a request waits for others, milliseconds.
        threads, precision: torch threads and precision of each instance.

    Raises:
        RedppError: a dtype that Triton does not know.
    """
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": batch_size,
        "input": [_tensor(spec) for spec in inputs],
        "output": [_tensor(spec) for spec in outputs],
        "version_policy": {"all": {}},
        # Every GPU that there is gets an instance, a machine without one gets one on the CPU.
        "instance_group": [{"count": 1, "kind": Word("KIND_AUTO")}],
        "dynamic_batching": {
            # Not the smaller buckets: two of three waiting requests would go ahead, and the third wait alone.
            "preferred_batch_size": [batch_size],
            "max_queue_delay_microseconds": 1000 * max_batch_delay_ms,
            # No queue policy: with any, Triton 2.51 lets all waiting requests of a busy model lie for half a second now
            # and then (measured: every 30th to 100th, throughput halved). A gateway has to limit the queue.
        },
        "parameters": [
            {"key": key, "value": {"string_value": str(value)}}
            for key, value in (("threads", threads), ("precision", precision))
        ],
        "model_warmup": [_warmup(size, inputs) for size in batch_buckets(batch_size)],
    }


def to_text(message: Mapping[str, Any], indent: str = "") -> str:
    """Protobuf's text format: mappings are messages, lists repeated fields, texts quoted unless they are a `Word`."""
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
    """The message as Triton hands it to a model: maps are objects by their keys."""
    if isinstance(message, list):
        entries = [to_json(one) for one in message]
        is_map = bool(entries) and all(isinstance(e, dict) and set(e) == {"key", "value"} for e in entries)
        return {e["key"]: e["value"] for e in entries} if is_map else entries
    return {key: to_json(value) for key, value in message.items()} if isinstance(message, Mapping) else message


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not isinstance(value, Word):
        return (
            '"' + "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else _escaped(c) for c in value) + '"'
        )
    return str(value)


def _escaped(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode())


def _tensor(spec: InputSpec) -> dict[str, Any]:
    """A tensor with one number in a row has no dimensions, which Triton writes as one that is taken away again."""
    if spec.dtype not in TYPES:
        raise RedppError(
            f"{spec.name!r} of dtype {spec.dtype}",
            f"one of {', '.join(TYPES)}",
            "convert it inside the network, and package that",
        )
    shape = {"dims": list(spec.shape)} if spec.shape else {"dims": [1], "reshape": {"shape": []}}
    return {"name": spec.name, "data_type": Word(TYPES[spec.dtype]), **shape}


def _warmup(size: int, inputs: Sequence[InputSpec]) -> dict[str, Any]:
    """One batch of that many equal requests before the version is ready. A real input: zeros may have no finite output,
    and then Triton would refuse to load the model.
    """
    values = [
        {
            "key": spec.name,
            "value": {
                "data_type": Word(TYPES[spec.dtype]),
                "dims": list(spec.shape) or [1],
                "input_data_file": warmup_file(index),
            },
        }
        for index, spec in enumerate(inputs)
    ]
    return {"name": f"batch of {size}", "batch_size": size, "inputs": values}


CONFIG = "config.pbtxt"
VERSIONS = {"original": "1", "pruned": "2"}  # Triton's versions are whole numbers

_MODEL = f'''"""Entry point of this version. Its own copy of the code comes first: it is what was tested."""

import locale
import sys
from contextlib import suppress
from pathlib import Path

with suppress(locale.Error):
    locale.setlocale(locale.LC_ALL, "")  # the back end starts Python with an ASCII locale
sys.dont_write_bytecode = True  # new files in the repository look to Triton like a changed model
sys.path.insert(0, str(Path(__file__).resolve().parent))

from redpp_serve.handlers.triton_server import RedppModel  # noqa: E402


class TritonPythonModel(RedppModel):
    """Triton looks for this name."""

    artifact = Path(__file__).resolve().with_name("{ARTIFACT}")
'''


def build_repository(
    name: str, artifacts: Mapping[str, bytes], config: str, sample: Sequence[np.ndarray]
) -> dict[str, bytes]:
    """Path below the repository to bytes, for all files; equal arguments give equal bytes.

    Args:
        name: the model's name in URLs.
        artifacts: of the variants ``original`` and ``pruned``.
        config: text of ``config.pbtxt``, see `triton_config.triton_config`.
        sample: one input without batch for each of the network's; what Triton warms up with.

    Raises:
        RedppError: a name that cannot be used.
    """
    check_name(name)
    files = {f"{name}/{CONFIG}": config.encode()}
    for index, array in enumerate(sample):
        files[f"{name}/warmup/{warmup_file(index)}"] = array.tobytes()
    for variant, version in VERSIONS.items():
        own = {"model.py": _MODEL.encode(), ARTIFACT: artifacts[variant], **serving_sources()}
        files.update({f"{name}/{version}/{path}": content for path, content in own.items()})
    return files


def output_specs(outputs: Mapping[str, Sequence[InputSpec]]) -> tuple[InputSpec, ...]:
    """The outputs as clients name them, which both variants must share.

    Args:
        outputs: for each variant shape without batch and dtype of each output.

    Raises:
        RedppError: the pruned network's differ from the original's.
    """
    original, pruned = (
        tuple(InputSpec(f"output_{k}", y.shape, y.dtype) for k, y in enumerate(outputs[variant]))
        for variant in VERSIONS
    )
    if original != pruned:
        raise RedppError(
            f"outputs {pruned} of the pruned network",
            f"those of the original, {original}",
            "report this with the model and the command",
        )
    return original


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write them below the folder, which is made where it is missing."""
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
