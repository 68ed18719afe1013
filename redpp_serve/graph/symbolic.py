"""Shapes as expressions of the batch and of the sizes that vary, as torch's own tracing derives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node
from redpp_serve.graph.operators import INT8_VALUES

_BATCH = 3  # of the example: no operator takes it for a size to broadcast


@dataclass(frozen=True)
class SymbolicSizes:
    """The sizes of a network's values.

    Attributes:
        shapes: for each input and each tensor that a call makes, the expressions of its sizes; for a number, its own.
        places: for each symbol in them, an input and the axis of a batch of it that the symbol stands for.
    """

    shapes: Mapping[str, tuple[Any, ...]]
    places: Mapping[Any, tuple[str, int]]


def symbolic_sizes(graph: Graph) -> SymbolicSizes:
    """Derive the size of every value in a graph, without computing any.

    Raises:
        Exception: whatever torch raises on an operator that it cannot follow so.
    """
    # Half a second to import, which networks of one size need not wait for.
    from torch._dispatch.python import enable_python_dispatcher  # noqa: PLC0415
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    inputs = [_fake(mode, spec) for spec in graph.inputs]
    stored: dict[str, torch.Tensor] = {
        name: mode.from_tensor(tensor, static_shapes=True) for name, tensor in graph.tensors.items()
    }
    kept = {n.name: Node(n.name, "aten.clone.default", n.args[:1]) for n in graph.nodes if n.op == INT8_VALUES}
    program = Program(graph.with_tensors(stored).with_nodes(kept))  # torch follows no sizes through its rounding
    with torch.no_grad(), mode, enable_python_dispatcher():
        found = program.types(*inputs)
    shapes = {
        name: (_expression(value),) if not isinstance(value, tuple) else tuple(map(_expression, value[0]))
        for name, value in found.items()
    }
    places: dict[Any, tuple[str, int]] = {}
    for spec, x in zip(graph.inputs, inputs, strict=True):
        shapes[spec.name] = tuple(map(_expression, x.shape))
        places |= {_expression(size): (spec.name, axis) for axis, size in enumerate(x.shape) if _varies(size)}
    return SymbolicSizes(shapes, places)


def _fake(mode: Any, spec: InputSpec) -> Any:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext  # noqa: PLC0415

    varying = {0, *(axis + 1 for axis, _ in spec.varying)}
    axes = [DimDynamic.DYNAMIC if axis in varying else DimDynamic.STATIC for axis in range(1 + len(spec.shape))]
    x = torch.empty(_BATCH, *spec.shape, dtype=getattr(torch, spec.dtype))
    return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(axes))


def _varies(size: Any) -> bool:
    return isinstance(size, torch.SymInt)


def _expression(size: Any) -> Any:
    """Return a number, or torch's expression of one."""
    return size.node.expr if _varies(size) else size
