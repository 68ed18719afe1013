"""Operators that an artifact lacks and torch does not define by simpler ones, written out.

An embedding bag is an embedding whose rows are summed, averaged or compared, bag by bag. Others have a definition in
torch, but one that fixes the size of the batch. An index by a mask that is stored is one by places.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.predispatch import _add_batch_dim, _remove_batch_dim
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from redpp_serve.capture.sequences import stand_ins
from redpp_serve.graph.graph import Graph, Node, Ref

_SUM, _MEAN, _MAX = range(3)  # torch's numbers of what a bag does
_BAGS = (torch.ops.aten._embedding_bag.default, torch.ops.aten._embedding_bag_forward_only.default)
_ROWS = "aten.arange"
_LISTED = 16  # numbers in a list at most


def definitions(nodes: Sequence[fx.Node]) -> dict[Any, Callable[..., Any]]:
    """Return the definition of each operator of this file that a program calls."""
    bags = [node for node in nodes if node.target in _BAGS]
    if not bags:
        return {}
    # F.embedding_bag of inputs (N, length) calls the operator with all ids in a row, and 0, length, 2 * length...
    even = all(isinstance(node.args[2], fx.Node) and _ROWS in str(node.args[2].target) for node in bags)
    return dict.fromkeys(_BAGS, _even_bags if even else _bags)


def _even_bags(  # noqa: PLR0913 - torch's own arguments
    weight: Tensor,
    ids: Tensor,
    starts: Tensor,
    scale_by_frequency: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    factors: Tensor | None = None,
    last: bool = False,
    padding: int = -1,
) -> tuple[Tensor, ...]:
    """Compute bags of one size: ids (bags * size,) of rows of the weight (rows, n) to (bags, n)."""
    ids = ids.reshape(starts.shape[0], -1)
    found, kept = torch.ops.aten.embedding(weight, ids), None
    if factors is not None:
        found = found * factors.reshape(starts.shape[0], -1, 1)
    if padding >= 0:
        kept = (ids != padding).unsqueeze(2)
    if mode == _MAX:
        most = found.amax(1) if kept is None else found.masked_fill(~kept, -torch.inf).amax(1)
        return _results(most if kept is None else torch.where(kept.any(1), most, torch.zeros_like(most)), starts)
    if kept is None:
        return _results(found.sum(1) if mode == _SUM else found.mean(1), starts)
    total = found.masked_fill(~kept, 0).sum(1)
    return _results(total if mode == _SUM else total / kept.sum(1).clamp(min=1).to(total.dtype), starts)


def _bags(  # noqa: PLR0913 - torch's own arguments
    weight: Tensor,
    ids: Tensor,
    starts: Tensor,
    scale_by_frequency: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    factors: Tensor | None = None,
    last: bool = False,
    padding: int = -1,
) -> tuple[Tensor, ...]:
    """Compute bags of ids (ids,) that begin at ``starts`` (bags,); with ``last``, the last start is the end."""
    starts = starts[:-1] if last else starts
    place = torch.arange(ids.shape[0], dtype=starts.dtype, device=ids.device)
    bag = torch.searchsorted(starts, place, right=True) - 1
    found, kept = torch.ops.aten.embedding(weight, ids), (ids != padding).unsqueeze(1)
    if factors is not None:
        found = found * factors.unsqueeze(1)
    none = found.new_zeros(starts.shape[0], weight.shape[1])
    counts = none[:, :1].index_add(0, bag, kept.to(none.dtype))
    if mode == _MAX:
        where = bag.unsqueeze(1).expand(-1, weight.shape[1])
        most = (none - torch.inf).scatter_reduce(0, where, found.masked_fill(~kept, -torch.inf), "amax")
        return _results(torch.where(counts > 0, most, none), starts)
    total = none.index_add(0, bag, found.masked_fill(~kept, 0))
    return _results(total if mode == _SUM else total / counts.clamp(min=1), starts)


def _results(bags: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
    """Return as many results as the operator has; forward reads the first alone."""
    return bags, starts, starts, starts


def places_of_masks(graph: Graph) -> Graph:
    """Return the graph with the places of the true values where a stored mask indexes, so that shapes are known."""
    tensors, buffers, changed = dict(graph.tensors), graph.buffers, {}
    for node in graph.nodes:
        indices = node.args[1] if node.op == "aten.index.Tensor" else []
        masks = {
            r.name for r in indices if isinstance(r, Ref) and r.name in tensors and tensors[r.name].dtype == torch.bool
        }
        if not masks:
            continue
        written: list[Ref | None] = []
        for ref in indices:
            places = tensors[ref.name].nonzero(as_tuple=True) if ref is not None and ref.name in masks else ()
            names = [f"{ref.name}_places_{k}" for k in range(len(places))]
            tensors.update(zip(names, places, strict=True))
            buffers = buffers | set(names) if buffers is not None else None
            written += [Ref(name) for name in names] or [ref]
        changed[node.name] = Node(node.name, node.op, (node.args[0], written))
    return replace(graph.with_nodes(changed), tensors=tensors, buffers=buffers).pruned_of_unused() if changed else graph


def kron(one: Tensor, other: Tensor) -> Tensor:
    """Compute ``torch.kron`` with sizes that may be symbols."""
    rank = max(one.dim(), other.dim())
    a, b = ([1] * (rank - x.dim()) + list(x.shape) for x in (one, other))
    pairs = [
        [size for pair in zip(*sizes, strict=True) for size in pair] for sizes in ((a, [1] * rank), ([1] * rank, b))
    ]
    product = one.reshape(pairs[0]) * other.reshape(pairs[1])
    return product.reshape([m * n for m, n in zip(a, b, strict=True)])


def take_along_dim(x: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """Compute ``torch.take_along_dim`` with sizes that may be symbols."""
    if dim is None:
        return x.reshape(-1).gather(0, indices.reshape(-1))
    shape = [n if m == 1 else m for n, m in zip(x.shape, indices.shape, strict=True)]
    whole, places = ([*shape[: dim % x.dim()], y.shape[dim], *shape[dim % x.dim() + 1 :]] for y in (x, indices))
    return x.expand(whole).gather(dim, indices.expand(places))


def cov(x: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None) -> Tensor:
    """Compute ``torch.cov``, whose own definition asks for the values of the weights."""
    x = x.reshape(1, -1) if x.dim() < 2 else x
    given = [w.to(x.dtype) for w in (fweights, aweights) if w is not None]
    w = reduce(torch.mul, given) if given else torch.ones_like(x[0])
    total = w.sum()
    centred = x - ((x * w).sum(1) / total).unsqueeze(1)
    lost = correction if aweights is None else correction * (w * aweights).sum() / total
    return (((centred * w) @ centred.mT) / (total - lost)).squeeze()


def corrcoef(x: Tensor) -> Tensor:
    """Compute ``torch.corrcoef``."""
    found = cov(x)
    deviation = found.diagonal().sqrt() if found.dim() else found.sqrt()
    return (found / deviation.unsqueeze(-1) / deviation.unsqueeze(0)).clamp(-1, 1) if found.dim() else found / found


def combinations(x: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    """Compute ``torch.combinations``, whose number of rows follows from the size of x (n,)."""
    choose = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    places = torch.tensor(list(choose(range(x.shape[0]), r)), dtype=torch.int64, device=x.device)
    return x[places.reshape(-1, r)]


def with_rows_first(x: Tensor, dim: int, level: int) -> Tensor:
    """Enter ``torch.vmap`` with the dimension that ``in_dims`` names in front; torch loses track of it elsewhere."""
    return _add_batch_dim(x.movedim(dim, 0) if dim else x, 0, level)


def with_rows_back(x: Tensor, level: int, size: int, dim: int) -> Tensor:
    """Leave ``torch.vmap`` with the rows in front, and move them to the dimension that ``out_dims`` names."""
    rows = _remove_batch_dim(x, level, size, 0)
    return rows.movedim(0, dim) if dim else rows


_FUNCTIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((torch.kron, Tensor.kron), kron),
    **dict.fromkeys((torch.take_along_dim, Tensor.take_along_dim), take_along_dim),
    **dict.fromkeys((torch.cov, Tensor.cov), cov),
    **dict.fromkeys((torch.corrcoef, Tensor.corrcoef), corrcoef),
    torch.combinations: combinations,
    Tensor.data.__get__: Tensor.detach,  # type: ignore[attr-defined]
    Tensor.numpy: lambda x, force=False: x.detach(),  # as an output, where it is the tensor of its numbers
    _add_batch_dim: with_rows_first,
    _remove_batch_dim: with_rows_back,
    **stand_ins(),
}


@contextlib.contextmanager
def as_in_export() -> Iterator[None]:
    """Switch off what torch.export cannot follow and no result needs, and what it would follow for hours.

    The former are the checks of ``torch.distributions``, which ask for values; the latter are long lists of numbers.

    Raises:
        RuntimeError: within it, where forward makes a list of more than a few of a tensor's numbers.
    """
    from torch._subclasses import FakeTensor  # noqa: PLC0415 - takes a second to import

    own, checks = Tensor.tolist, Distribution._validate_args

    def tolist(x: Tensor) -> Any:
        if isinstance(x, FakeTensor) and (not isinstance(x.numel(), int) or x.numel() > _LISTED):
            raise RuntimeError("x.tolist()")
        return own(x)

    Distribution.set_default_validate_args(False)
    Tensor.tolist = tolist  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.tolist = own  # type: ignore[method-assign]
        Distribution.set_default_validate_args(checks)


class WrittenOut(TorchFunctionMode):
    """While it is entered, the functions that torch cannot capture for any batch are computed as written here."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function, or its definition here."""
        return _FUNCTIONS.get(func, func)(*args, **(kwargs or {}))
