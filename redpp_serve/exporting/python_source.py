"""A graph as a Python module of its own: readable code that needs torch alone, and a file of weights beside it.

What is written comes from a graph that anybody may have made, so nothing of it is copied as code: names become
identifiers or quoted texts, operators are those of the allow-list, and constants are written by their type.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from redpp_serve import __version__
from redpp_serve.errors import RedppError
from redpp_serve.exporting.module import MOMENTUM, buffer_names
from redpp_serve.graph.executor import makes_tensor, output_types
from redpp_serve.graph.graph import Graph, Node, Ref
from redpp_serve.graph.operators import ALLOWED, resolve
from redpp_serve.graph.passes import is_inference_norm

_RESERVED = {"F", "Path", "Tensor", "aten", "float", "nn", "operator", "self", "stored", "super", "torch"}
_TEMPLATE = '''"""{title}, written by redpp-serve {version}.

It needs torch alone, and its weights in the .pt file of the same name beside it.

    network = Network()  # in eval mode; network.train() makes batch norms use and update their statistics

Inputs: {inputs}. Outputs: {outputs}.
"""

import operator  # noqa: F401
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: F401
from torch import Tensor, nn

aten = torch.ops.aten
BUFFERS = {buffers}


class Network(nn.Module):
    """The network, with its parameters under the names that they had in the original."""

    def __init__(self, weights=Path(__file__).with_suffix(".pt")):
        super().__init__()
        for name, tensor in torch.load(weights, map_location="cpu", weights_only=True).items():
            *path, last = name.split(".")
            place = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            if name in BUFFERS:
                place.register_buffer(last, tensor)
            else:
                place.register_parameter(last, nn.Parameter(tensor))
        self.eval()

    def forward({arguments}):
        stored = {{**dict(self.named_parameters()), **dict(self.named_buffers())}}
{calls}
        return {results}
'''


def python_source(graph: Graph, title: str) -> str:
    """Return the source of a module with a class ``Network``.

    Args:
        graph: the network.
        title: what it is, in plain words.

    Raises:
        RedppError: an operator that torch alone does not have.
    """
    names = _identifiers([spec.name for spec in graph.inputs] + [node.name for node in graph.nodes])
    device = f"{names[graph.inputs[0].name]}.device"
    outputs = [
        f"{name} (N{''.join(f', {n}' for n in shape[1:])}) {str(dtype)[6:]}"
        for name, (shape, dtype) in output_types(graph, "cpu").items()
    ]
    return _TEMPLATE.format(
        title=re.sub(r"[^\w .,-]", "", title),
        version=__version__,
        inputs="; ".join(f"{names[i.name]} (N{''.join(f', {n}' for n in i.shape)}) {i.dtype}" for i in graph.inputs),
        outputs="; ".join(outputs),
        buffers=sorted(buffer_names(graph)) or "()",
        arguments=", ".join(["self", *(f"{names[spec.name]}: Tensor" for spec in graph.inputs)]),
        calls="\n".join(f"        {names[node.name]} = {_call(graph, node, names, device)}" for node in graph.nodes),
        results=", ".join(_value(Ref(name), graph, names) for name in graph.outputs),
    )


def _call(graph: Graph, node: Node, names: Mapping[str, str], device: str) -> str:
    args = [_value(argument, graph, names) for argument in node.args]
    if is_inference_norm(node):
        x, weight, bias, mean, variance, _, _, eps, *_ = args
        training = f"self.get_submodule({node.args[3].name.rpartition('.')[0]!r}).training"
        momentum = _value(node.args[6] or MOMENTUM, graph, names)
        return f"F.batch_norm({x}, {mean}, {variance}, {weight}, {bias}, {training}, {momentum}, {eps})"
    if node.op not in ALLOWED:
        raise RedppError(
            f"the operator {node.op} ({node.name})", "operators of torch itself", "export it in precision fp32"
        )
    family, _, name = node.op.partition(".")
    named = [f"{key}={_value(value, graph, names)}" for key, value in node.kwargs.items() if key.isidentifier()]
    if makes_tensor(resolve(node.op)):
        named.append(f"device={device}")
    return f"{'operator' if family == 'py' else family}.{name}({', '.join([*args, *named])})"


def _value(value: Any, graph: Graph, names: Mapping[str, str]) -> str:
    """Write an argument: a value by its identifier, a stored tensor by its name, a constant by its type."""
    if isinstance(value, Ref):
        return f"stored[{value.name!r}]" if value.name in graph.tensors else names[value.name]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item, graph, names) for item in value)}]"
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    assert value is None or isinstance(value, (bool, int, float, str))  # as the artifact has it
    return repr(value)


def _identifiers(values: Iterable[str]) -> dict[str, str]:
    """Return for each value's name an identifier of its own."""
    found: dict[str, str] = {}
    taken = set(_RESERVED)
    for name in values:
        made = re.sub(r"[^A-Za-z0-9_]", "_", name).strip("_") or "value"
        made = f"value_{made}" if made[0].isdigit() or keyword.iskeyword(made) else made
        numbered = made
        count = 0
        while numbered in taken:
            count += 1
            numbered = f"{made}_{count}"
        taken.add(numbered)
        found[name] = numbered
    return found
