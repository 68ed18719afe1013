"""How much memory and time a graph of somebody else would take, found on meta tensors before it runs for real.

Operators of the allow-list make tensors of any size from a few numbers, and a chain of small ones doubles a size at
each step. `check_runs` follows the graph without computing it and refuses what is beyond any network of this machine.
The meta device's registrations take a second and 100 MB, so commands check a package once, and workers do not.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from redpp_serve.errors import RedppError, printable
from redpp_serve.graph.executor import Program, makes_tensor, output_types
from redpp_serve.graph.graph import Graph, Node, map_refs
from redpp_serve.graph.operators import resolve
from redpp_serve.graph.ranges import blank
from redpp_serve.graph.recurrent import SEQUENCES
from redpp_serve.graph.sizes import largest
from redpp_serve.packaging.server_config import Limits, limits_for

MEMORY_VARIABLE = "REDPP_MEMORY_GB"
MOST_MACS = 4e12  # for one input; the largest networks for images take 3e12
MOST_NUMBERS = 1 << 36  # that all operators read or write together, for one input
MOST_PARTS = 1 << 17  # into which one operator takes a tensor apart, or steps of a sequence
MOST_NODES = 100_000
_SMALL, _SHORT = 1 << 26, 1 << 20  # numbers, and a number, of a call that may run for real
_PARTS = {"split", "unsafe_split", "chunk", "unsafe_chunk", "unbind", "tensor_split", "split_with_sizes"}
_CUBIC = ("linalg_", "_linalg_", "cholesky", "cdist", "_cdist")  # steps for each number: the length of its row
_WINDOWS = ("pool", "im2col", "unfold", "upsample", "col2im")


def check_runs(graph: Graph, batch: int = 1) -> None:
    """Refuse a network that does not run, or that takes more memory or time than a network does.

    Args:
        graph: the network; inputs whose size varies have their largest.
        batch: the largest batch that it is served at.

    Raises:
        RedppError: says at which node, and what it would take.
    """
    graph = _at_largest(graph)
    _Run(graph, 1).check()
    if batch > 1:
        _Run(graph, batch, math.inf).check()


def check_answers(graph: Graph, batch: int = 1) -> None:
    """Refuse a network that `check_runs` refuses, or that fails when it runs for real, once on zeros.

    The meta device does not look at all that an operator is given.

    Raises:
        RedppError: says why.
    """
    check_runs(graph, batch)
    try:
        with torch.inference_mode():
            Program(graph)(*(blank(spec, 1) for spec in graph.inputs))
    except RedppError:
        raise
    except Exception as error:  # an operator's own, which have no common class
        raise _fails("the network", error) from error


def body_limits(graph: Graph, batch: int) -> Limits:
    """Return limits of a server in which the largest request and its answer fit, see `limits_for`.

    Args:
        graph: the network, which runs once on zeros.
        batch: items that the server takes together.

    Raises:
        RedppError: TorchServe could not serve one item.
    """
    graph = _at_largest(graph)
    outputs = [(shape[1:], str(dtype).removeprefix("torch.")) for shape, dtype in output_types(graph, "cpu").values()]
    return limits_for([(spec.shape, spec.dtype) for spec in graph.inputs], outputs, batch)


def _at_largest(graph: Graph) -> Graph:
    return replace(graph, inputs=tuple(replace(spec, shape=largest(spec), varying=()) for spec in graph.inputs))


def most_bytes() -> float:
    """Return how many bytes the values of a network may take: a quarter of the memory, or what the user allows."""
    given = os.environ.get(MEMORY_VARIABLE, "")
    if given:
        try:
            if 0 < float(given) < math.inf:
                return float(given) * 2**30
        except ValueError:
            pass
        do = f"correct or unset {MEMORY_VARIABLE}"
        raise RedppError(f"{MEMORY_VARIABLE} is {given[:40]!r}", "a number of GiB above 0", do)
    return max(2 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)


class _Run:
    """One walk along a graph, value by value, on the meta device.

    Args:
        graph: the network.
        batch: how many inputs.
        share: of the limits of time; infinite where only memory counts.
    """

    def __init__(self, graph: Graph, batch: int, share: float = 1.0) -> None:
        from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415 - it imports triton, where there is one

        self._graph, self._share = graph, share
        self._bytes, self._numbers = most_bytes(), 0.0
        self._held, self._readers = 0, Counter[int]()
        self._flops = FlopCounterMode(display=False)
        self._values: dict[str, Any] = {name: tensor.to("meta") for name, tensor in graph.tensors.items()}
        self._values |= {spec.name: self._blank(spec, batch) for spec in graph.inputs}
        self._hold([self._values[spec.name] for spec in graph.inputs], 1)

    def _blank(self, spec: Any, batch: int) -> Tensor:
        if batch * math.prod(spec.shape) * 8 > self._bytes:
            raise _beyond(f"the input {printable(spec.name)[:60]!r} of shape {spec.shape}", "more memory than it may")
        return blank(spec, batch, "meta")

    def check(self) -> None:
        """Walk along the whole graph."""
        if len(self._graph.nodes) > MOST_NODES:
            raise _beyond(f"the network with {len(self._graph.nodes)} operations", "more time than any network")
        last = {name: k for k, node in enumerate(self._graph.nodes) for name in node.refs()}
        kept = {*self._graph.outputs, *self._graph.tensors}
        with torch.no_grad(), self._flops:
            for k, node in enumerate(self._graph.nodes):
                try:
                    value = self._call(node)
                except RedppError:
                    raise
                except Exception as error:  # an operator's own, which have no common class
                    raise _fails(_at(node), error) from error
                self._count(node, value)
                self._values[node.name] = value
                for name in {*node.refs(), node.name} - kept:
                    if last.get(name, k) == k:
                        self._hold(self._values.pop(name), -1)

    def _call(self, node: Node) -> Any:
        fn, args = resolve(node.op), map_refs(node.args, self._values.__getitem__)
        kwargs = {key: map_refs(value, self._values.__getitem__) for key, value in node.kwargs.items()}
        if node.op.startswith("py."):
            return _of_numbers(node, fn, args)
        _check_parts(node, args)
        if makes_tensor(fn):
            kwargs["device"] = torch.device("meta")
        try:
            return fn(*args, **kwargs)
        except Exception:  # an operator that has no shapes without values, such as an inverse spectrum
            if not _is_small((args, kwargs)):
                raise
        with torch.utils._python_dispatch._disable_current_modes():
            args = map_refs(node.args, self._real)
            kwargs = {key: map_refs(value, self._real) for key, value in node.kwargs.items()}
            return _map_tensors(fn(*args, **kwargs), lambda x: x.to("meta"))

    def _real(self, name: str) -> Any:
        if name in self._graph.tensors:
            return self._graph.tensors[name]
        return _map_tensors(self._values[name], lambda x: torch.zeros_like(x, device="cpu"))

    def _count(self, node: Node, value: Any) -> None:
        """Add up what a call takes, and compare it with the limits."""
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise _beyond(_at(node), "a whole number of more than 64 bits")
        given = [x for name in node.refs() for x in _tensors(self._values[name])]
        made = list(_tensors(value))
        storages = {x.untyped_storage()._cdata for x in given}
        fresh = [x for x in made if x.untyped_storage()._cdata not in storages]
        if fresh:
            self._numbers += max(x.numel() for x in (*given, *made)) * _steps(node, given)
        self._hold(value, 1)
        if self._held > self._bytes:
            raise _beyond(_at(node), f"{self._held / 2**30:.1f} GiB of memory, of {self._bytes / 2**30:.1f}")
        if self._numbers > self._share * MOST_NUMBERS or self._flops.get_total_flops() / 2 > self._share * MOST_MACS:
            raise _beyond(_at(node), "more time than any network")

    def _hold(self, value: Any, change: int) -> None:
        """Count the values that read a storage, and add up the bytes of those that any reads."""
        for storage in (x.untyped_storage() for x in _tensors(value)):
            key, before = storage._cdata, self._readers[storage._cdata]
            self._readers[key] += change
            self._held += storage.nbytes() * (bool(self._readers[key]) - bool(before))


def _of_numbers(node: Node, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call an operator of Python, which on lists would repeat or join them."""
    if node.op != "py.getitem" and not all(isinstance(arg, (int, float)) for arg in args):
        raise TypeError("it takes numbers")
    return fn(*args)


def _check_parts(node: Node, args: tuple[Any, ...]) -> None:
    """Refuse to take a tensor into more parts, or a sequence into more steps, than a network does."""
    word = node.op.split(".")[1]
    x = next((arg for arg in args if isinstance(arg, Tensor)), None)
    if x is None:
        return
    count = 0
    if node.op in SEQUENCES:
        count = max(x.shape, default=0)
    elif word in _PARTS:
        numbers = [arg for arg in args[1:] if isinstance(arg, int)]
        dim = numbers[-1] if len(numbers) > (word != "unbind") and -x.dim() <= numbers[-1] < x.dim() else 0
        length = x.shape[dim] if x.dim() else 0
        size = numbers[0] if numbers else 1
        by_size = word in ("split", "unsafe_split")
        count = length // max(1, size) if by_size else length if word == "unbind" else min(size, MOST_PARTS + length)
    elif word == "diff" and len(args) > 1 and isinstance(args[1], int):
        count = args[1]
    if count > MOST_PARTS:
        raise _beyond(_at(node), f"{count} parts or steps")


def _steps(node: Node, given: list[Tensor]) -> int:
    """Return how many steps an operator takes for each number, where that is not a constant."""
    word = node.op.split(".")[1]
    if word.startswith(_CUBIC):
        return max((max(x.shape[-2:], default=1) for x in given), default=1)
    if any(part in word for part in _WINDOWS):
        sizes = node.args[1] if len(node.args) > 1 else 1
        whole = sizes if isinstance(sizes, (list, tuple)) else [sizes]
        return math.prod(abs(n) or 1 for n in whole if isinstance(n, int)) if "adaptive" not in word else 1
    return 1


def _is_small(value: Any) -> bool:
    """Return whether a call's arguments are so small that it may run for real."""
    if isinstance(value, Tensor):
        return value.numel() <= _SMALL
    if isinstance(value, Mapping):
        return all(map(_is_small, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_small, value))
    return not isinstance(value, int) or abs(value) <= _SHORT or value in (2**63 - 1, -(2**63))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_map_tensors(inner, change) for inner in value]
    return change(value) if isinstance(value, Tensor) else value


def _at(node: Node) -> str:
    return f"the network at {printable(node.name)[:60]!r} ({printable(node.op)[:40]})"


def _beyond(what: str, takes: str) -> RedppError:
    return RedppError(
        f"{what} would take {takes}",
        "a network that this machine can run",
        f"do not use this package; or, if the network is yours, set {MEMORY_VARIABLE} to the GiB that it may take",
    )


def _fails(what: str, error: Exception) -> RedppError:
    why = printable(str(error).strip().split("\n")[0])[:200]
    return RedppError(
        f"{what} does not run: {why or type(error).__name__}",
        "a network that redpp-serve packaged",
        "package the model again, or fetch the package again if it was copied",
    )
