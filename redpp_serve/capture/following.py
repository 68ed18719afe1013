"""Follow the entries of a graph's integer inputs, and note what the calls that read them tell of their values.

Entries are followed through calls that move them, such as slices and concatenations, or add a constant to them. Each
call that reads them tells something: an embedding which rows there are, a comparison with zero that they may be a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from redpp_serve.capture.entries import Entries, Reading
from redpp_serve.graph.executor import makes_tensor, value_shapes, value_sizes
from redpp_serve.graph.graph import Graph, Node, Ref, map_refs
from redpp_serve.graph.operators import resolve

_BEFORE_THE_VALUE = {"aten.constant_pad_nd.default": 2, "aten.pad.default": 3}  # arguments before that of the border
_PENALTY = 1e3  # masks are multiplied by at least so much
_MOST_CONSTANT = 1 << 22  # numbers of a constant that is worth computing

_MOVES = """
reshape.default flatten.using_ints unflatten.int squeeze.default squeeze.dim squeeze.dims unsqueeze.default
transpose.int swapaxes.default permute.default t.default movedim.int movedim.intlist mT.default select.int slice.Tensor
narrow.default unbind.int split.Tensor split.sizes split_with_sizes.default chunk.default expand.default repeat.default
tile.default repeat_interleave.self_int cat.default concat.default stack.default contiguous.default clone.default
flip.default roll.default index_select.default index.Tensor gather.default unfold.default constant_pad_nd.default
pad.default expand_as.default reshape_as.default
"""  # they move entries of their first argument, or of the list that it is, and change none
_CASTS = "to.dtype to.dtype_layout to.device to.other _to_copy.default type_as.default"
_SHAPE_ALONE = """
sym_size.int zeros_like.default ones_like.default full_like.default new_zeros.default new_ones.default new_full.default
"""
_SUMS = "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar mul.Tensor mul.Scalar"
_CONFINING = "clamp.default clamp_min.default clamp_max.default remainder.Scalar abs.default"
_CHOICES = "where.self where.ScalarSelf where.ScalarOther masked_fill.Scalar masked_fill.Tensor"
_COMPARISONS = "eq.Scalar ne.Scalar gt.Scalar lt.Scalar ge.Scalar le.Scalar"
_TENSOR_COMPARISONS = "eq.Tensor ne.Tensor gt.Tensor lt.Tensor ge.Tensor le.Tensor"
_LOGIC = "logical_not.default logical_and.default logical_or.default bitwise_not.default"
_GATES = "mul.Tensor sum.default sum.dim_IntList mean.default mean.dim any.default any.dim"
_KINDS: dict[str, str] = {
    f"aten.{name}": kind
    for kind, names in (
        ("gate", _GATES),
        ("logic", _LOGIC),
        ("comparison", _COMPARISONS),
        ("tensor comparison", _TENSOR_COMPARISONS),
        ("choice", _CHOICES),
        ("confining", _CONFINING),
        ("sum", _SUMS),
        ("shape alone", _SHAPE_ALONE),
        ("cast", _CASTS),
        ("move", _MOVES),
    )
    for name in names.split()
}


def read_entries(graph: Graph) -> dict[str, Reading]:
    """Return what a graph tells of each of its integer inputs, by name."""
    return _Reader(graph).read()


class _Reader:
    """Follows the entries of a graph's integer inputs."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.shapes, self.sizes = graph, dict(value_shapes(graph)), value_sizes(graph)
        self.shapes |= {name: tuple(tensor.shape) for name, tensor in graph.tensors.items()}
        self.shapes |= {spec.name: (1, *spec.shape) for spec in graph.inputs}
        self.constants: dict[str, Any] = {**graph.tensors, **self.sizes}
        self.values: dict[str, Entries | list[Entries]] = {}
        self.starts: dict[str, int] = {}
        total = 1
        for spec in graph.inputs:
            if spec.holds_integers:
                self.starts[spec.name] = total
                self.values[spec.name] = Entries.of_input(total, spec.shape)
                total += math.prod(spec.shape)
        self.found = Reading.of_nothing(total)

    def read(self) -> dict[str, Reading]:
        """Return what is known of each integer input."""
        for node in self.graph.nodes:
            if any(name in self.values for name in node.refs()):
                self._call(node)
            elif all(name in self.constants for name in node.refs()):
                self._compute(node)
        counts = {spec.name: math.prod(spec.shape) for spec in self.graph.inputs}
        return {name: self.found.part(at, counts[name]) for name, at in self.starts.items()}

    def _compute(self, node: Node) -> None:
        """Compute a value that does not depend on the inputs, for one input."""
        if node.name not in self.sizes and math.prod(self.shapes.get(node.name, (_MOST_CONSTANT,))) < _MOST_CONSTANT:
            self.constants[node.name] = self._run(node, self.constants.__getitem__)

    def _run(self, node: Node, value_of: Callable[[str], Any]) -> Any:
        function = resolve(node.op)
        kwargs = {key: map_refs(value, value_of) for key, value in node.kwargs.items()}
        if makes_tensor(function):
            kwargs["device"] = "cpu"
        return function(*map_refs(node.args, value_of), **kwargs)

    def _call(self, node: Node) -> None:
        kind = _KINDS.get(node.op, "py" if node.op.startswith("py.") else "")
        refs = {name for name in node.refs() if name in self.values}
        first = {ref.name for ref in _flat(node.args[:1]) if isinstance(ref, Ref)}
        known = all(name in self.values or name in self.constants for name in node.refs())
        if node.op == "py.getitem":
            self._take(node)
        elif kind == "shape alone" and known and node.name not in self.sizes:
            self.constants[node.name] = self._run(node, self._place_or_constant)
        elif kind == "move" and refs <= first and self._rest_is_constant(node, first):
            self._move(node)
        elif kind == "cast" and refs == first:
            self._cast(node)
        elif kind == "sum":
            self._calculate(node, refs, known)
        elif kind == "confining":
            self._confine(node)
        elif kind == "choice":
            self._choose(node)
        elif kind not in ("py", "shape alone"):
            self._tell(node, kind, refs)

    def _place_or_constant(self, name: str) -> Any:
        return self._entries(name).place if name in self.values else self.constants[name]

    def _rest_is_constant(self, node: Node, first: set[str]) -> bool:
        """Return whether all arguments behind the first are known, and those in it are entries or constants."""
        rest = {ref.name for ref in _flat((*node.args[1:], *node.kwargs.values())) if isinstance(ref, Ref)}
        if node.op in ("aten.expand_as.default", "aten.reshape_as.default"):
            return True
        return rest <= self.constants.keys() and all(
            name in self.constants or isinstance(self.values.get(name), Entries) for name in first
        )

    def _entries(self, name: str) -> Entries:
        """Return a value as entries; a constant has none, only shifts."""
        found = self.values.get(name)
        if isinstance(found, Entries):
            return found
        return Entries.of_constant(self.constants[name])

    def _move(self, node: Node) -> None:
        if node.op in ("aten.expand_as.default", "aten.reshape_as.default"):
            shape = self.shapes[node.name]
            change = (lambda x: x.expand(shape)) if "expand" in node.op else (lambda x: x.reshape(shape))
            self.values[node.name] = self._entries(node.args[0].name).moved(change)
            return
        node = replace(node, args=node.args[: _BEFORE_THE_VALUE.get(node.op, len(node.args))])
        parts = {ref.name: self._entries(ref.name) for ref in _flat(node.args[:1]) if isinstance(ref, Ref)}
        place, scale, shift = (self._moved(node, parts, key) for key in ("place", "scale", "shift"))
        whole, any_read = all(p.whole for p in parts.values()), any(p.any_read for p in parts.values())
        if isinstance(place, Tensor):
            self.values[node.name] = Entries(place, scale, shift, whole, any_read)
        else:
            every = zip(place, scale, shift, strict=True)
            self.values[node.name] = [Entries(*part, whole=whole, any_read=any_read) for part in every]

    def _moved(self, node: Node, parts: Mapping[str, Entries], key: str) -> Any:
        return self._run(node, lambda name: getattr(parts[name], key) if name in parts else self.constants[name])

    def _take(self, node: Node) -> None:
        found, at = self.values.get(node.args[0].name), node.args[1]
        if isinstance(found, list) and isinstance(at, int):
            self.values[node.name] = found[at]

    def _cast(self, node: Node) -> None:
        entries = self._entries(node.args[0].name)
        wanted = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, (torch.dtype, Ref))]
        dtype = wanted[0] if wanted else None
        if isinstance(dtype, Ref):
            dtype = None if dtype.name in self.values else torch.float32
        if dtype is torch.bool:
            self.found.note(entries, "mask")
        else:
            whole = entries.whole if dtype is None else not dtype.is_floating_point
            self.values[node.name] = replace(entries, whole=whole)

    def _calculate(self, node: Node, refs: set[str], known: bool) -> None:
        """Follow entries through a sum or product with a constant; note what they are used for elsewhere."""
        op, (one, other) = node.op.split(".")[1], node.args[:2]
        swapped = isinstance(one, Ref) and one.name in self.constants
        constant: Any = one if swapped else other
        constant = self.constants.get(constant.name) if isinstance(constant, Ref) else constant
        from_constant = op == "rsub" or (op == "sub" and swapped)
        steady = isinstance(constant, int) or (isinstance(constant, Tensor) and not constant.is_floating_point())
        followed = known and steady and len(refs) == 1 and len(node.args) == 2 and not node.kwargs
        for name in refs:
            entries = self._entries(name)
            if (from_constant and _all(constant, lambda x: x == 1)) or (
                op == "mul" and _all(constant, lambda x: abs(x) >= _PENALTY)
            ):
                self.found.note(entries, "mask")
            elif followed and entries.whole:
                self.values[node.name] = entries.calculated(op, constant, from_constant)
            else:
                self.found.note(entries, "" if op == "mul" and not known else "number")

    def _confine(self, node: Node) -> None:
        op = node.op.removeprefix("aten.")
        entries = self._entries(node.args[0].name)
        low, high = None, None
        if op == "remainder.Scalar":
            low, high = 0, node.args[1] - 1
        elif op.startswith("clamp"):
            at = {"clamp.default": (1, 2), "clamp_min.default": (1, 9), "clamp_max.default": (9, 1)}[op]
            low, high = (node.argument(k) for k in at)
            low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
        if not entries.whole or not all(bound is None or isinstance(bound, int) for bound in (low, high)):
            self.found.note(entries, "number")
            return
        soft = replace(entries, any_read=True)
        self.found.limit(soft, low, high)
        self.values[node.name] = soft

    def _choose(self, node: Node) -> None:
        """Follow the entries that a mask lets through beside a constant; a mask that is made of them is one."""
        at = 0 if node.op.startswith("aten.masked_fill") else 1
        condition = node.args[1 - at]
        if isinstance(condition, Ref) and condition.name in self.values:
            self.found.note(self._entries(condition.name), "mask")
        places = (0,) if at == 0 else (1, 2)
        chosen = [a.name for k in places if isinstance(a := node.argument(k), Ref) and a.name in self.values]
        shape = self.shapes.get(node.name)
        if len(chosen) == 1 and shape is not None:
            entries = self._entries(chosen[0]).moved(lambda x: x.expand(shape))
            self.values[node.name] = replace(entries, any_read=True)
        else:
            for name in chosen:
                self.found.note(self._entries(name), "number")

    def _tell(self, node: Node, kind: str, refs: set[str]) -> None:
        """Note what a call that reads entries says of them."""
        reads = self._rows(node)
        for name in refs:
            value = self.values[name]
            for entries in value if isinstance(value, list) else [value]:
                if name in reads:
                    self.found.read_rows(entries, *reads[name])
                elif kind == "comparison":
                    self.found.note(entries, "mask" if node.args[1] in (0, 1) else "number")
                elif kind == "tensor comparison":
                    self._compare(node, entries)
                elif kind == "logic":
                    self.found.note(entries, "mask")
                else:
                    self.found.note(entries, "" if kind == "gate" else "number")

    def _rows(self, node: Node) -> dict[str, tuple[int, int, int]]:
        """Return for each argument that a call takes as indices the first and last, and the lowest it can read."""
        op, args = node.op.removeprefix("aten."), node.args
        if op in ("embedding.default", "embedding_bag.default", "embedding_bag.padding_idx"):
            rows = self.shapes[args[0].name][0]
            return {args[1].name: (0, rows - 1, 0)}
        if op == "one_hot.default" and len(args) > 1 and args[1] > 0:
            return {args[0].name: (0, args[1] - 1, 0)}
        if op in ("index_select.default", "gather.default", "scatter.src", "scatter.value", "scatter_add.default"):
            shape, index = self.shapes.get(args[0].name), args[2]
            return {} if shape is None or not isinstance(index, Ref) else {index.name: (0, shape[args[1]] - 1, 0)}
        if op == "take.default":
            count = math.prod(self.shapes[args[0].name])
            return {args[1].name: (0, count - 1, -count)}
        if op == "index.Tensor":
            shape = self.shapes.get(args[0].name, ())
            pairs = zip(args[1], shape, strict=False)
            return {ref.name: (0, size - 1, -size) for ref, size in pairs if isinstance(ref, Ref)}
        return {}

    def _compare(self, node: Node, entries: Entries) -> None:
        """Take what is compared with 0, 1, ... n - 1 for a length, or for a class where equality is asked."""
        other = [ref.name for ref in node.args[:2] if isinstance(ref, Ref) and ref.name in self.constants]
        positions = self.constants[other[0]] if other else None
        if isinstance(positions, Tensor) and positions.numel() > 1 and not positions.is_floating_point():
            longest = int(positions.max()) + 1
            if positions.numel() == longest and int(positions.min()) == 0:
                equal = node.op in ("aten.eq.Tensor", "aten.ne.Tensor")
                self.found.limit(replace(entries, any_read=True), *((0, longest - 1) if equal else (1, longest)))
                return
        self.found.note(entries, "number")


def _all(constant: Any, holds: Callable[[Any], Any]) -> bool:
    """Return whether a number, or each of a tensor of numbers, is of a kind; what is no number is of none."""
    if isinstance(constant, Tensor):
        return constant.numel() > 0 and bool(holds(constant.double()).all())
    return isinstance(constant, (int, float)) and bool(holds(constant))


def _flat(values: Any) -> list[Any]:
    """Return all items of nested lists."""
    if isinstance(values, (list, tuple)):
        return [item for value in values for item in _flat(value)]
    return [values]
