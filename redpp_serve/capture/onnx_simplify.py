"""What an ONNX file says in several calls, said in one: constants computed, products with a stored weight as layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redpp_serve.capture.onnx_call import Call, UnsupportedError
from redpp_serve.capture.onnx_file import Array, OnnxFile, OnnxNode, Text, refused, shown
from redpp_serve.capture.onnx_recurrent import with_torchs_weights
from redpp_serve.capture.onnx_rules import RULES, apply
from redpp_serve.capture.sniff import first_line, shorten

MOST_CONSTANT = 1 << 28  # elements of all constants that are computed
Constants = dict[str, Array | Text]


def simplified(path: Path, file: OnnxFile, messages: list[str]) -> OnnxFile:
    """Return the model without what is known before it runs, its products with stored weights as ``Linear``.

    Args:
        path: the file, for messages.
        file: what it holds.
        messages: gains a line where an output of text is left out.

    Raises:
        RedppError: operators without a rule, all at once; no output but text; constants of an absurd size.
    """
    nodes = _needed(file.nodes, file.outputs)
    unknown = Counter(node.op for node in nodes if node.op not in RULES and node.op != "Constant")
    if unknown:
        counted = (f"{shown(op)} ({count})" if count > 1 else shown(op) for op, count in unknown.items())
        do = "export the network without them, or give its PyTorch weights"
        raise refused(path, f"with operators that have no rule: {shorten(counted, 12)}", do)
    constants, nodes = _folded(path, file, nodes)
    texts = [name for name in file.outputs if isinstance(constants.get(name), Text)]
    outputs = tuple(name for name in file.outputs if name not in texts)
    if not outputs:
        raise refused(path, "whose outputs are all text")
    messages += [f"left out output {shown(name)}, which is text" for name in texts]
    nodes = _activations(_recurrent(path, constants, _needed(nodes, outputs)))
    nodes = _own_biases(constants, _layers(constants, nodes, outputs))
    used = {name for node in nodes for name in node.inputs} | set(outputs)
    kept: Constants = {name: value for name, value in constants.items() if name in used and not isinstance(value, Text)}
    return replace(file, nodes=tuple(nodes), constants=kept, outputs=outputs)


def _needed(nodes: Iterable[OnnxNode], outputs: Iterable[str]) -> list[OnnxNode]:
    """Return the calls that the outputs depend on, in order."""
    wanted, kept = set(outputs), []
    for node in reversed(list(nodes)):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return kept[::-1]


class _Numbers:
    """Makes tensors of constants while constants are computed."""

    def tensor(self, name: str, array: Array, *, trained: bool) -> Tensor:
        """Return a tensor; one without memory inside ``torch.device("meta")``."""
        tensor = torch.from_numpy(np.array(array))
        return tensor.to("meta") if torch.get_default_device().type == "meta" else tensor


def _folded(path: Path, file: OnnxFile, nodes: Iterable[OnnxNode]) -> tuple[Constants, list[OnnxNode]]:
    """Compute what depends on constants alone, first without memory to know its size."""
    constants, left, budget = dict(file.constants), [], MOST_CONSTANT
    for node in nodes:
        names = [name for name in node.inputs if name]
        if any(isinstance(constants.get(name), Text) for name in names):
            constants.update((name, Text()) for name in node.outputs)
            continue
        if not all(name in constants for name in names):
            left.append(node)
            continue
        try:
            results = _constant(node, constants, file.opset, budget)
        except Exception as error:  # torch's operators raise whatever they do
            what = str(error) if isinstance(error, UnsupportedError) else f"fails: {first_line(error)}"
            raise refused(path, f"whose operator {shown(node.op)} {shown(node.name)!r} {what}") from error
        budget -= sum(value.size for value in results if isinstance(value, np.ndarray))
        constants.update(zip(node.outputs, results, strict=False))
    return constants, left


def _constant(node: OnnxNode, constants: Constants, opset: int, budget: int) -> list[Array | Text]:
    if node.op == "Constant":
        (value,) = node.attributes.values()
        if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str)):
            return [Text()]
        if isinstance(value, (np.ndarray, Text)):
            return [value]
        whole = "value_int" in node.attributes or "value_ints" in node.attributes
        return [np.array(value, np.int64 if whole else np.float32)]
    given = [_number(constants[name]) if name else None for name in node.inputs]
    call = Call(node, given, opset, _Numbers())
    with torch.no_grad():
        with torch.device("meta"):
            size = sum(math.prod(value.shape) for value in _listed(apply(call)))
        if size > budget:
            raise UnsupportedError(f"makes a constant of {size} numbers")
        return [value.numpy() if isinstance(value, Tensor) else value for value in _listed(apply(call))]


def _number(value: Array | Text) -> Array:
    assert isinstance(value, np.ndarray)
    return value


def _listed(found: Any) -> list[Any]:
    return list(found) if isinstance(found, tuple) else [found]


def _recurrent(path: Path, constants: Constants, nodes: list[OnnxNode]) -> list[OnnxNode]:
    """Give recurrent calls torch's weights."""

    def stored(name: str) -> Array | None:
        value = constants.get(name)
        return value if isinstance(value, np.ndarray) and value.dtype.kind == "f" else None

    found = []
    for node in nodes:
        try:
            recurrent = node.op in ("LSTM", "GRU", "RNN")
            found.append(with_torchs_weights(node, stored, partial(_derived, constants)) if recurrent else node)
        except UnsupportedError as error:
            raise refused(path, f"whose operator {node.op} {shown(node.name)!r} {error}") from error
    return found


def _activations(nodes: list[OnnxNode]) -> list[OnnxNode]:
    """Make x * sigmoid(x) one call."""
    made = {name: node for node in nodes for name in node.outputs}
    return [
        node.replaced("Silu", [name for name in node.inputs if name != gate], node.outputs)
        if (gate := _gate(node, made))
        else node
        for node in nodes
    ]


def _gate(node: OnnxNode, made: dict[str, OnnxNode]) -> str | None:
    """Return which input of a product is the sigmoid of the other one."""
    if node.op == "Mul":
        for gate, x in (node.inputs[::-1], node.inputs):
            if gate in made and made[gate].op == "Sigmoid" and made[gate].inputs == (x,):
                return gate
    return None


def _layers(constants: Constants, nodes: list[OnnxNode], outputs: Iterable[str]) -> list[OnnxNode]:
    """Turn Gemm, and MatMul with the Add behind it, into ``Linear`` where the weight is stored."""
    readers = Counter(name for node in nodes for name in node.inputs)
    readers.update(outputs)
    adds = {name: node for node in nodes if node.op == "Add" for name in node.inputs}
    found, gone = [], set()
    for node in nodes:
        add = adds.get(node.outputs[0]) if readers[node.outputs[0]] == 1 else None
        if node.op == "Gemm":
            found.append(_of_gemm(constants, node))
        elif node.op == "MatMul" and (weight := _matrix(constants, node.inputs[1])) is not None:
            bias = next((name for name in add.inputs if name != node.outputs[0]), "") if add else ""
            turned = _derived(constants, node.inputs[1], "turned", np.transpose)
            if add and (vector := _vector(constants, bias, weight.shape[1], 1.0)):
                gone.add(id(add))
                found.append(node.replaced("Linear", (node.inputs[0], turned, vector), add.outputs))
            else:
                found.append(node.replaced("Linear", (node.inputs[0], turned), node.outputs))
        elif id(node) not in gone:
            found.append(node)
    return found


def _own_biases(constants: Constants, nodes: list[OnnxNode]) -> list[OnnxNode]:
    """Give each layer a bias of its own; exporters store equal ones once, and what is shared cannot be narrowed."""
    seen: set[str] = set()
    found = []
    for node in nodes:
        if node.op in ("Conv", "ConvTranspose", "Linear") and len(node.inputs) > 2 and node.inputs[2] in constants:
            bias = node.inputs[2]
            if bias in seen:
                bias = _derived(constants, bias, f"of {node.outputs[0]}", np.copy)
            seen.update(node.inputs)
            node = replace(node, inputs=(*node.inputs[:2], bias))  # noqa: PLW2901
        else:
            seen.update(node.inputs)
        found.append(node)
    return found


def _of_gemm(constants: Constants, node: OnnxNode) -> OnnxNode:
    weight, options = _matrix(constants, node.inputs[1]), node.attributes
    if weight is None or options.get("transA", 0):
        return node
    turned, alpha, name = bool(options.get("transB", 0)), options.get("alpha", 1.0), node.inputs[1]
    if not turned or alpha != 1:
        change = lambda w: (w if turned else w.T) * w.dtype.type(alpha)  # noqa: E731
        name = _derived(constants, name, f"{'' if turned else 'turned'}{alpha:g}", change)
    inputs = [node.inputs[0], name]
    if len(node.inputs) > 2 and node.inputs[2]:
        bias = _vector(constants, node.inputs[2], weight.shape[0 if turned else 1], options.get("beta", 1.0))
        if bias is None:
            return node
        inputs.append(bias)
    return node.replaced("Linear", inputs, node.outputs)


def _matrix(constants: Constants, name: str) -> Array | None:
    value = constants.get(name)
    return value if isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind == "f" else None


def _vector(constants: Constants, name: str, length: int, factor: float) -> str | None:
    """Return the name of a stored summand times ``factor`` as a bias (length,), None where it is none."""
    value = constants.get(name)
    if not isinstance(value, np.ndarray) or value.ndim > 2 or value.size not in (1, length):
        return None
    if value.size > 1 and value.shape[-1] != length:  # a column, which adds to each item as a whole
        return None
    if value.shape == (length,) and factor == 1:
        return name
    change = lambda v: np.resize(v, length) * v.dtype.type(factor)  # noqa: E731
    return _derived(constants, name, f"{factor:g}x{length}", change)


def _derived(constants: Constants, name: str, how: str, change: Callable[[Array], Array]) -> str:
    """Store what is computed of a constant, once for all calls that need it; return its name."""
    derived = f"{name}|{how}"
    if derived not in constants:
        constants[derived] = np.ascontiguousarray(change(_number(constants[name])))
    return derived
