"""Taking an exported program apart into plain calls, before they become nodes.

Blocks such as ``torch.no_grad()`` and a disabled ``autocast`` give way to the calls inside them. A program that writes
into memory it reads by another name is made functional, and ``torch.vmap`` gives way to operators of whole batches. An
operator that an artifact cannot hold is replaced by the simpler ones that torch defines it by; all other operators stay
whole, as layers must.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import TensorArgument

from redpp_serve.capture.aliasing import writes_to_views
from redpp_serve.capture.calls import constant_nodes, has_place, is_random
from redpp_serve.capture.refusals import first_words, not_capturable, place, random_result
from redpp_serve.capture.written_out import definitions

_GRAD_BLOCK, _AUTOCAST_BLOCK = "wrap_with_set_grad_enabled", "wrap_with_autocast"
_BODY = {_GRAD_BLOCK: 1, _AUTOCAST_BLOCK: 4}  # position of a block's body among its arguments
_ROUNDS = 4  # what an operator is defined by may need taking apart too


def taken_apart(exported: ExportedProgram) -> ExportedProgram:
    """Return the program without blocks, without writes into views, and with simple operators for unlisted ones.

    Raises:
        RedppError: an operator draws random numbers, a block computes in another precision, or torch fails to follow
            functions of torch.func or writes into views.
    """
    _inline_blocks(exported.graph_module)
    exported = _with_named_outputs(exported)
    for node in exported.graph.nodes:
        if is_random(node):
            raise random_result(str(node.target), place(node))
    mapped = [node for node in exported.graph.nodes if _maps(node)]
    if writes_to_views(exported) or mapped:
        try:
            exported = _decomposed(exported, {})  # makes it functional and batched; no operator is in the table
        except Exception as error:
            what = f"a function of torch.func{place(mapped[0])}" if mapped else "writes into views"
            raise not_capturable(
                f"torch cannot replace {what} by plain calls: {first_words(error)}",
                "a forward without derivatives, and without writes into memory that is read by another name",
                "write the derivative out or compute it outside of the network; write into a clone()",
            ) from error
    for _ in range(_ROUNDS):
        constant = constant_nodes(exported)
        targets = {n.target for n in exported.graph.nodes if n not in constant and not has_place(n)}
        own = definitions([n for n in exported.graph.nodes if n.target in targets])
        table = {target: rule for target in targets for rule in _definition(target)} | own
        if not table:
            break
        try:
            exported = _decomposed(exported, table)
        except Exception:  # torch's rules may fail on a dynamic batch: then the operator is refused by its name
            break
    return exported


def _maps(node: fx.Node) -> bool:
    """Return whether a call belongs to ``torch.vmap``, whose operators stand in the program for one row each."""
    return getattr(node.target, "__module__", "") == "torch._functorch.predispatch"


def _decomposed(exported: ExportedProgram, table: dict[Any, Callable[..., Any]]) -> ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        simpler: ExportedProgram = exported.run_decompositions(table)
        return simpler


def _definition(target: Any) -> list[Callable[..., Any]]:
    """Return the function by which torch defines an operator through simpler ones, if there is one, in a list."""
    if target is torch.ops.aten.item.default:  # refused under the name by which people know it
        return []
    found = [table[target] for table in _definitions() if target in table]
    if not found and isinstance(target, OpOverload) and target._can_decompose():
        found = [target.decompose]  # one that torch itself composes of others, as movedim
    return found[:1]


@functools.cache
def _definitions() -> tuple[Mapping[Any, Callable[..., Any]], ...]:
    from torch._decomp import decomposition_table  # noqa: PLC0415 - takes a second to import

    return default_decompositions(), decomposition_table


def _inline_blocks(module: fx.GraphModule) -> None:
    """Replace each block of a graph, and of the blocks inside it, by the calls of its body."""
    graph = module.graph
    for node in list(graph.nodes):
        kind = getattr(node.target, "__name__", "")
        if node.op != "call_function" or kind not in _BODY:
            continue
        if kind == _AUTOCAST_BLOCK:
            _check_autocast(node)
        at = _BODY[kind]
        body = getattr(module, node.args[at].target)
        _inline_blocks(body)
        inner = [n for n in body.graph.nodes if n.op == "placeholder"]
        with graph.inserting_before(node):
            results: Any = graph.graph_copy(body.graph, dict(zip(inner, node.args[at + 1 :], strict=True)))
        for item in list(node.users):  # each takes one of the body's results
            item.replace_all_uses_with(results[item.args[1]])
            graph.erase_node(item)
        graph.erase_node(node)
    module.recompile()


def _check_autocast(node: fx.Node) -> None:
    """Refuse a block that computes in another precision on the CPU, where the graph is compared with the network."""
    device, dtype, enabled = node.args[:3]
    if enabled and device == "cpu":
        raise not_capturable(
            f"an autocast block{place(node)} computes in {str(dtype).removeprefix('torch.')} on the CPU",
            "a forward in the precision of its weights; the server's precision is chosen by --precision",
        )


def _with_named_outputs(exported: ExportedProgram) -> ExportedProgram:
    """Give the program's signature the names that its outputs have after blocks were replaced."""
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    for spec, value in zip(exported.graph_signature.output_specs, output.args[0], strict=True):
        if isinstance(spec.arg, TensorArgument) and isinstance(value, fx.Node) and spec.arg.name != value.name:
            spec.arg = TensorArgument(name=value.name)
    return exported
