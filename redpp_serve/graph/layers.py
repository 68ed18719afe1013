"""The layers that carry the weights, the products of computed values, and what both cost.

A layer is one stored weight with all calls that read it: a convolution or transposed one in one to three dimensions, a
Linear, an embedding, or one matrix of a recurrent operator. A product multiplies values that are computed, such as
queries with keys. Both are found in order of execution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from redpp_serve.graph.einsum import contractions
from redpp_serve.graph.executor import value_shapes
from redpp_serve.graph.graph import Graph, Node, Ref, once_per_graph

CONV, LINEAR, EMBEDDING = "aten.conv2d.default", "aten.linear.default", "aten.embedding.default"
CONVOLUTIONS = {f"aten.conv{d}d.{form}": d for d in (1, 2, 3) for form in ("default", "padding")}
TRANSPOSED = {"aten.conv_transpose1d.default": 1, "aten.conv_transpose2d.input": 2, "aten.conv_transpose3d.input": 3}
RECURRENT = frozenset(
    {
        *(f"aten.{name}.input" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
        *(f"aten.{name}_cell.default" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
    }
)
ATTENTION = "aten.scaled_dot_product_attention.default"
_PRODUCTS = {  # by operator, the position of its first factor
    **{f"aten.{name}.default": 0 for name in ("matmul", "mm", "bmm", "mv", "dot")},
    **{f"aten.{name}.default": 1 for name in ("addmm", "baddbmm", "addmv", "addbmm")},
}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input; each tuple has an entry for each spatial dimension.

    Attributes:
        stride: steps between output positions; of input positions, for a transposed convolution.
        padding: zeros on either side; positions that are cut off, for a transposed convolution.
        dilation: steps between taps.
        groups: the number of groups.
        output_padding: positions that a transposed convolution adds at each end; zero for others.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    output_padding: tuple[int, ...] = ()


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        node: the call.
        window: its window; empty for a call that is no convolution.
        positions: how often it multiplies every number of the weight, for one input: output positions (input positions
            of a transposed convolution, steps of a recurrent operator), over all windows, frames or heads.
    """

    node: Node
    window: Window
    positions: int


@dataclass(frozen=True)
class Layer:
    """A stored weight and the calls that read it.

    Attributes:
        name: the weight's name without its ending.
        calls: the calls in order of execution; more than one where a module is used several times.
        weight: the name of the weight.
        bias: the name of the bias (n_out,) that all calls add, or None.
        shape: the weight's shape: (n_out, n_in / groups, *kernel) or (n_out, n_in); transposed convolutions have
            (n_in, n_out / groups, *kernel), embeddings (rows, n_out).
        stays: why its weight and outputs are left as they are by fitting and narrowing; empty if they may change.
    """

    name: str
    calls: tuple[Call, ...]
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    stays: str = ""

    @property
    def node(self) -> Node:
        """The first call."""
        return self.calls[0].node

    @property
    def window(self) -> Window:
        """The window of the first call."""
        return self.calls[0].window

    @property
    def groups(self) -> int:
        """The number of groups, 1 for a layer that is no convolution."""
        return self.window.groups

    @property
    def positions(self) -> int:
        """How often all calls together multiply every number of the weight, for one input."""
        return sum(call.positions for call in self.calls)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input, dense, over all calls."""
        return self.positions * math.prod(self.shape)

    @property
    def is_transposed(self) -> bool:
        """Whether the layer is a transposed convolution."""
        return self.node.op in TRANSPOSED

    @property
    def is_embedding(self) -> bool:
        """Whether the layer looks rows up, and so multiplies nothing."""
        return self.node.op == EMBEDDING

    @property
    def is_recurrent(self) -> bool:
        """Whether the weight belongs to a recurrent operator."""
        return self.node.op in RECURRENT

    @property
    def axis(self) -> int:
        """The axis of the outputs' channels: 1 behind a convolution, else -1."""
        return 1 if is_convolution(self.node) else -1

    @property
    def out_dim(self) -> int:
        """The dimension of the weight that the outputs' channels lie along, within a group."""
        return int(self.is_transposed or self.is_embedding)

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        return channel_counts(self.node, self.shape, self.groups)[1]

    @property
    def inputs(self) -> int:
        """The number of input channels; of rows, for an embedding."""
        return channel_counts(self.node, self.shape, self.groups)[0]

    @property
    def taps(self) -> int:
        """The number of weights of each pair of input and output."""
        return math.prod(self.shape[2:])

    @property
    def can_be_fitted(self) -> bool:
        """Whether least squares can give the layer other weights: it is whole, multiplies, and may change."""
        return not self.stays and not self.is_embedding and self.groups == 1

    @property
    def unknowns(self) -> int:
        """The number of weights that each output has."""
        return math.prod(self.shape) // max(self.outputs, 1)

    def by_output(self, weight: Tensor) -> Tensor:
        """Return the weight as that of a convolution or Linear, (n_out, n_in / groups, *kernel)."""
        if not self.is_transposed:
            return weight.movedim(self.out_dim, 0)
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2)
        return grouped.reshape(-1, *grouped.shape[2:])


@dataclass(frozen=True)
class Product:
    """A call that multiplies computed values, or by a weight that is computed or read in other ways too.

    Attributes:
        node: the call.
        terms: what it multiplies, one after the other; a term costs the product of the sizes of these axes of values.
        reason: why its weight makes no layer; empty for a product of values, which has no weight.
    """

    node: Node
    terms: tuple[tuple[tuple[str, int], ...], ...]
    reason: str = ""

    def macs(self, shapes: Shapes) -> int:
        """Return the multiply-accumulates for one input, with the values and tensors in these shapes."""
        return sum(math.prod(shapes[name][axis] for name, axis in term) for term in self.terms)


def is_convolution(node: Node) -> bool:
    """Return whether a call is a convolution of any dimension, transposed or not."""
    return node.op in CONVOLUTIONS or node.op in TRANSPOSED


def channel_counts(node: Node, shape: tuple[int, ...], groups: int) -> tuple[int, int]:
    """Return the number of input and of output channels of a call with a weight of that shape."""
    if node.op in TRANSPOSED:
        return shape[0], shape[1] * groups
    return (shape[0], shape[1]) if node.op == EMBEDDING else (shape[1] * groups, shape[0])


def window(node: Node, kernel: tuple[int, ...]) -> Window:
    """Return the window of a convolution's call with a kernel of that size.

    ``padding="same"`` becomes numbers, where it pads both sides alike; where it does not, the numbers are those of the
    front.
    """
    dims = len(kernel)
    transposed = node.op in TRANSPOSED
    dilation = _each(node.argument(7 if transposed else 5), 1, dims)
    padding = node.argument(4)
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    return Window(
        _each(node.argument(3), 1, dims),
        _each(None if padding == "valid" else padding, 0, dims),
        dilation,
        node.argument(6) or 1,
        _each(node.argument(5) if transposed else None, 0, dims),
    )


def _each(value: int | list[int] | None, default: int, dims: int) -> tuple[int, ...]:
    if value is None or value == []:
        return (default,) * dims
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


def find_layers(graph: Graph) -> list[Layer]:
    """List all layers in order of their first calls. A weight that is computed, or read in other ways, makes none."""
    return list(_layers(graph))


def find_products(graph: Graph) -> list[Product]:
    """List all products in order of execution."""
    return list(_products(graph))


def weight_calls(graph: Graph) -> dict[str, list[Node]]:
    """Map each weight that makes a layer to the calls that read it; that needs no shapes of values."""
    users, found = graph.users(), dict[str, list[Node]]()
    for node in graph.nodes:
        for name, _ in _parameters(graph, node):
            found.setdefault(name, []).append(node)
    return {
        name: calls for name, calls in found.items() if len(users[name]) == len(calls) and name not in graph.outputs
    }


def _parameters(graph: Graph, node: Node) -> list[tuple[str, Any]]:
    """List the stored weights of a call by name, each with the bias that it adds, a `Ref` or None."""
    if node.op in RECURRENT:  # matrices, then as many biases, group by group
        waiting, pairs = list[str](), dict[str, Any]()
        for name in filter(graph.tensors.__contains__, Node("", "", node.args[2:]).refs()):
            if graph.tensors[name].dim() > 1:
                waiting.append(name)
                pairs[name] = None
            elif waiting:
                pairs[waiting.pop(0)] = Ref(name)
        return list(pairs.items())
    if node.op == EMBEDDING:
        weight, bias = node.args[0], None
    elif node.op == LINEAR or is_convolution(node):
        weight, bias = node.args[1], node.argument(2)
    else:
        return []
    return [(weight.name, bias)] if weight.name in graph.tensors else []


def value_and_tensor_shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Return the shapes of inputs and values at batch size 1, and of stored tensors."""
    stored = {name: tuple(tensor.shape) for name, tensor in graph.tensors.items()}
    return {**stored, **{spec.name: (1, *spec.shape) for spec in graph.inputs}, **value_shapes(graph)}


@once_per_graph
def _layers(graph: Graph) -> list[Layer]:
    shapes, users = value_and_tensor_shapes(graph), graph.users()
    layers = []
    for weight, nodes in weight_calls(graph).items():
        biases = [dict(_parameters(graph, node))[weight] for node in nodes]
        calls = tuple(_call(node, graph.tensors[weight], shapes) for node in nodes)
        bias = biases[0].name if biases[0] is not None and biases[0].name in graph.tensors else None
        alone = bias is None or len(users[bias]) == len(calls)
        stays = _stays(graph, calls, biases, alone)
        name = weight.removesuffix(".weight")
        layers.append(Layer(name, calls, weight, bias, tuple(graph.tensors[weight].shape), stays))
    return layers


def _call(node: Node, weight: Tensor, shapes: Shapes) -> Call:
    """Describe a call; a recurrent operator multiplies once for each vector of its input."""
    if node.op == EMBEDDING:
        return Call(node, Window(), 0)
    x = shapes[node.args[0].name]
    if node.op in RECURRENT:
        return Call(node, Window(), math.prod(x[:-1]))
    if node.op == LINEAR:
        return Call(node, Window(), math.prod(shapes[node.name][:-1]))
    found = window(node, tuple(weight.shape[2:]))
    moved = x if node.op in TRANSPOSED else shapes[node.name]
    spatial = len(found.stride)
    return Call(node, found, math.prod(moved[: -spatial - 1]) * math.prod(moved[-spatial:]))


def _stays(graph: Graph, calls: tuple[Call, ...], biases: list[Any], alone: bool) -> str:
    """Say why fitting leaves a layer alone; ``alone`` tells whether nothing else reads its stored bias."""
    first = calls[0].node
    if first.op in RECURRENT:
        return "a recurrent operator stays whole"
    if any(call.node.op != first.op or call.window.groups != calls[0].window.groups for call in calls):
        return "its weight is shared by calls of different kinds"
    if any(bias is not None and bias.name not in graph.tensors for bias in biases):
        return "its bias is computed"
    if any(bias != biases[0] for bias in biases):
        return "the calls that share its weight add different biases"
    if not alone:
        return "its bias is shared with other calls"
    if first.op.endswith(".padding") and any(_uneven(call.node, graph) for call in calls):
        return "it pads one side more than the other"
    return ""


def _uneven(node: Node, graph: Graph) -> bool:
    kernel = tuple(graph.tensors[node.args[1].name].shape[2:])
    dilation = window(node, kernel).dilation
    return node.argument(4) == "same" and any(d * (k - 1) % 2 for d, k in zip(dilation, kernel, strict=True))


@once_per_graph
def _products(graph: Graph) -> list[Product]:
    shapes, weights = value_and_tensor_shapes(graph), weight_calls(graph)
    found = []
    for node in graph.nodes:
        if node.op in (LINEAR, *CONVOLUTIONS, *TRANSPOSED) and node.args[1].name not in weights:
            stored = node.args[1].name in graph.tensors
            reason = "its weight is read in other ways too" if stored else "its weight is computed"
            found.append(Product(node, (weighted_axes(node, shapes),), reason))
        elif terms := _terms(node, shapes):
            found.append(Product(node, terms))
    return found


def weighted_axes(node: Node, shapes: Shapes) -> tuple[tuple[str, int], ...]:
    """Return the axes whose sizes multiply in a convolution or Linear: of the positions, then of the weight."""
    moved, weight = node.args[0].name if node.op in TRANSPOSED else node.name, node.args[1].name
    dims = len(shapes[moved])
    channels = dims - 1 if node.op == LINEAR else dims - len(shapes[weight]) + 1
    return (*((moved, d) for d in range(dims) if d != channels), *((weight, d) for d in range(len(shapes[weight]))))


def _terms(node: Node, shapes: Shapes) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Return the axes whose sizes multiply, for each product that a call makes; empty for other operators."""

    def axes(name: str) -> Iterator[tuple[str, int]]:
        return ((name, d) for d in range(len(shapes[name])))

    if node.op == ATTENTION:
        query, key = node.args[0].name, node.args[1].name
        return tuple((*axes(value), (key, len(shapes[key]) - 2)) for value in (query, node.name))
    if node.op == "aten.einsum.default":
        return contractions(node.args[0], [(ref.name, shapes[ref.name]) for ref in node.args[1]])
    if node.op in _PRODUCTS:
        factor = node.args[_PRODUCTS[node.op]].name
        return ((*axes(node.name), (factor, len(shapes[factor]) - 1)),)
    return ()


def parameter_count(graph: Graph) -> int:
    """Count the floating-point values that the graph holds."""
    return sum(t.numel() for t in graph.tensors.values() if t.is_floating_point())


def mac_count(graph: Graph) -> int:
    """Count the multiply-accumulates of all layers and products for one input.

    This is what the project means by MACs wherever a whole network is concerned: in reports, in ``inspect``, and in
    ``--target macs=R``. Biases, norms, activations and pooling count nothing; a shared weight counts at each call.
    """
    return sum(layer.macs for layer in find_layers(graph)) + product_macs(graph)


def product_macs(graph: Graph) -> int:
    """Count the multiply-accumulates of the products for one input."""
    shapes = value_and_tensor_shapes(graph)
    return sum(product.macs(shapes) for product in find_products(graph))
