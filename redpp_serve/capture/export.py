"""From a module or exported program to a `Graph`, by ``torch.export`` with a dynamic batch.

A graph must compute what the network computes, for each input of a batch by itself. In-place operators become their
functional form, unless one writes into memory that is read under another name: then torch makes the program
functional first. The graph is compared with the network before anyone sees it, see `agreement`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.dynamic_shapes import ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from redpp_serve.capture.agreement import MIXED, check_agreement
from redpp_serve.capture.any_size import batch_as_number, dynamic_axes, require_any_size, shapes_in_words
from redpp_serve.capture.broken_numbers import refuse_broken_numbers
from redpp_serve.capture.calls import nodes_of
from redpp_serve.capture.flat import PREFIX, FlatNetwork, describe_outputs, exported_network, flat_network
from redpp_serve.capture.inputs import sample
from redpp_serve.capture.linear_form import linear_form
from redpp_serve.capture.ranges import with_ranges
from redpp_serve.capture.refusals import not_capturable, not_exported, place, reason, without_dumps
from redpp_serve.capture.sequences import with_sequences
from redpp_serve.capture.taking_apart import taken_apart
from redpp_serve.capture.torchscript import READS_NUMBER, converted, script_of_one_size, with_named_weights
from redpp_serve.capture.written_out import WrittenOut, as_in_export, places_of_masks
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.passes import fold_constants
from redpp_serve.graph.sizes import in_words, is_varying
from redpp_serve.graph.tensor_file import DTYPES

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # what training changes in batch norms


def capture(
    source: nn.Module | ExportedProgram,
    inputs: Sequence[InputSpec],
    messages: list[str],
    constants: Mapping[str, Any] | None = None,
) -> Graph:
    """Capture a network as a graph and check that the graph computes what the network computes.

    Args:
        source: an eager module, a TorchScript module, or an exported program.
        inputs: one entry an input, shapes without batch; names say how forward takes them, see `arguments.calls`.
        messages: gains a line for each thing the user should know, such as that train mode was switched off.
        constants: further arguments of forward by name, which stay as they are.

    Raises:
        RedppError: the inputs do not fit, the network cannot be exported, an operator has no place in an
            artifact, or the captured graph disagrees with the network.
    """
    if isinstance(source, ExportedProgram):
        _refuse_fixed_batch(source)
        exported, flat = source, exported_network(source, inputs)
    else:
        if any(getattr(m, "training", False) for m in source.modules()):  # frozen TorchScript has no mode
            messages.append(
                "the network was in train mode; switched to eval mode (dropout off, batch norm by statistics)"
            )
            source.eval()
        with torch.no_grad(), without_dumps():  # without gradients, blocks that switch them off vanish
            flat = flat_network(source, inputs, constants or {})
            exported = _export(flat)
    places: dict[str, str] = {}
    try:
        graph = to_graph(exported, flat.inputs, isinstance(source, nn.Module), places)
    except RedppError as error:
        if isinstance(source, torch.jit.ScriptModule) and is_varying(flat.inputs) and READS_NUMBER in error.found:
            raise script_of_one_size(f"it reads a size from a tensor ({error.found.partition(': ')[2]})") from error
        raise
    graph = linear_form(fold_constants(linear_form(places_of_masks(graph))))
    graph = with_named_weights(graph) if isinstance(source, torch.jit.ScriptModule) else graph
    refuse_broken_numbers(graph, flat.network.state_dict())
    graph = with_ranges(graph)
    graph = replace(graph, output_names=describe_outputs(flat, graph.inputs, messages))
    try:
        check_agreement(graph, flat, places)
    except RedppError as error:
        if _fixed_batches(exported) and MIXED not in str(error):
            raise batch_as_number(flat, _for_any_batch) from error
        raise
    if is_varying(graph.inputs):
        shapes = "; ".join(f"{spec.name} {in_words(spec)}" for spec in graph.inputs if spec.varying)
        messages.append(f"sizes vary ({shapes}): pruned and timed at {shapes_in_words(graph.inputs)}")
    return graph


def _export(flat: FlatNetwork) -> ExportedProgram:
    require_any_size(flat)
    example = sample(flat.inputs, 2, torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), as_in_export():
        warnings.simplefilter("ignore")
        try:
            if isinstance(flat.network, torch.jit.ScriptModule):
                # The trace holds how the network is called and its outputs flattened; the scripted part stays as it is.
                traced = torch.jit.trace(flat, example, check_trace=False)
                return converted(traced, example, dynamic_axes(flat.inputs))
            for mode in (contextlib.nullcontext(), WrittenOut()):  # the second where torch's own definitions fail
                with contextlib.suppress(Exception), flat.under(mode):
                    return with_sequences(_for_any_batch(flat, example))
            if is_varying(flat.inputs):
                return _for_any_batch(flat, example)
            return torch.export.export(flat, tuple(x.clone() for x in example))  # the first tries left marks
        except Exception as error:
            if isinstance(flat.network, torch.jit.ScriptModule) and is_varying(flat.inputs):
                raise script_of_one_size(reason(error)) from error
            raise not_exported(error, flat.network) from error


def _for_any_batch(flat: FlatNetwork, example: tuple[Tensor, ...]) -> ExportedProgram:
    dynamic = ShapesCollection()
    for x, axes in zip(example, dynamic_axes(flat.inputs), strict=True):
        dynamic[x] = axes
    return torch.export.export(flat, example, dynamic_shapes=dynamic)  # type: ignore[arg-type]


def to_graph(
    exported: ExportedProgram, inputs: Sequence[InputSpec], inner: bool = False, places: dict[str, str] | None = None
) -> Graph:
    """Convert an exported program to a graph, in which no operator changes its arguments.

    Args:
        exported: the program.
        inputs: its inputs, in its order, under the names that they shall have.
        inner: whether it was exported from a `FlatNetwork`, inside of which the network's names begin with `PREFIX`.
        places: gains the `refusals.place` of each call, by the name of its node.
    """
    exported = taken_apart(exported)
    signature = exported.graph_signature
    for result, name in {**signature.buffers_to_mutate, **getattr(signature, "parameters_to_mutate", {})}.items():
        (made,) = (node for node in exported.graph.nodes if node.name == result)
        as_norms = ", as batch norm does in train mode" if name.endswith(_STATISTICS) else ""
        raise not_capturable(
            f"its forward changes {name.removeprefix(PREFIX if inner else '')}{place(made)}{as_norms}",
            "a network in eval mode, a forward that keeps no state",
            "compute a new value instead of writing into a buffer or parameter, and hand a state in and out of forward",
        )
    tensors, names = _stored_tensors(exported, inner)
    specs = _input_specs(exported, inputs, names, taken=set(tensors))
    parameters = {names[spec.arg.name] for spec in signature.input_specs if spec.kind is InputKind.PARAMETER}
    buffers = tensors.keys() - parameters
    nodes = nodes_of(exported, names, {*tensors, *(spec.name for spec in specs)}, tensors, buffers)
    if places is not None:
        places.update({names[node.name]: place(node) for node in exported.graph.nodes if node.name in names})
    outputs = []
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            continue  # a network may write into its input; nobody reads that
        if isinstance(spec.arg, TensorArgument):
            outputs.append(names[spec.arg.name])
    for node in _output_nodes(exported):
        if node.meta["val"].is_complex():
            raise not_capturable(
                f"it has an output of complex numbers{place(node)}",
                "real numbers",
                "return torch.view_as_real(x) or x.abs()",
            )
    return Graph(tuple(specs), tensors, tuple(nodes), tuple(outputs), frozenset(buffers)).pruned_of_unused()


def _output_nodes(exported: ExportedProgram) -> list[fx.Node]:
    """Return the calls whose tensors the program returns."""
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    return [node for node in output.all_input_nodes if isinstance(node.meta.get("val"), Tensor)]


def _fixed_batches(exported: ExportedProgram) -> dict[str, int]:
    """Return the inputs of a program that have one batch size, by name, with that size."""
    values = {name: _placeholders(exported).get(name) for name in exported.graph_signature.user_inputs}
    tensors = {str(name): value for name, value in values.items() if isinstance(value, Tensor) and value.dim()}
    return {name: value.shape[0] for name, value in tensors.items() if isinstance(value.shape[0], int)}


def _refuse_fixed_batch(exported: ExportedProgram) -> None:
    for name, size in _fixed_batches(exported).items():
        raise RedppError(
            f"the program was exported for batches of {size} only (input {name})",
            "a program that takes any batch size",
            "export it again with torch.export.export(..., dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))",
        )


def _placeholders(exported: ExportedProgram) -> dict[Any, Any]:
    return {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}


def _stored_tensors(exported: ExportedProgram, inner: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return parameters, buffers and constants by name, and the names by placeholder."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    stores = (exported.state_dict, exported.constants)
    for entry in exported.graph_signature.input_specs:
        if entry.kind is InputKind.USER_INPUT:
            continue
        tensor = next((s[entry.target] for s in stores if entry.target in s), None)
        name = str(entry.target).removeprefix(PREFIX if inner else "")
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
            kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            readers = [user for node in exported.graph.nodes if node.name == entry.arg.name for user in node.users]
            if not readers:
                continue
            raise not_capturable(
                f"{name} is of type {kind}{place(readers[0])}",
                "tensors of real numbers, integers or booleans",
                "store real and imaginary parts, or the numbers in float32, and convert them in forward",
            )
        tensors[name] = tensor.detach().cpu()
        names[entry.arg.name] = name
    return tensors, names


def _input_specs(
    exported: ExportedProgram, inputs: Sequence[InputSpec], names: dict[str, str], taken: set[str]
) -> list[InputSpec]:
    """Return the inputs under names that nothing else has, if the program was exported for such inputs.

    Args:
        exported: the program.
        inputs: its inputs, in its order.
        names: gains the inputs' names, by placeholder.
        taken: names of stored tensors; gains those of the inputs.
    """
    values = _placeholders(exported)
    entries = [e for e in exported.graph_signature.input_specs if e.kind is InputKind.USER_INPUT]
    tensors = [e for e in entries if isinstance(e.arg, TensorArgument)]
    specs = []
    for entry, spec in zip(tensors, inputs, strict=True):
        value, name = values[entry.arg.name], spec.name
        fits = len(value.shape) == 1 + len(spec.shape) and all(
            not isinstance(size, int) or (size == mine and axis not in dict(spec.varying))
            for axis, (size, mine) in enumerate(zip(value.shape[1:], spec.shape, strict=True))
        )
        if not fits or value.dtype is not getattr(torch, spec.dtype):
            shape = "x".join(str(size) for size in value.shape[1:])
            raise RedppError(
                f"input {name} was exported as {shape}:{str(value.dtype).removeprefix('torch.')}, without its batch",
                "the --input that the program was exported for",
                f"pass --input {shape}",
            )
        while name in taken:
            name += "_input"
        taken.add(name)
        names[entry.arg.name] = name
        specs.append(replace(spec, name=name))
    return specs
