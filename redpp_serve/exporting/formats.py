"""Write a packaged network as a file of another program, and check the file before it is put in place."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpp_serve.capture.any_size import dynamic_axes
from redpp_serve.capture.sniff import first_line
from redpp_serve.engines.engine import INSTALL
from redpp_serve.engines.onnx_builder import to_onnx
from redpp_serve.engines.sessions import OnnxRuntimeSession, import_openvino
from redpp_serve.errors import RedppError
from redpp_serve.exporting.module import find_variant, graph_module
from redpp_serve.exporting.python_source import python_source
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.passes import in_precision
from redpp_serve.graph.quantization import in_int8
from redpp_serve.graph.ranges import blank
from redpp_serve.graph.sizes import choice_in_words, ends, resized
from redpp_serve.packaging.mar import check_name, read_artifact
from redpp_serve.packaging.samples import as_array, read_samples, sized
from redpp_serve.runtime.engine_network import ranges
from redpp_serve.runtime.serving_graph import serving_graph
from redpp_serve.state_folders import scratch_folder

BATCHES = (1, 3)  # that a file is checked at
ALIKE = {"fp32": 1e-4, "bf16": 2e-2, "int8": 5e-2}  # least of the spread of an output; rounding may fall either way


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffixes: endings of the files that it consists of, that of the one which is opened first.
        precisions: those that a network can be written in.
        folded: whether the network is written as it is served, folded and fused, without what only training needs.
        write: writes a graph to the first file, and the others beside it; takes the graph, the path and a title.
        open: reads the file and returns the function that it holds.
    """

    suffixes: tuple[str, ...]
    precisions: tuple[str, ...]
    folded: bool
    write: Callable[[Graph, Path, str], None]
    open: Callable[[Path], Callable[[Sequence[Tensor]], Sequence[Tensor]]]


def export(
    folder: Path, to: str, out: Path | None = None, *, version: str = "pruned", precision: str = "fp32"
) -> list[Path]:
    """Write one version of a package for another program.

    The file is read back and compared with the network on inputs that the package keeps, at batch 1 and 3, and at the
    smallest and largest of sizes that vary, before it takes its place; it replaces an earlier file of that name.

    Args:
        folder: what `package` wrote.
        to: one of `FORMATS`.
        out: the file; by default NAME_VERSION with the format's ending, in the current folder.
        version: ``pruned`` or ``original``.
        precision: that the network computes in; inputs and outputs keep theirs. int8 needs the ranges of a package
            that was made with them.

    Returns:
        The files that were written.

    Raises:
        RedppError: no package, no such version, a precision or an operator that the format has no place for, a missing
            library, a file that computes something else, or no space.
    """
    form, variant = FORMATS[to], find_variant(version)
    artifact = read_artifact(variant.archive_in(folder))
    name = str(artifact.description.get("name"))
    check_name(name)
    if precision not in form.precisions:
        raise RedppError(
            f"--precision {precision} for --to {to}",
            " or ".join(form.precisions),
            "leave out --precision, or choose another format",
        )
    graph = graph_for(form, artifact, precision)
    samples = read_samples(folder, graph.inputs)
    path = out or Path(f"{name}_{variant.name}{form.suffixes[0]}")
    if path.is_dir() or path.suffix != form.suffixes[0]:
        raise RedppError(f"--out {path}", f"a file that ends in {form.suffixes[0]}", "correct --out")
    files = [path.with_suffix(suffix) for suffix in form.suffixes]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(path.parent, f".{path.name}.redpp-") as scratch:
            new = scratch / path.name
            title = f"{name}, the {variant.name} version"
            write_checked(form, graph, samples, new, title=title, alike=ALIKE[precision])
            for file in reversed(files):  # the one that is opened comes last, when the others are there
                os.replace(scratch / file.name, file)
    except OSError as error:
        raise RedppError(
            f"{path} cannot be written: {error}", "a place with enough free space and write permission", "change --out"
        ) from error
    return files


def graph_for(form: Format, artifact: LoadedArtifact, precision: str = "fp32") -> Graph:
    """Return the network of an artifact as a format takes it.

    Raises:
        RedppError: int8 of a package that holds no ranges for it.
    """
    if not form.folded:
        return in_precision(artifact.graph, precision)
    served = serving_graph(artifact.graph, torch.device("cpu"))
    if precision != "int8":
        return served
    found = ranges(artifact.description)
    if not found:
        raise RedppError(
            "--precision int8 of a network without ranges for eight bits",
            "a package that this release made, of a network with convolutions or Linear in fp32",
            "package the model again, or leave out --precision",
        )
    return in_int8(served, found)


def write_checked(
    form: Format, graph: Graph, samples: Sequence[Tensor], path: Path, *, title: str, alike: float = ALIKE["fp32"]
) -> None:
    """Write a graph to a file, read it back, and compare it with the graph.

    Args:
        form: the kind of file.
        graph: the network.
        samples: inputs, (n, ...) for each of the network's.
        path: the file.
        title: what the network is, in plain words.
        alike: share of the spread of an output that the file may differ by.

    Raises:
        RedppError: the network cannot be written so, or the file computes something else.
    """
    try:
        form.write(graph, path, title)
        run = form.open(path)
    except (RedppError, OSError):
        raise
    except ImportError as error:
        raise RedppError(
            f"{error.name} is not installed" if error.name else f"a library of this format is broken: {error}",
            "the library of this format",
            INSTALL,
        ) from error
    except Exception as error:  # the libraries' exceptions have no common class
        raise RedppError(
            f"the network cannot be written as {path.suffix}: {first_line(error)}",
            "a network that the format can express",
            "choose another format with --to; module takes every network",
        ) from error
    program = Program(graph).eval()
    for batch, sizes in [*((batch, {}) for batch in BATCHES), *((1, sizes) for sizes in ends(graph.inputs))]:
        inputs = [
            sized(x[torch.arange(batch) % len(x)], resized(spec, sizes)) if sizes else x[torch.arange(batch) % len(x)]
            for spec, x in zip(graph.inputs, samples, strict=True)
        ]
        with torch.no_grad():
            expected = program(*inputs)
        _require_alike(expected, run(inputs), alike, path, f"batch {batch} {choice_in_words(sizes)}".strip())


def _require_alike(
    expected: Sequence[Tensor], found: Sequence[Tensor], relative: float, path: Path, where: str
) -> None:
    """Compare the outputs of a file with the network's, up to a share of the spread of each."""
    worst = float("inf") if len(expected) != len(found) else 0.0
    for mine, theirs in zip(expected, found, strict=False):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            worst = float("inf")
            continue
        wanted = mine.double()
        spread = float(wanted.max() - wanted.min()) or float(wanted.abs().max()) or 1.0
        far = float((wanted - theirs.double()).abs().max()) / spread
        worst = max(worst, far) if far == far else float("inf")
    if worst > relative:
        raise RedppError(
            f"{path.name} computes something else than the network: it differs by {worst:.1e} of the outputs' spread "
            f"at {where}",
            f"at most {relative:g}",
            "report this with the model; nothing was written; choose another format with --to meanwhile",
        )


def _write_exported(graph: Graph, path: Path, title: str) -> None:
    module = graph_module(graph)
    example = tuple(blank(spec, 2) for spec in graph.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = (tuple(dynamic_axes(graph.inputs)),)
        torch.export.save(torch.export.export(module, example, dynamic_shapes=shapes), path)


def _open_exported(path: Path) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    module = torch.export.load(path).module()

    @torch.no_grad()
    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return _several(module(*inputs))

    return run


def _write_module(graph: Graph, path: Path, title: str) -> None:
    torch.save(graph.tensors, path.with_suffix(".pt"))
    path.write_text(python_source(graph, title), encoding="utf-8")


def _open_module(path: Path) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    spec = importlib.util.spec_from_file_location("redpp_serve_exported", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.Network()

    @torch.no_grad()
    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return _several(network(*inputs))

    return run


def _several(outputs: Any) -> Sequence[Tensor]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def onnx_bytes(graph: Graph) -> bytes:
    """Return a folded graph as an ONNX model, with the inputs and outputs under their names."""
    data: bytes = to_onnx(graph).SerializeToString()
    return data


def _write_onnx(graph: Graph, path: Path, title: str) -> None:
    path.write_bytes(onnx_bytes(graph))


def _open_onnx(path: Path) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    session = OnnxRuntimeSession(path.read_bytes(), "fp32", 1)
    return lambda inputs: [torch.from_numpy(y) for y in session([as_array(x) for x in inputs])]


def _write_openvino(graph: Graph, path: Path, title: str) -> None:
    openvino = import_openvino()
    model = openvino.Core().read_model(onnx_bytes(graph), b"")
    for value in model.inputs:
        value.get_node().set_layout(openvino.Layout("N..."))
    openvino.save_model(model, path, compress_to_fp16=False)


def _open_openvino(path: Path) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
    compiled = import_openvino().Core().compile_model(str(path), "CPU", settings)

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        found = compiled([as_array(x) for x in inputs])
        return [torch.from_numpy(found[k].copy()) for k in range(len(found))]

    return run


FORMATS = {
    "onnx": Format((".onnx",), ("fp32", "int8"), True, _write_onnx, _open_onnx),
    "openvino": Format((".xml", ".bin"), ("fp32", "int8"), True, _write_openvino, _open_openvino),
    "pt2": Format((".pt2",), ("fp32", "bf16"), False, _write_exported, _open_exported),
    "module": Format((".py", ".pt"), ("fp32", "bf16"), False, _write_module, _open_module),
}
