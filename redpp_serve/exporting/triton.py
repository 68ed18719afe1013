"""A model repository for Triton Inference Server's own back ends, without Python in the server.

The repository that `package` writes serves with the Python back end, which measures kernels and engines where it
serves, pins nothing and reports the handler's metrics. A native back end has none of that, but needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpp_serve.errors import RedppError
from redpp_serve.exporting.formats import FORMATS, Format, graph_for, write_checked
from redpp_serve.exporting.tuned import Packaged
from redpp_serve.graph.graph import InputSpec
from redpp_serve.options import Serving
from redpp_serve.packaging.mar import check_name
from redpp_serve.packaging.output_folder import all_or_nothing, replaced, write_files
from redpp_serve.packaging.samples import as_array, read_samples
from redpp_serve.packaging.triton_repository import (
    ANY_SIZE,
    CONFIG,
    Word,
    output_specs,
    to_text,
    triton_config,
    warmup_files,
)
from redpp_serve.variants import VARIANTS


@dataclass(frozen=True)
class BackEnd:
    """One of Triton's back ends for whole networks.

    Attributes:
        name: in ``config.pbtxt``.
        format: the file of each version.
        batches: whether the back end takes batches of any size, so that Triton may batch requests.
        warnings: what a user should know.
    """

    name: str
    format: Format
    batches: bool
    warnings: tuple[str, ...]

    def parameters(self, serving: Serving) -> dict[str, str]:
        """Return the parameters of ``config.pbtxt`` that keep a model to its threads."""
        if self.name == "openvino":
            return {"INFERENCE_NUM_THREADS": str(serving.threads), "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
        return {
            "intra_op_thread_count": str(serving.threads),
            "inter_op_thread_count": "1",
            "execution_mode": "0",
            "enable_mem_arena": "1",
            "enable_mem_pattern": "0",
        }


BACK_ENDS = {
    "triton-onnxruntime": BackEnd(
        "onnxruntime",
        FORMATS["onnx"],
        True,
        ("every instance of the ONNX Runtime back end holds all weights again: raise the count with care",),
    ),
    "triton-openvino": BackEnd(
        "openvino",
        FORMATS["openvino"],
        False,
        (
            "the OpenVINO back end has no parameter for pinning: its threads are pinned from the first core on, so two "
            "instances or servers may share one core",
            "it has no parameter for fp32 either: on a processor with AMX it computes in bf16",
            "it pads every request to the largest batch where Triton batches, so this repository does not: a request "
            "runs alone, with the batch it was sent with",
        ),
    ),
}


def export_repository(folder: Path, to: str, out: Path | None = None) -> tuple[Path, tuple[str, ...]]:
    """Write both versions of a package for one of Triton's own back ends.

    Version 1 is the original and 2 the pruned network, as in the repository that `package` writes; inputs and outputs
    have the same names, so clients need no change. Each model is checked as `export` does before the folder appears.

    Args:
        folder: what `package` wrote.
        to: one of `BACK_ENDS`.
        out: a new or empty folder; by default NAME_triton_BACKEND in the current one.

    Returns:
        The folder, and what a user should know of the back end.

    Raises:
        RedppError: see `formats.export`; or the folder holds something already.
    """
    back_end, packaged = BACK_ENDS[to], Packaged.read(folder)
    name = str(packaged.original.description.get("name"))
    check_name(name)
    out = Path(os.path.abspath(out or f"{name}_{to.replace('-', '_')}"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RedppError(f"{out} exists and is not empty", "a new or empty folder", "choose another one with --out")
    artifacts = dict(zip(VARIANTS, (packaged.original, packaged.pruned), strict=True))
    graphs = {variant: graph_for(back_end.format, artifact) for variant, artifact in artifacts.items()}
    inputs = packaged.original.graph.inputs
    samples = read_samples(folder, inputs)
    outputs = output_specs({variant.name: graph for variant, graph in graphs.items()})
    config = native_config(back_end, name, inputs, outputs, packaged.serving())
    with all_or_nothing(out, None), replaced(out) as new:
        for variant, graph in graphs.items():
            path = new / name / variant.triton_version / f"model{back_end.format.suffixes[0]}"
            path.parent.mkdir(parents=True)
            write_checked(back_end.format, graph, samples, path, title=f"{name}, the {variant.name} version")
        warmup = warmup_files([as_array(x[0]) for x in samples])
        write_files(new / name, {CONFIG: to_text(config).encode(), **warmup})
    return out, back_end.warnings


def native_config(
    back_end: BackEnd, name: str, inputs: Sequence[InputSpec], outputs: Sequence[InputSpec], serving: Serving
) -> dict[str, Any]:
    """Return the configuration that both versions share, as a message for `to_text`.

    Raises:
        RedppError: a dtype that has no place in it.
    """
    for spec in (*inputs, *outputs):
        if spec.dtype == "bfloat16":
            raise RedppError(
                f"{spec.name!r} of dtype bfloat16",
                "dtypes that NumPy has",
                "cast it inside the network, and package that",
            )
    config = triton_config(name, inputs, outputs, serving)
    config["backend"] = back_end.name
    config["instance_group"] = [{"count": 1, "kind": Word("KIND_CPU")}]
    config["parameters"] = [
        {"key": key, "value": {"string_value": value}} for key, value in back_end.parameters(serving).items()
    ]
    if back_end.batches:
        return config
    del config["dynamic_batching"]
    config["max_batch_size"] = 0
    for kind, specs in (("input", inputs), ("output", outputs)):
        for entry, spec in zip(config[kind], specs, strict=True):
            entry.pop("reshape", None)
            entry["dims"] = [ANY_SIZE, *(entry["dims"] if spec.shape else ())]
    config["model_warmup"] = config["model_warmup"][:1]
    for entry, spec in zip(config["model_warmup"][0]["inputs"], inputs, strict=True):
        entry["value"]["dims"] = [1, *spec.shape]
    return config
