"""The precision that a network runs in: torch's switches for fp32 and tf32, a cast of the whole graph for fp16 and bf16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..errors import RedppError
from .graph import Graph, InputSpec, Node, Ref
from .program import value_types

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_CAST = (torch.float32, torch.float16, torch.bfloat16)


def check_precision(precision: str) -> None:
    """Refuses a name that is no precision.

    Raises:
        RedppError: naming those that there are.
    """
    if precision not in PRECISIONS:
        raise RedppError(f"precision {str(precision)[:40]!r}", f"one of {', '.join(PRECISIONS)}",
                         "correct the precision where the server's configuration sets it")  # fmt: skip


def precision_dtype(precision: str) -> torch.dtype:
    """The dtype of activations and weights in a precision."""
    return _HALF.get(precision, torch.float32)


def set_switches(precision: str) -> None:
    """Allow or forbid TF32 in matrix products and convolutions on CUDA, for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def in_precision(graph: Graph, precision: str) -> Graph:
    """The graph with its floating-point tensors, inputs and constant dtypes in a precision.

    fp32 and tf32 change nothing: a network stored in float64 or float16 runs in that. In fp16 and bf16, what a node
    makes in float32 from integers alone is cast behind it, so that no layer meets two dtypes; integers stay. Runs the
    network once on zeros, on the CPU.

    Raises:
        RedppError: a float64 network in fp16 or bf16.
    """
    if precision not in _HALF:
        return graph
    dtype = _HALF[precision]
    double = [i.name for i in graph.inputs if i.dtype == "float64"]
    double += [name for name, tensor in graph.tensors.items() if tensor.dtype == torch.float64]
    if double:
        raise RedppError(f"a network with float64 values ({', '.join(double[:3])}) in {precision}",
                         "a float32 network, which 16 bits can stand in for",
                         "serve it with precision fp32, or convert it to float32 and package that")  # fmt: skip
    types = {name: found for name, (_, found) in value_types(graph, "cpu").items()}
    floating = {i.name for i in graph.inputs if getattr(torch, i.dtype).is_floating_point}
    floating |= {name for name, tensor in graph.tensors.items() if tensor.is_floating_point()}
    nodes: list[Node] = []
    for node in graph.nodes:
        cast = Node(node.name, node.op, _cast(node.args, dtype), {k: _cast(v, dtype) for k, v in node.kwargs.items()})
        if types.get(node.name) in _CAST and not floating & set(node.refs()) and not _tells_dtype(node):
            wide = f"{node.name}.wide"
            nodes.append(replace(cast, name=wide))
            cast = Node(node.name, "aten._to_copy.default", (Ref(wide),), {"dtype": dtype})
        nodes.append(cast)
        if node.name not in types or types[node.name].is_floating_point:
            floating.add(node.name)
    tensors = {name: t.to(dtype) if t.dtype in _CAST else t for name, t in graph.tensors.items()}
    inputs = tuple(_input(spec, dtype) for spec in graph.inputs)
    return replace(graph, inputs=inputs, tensors=tensors, nodes=tuple(nodes))


def _input(spec: InputSpec, dtype: torch.dtype) -> InputSpec:
    is_cast = getattr(torch, spec.dtype) in _CAST
    return replace(spec, dtype=str(dtype).removeprefix("torch.")) if is_cast else spec


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.dtype):
        return dtype if value in _CAST else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v, dtype) for v in value)
    return value


def _tells_dtype(node: Node) -> bool:
    return any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
