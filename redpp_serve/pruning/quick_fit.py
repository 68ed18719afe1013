"""Readers of narrowed channels made up for at once, from moments that were gathered before; and where constants go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..graph.classes import Reader
from ..runtime.batch_norm import is_inference_norm
from ..runtime.graph import Graph, Ref
from ..runtime.program import Program
from .observation import Observed, output_axis, samples

_RIDGE = 1e-6  # of channels scaled to unit variance


def quick_fit(observed: Observed, kept: Mapping[str, Tensor]) -> Graph:
    """The network with only those channels of those classes, its readers making up for the ones that left.

    Each channel that left is replaced by the linear combination of kept ones that predicts it best; means are
    preserved. The fit is to the activations of the whole network, so errors of several classes add up.
    """
    graph = observed.coupling.graph
    weights: dict[str, Tensor] = {}
    nodes = {}
    for group in observed.coupling.open:
        if group.name not in kept or len(kept[group.name]) == group.channels:
            continue
        for reader in group.readers:
            mix = mix_of(observed.grams[group.name, reader.value], kept[group.name])
            old = weights.get(reader.tensor, graph.tensors[reader.tensor].double())
            weights[reader.tensor] = _mixed(old, reader, kept[group.name], mix)
            nodes[reader.node] = reader
    narrow, places = observed.coupling.narrow(kept), observed.coupling.kept_positions(kept)
    cut = {name: _cut(weight, places(name)).to(graph.tensors[name]) for name, weight in weights.items()}
    narrow = narrow.with_tensors(cut)
    for node, reader in nodes.items():
        shift = _mean_shift(observed, reader, weights[reader.tensor])
        rows = next(iter(places(node).values()), None)  # a reader's output has one axis of channels
        narrow = add_constant(narrow, node, shift if rows is None else shift[rows])
    return narrow


def _mean_shift(observed: Observed, reader: Reader, weight: Tensor) -> Tensor:
    """By how much the mean of a reader's output (n_out,) falls when it gets another weight."""
    graph, mean = observed.coupling.graph, observed.means[reader.value]
    node = graph.node(reader.node)
    spec = replace(graph.inputs[0], name=reader.value, shape=tuple(mean.shape))
    tensors = {ref: graph.tensors[ref].double().to(mean.device) for ref in node.refs() if ref in graph.tensors}
    means = []
    for tensor in (graph.tensors[reader.tensor], weight):
        one = Graph((spec,), {**tensors, reader.tensor: tensor.double().to(mean.device)}, (node,), (node.name,))
        (y,) = Program(one)(mean[None])
        means.append(samples(y, output_axis(graph, reader.node)).mean(0))
    return (means[0] - means[1]).cpu()


def mix_of(gram: Tensor, kept: Tensor) -> Tensor:
    """How each channel follows from the kept ones, (k, channels): least squares; kept ones from themselves."""
    scale = gram.diagonal().clamp_min(1e-300).rsqrt()
    scale = torch.where(gram.diagonal() > 1e-14 * gram.diagonal().max(), scale, 0.0)
    correlation = gram * scale * scale[:, None]
    inner = correlation[kept][:, kept] + _RIDGE * torch.eye(len(kept), dtype=gram.dtype)
    mix = torch.cholesky_solve(correlation[kept], torch.linalg.cholesky(inner))
    mix = mix * scale[kept][:, None] * (1 / scale).nan_to_num(posinf=0.0)
    mix[:, kept] = torch.eye(len(kept), dtype=gram.dtype)
    return mix


def add_constant(graph: Graph, node: str, constant: Tensor) -> Graph:
    """Add (n_out,) to a layer's output: in its bias, the mean of the batch norm that alone reads it, or a new bias.

    A call that takes no bias, or whose bias others use too, stays as it is.
    """
    call, users = graph.node(node), graph.users()
    if not (call.op.startswith("aten.conv") or call.op == "aten.linear.default"):
        return graph
    bias = call.args[2] if len(call.args) > 2 else None
    if bias is not None:
        old = graph.tensors.get(bias.name)
        if old is None or len(users[bias.name]) > 1:
            return graph
        return graph.with_tensors({bias.name: (old.double() + constant.to(old.device)).to(old)})
    readers = users.get(node, [])
    mean = readers[0].args[3].name if len(readers) == 1 and is_inference_norm(readers[0]) else None
    if mean in graph.tensors and len(users[mean]) == 1 and node not in graph.outputs:
        old = graph.tensors[mean]
        return graph.with_tensors({mean: (old.double() - constant.to(old.device)).to(old)})
    name = f"{node}.bias"
    args = (*call.args[:2], Ref(name), *call.args[3:])
    new = constant.to(graph.tensors[call.args[1].name])
    return graph.with_tensors({name: new}).with_nodes({node: replace(call, args=args)})


def _mixed(weight: Tensor, reader: Reader, kept: Tensor, mix: Tensor) -> Tensor:
    """A float64 weight at full width whose kept columns took over the others', which become 0."""
    moved = weight.movedim(reader.dim, 0).clone()
    positions = reader.positions
    columns = moved[positions.flatten()].reshape(*positions.shape, -1)
    moved[positions.flatten()] = 0.0
    taken = torch.einsum("kc,cmr->kmr", mix, columns)
    moved[positions[kept].flatten()] = taken.reshape(-1, *moved.shape[1:])
    return moved.movedim(0, reader.dim)


def _cut(tensor: Tensor, places: Mapping[int, Tensor]) -> Tensor:
    for axis, kept in places.items():
        tensor = tensor.index_select(axis, kept)
    return tensor.contiguous()
