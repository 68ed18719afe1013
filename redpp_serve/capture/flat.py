"""A network as a function of flat tensors: found by trying calls, with names for what goes in and what comes out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_unflatten

from redpp_serve.capture.arguments import Call, calls, signature_of
from redpp_serve.capture.inputs import are_numbered, sample
from redpp_serve.capture.outputs import left_out, names_in, tensors_in
from redpp_serve.capture.refusals import defined_at, not_capturable, reason
from redpp_serve.capture.sniff import shorten
from redpp_serve.capture.trail import copies, trail
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec

PREFIX = "network."  # of the network's own names inside a `FlatNetwork`
_STRUCTURAL = (KeyError, IndexError, TypeError, AttributeError)  # what a forward raises that wants another container
_SHOWN = 4  # failed calls that a message lists
_WORDS = {"float16": "half", "bfloat16": "bf16", "float64": "double", "float32": "float"}


class FlatNetwork(nn.Module):
    """A network that takes flat tensors (N, ...) and returns a tuple of them, whatever its own forward has.

    Args:
        network: an eager module, a TorchScript module, or the module of an exported program.
        arguments: makes positional and keyword arguments of its forward from the tensors.
        inputs: the tensors, under their final names.
    """

    def __init__(
        self,
        network: nn.Module,
        arguments: Callable[[Sequence[Any]], tuple[Sequence[Any], Mapping[str, Any]]],
        inputs: Sequence[InputSpec],
    ) -> None:
        super().__init__()
        self.training = False  # as the network; a frozen one has no mode to be set
        self.network, self.arguments, self.inputs = network, arguments, tuple(inputs)
        self._mode: AbstractContextManager[Any] = nullcontext()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Call the network and flatten what it returns; what is no tensor is left out."""
        with self._mode:
            return tuple(tensors_in(self.returned(inputs)))

    @contextmanager
    def under(self, mode: AbstractContextManager[Any]) -> Iterator[None]:
        """Enter a mode within each call, so that it is asked before those that torch enters around the calls."""
        self._mode = mode
        try:
            yield
        finally:
            self._mode = nullcontext()

    def returned(self, inputs: Sequence[Tensor]) -> Any:
        """Call the network and return what it returns; a forward that ends the program fails as others do."""
        args, kwargs = self.arguments(inputs)
        try:
            return self.network(*args, **kwargs)
        except SystemExit as error:
            raise RuntimeError(f"it ends the program, with {error!r}").with_traceback(error.__traceback__) from error


def flat_network(network: nn.Module, inputs: Sequence[InputSpec], constants: Mapping[str, Any]) -> FlatNetwork:
    """Find the call of a network's forward that takes the user's inputs, by trying in the order of `arguments.calls`.

    Args:
        network: a module in eval mode.
        inputs: what the user gave, under names or numbered.
        constants: further arguments of forward by name.

    Raises:
        RedppError: none of the calls fits; the message lists what was tried; or weights are not there yet.
    """
    stored = [*network.named_parameters(), *network.named_buffers()]
    if lazy := [name for name, tensor in stored if is_lazy(tensor)]:
        raise RedppError(
            f"{lazy[0]} has no weights: its module is lazy and has never run",
            "a network whose weights are there",
            "call the network on one input, train it, and save it then",
        )
    example, failed = sample(inputs, 2, torch.Generator().manual_seed(0)), []
    for call in calls(network, inputs, constants):
        flat = FlatNetwork(network, call.arguments, _named(inputs, call.names))
        try:
            with torch.no_grad():
                flat.returned([x.clone() for x in example])
        except Exception as error:  # the user's forward may raise anything
            failed.append((call, error))
        else:
            return flat
    raise _refusal(network, inputs, failed)


def exported_network(exported: ExportedProgram, inputs: Sequence[InputSpec]) -> FlatNetwork:
    """Make the flat network of an exported program, whose inputs are in the order in which it was exported.

    Inputs under the names that the program gives them may come in any order; under other names they are taken in order.

    Raises:
        RedppError: not as many inputs as the program has.
    """
    entries = [e for e in exported.graph_signature.input_specs if e.kind is InputKind.USER_INPUT]
    names = [entry.arg.name for entry in entries if isinstance(entry.arg, TensorArgument)]
    if len(names) != len(inputs):
        raise not_capturable(
            f"forward takes {', '.join(names)}; {len(inputs)} --input given", "one --input for each, all tensors"
        )
    given = {_plain(spec.name): spec for spec in inputs}
    if are_numbered(inputs):
        specs = _named(inputs, names)
    else:
        specs = [given[name] for name in names] if given.keys() == set(names) else list(inputs)

    def arguments(tensors: Sequence[Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        places = iter(tensors)
        leaves = [next(places) if isinstance(e.arg, TensorArgument) else getattr(e.arg, "value", None) for e in entries]
        args, kwargs = tree_unflatten(leaves, exported.call_spec.in_spec)
        return args, kwargs

    return FlatNetwork(exported.module(), arguments, specs)


def describe_outputs(flat: FlatNetwork, inputs: Sequence[InputSpec], messages: list[str]) -> tuple[str, ...]:
    """Call a flat network and return the names of its outputs; say what of its own outputs is left out.

    Args:
        flat: the network.
        inputs: its inputs as the graph has them, with the integers that it reads.
        messages: gains a line for what is left out.

    Raises:
        RedppError: it returns no tensor.
    """
    example = sample(inputs, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        returned = flat.returned(copies(example))
    beside = shorten(left_out(returned))
    names = names_in(returned, [spec.name for spec in inputs])
    if not names:
        passed = trail(flat.network, lambda: flat.returned(example))
        (where, *_) = [each.where() for each in passed if each.given and not each.made] or [
            defined_at("", flat.network)
        ]
        raise not_capturable(
            f"forward returns no tensor but {beside or 'nothing'}{where}",
            "tensors of shape (N, ...)",
            "return the tensor itself, before .tolist(), .item() or str(), and make the rest in the client",
        )
    if beside:
        messages.append(f"left out of the outputs, since they are no tensors: {beside}")
    return names


def _named(inputs: Sequence[InputSpec], names: Sequence[str]) -> list[InputSpec]:
    return [replace(spec, name=name) for spec, name in zip(inputs, names, strict=True)]


def _plain(name: str) -> str:
    """Return a name as torch writes it for an argument of an exported program."""
    return re.sub(r"\W", "_", name)


def _refusal(network: nn.Module, inputs: Sequence[InputSpec], failed: Sequence[tuple[Call, Exception]]) -> RedppError:
    """Say what was tried, what forward takes, and what the user may have meant."""
    described = ", ".join(_shape(spec) + ("" if are_numbered(inputs) else f" ({spec.name})") for spec in inputs)
    shown = [f"{call}: {reason(error)}" for call, error in failed[:_SHOWN]]
    tried = "; ".join(shown) + (f"; and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else "")
    if len(failed) == 1 or (failed and not isinstance(failed[0][1], _STRUCTURAL)):
        tried = reason(failed[0][1])  # forward took the inputs as they were given first, and failed further inside
    signature = f"forward{signature_of(network)[0]}"
    found = RedppError(
        f"the network rejects a batch of inputs of shape {described}: {tried or f'no call of {signature} fits them'}",
        f"the shape of one input without its batch dimension, one --input for each argument of {signature}",
        _advice(network, inputs, failed),
    )
    found.__cause__ = failed[0][1] if failed else None
    return found


def _shape(spec: InputSpec) -> str:
    return f"{'x'.join(map(str, spec.shape))}:{spec.dtype}"


def _advice(network: nn.Module, inputs: Sequence[InputSpec], failed: Sequence[tuple[Call, Exception]]) -> str:
    stored = {str(p.dtype).removeprefix("torch.") for p in network.parameters() if p.is_floating_point()}
    floats = [spec for spec in inputs if getattr(torch, spec.dtype).is_floating_point]
    if len(stored) == 1 and (odd := next((spec for spec in floats if spec.dtype not in stored), None)):
        (dtype,) = stored
        wanted = replace(odd, dtype=_WORDS.get(dtype, dtype))
        return f"write --input {_shape(wanted)}, since the weights are {dtype}; or save the module after .float()"
    if are_numbered(inputs) and any(isinstance(error, _STRUCTURAL) for _, error in failed[:1]):
        return (
            "pass the shapes the network was trained on; where forward reads a dict, or arguments by keyword, name "
            f"each input: --input NAME={'x'.join(map(str, inputs[0].shape))}"
        )
    integers = ", and the integers that it reads, e.g. --input 20:int64:1..999"
    return "pass the shape the network was trained on, e.g. --input 3x224x224" + (
        integers if any(spec.holds_integers for spec in inputs) else ""
    )
