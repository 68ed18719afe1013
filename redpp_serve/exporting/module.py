"""A packaged network as an ordinary module: parameters under their original names, live batch norms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import makes_tensor
from redpp_serve.graph.graph import Graph, Node, map_refs
from redpp_serve.graph.operators import resolve
from redpp_serve.graph.passes import is_inference_norm
from redpp_serve.packaging.mar import artifact_bytes, read_artifact
from redpp_serve.report.folder import read_report
from redpp_serve.runtime.model import ServingModel
from redpp_serve.variants import NAMES, VARIANTS, Variant, canonical_name

MOMENTUM = 0.1  # of batch norms that were trained with a cumulative average, which is captured as 0
_SERVED_AS = {"engine": "engine", "precision": "precision", "batch_size": "batch"}  # option -> ServingModel's argument


class GraphModule(nn.Module):
    """A graph as a module that can be trained, saved, copied and exported like any other.

    A floating-point tensor is a parameter unless its author had made it a buffer; where the graph does not say, all are
    parameters but the statistics of batch norms. A tensor that several calls read is one parameter. Names with dots are
    nested modules, so ``named_parameters()`` gives ``layer1.0.conv1.weight``.

    A batch norm follows the mode of the module that holds its running mean: in train mode it normalizes by the batch
    and updates its statistics. In eval mode the module calls exactly what the graph calls. Dropout was left out when
    the network was captured, and is absent in both modes.

    Args:
        graph: the network; its tensors are copied.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._network = replace(graph, tensors={})
        self._stored = tuple(graph.tensors)
        self._last = _last_uses(graph)
        buffers = buffer_names(graph)
        for name, tensor in graph.tensors.items():
            place, own = _place(self, name), tensor.detach().clone()
            if name in buffers:
                place.register_buffer(name.rpartition(".")[2], own)
            else:
                place.register_parameter(name.rpartition(".")[2], nn.Parameter(own))
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map inputs (N, ...) to the network's output, or to a tuple of them where it has several."""
        specs = self._network.inputs
        if len(inputs) != len(specs):
            raise TypeError(f"the network takes {len(specs)} inputs ({', '.join(s.name for s in specs)})")
        values: dict[str, Any] = {spec.name: x for spec, x in zip(specs, inputs, strict=True)}
        values |= {name: attrgetter(name)(self) for name in self._stored}
        for node in self._network.nodes:
            values[node.name] = self._call(node, values, inputs[0].device)
            for name in self._last[node.name]:
                del values[name]
        outputs = tuple(values[name] for name in self._network.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def graph(self) -> Graph:
        """Return the network with its tensors as they are now."""
        state = self.state_dict()
        return replace(self._network, tensors={name: state[name].detach().cpu() for name in self._stored})

    def _call(self, node: Node, values: dict[str, Any], device: torch.device) -> Any:
        args = map_refs(node.args, values.__getitem__)
        if is_inference_norm(node) and self.get_submodule(node.args[3].name.rpartition(".")[0]).training:
            x, weight, bias, mean, variance, _, momentum, eps = args[:8]
            return F.batch_norm(x, mean, variance, weight, bias, True, momentum or MOMENTUM, eps)
        kwargs = {key: map_refs(value, values.__getitem__) for key, value in node.kwargs.items()}
        function = _function(node.op)
        if makes_tensor(function):
            kwargs["device"] = device
        return function(*args, **kwargs)


class ServedModule(nn.Module):
    """A packaged network as a server runs it, for measuring and for batch jobs; it cannot be trained.

    Args:
        source: the artifact.
        device: where to run.
        options: arguments of `ServingModel`.
    """

    def __init__(self, source: bytes, device: str, **options: Any) -> None:
        super().__init__()
        self.model = ServingModel(source, device, **options)
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map inputs (N, ...) to the network's output on the CPU, or to a tuple of them where it has several."""
        outputs = self.model(*inputs)
        return outputs[0] if len(outputs) == 1 else outputs


def load(folder: Path | str, version: str = "pruned", *, serving: bool = False, device: str = "cpu") -> nn.Module:
    """Load a network out of a package.

    Args:
        folder: what `package` wrote.
        version: ``pruned`` or ``original``.
        serving: return it as it is served, with the package's precision and batch size and the fastest kernels found
            here, instead of as a module that can be trained.
        device: where it is to be.

    Returns:
        A module in eval mode, see `GraphModule` and `ServedModule`.

    Raises:
        RedppError: no such version, or no package.
    """
    folder = Path(folder)
    archive = find_variant(version).archive_in(folder)
    graph = read_artifact(archive).graph  # within bounds
    if not serving:
        return graph_module(graph).to(device)
    options = read_report(folder).options
    known = {argument: options[name] for name, argument in _SERVED_AS.items() if options.get(name) is not None}
    return ServedModule(artifact_bytes(archive), device, **known)


def graph_module(graph: Graph) -> GraphModule:
    """Return a graph as a module.

    Raises:
        RedppError: a tensor has a name that no module can give it, which a file's author may choose.
    """
    try:
        return GraphModule(graph)
    except KeyError as error:
        raise RedppError(
            f"a tensor's name cannot be used in a module: {str(error)[:200]}",
            "names of parameters, such as layer1.0.conv1.weight",
            "package the model again with this release",
        ) from error


def find_variant(version: str) -> Variant:
    """Return the version of that name.

    Raises:
        RedppError: there is none.
    """
    for variant in VARIANTS:
        if canonical_name(version) == variant.name:
            return variant
    raise RedppError(f"there is no version {version!r}", " or ".join(NAMES), "correct it, or leave it out for pruned")


def buffer_names(graph: Graph) -> set[str]:
    """Return the names of a graph's tensors that are no parameters."""
    statistics = {node.args[k].name for node in graph.nodes if is_inference_norm(node) for k in (3, 4)}
    named = statistics if graph.buffers is None else statistics | graph.buffers
    return {name for name, tensor in graph.tensors.items() if name in named or not tensor.is_floating_point()}


def _place(root: nn.Module, name: str) -> nn.Module:
    """Return the module that holds the tensor of a dotted name, made where it is missing."""
    for part in name.split(".")[:-1]:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root


def _last_uses(graph: Graph) -> dict[str, list[str]]:
    """Return for each call the values that nothing reads after it."""
    last: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
    seen = set(graph.outputs) | graph.tensors.keys()
    for node in reversed(graph.nodes):
        for name in dict.fromkeys(node.refs()):
            if name not in seen:
                seen.add(name)
                last[node.name].append(name)
    return last


@functools.cache
def _function(op: str) -> Callable[..., Any]:
    return resolve(op)
