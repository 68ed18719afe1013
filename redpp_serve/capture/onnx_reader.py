"""From an ONNX file to a module and its inputs, and a comparison with an engine that reads the file itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redpp_serve.capture.inputs import sample
from redpp_serve.capture.onnx_file import Array, Text, read_onnx_file, refused, shown
from redpp_serve.capture.onnx_network import VARYING_BATCH, OnnxNetwork, build_network
from redpp_serve.capture.onnx_simplify import simplified
from redpp_serve.capture.outputs import are_close
from redpp_serve.capture.sniff import first_line, shorten
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec

_BATCHES = (1, 2, 3)
# Capture takes about 3 ms a call and 12 ms an input, and is to be over in a minute.
_MOST_CALLS, _MOST_INPUTS, _MOST_OUTPUTS = 10_000, 256, 1_000
_TOLERANCES = {torch.float16: 2e-2, torch.float64: 1e-6}  # of the largest value; 1e-3 for float32
Run = Callable[[list[str], dict[str, Array]], Any]


def read_onnx(path: Path) -> OnnxNetwork:
    """Read an ONNX file as a module; no code of the file runs, as it has none.

    Args:
        path: the file; weights beside it are read too.

    Raises:
        RedppError: see `onnx_file.read_onnx_file` and `onnx_simplify.simplified`; or it is too large to capture.
    """
    file, messages = read_onnx_file(path), list[str]()
    file = simplified(path, file, messages)
    for found, most, what in (
        (file.nodes, _MOST_CALLS, "calls that are not constant"),
        (file.inputs, _MOST_INPUTS, "inputs"),
        (file.outputs, _MOST_OUTPUTS, "outputs"),
    ):
        if len(found) > most:
            raise refused(path, f"with {len(found)} {what}, more than {most}", "cut it into several models")
    bad = [name for name, value in file.constants.items() if _has_nan(value)]
    if bad:
        raise refused(path, f"with NaN among its weights: {shorten(map(shown, bad))}", "use an earlier checkpoint")
    return build_network(path, file, messages)


def _has_nan(value: Array | Text) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f" and bool(np.isnan(value).any())


def settle_inputs(network: OnnxNetwork, given: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """Return the network's inputs, once it computes for them what ONNX Runtime computes, at batches of 1, 2 and 3.

    A file for one batch size is asked that many items at a time. Without ONNX Runtime the reference evaluator of onnx
    stands in.

    Raises:
        RedppError: sizes that nobody gives, an operator that fails, or another result.
    """
    specs = network.specs(given)
    network.probe(specs)
    run, engine = _engine(network.path)
    for batch in _BATCHES:
        inputs = sample(specs, batch * (network.fixed or 1), torch.Generator().manual_seed(batch))
        with torch.no_grad():
            try:
                mine = network(*inputs).values()
            except RedppError:
                raise
            except Exception as error:  # a size that the probe could not tell from the batch
                raise _failed(network, f"fails at batch size {len(inputs[0])}: {first_line(error)}") from error
        theirs = _asked(network, run, inputs)
        far = [name for name, a, b in zip(network.file.outputs, mine, theirs, strict=True) if not _agree(a, b)]
        if far:
            what = f"is computed otherwise by {engine}, at batch size {len(inputs[0])} in output {shown(far[0])!r}"
            raise _failed(network, what)
    return specs


def _failed(network: OnnxNetwork, what: str) -> RedppError:
    """Make the refusal of a network, which for a file of one batch size lies in that size as a rule."""
    if network.fixed is None:
        return refused(network.path, f"that {what}")
    found = f"for batches of {network.fixed} only, which for others {what}"
    return refused(network.path, found, VARYING_BATCH)


def _engine(path: Path) -> tuple[Run, str]:
    try:
        import onnxruntime  # noqa: PLC0415
    except ImportError:
        from onnx.reference import ReferenceEvaluator  # noqa: PLC0415

        evaluator = ReferenceEvaluator(str(path))
        return evaluator.run, "onnx's reference evaluator"
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise refused(path, f"that ONNX Runtime refuses: {first_line(error)}") from error
    return session.run, "ONNX Runtime"


def _asked(network: OnnxNetwork, run: Run, inputs: Sequence[Tensor]) -> list[Array]:
    """Return the engine's outputs that the network has, for as many items at a time as the file allows."""
    at_once = network.fixed or len(inputs[0])
    parts = []
    for chunk in zip(*(torch.split(x, at_once) for x in inputs), strict=True):
        feeds = {value.name: x.numpy() for value, x in zip(network.file.inputs, chunk, strict=True)}
        try:
            parts.append(run(list(network.file.outputs), feeds))
        except Exception as error:
            raise refused(network.path, f"that fails at batch size {at_once}: {first_line(error)}") from error
    return [_joined(part) for part in zip(*parts, strict=True)]


def _joined(parts: Sequence[Any]) -> Array:
    """Join an output's parts; of ZipMap, which gives a table of classes for each item, the values."""
    arrays = [
        np.array([list(row.values()) for row in part], np.float32) if isinstance(part, list) else part for part in parts
    ]
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def _agree(mine: Tensor, theirs: Array) -> bool:
    if mine.shape != theirs.shape:
        return False
    return are_close(mine, torch.from_numpy(theirs.astype(np.float64)), _TOLERANCES.get(mine.dtype, 1e-3))
