"""ONNX models that a reader must refuse or bound: circles, sizes that grow, weights that lie elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

Build = Callable[[], Any]
BIG = 2_000_000_000


def model(nodes: Sequence[Any], stored: Sequence[Any] = (), inputs: Sequence[str] = ("x",), output: str = "y") -> Any:
    """Return a model of these calls, whose inputs are (N, 4) of float32."""
    from onnx import TensorProto, helper

    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in inputs]
    made = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    graph = helper.make_graph(list(nodes), "g", given, made, list(stored))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def call(op: str, inputs: Sequence[str], output: str = "y", **attributes: Any) -> Any:
    """Return one call."""
    from onnx import helper

    return helper.make_node(op, list(inputs), [output], **attributes)


def whole(name: str, *values: int) -> Any:
    """Return a stored vector of whole numbers."""
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array(values, np.int64), name)


def claimed(name: str, dims: Sequence[int], data_type: int = 1, **fields: Any) -> Any:
    """Return a stored tensor, by default of float32, whose dimensions need not be those of what it holds."""
    from onnx import TensorProto

    return TensorProto(name=name, data_type=data_type, dims=dims, **fields)


def elsewhere(**entries: str) -> Any:
    """Return a stored tensor (4, 4) of float32 that lies in another file."""
    from onnx import StringStringEntryProto, TensorProto

    stored = [StringStringEntryProto(key=key, value=value) for key, value in entries.items()]
    return claimed("w", [4, 4], data_location=TensorProto.EXTERNAL, external_data=stored)


def product(weight: Any) -> Any:
    """Return a model that multiplies by a stored tensor."""
    return model([call("MatMul", ["x", "w"])], [weight])


def chain(op: str, times: int, inputs: Callable[[str], list[str]], **attributes: Any) -> list[Any]:
    """Return calls each of which takes the result of the one before."""
    names = ["x", *(f"v{k}" for k in range(times - 1)), "y"]
    return [call(op, inputs(a), b, **attributes) for a, b in pairwise(names)]


def of_one_name(count: int) -> list[str]:
    """Return names that differ in signs alone, which no name in Python may hold."""
    return ["x" + "".join("-."[k >> bit & 1] for bit in range(16)) for k in range(count)]


def nested(depth: int) -> Any:
    """Return a model of branches within branches."""
    from onnx import helper

    graph = leaf = helper.make_graph([call("Relu", ["x"])], "g", [], [])
    for _ in range(depth):
        graph = helper.make_graph([call("If", ["x"], then_branch=graph, else_branch=leaf)], "g", [], [])
    return model([call("If", ["x"], then_branch=graph, else_branch=leaf)])


def _many_inputs() -> Any:
    names = of_one_name(5000)
    return model([call("Sum", names)], inputs=names)


def _many_weights() -> Any:
    names = of_one_name(20_000)
    calls = [call("Add", [f"v{k - 1}" if k else "x", name], f"v{k}") for k, name in enumerate(names)]
    return model([*calls, call("Relu", [f"v{len(names) - 1}"])], [claimed(n, [4], float_data=[1.0] * 4) for n in names])


MODELS: dict[str, Build] = {
    "a circle": lambda: model([call("Add", ["x", "b"], "a"), call("Relu", ["a"], "b"), call("Relu", ["b"])]),
    "a call that reads itself": lambda: model([call("Add", ["x", "y"])]),
    "an output that nothing makes": lambda: model([call("Relu", ["x"], "z")]),
    "a value that is made twice": lambda: model([call("Relu", ["x"]), call("Abs", ["x"])]),
    "a call without inputs": lambda: model([call("MatMul", [])]),
    "doubled 40 times": lambda: model(chain("Concat", 40, lambda v: [v, v], axis=1)),
    "doubled 40 times along the batch": lambda: model(chain("Concat", 40, lambda v: [v, v], axis=0)),
    "a constant of 2**62": lambda: model(
        [call("ConstantOfShape", ["s"], "c"), call("Add", ["x", "c"])], [whole("s", 1 << 31, 1 << 31)]
    ),
    "a range of 2**60": lambda: model(
        [call("Range", ["a", "b", "c"], "r"), call("Cast", ["r"], "f", to=1), call("Add", ["x", "f"])],
        [whole("a", 0), whole("b", 1 << 60), whole("c", 1)],
    ),
    "tiles": lambda: model([call("Tile", ["x", "s"])], [whole("s", 1, BIG)]),
    "a border": lambda: model([call("Pad", ["x", "s"])], [whole("s", 0, BIG, 0, BIG)]),
    "expanded": lambda: model([call("Expand", ["x", "s"])], [whole("s", BIG, 1, 4)]),
    "a one-hot of 2**40": lambda: model(
        [call("Cast", ["x"], "i", to=7), call("OneHot", ["i", "d", "v"])],
        [whole("d", 1 << 40), claimed("v", [2], float_data=[0.0, 1.0])],
    ),
    "many thousand inputs of one name": _many_inputs,
    "many thousand weights of one name": _many_weights,
    "branches within branches": lambda: nested(30),
    "dimensions that overflow": lambda: product(claimed("w", [1 << 32, 1 << 32], raw_data=b"")),
    "dimensions below zero": lambda: product(claimed("w", [-4, -4], raw_data=bytes(64))),
    "a million dimensions": lambda: product(claimed("w", [1] * 1_000_000, raw_data=bytes(4))),
    "numbers that are missing": lambda: product(claimed("w", [4, 4], float_data=[1.0])),
    "a type that is none": lambda: product(claimed("w", [4, 4], 99, raw_data=bytes(64))),
    "weights above the folder": lambda: product(elsewhere(location="../../../../etc/passwd")),
    "weights at the root": lambda: product(elsewhere(location="/etc/passwd")),
    "weights behind a link": lambda: product(elsewhere(location="link")),
    "weights in a pipe": lambda: product(elsewhere(location="pipe")),
    "weights at an offset of 10**4000": lambda: product(elsewhere(location="beside", offset="1" + "0" * 4000)),
    "weights at an offset of many digits": lambda: product(elsewhere(location="beside", offset="9" * 1_000_000)),
    "weights of a negative length": lambda: product(elsewhere(location="beside", length="-64")),
    "weights whose name steers": lambda: product(elsewhere(location="\x1b]0;owned\x07\x1b[2J\u202e")),
    "names that steer": lambda: model([call("\x1b[2JRelu\u202e", ["x"]), call("Relu", ["\x1b]0;x\x07"], "z")]),
}


def write(path: Path, build: Build) -> None:
    """Write a model, and beside it 64 bytes, a link out and a pipe."""
    path.write_bytes(build().SerializeToString())
    (path.parent / "beside").write_bytes(bytes(64))
    (path.parent / "link").symlink_to("/etc/passwd")
    os.mkfifo(path.parent / "pipe")
