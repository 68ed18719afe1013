"""Channels that give the same whatever the network reads, and the network without them.

A mask of torch.nn.utils.prune, or a norm's scale of zero, leaves channels that no longer depend on the input. Those
that are zero where they are read can go as they are. The others are constants: their share goes into the bias of a
layer that reads them without padding. With padding the border reads fewer of them, so one constant channel stays there
and takes over the columns of the others, in proportion.

What depends on the input is found by running the network once, in float64, with NaN as the input: NaN is what depends
on it. Layers pass it on where a weight is not zero; operators without a rule here, and all that follows integers,
count as dependent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redpp_serve.channels.coupling import Coupling, Reader
from redpp_serve.graph.executor import TensorType, value_sizes, value_types
from redpp_serve.graph.graph import Graph, Node, map_refs
from redpp_serve.graph.layers import LINEAR, Layer, find_layers, is_convolution
from redpp_serve.graph.operators import resolve
from redpp_serve.graph.passes import BATCH_NORM, is_inference_norm, scale_and_shift
from redpp_serve.pruning.verification import casting_to_double, default_dtype

_NAMES = """
relu.default relu6.default hardtanh.default silu.default gelu.default hardswish.default hardsigmoid.default
sigmoid.default tanh.default leaky_relu.default elu.default softplus.default mish.default neg.default abs.default
exp.default sqrt.default square.default add.Tensor add.Scalar sub.Tensor sub.Scalar mul.Scalar div.Scalar div.Tensor
rsub.Scalar reshape.default flatten.using_ints unflatten.int permute.default transpose.int unsqueeze.default
squeeze.dim squeeze.dims expand.default cat.default slice.Tensor narrow.default select.int split.Tensor
split_with_sizes.default chunk.default clone.default contiguous.default mean.dim sum.dim_IntList pad.default
constant_pad_nd.default max_pool1d.default max_pool2d.default max_pool3d.default avg_pool1d.default
avg_pool2d.default avg_pool3d.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default
adaptive_avg_pool3d.default upsample_nearest2d.vec upsample_bilinear2d.vec channel_shuffle.default
pixel_shuffle.default
"""
_PASSED_ON = frozenset(f"aten.{name}" for name in _NAMES.split())  # NaN wherever a NaN was read for it


@dataclass(frozen=True)
class Constants:
    """What the constant channels of a network come to.

    Attributes:
        tensors: the weights that read them, float64, changed so that nothing reads the channels that can go.
        added: by a layer's call, what its outputs gain, (n_out,) float64.
        channels: for each set that has some, which of its channels can go, (channels,) bool.
    """

    tensors: Mapping[str, Tensor]
    added: Mapping[str, Tensor]
    channels: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """How many channels can go."""
        return sum(int(found.sum()) for found in self.channels.values())


@torch.no_grad()
def find_constants(coupling: Coupling) -> Constants:
    """Find the constant channels of all open sets, and what makes up for them exactly."""
    with default_dtype(torch.float64):  # bytes and tokens become floats of this type, as those of the stored tensors
        return _find_constants(coupling, casting_to_double(coupling.graph.to(torch.float64)))


def _find_constants(coupling: Coupling, graph: Graph) -> Constants:
    found = Constants({}, {}, {})
    if not _may_have_some(graph):
        return found
    tensors, added, channels = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    values = _values(graph, {reader.value for c in coupling.open for reader in c.readers})
    layers = {call.node.name: layer for layer in find_layers(graph) for call in layer.calls}
    for channel_set in coupling.open:
        if any(reader.node not in layers for reader in channel_set.readers):
            continue
        reads = [_Read(reader, layers[reader.node], values[reader.value]) for reader in channel_set.readers]
        goes, keeper = _which(reads)
        if not bool(goes.any()):
            continue
        channels[channel_set.name] = goes
        for read in {read.reader.tensor: read for read in reads}.values():
            weight = tensors.get(read.reader.tensor, graph.tensors[read.reader.tensor])
            tensors[read.reader.tensor] = read.without(weight, goes, keeper)
            share = read.share(weight, goes)
            if keeper is None and bool(share.any()):
                added[read.layer.node.name] = share + added.get(read.layer.node.name, 0.0)
    return Constants(tensors, added, channels)


def _may_have_some(graph: Graph) -> bool:
    """Return whether a row of a layer's weight or a norm's scale is zero: else nothing has to run."""
    rows = any(
        bool((layer.by_output(graph.tensors[layer.weight]).flatten(1) == 0).all(1).any())
        for layer in find_layers(graph)
        if not layer.is_embedding
    )
    scales = (graph.tensors.get(node.args[1].name) for node in graph.nodes if node.op == BATCH_NORM and node.args[1])
    return rows or any(scale is not None and bool((scale == 0).any()) for scale in scales)


class _Read:
    """A call that reads the channels of a set, and the constants (channels, m) that it finds; NaN for others."""

    def __init__(self, reader: Reader, layer: Layer, value: Tensor) -> None:
        self.reader, self.layer = reader, layer
        rows = value.movedim(reader.axis, 0)[reader.positions.flatten()].flatten(1)
        alike = rows.amin(1) == rows.amax(1)
        self.constants = torch.where(alike, rows[:, 0], torch.nan).view(reader.positions.shape)

    @property
    def everywhere_alike(self) -> bool:
        """Whether every output reads all taps, and the layer can take a constant."""
        padded = any(any(call.window.padding) for call in self.layer.calls)
        return not (padded or self.layer.is_transposed or self.layer.stays)

    def share(self, weight: Tensor, goes: Tensor) -> Tensor:
        """Return what the channels that go give to the layer's outputs, (n_out,)."""
        moved = weight.movedim(self.reader.dim, 0)
        columns = moved[self.reader.positions[goes]]  # (channels, m, n_out, *kernel)
        columns = columns.reshape(*columns.shape[:3], -1).sum(3)
        return (columns * self.constants[goes][..., None]).sum((0, 1))

    def without(self, weight: Tensor, goes: Tensor, keeper: int | None) -> Tensor:
        """Return the weight that does not read the channels that go; the keeper takes over their columns."""
        moved, positions = weight.movedim(self.reader.dim, 0).clone(), self.reader.positions
        if keeper is not None:
            ratios = self.constants[goes] / self.constants[keeper]
            columns = moved[positions[goes]]
            moved[positions[keeper]] += (columns * ratios.view(*ratios.shape, *[1] * (columns.dim() - 2))).sum(0)
        moved[positions[goes].flatten()] = 0.0
        return moved.movedim(0, self.reader.dim)


def _which(reads: Sequence[_Read]) -> tuple[Tensor, int | None]:
    """Decide which channels of a set can go, (channels,) bool, and which one takes over their columns.

    None takes over where all that go are zero, or where the layers that read them take their share as a constant.
    """
    found = torch.stack([read.constants.isfinite().all(1) for read in reads]).all(0)
    zero = torch.stack([(read.constants == 0).all(1) for read in reads]).all(0)
    by_weight: dict[str, Tensor] = {}
    for read in reads:
        first = by_weight.setdefault(read.reader.tensor, read.constants)
        found = found & (zero | (read.constants == first).all(1))  # calls that share a weight must agree
    if bool((found == zero).all()) or all(read.everywhere_alike for read in reads):
        return found, None
    least = torch.stack([read.constants.abs().amin(1) for read in reads]).amin(0)
    keeper = int(torch.where(found, least, -1.0).argmax())
    if not least[keeper] > 0:
        return zero, None
    found[keeper] = False
    return found, keeper


def _values(graph: Graph, wanted: Collection[str]) -> dict[str, Tensor]:
    """Return values (1, ...) in float64 with NaN wherever they depend on the input."""
    types, sizes = value_types(graph), value_sizes(graph)
    known: dict[str, Any] = {i.name: _unknown((1, *i.shape), getattr(torch, i.dtype)) for i in graph.inputs}
    known |= graph.tensors
    last = {name: node.name for node in graph.nodes for name in node.refs()}
    for node in graph.nodes:
        if node.name in sizes:
            known[node.name] = sizes[node.name]
        else:
            known[node.name] = _result(graph, node, known, types.get(node.name))
        for name in set(node.refs()) - set(wanted):
            if last[name] == node.name and name not in graph.tensors:
                del known[name]
    return {name: known[name] for name in wanted}


def _unknown(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Return NaN in a floating type; integers and truth values have none, so None stands for them."""
    return torch.full(shape, torch.nan, dtype=torch.float64) if dtype.is_floating_point else None


def _result(graph: Graph, node: Node, known: Mapping[str, Any], made: TensorType | None) -> Any:
    """Return what a call gives: numbers that do not depend on the input, and NaN."""
    args = map_refs(node.args, known.get)
    read = [known[name] for name in node.refs()]
    if all(value is not None for value in read):
        if node.op == "py.getitem":
            return args[0][args[1]]
        if (node.op == LINEAR or is_convolution(node)) and node.args[1].name in graph.tensors:
            return _summed(node, *args)
        if is_inference_norm(node) and all(ref.name in graph.tensors for ref in node.args[1:5] if ref):
            return _normalised(graph, node, args[0])
        if node.op == "aten.mul.Tensor" and all(isinstance(arg, Tensor) for arg in args):
            return torch.where((args[0] == 0) | (args[1] == 0), 0.0, args[0] * args[1])
        if node.op in _PASSED_ON and "dtype" not in node.kwargs:
            return resolve(node.op)(*args, **{key: map_refs(value, known.get) for key, value in node.kwargs.items()})
    return None if made is None else _unknown(*made)


def _summed(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
    """Apply a layer; an output depends on the input where a weight that is not zero meets a NaN."""
    call, unknown = resolve(node.op), x.isnan()
    depends = call(unknown.to(weight), (weight != 0).to(weight), None, *rest) > 0.5
    result: Tensor = call(x.masked_fill(unknown, 0.0), weight, bias, *rest)
    return result.masked_fill(depends, torch.nan)


def _normalised(graph: Graph, node: Node, x: Tensor) -> Tensor:
    """Apply a batch norm by stored statistics; a scale of zero leaves its constant alone."""
    scale, shift = (each.view(-1, *[1] * (x.dim() - 2)) for each in scale_and_shift(graph, node))
    return torch.where(scale == 0, shift, x * scale + shift)
