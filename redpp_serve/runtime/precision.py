"""The precision that a network runs in: torch's switches for fp32 and tf32, a cast of the graph for fp16 and bf16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..errors import RedppError
from .graph import Graph, Node, Ref, map_refs
from .program import value_types

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_CAST = (torch.float32, torch.float16, torch.bfloat16)
_TO = "aten._to_copy.default"


def check_precision(precision: Any, where: str = "--precision") -> None:
    """Refuses a name that is no precision; ``where`` names the file or flag that says so.

    Raises:
        RedppError: naming those that there are.
    """
    if precision not in PRECISIONS:
        raise RedppError(f"precision is {str(precision)[:40]!r} in {where}", f"one of {', '.join(PRECISIONS)}", f"correct {where}")


def precision_dtype(precision: str) -> torch.dtype:
    """The dtype of activations and weights in a precision."""
    return _HALF.get(precision, torch.float32)


def set_switches(precision: str) -> None:
    """Allow or forbid TF32 in matrix products and convolutions on CUDA, for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def in_precision(graph: Graph, precision: str) -> Graph:
    """The graph with all floating-point values between its inputs and outputs in a precision.

    Inputs and outputs keep their dtypes: the first and the last nodes cast them. fp32 and tf32 change nothing, so that
    a network stored in float64 or float16 runs in that. fp16 and bf16 cast tensors and the dtypes among the arguments;
    what a node makes in float32 from integers alone is cast behind it, so that no layer meets two dtypes. Integers
    stay. Runs the network once on zeros, on the CPU.

    Raises:
        RedppError: a network with float64 values in fp16 or bf16.
    """
    if precision not in _HALF:
        return graph
    dtype, types = _HALF[precision], {name: found for name, (_, found) in value_types(graph, "cpu").items()}
    types |= {i.name: getattr(torch, i.dtype) for i in graph.inputs}
    types |= {name: tensor.dtype for name, tensor in graph.tensors.items()}
    if double := [name for name, found in types.items() if found == torch.float64]:
        raise RedppError(f"a network with float64 values ({', '.join(double[:3])}) in {precision}",
                         "a network that computes in float32, which 16 bits can stand in for",
                         "serve it with precision fp32")  # fmt: skip
    tensors = {name: t.to(dtype) if t.dtype in _CAST else t for name, t in graph.tensors.items()}
    inputs = {i.name: f"{i.name}.{precision}" for i in graph.inputs if types[i.name] in _CAST}
    nodes = [Node(cast, _TO, (Ref(name),), {"dtype": dtype}) for name, cast in inputs.items()]
    for node in graph.nodes:
        call = _cast(node, inputs, dtype)
        from_integers = not any(types.get(name, dtype).is_floating_point for name in node.refs())
        if types.get(node.name) in _CAST and from_integers and call == node:
            nodes.append(replace(call, name=f"{node.name}.wide"))
            call = Node(node.name, _TO, (Ref(f"{node.name}.wide"),), {"dtype": dtype})
        nodes.append(call)
    outputs = {name: f"{name}.{str(types[name]).removeprefix('torch.')}" for name in graph.outputs if types[name] in _CAST}
    nodes += [Node(cast, _TO, (Ref(name),), {"dtype": types[name]}) for name, cast in outputs.items()]
    named = tuple(outputs.get(name, name) for name in graph.outputs)
    return replace(graph, tensors=tensors, nodes=tuple(nodes), outputs=named)


def _cast(node: Node, inputs: dict[str, str], dtype: torch.dtype) -> Node:
    """The call with inputs by their cast names, and with its constant dtypes in the precision."""

    def convert(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return dtype if value in _CAST else value
        return type(value)(map(convert, value)) if isinstance(value, (list, tuple)) else value

    args, kwargs = (map_refs(part, lambda name: Ref(inputs.get(name, name))) for part in
                    (node.args, tuple(node.kwargs.values())))  # fmt: skip
    return Node(node.name, node.op, convert(args), dict(zip(node.kwargs, convert(kwargs))))
