"""Sizes that only a request tells, computed inside an ONNX model from the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.sizes import drawn, is_varying, resized
from redpp_serve.graph.symbolic import symbolic_sizes

if TYPE_CHECKING:
    from redpp_serve.engines.onnx_writer import Writer

_SAMPLES = 3  # choices of sizes at which expressions are checked, beside the graph's own
_INTEGER, _REAL = torch.int64, torch.float64
_ROUNDED = {"FloorToInt": "Floor", "CeilToInt": "Ceil", "TruncToInt": ""}


class SizeError(RedppError):
    """A size that has no expression, or not by the rules here."""

    def __init__(self, found: str) -> None:
        super().__init__(found, "sizes that follow from the inputs' by arithmetic", "use another engine or format")


def size_samples(graph: Graph) -> list[Graph]:
    """Return the graph at choices of sizes other than its own, the small ones of many; none where no size varies."""
    if not is_varying(graph.inputs):
        return []
    chosen = sorted(drawn(graph.inputs, 3 * _SAMPLES, seed=0), key=lambda sizes: sum(sizes.values()))
    others = [inputs for s in chosen if (inputs := tuple(resized(spec, s) for spec in graph.inputs)) != graph.inputs]
    return [replace(graph, inputs=inputs) for inputs in dict.fromkeys(others)][:_SAMPLES]


class SizeExpressions:
    """Emits the ONNX nodes that compute sizes, each once.

    Args:
        writer: collects the nodes.

    Raises:
        SizeError: torch cannot derive the sizes.
    """

    def __init__(self, writer: Writer) -> None:
        try:
            self._symbolic = symbolic_sizes(writer.graph)
        except Exception as error:  # whatever torch raises
            text = " ".join(str(error).split())[:160]
            raise SizeError(f"an operator whose sizes cannot be followed: {text}") from error
        self._writer = writer
        self._made: dict[Any, str] = {}

    def checked(self, name: str, sizes: Sequence[Sequence[int]], inputs: Sequence[Mapping[str, Sequence[int]]]) -> Any:
        """Return the expressions of a tensor's sizes, or that of a number, once they are right in all runs.

        Args:
            name: of the value.
            sizes: its sizes in each run.
            inputs: the shapes of the network's inputs in each run, with the batch.

        Raises:
            SizeError: they are wrong in one.
        """
        expressions = self._symbolic.shapes[name]
        for known, expected in zip(inputs, sizes, strict=True):
            values = {symbol: known[place][axis] for symbol, (place, axis) in self._symbolic.places.items()}
            found = [int(e) if isinstance(e, int) else int(e.subs(values)) for e in expressions]
            if found != list(expected):
                raise SizeError(f"{name} of sizes {list(expected)} where torch derives {found}")
        return expressions

    def vector(self, expression: Any) -> str:
        """Return the ONNX vector (1,) of int64 with the value of an expression."""
        if expression not in self._made:
            self._made[expression] = self._vector(expression)
        return self._made[expression]

    def _vector(self, e: Any) -> str:
        w, kind = self._writer, type(e).__name__
        parts: Sequence[Any] = getattr(e, "args", ())
        if isinstance(e, int) or e.is_Integer:
            return w.integers([int(e)])
        if e in self._symbolic.places:
            name, axis = self._symbolic.places[e]
            return w.emit("Slice", w.emit("Shape", name), w.integers([axis]), w.integers([axis + 1]))
        if kind == "Pow" and parts[1].is_Integer and parts[1] > 0:
            return self._folded("Mul", [self.vector(parts[0])] * int(parts[1]))
        if kind in ("Add", "Mul", "Max", "Min"):
            return self._folded(kind, list(map(self.vector, parts)))
        if kind in ("Mod", "PythonMod"):
            return w.emit("Mod", *map(self.vector, parts))
        if kind in ("FloorDiv", "CleanDiv"):  # ONNX divides towards zero, but takes remainders as Python does
            a, b = map(self.vector, parts)
            return w.emit("Div", w.emit("Sub", a, w.emit("Mod", a, b)), b)
        if kind in _ROUNDED:
            found = self._real(parts[0])
            return w.cast(w.emit(_ROUNDED[kind], found) if _ROUNDED[kind] else found, _REAL, _INTEGER)
        raise SizeError(f"a size of the form {str(e)[:80]}")

    def _real(self, e: Any) -> str:
        """Return the ONNX vector (1,) of float64 with the value of an expression."""
        kind = type(e).__name__
        if getattr(e, "is_Float", False):
            return self._writer.constant(torch.tensor([float(e)], dtype=_REAL))
        if kind == "ToFloat":
            return self._writer.cast(self.vector(e.args[0]), _INTEGER, _REAL)
        if kind in ("Add", "Mul"):
            return self._folded(kind, list(map(self._real, e.args)))
        if kind in ("FloatTrueDiv", "IntTrueDiv"):
            return self._writer.emit("Div", *map(self._real, e.args))
        return self._writer.cast(self.vector(e), _INTEGER, _REAL)

    def _folded(self, op: str, values: list[str]) -> str:
        return reduce(lambda a, b: self._writer.emit(op, a, b), values)
