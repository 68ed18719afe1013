"""From a module or exported program to a `Graph`, by ``torch.export`` with a dynamic batch.

A graph must compute what the network computes, for each input of a batch by itself. In-place operators become their
functional form, unless one writes into memory that is read under another name: then torch makes the program
functional first. The graph is compared with the network before anyone sees it.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.dynamic_shapes import ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from redpp_serve.capture.any_size import batch_as_number, dynamic_axes, other_sizes, require_any_size, shapes_in_words
from redpp_serve.capture.broken_numbers import refuse_broken_numbers
from redpp_serve.capture.calls import nodes_of
from redpp_serve.capture.flat import PREFIX, FlatNetwork, describe_outputs, exported_network, flat_network
from redpp_serve.capture.inputs import sample
from redpp_serve.capture.linear_form import linear_form
from redpp_serve.capture.outputs import are_close
from redpp_serve.capture.ranges import with_ranges
from redpp_serve.capture.refusals import not_capturable, reason, without_dumps
from redpp_serve.capture.sequences import with_sequences
from redpp_serve.capture.taking_apart import taken_apart
from redpp_serve.capture.torchscript import READS_NUMBER, converted, script_of_one_size, with_named_weights
from redpp_serve.capture.written_out import WrittenOut, places_of_masks
from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.passes import fold_constants
from redpp_serve.graph.sizes import in_words, is_varying
from redpp_serve.graph.tensor_file import DTYPES

MIXED = "the result for one input depends on the others in its batch"
_MANY = 9  # inputs, more than a server's batch has by default
_MOST_NUMBERS = 1 << 21  # that so many inputs may hold to be tried


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
    try:
        graph = to_graph(exported, flat.inputs, inner=isinstance(source, nn.Module))
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
        check_agreement(graph, flat)
    except RedppError as error:
        if _fixed_batches(exported) and MIXED not in str(error):
            raise batch_as_number(flat) from error
        raise
    _refuse_shapes_by_value(graph)
    if is_varying(graph.inputs):
        shapes = "; ".join(f"{spec.name} {in_words(spec)}" for spec in graph.inputs if spec.varying)
        messages.append(f"sizes vary ({shapes}): pruned and timed at {shapes_in_words(graph.inputs)}")
    return graph


def _export(flat: FlatNetwork) -> ExportedProgram:
    require_any_size(flat)
    example = sample(flat.inputs, 2, torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if isinstance(flat.network, torch.jit.ScriptModule):
                # The trace holds how the network is called and its outputs flattened; the scripted part stays as it is.
                traced = torch.jit.trace(flat, example, check_trace=False)
                return converted(traced, example, dynamic_axes(flat.inputs))
            dynamic = ShapesCollection()
            for x, axes in zip(example, dynamic_axes(flat.inputs), strict=True):
                dynamic[x] = axes
            for mode in (contextlib.nullcontext(), WrittenOut()):  # the second where torch's own definitions fail
                with contextlib.suppress(Exception), mode:
                    return with_sequences(torch.export.export(flat, example, dynamic_shapes=dynamic))  # type: ignore[arg-type]
            if is_varying(flat.inputs):
                return torch.export.export(flat, example, dynamic_shapes=dynamic)  # type: ignore[arg-type]
            return torch.export.export(flat, tuple(x.clone() for x in example))  # the first tries left marks
        except Exception as error:
            if isinstance(flat.network, torch.jit.ScriptModule) and is_varying(flat.inputs):
                raise script_of_one_size(reason(error)) from error
            if "fake tensor in the exported program" in str(error):
                raise not_capturable(
                    "torch.export cannot follow how forward makes a tensor",
                    "tensors made by functions of torch from the inputs; torch.vmap with out_dims=0",
                ) from error
            raise RedppError(
                f"torch.export cannot capture the network: {reason(error)}",
                "a forward without data-dependent control flow, tensors in and tensors out",
                "rewrite the part of forward that the message names, or export it yourself and pass the .pt2 file",
            ) from error


def to_graph(exported: ExportedProgram, inputs: Sequence[InputSpec], inner: bool = False) -> Graph:
    """Convert an exported program to a graph, in which no operator changes its arguments.

    Args:
        exported: the program.
        inputs: its inputs, in its order, under the names that they shall have.
        inner: whether it was exported from a `FlatNetwork`, inside of which the network's names begin with `PREFIX`.
    """
    exported = taken_apart(exported)
    signature = exported.graph_signature
    if signature.buffers_to_mutate or getattr(signature, "parameters_to_mutate", None):
        raise not_capturable(
            "its forward changes a buffer or parameter, as batch norm does in train mode",
            "a network in eval mode, a forward that keeps no state",
        )
    tensors, names = _stored_tensors(exported, inner)
    specs = _input_specs(exported, inputs, names, taken=set(tensors))
    parameters = {names[spec.arg.name] for spec in signature.input_specs if spec.kind is InputKind.PARAMETER}
    buffers = tensors.keys() - parameters
    nodes = nodes_of(exported, names, {*tensors, *(spec.name for spec in specs)}, tensors, buffers)
    outputs = []
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            continue  # a network may write into its input; nobody reads that
        if isinstance(spec.arg, TensorArgument):
            outputs.append(names[spec.arg.name])
    if any(value.is_complex() for value in _output_values(exported)):
        raise not_capturable("it has an output of complex numbers", "real numbers, for example torch.view_as_real(x)")
    return Graph(tuple(specs), tensors, tuple(nodes), tuple(outputs), frozenset(buffers)).pruned_of_unused()


def _output_values(exported: ExportedProgram) -> list[Tensor]:
    """Return torch's description of each tensor that the program returns."""
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    values = [node.meta.get("val") for node in output.all_input_nodes]
    return [value for value in values if isinstance(value, Tensor)]


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


def _refuse_shapes_by_value(graph: Graph) -> None:
    """Refuse a graph whose shapes cannot be told without its values, such as one that drops rows by a mask."""
    try:
        value_shapes(graph)
    except NotImplementedError as error:  # torch's error on tensors without values
        if "nonzero" not in str(error):
            return
        raise not_capturable(
            "the shapes of its values cannot be told from those of its inputs",
            "a forward in which no shape depends on values, as those of x[mask] and x.nonzero() do",
        ) from error


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
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
            kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise not_capturable(f"{entry.target} is of type {kind}", "tensors of real numbers, integers or booleans")
        name = str(entry.target).removeprefix(PREFIX if inner else "")
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


def check_agreement(graph: Graph, network: FlatNetwork) -> None:
    """Compare graph and network on random inputs at batch sizes 2, 1, 3 and 9, and at other sizes where these vary.

    Servers batch the requests of strangers, so the answer to one input must not depend on the others either. A batch of
    9 is left out where the inputs are large.

    Raises:
        RedppError: another result, a failure at one of the batch sizes, or outputs that mix the inputs of a batch.
    """
    program, inputs = Program(graph), graph.inputs
    batches = [2, 1, 3, *([_MANY] if _MANY * sum(math.prod(i.shape) for i in inputs) <= _MOST_NUMBERS else [])]
    cases = [*((batch, inputs) for batch in batches), *((1, specs) for specs in other_sizes(inputs))]
    for batch, specs in cases:
        where = f"at batch size {batch}" + (f" and inputs of {shapes_in_words(specs)}" if is_varying(inputs) else "")
        x = sample(specs, batch, torch.Generator().manual_seed(batch))
        for t in x:  # unlike the others, so that a largest value of the batch is not the largest of each
            t[0] = t[0] / 2 if t.is_floating_point() else t[0] // 2 if t.dtype is torch.uint8 else t[0]
        ends = sorted({0, batch - 1})
        with torch.no_grad():
            try:
                got = program(*(t.clone() for t in x))  # a forward may write into its input
                alone = [program(*(t[k : k + 1].clone() for t in x)) for k in ends]
                expected = network(*x)
            except Exception as error:  # the user's forward may raise anything
                raise not_capturable(
                    f"{where} it fails: {reason(error)}", "a network that takes any batch size"
                ) from error
        if len(got) != len(expected) or not all(map(_agree, got, expected)):
            raise not_capturable(
                f"{where} the captured graph gives another result than the network",
                "a forward that is a pure function of its inputs",
            )
        named = zip(graph.output_names, got, strict=True)
        if odd := [f"{tuple(y.shape)} ({name})" for name, y in named if not y.dim() or len(y) != batch]:
            raise not_capturable(
                f"{where} it has an output of shape {odd[0]}",
                "a network that takes any batch size, with outputs of shape (N, ...)",
            )
        if not all(_agree(y[k : k + 1], one[n]) for n, y in enumerate(got) for k, one in zip(ends, alone, strict=True)):
            raise not_capturable(MIXED, "outputs that are each computed from their own input")


def _agree(mine: Tensor, theirs: Tensor) -> bool:
    """Compare shape, dtype, and values up to 1e-4 of the largest one or the dtype's own rounding."""
    if mine.shape != theirs.shape or mine.dtype is not theirs.dtype:
        return False
    relative = max(1e-4, 16 * torch.finfo(mine.dtype).eps) if mine.is_floating_point() else 0.0
    return are_close(mine, theirs, relative)
