"""What constants of a network tell about inputs of floats: ``x / 255``, ``2 * x - 1`` or ``(x - mean) / std`` inside.

Networks expect numbers of about one behind such calls, so they tell in which range the input itself is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, Node, Ref, once_per_graph
from redpp_serve.graph.ranges import blank

_SUMS = frozenset(("add", "sub", "rsub", "mul", "div", "neg"))
_VIEWS = frozenset(("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "to"))
_MOVES = frozenset(("permute", "transpose", "swapaxes", "movedim", "flip", "expand", "repeat")) | frozenset(
    ("index", "index_select", "slice", "select")
)


@dataclass(frozen=True)
class Affine:
    """What happens to an input first: each number becomes ``scale * x + shift``.

    Attributes:
        scale: of each number behind the calls, (numbers,).
        shift: the same.
        in_order: whether number k comes from number k of the input.
    """

    scale: Tensor
    shift: Tensor
    in_order: bool


@once_per_graph
@torch.no_grad()
def read_by_constants(graph: Graph) -> Mapping[str, Affine]:
    """Return for each input of floats the first value that constants make of it, where they change its range."""
    found = {}
    for spec in graph.inputs:
        if not getattr(torch, spec.dtype).is_floating_point:
            continue
        followed = _followed(graph, spec.name)
        ends = [name for name in followed if any(user not in followed for user in _users(graph, name))]
        ends = [name for name in ends if name != spec.name]
        if not ends:
            continue
        program, others = Program(graph, ends), {each.name: blank(each, 1) for each in graph.inputs}
        given = [{**others, spec.name: torch.full_like(others[spec.name], x)} for x in (0.0, 0.5, 1.0)]
        runs = [program(*inputs.values()) for inputs in given]
        for name, *values in zip(ends, *runs, strict=True):
            zero, half, one = (value.double().flatten() for value in values)
            scale = one - zero
            even = torch.allclose(zero + one, 2 * half, rtol=1e-3, atol=1e-6)
            # Adding a number, as in log(x + 1), tells nothing; taking one away centres.
            if even and bool(scale.all()) and bool(((scale != 1) | (zero < 0)).any()):
                found[spec.name] = Affine(scale, zero, followed[name] and scale.numel() == others[spec.name].numel())
                break
    return found


def _followed(graph: Graph, start: str) -> dict[str, bool]:
    """Return the input and the values that sums with constants and moves make of it; whether its order is kept."""
    followed = {start: True}
    for node in graph.nodes:
        refs = list(node.refs())
        mine = [name for name in refs if name in followed]
        word = node.op.removeprefix("aten.").split(".")[0]
        if len(mine) == 1 and all(name in followed or name in graph.tensors for name in refs):
            if word in _VIEWS or (word in _SUMS and not _divides_by(node, mine[0])):
                followed[node.name] = followed[mine[0]]
            elif word in _MOVES:
                followed[node.name] = False
    return followed


def _divides_by(node: Node, name: str) -> bool:
    divisor: Any = node.argument(1) if node.op.startswith("aten.div") else None
    return isinstance(divisor, Ref) and divisor.name == name


def _users(graph: Graph, name: str) -> list[str]:
    sizes = ("aten.sym_size", "py.")
    users = [node.name for node in graph.nodes if name in node.refs() and not node.op.startswith(sizes)]
    return users + ["output"] * (name in graph.outputs)
