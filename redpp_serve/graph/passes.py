"""Passes that map a graph to a graph with the same function.

`fold_constants` runs when a network is captured. The others run when a graph is loaded to serve it, the original as
well as the pruned one: `in_precision` casts it, `fold_batch_norm` folds affine maps into layers, `fuse_epilogues`
lets layers take over the addition and the activation that follow them. The fused nodes keep their plain weights and
mean plain PyTorch; `runtime.candidates` turns them into calls of a kernel for the device that serves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import value_shapes, value_types
from redpp_serve.graph.graph import Graph, Node, Ref, map_refs
from redpp_serve.graph.layers import CONV, LINEAR, TRANSPOSED, is_convolution, window
from redpp_serve.graph.operators import FUSED_CONV2D, FUSED_LINEAR, resolve

BATCH_NORM = "aten.batch_norm.default"
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")  # that torch computes in
SERVED = ("auto", *PRECISIONS, "int8")  # that a server may be told

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_CAST = (torch.float32, torch.float16, torch.bfloat16)
_TO = "aten._to_copy.default"
_ACTIVATIONS = {
    f"aten.{name}.default": name for name in ("relu", "relu6", "silu", "sigmoid", "hardswish", "hardsigmoid", "gelu")
}
_BATCH = 2  # of the run that finds the shapes: it tells a summand that is one row for all inputs


@torch.no_grad()
def fold_constants(graph: Graph) -> Graph:
    """Store the values that a graph computes from stored tensors alone, where they are no larger than those.

    Standardized or normalized weights and concatenated biases become a layer's own weight and bias, so that the layer
    takes part in everything that works on stored weights. A value is stored under the name of the call that made it.
    """
    tensors, nodes, buffers = dict(graph.tensors), [], graph.buffers
    known = dict(tensors)  # also what is made from sizes alone, such as an identity matrix, which is not stored
    for node in graph.nodes:
        refs = set(node.refs())
        stored = refs & tensors.keys()
        if refs <= known.keys():
            args, kwargs = (map_refs(part, known.get) for part in (node.args, tuple(node.kwargs.values())))
            value = resolve(node.op)(*args, **dict(zip(node.kwargs, kwargs, strict=True)))
            if isinstance(value, Tensor) and (not stored or value.is_complex()):  # no file holds complex numbers
                known[node.name] = value
            elif isinstance(value, Tensor) and value.numel() <= sum(tensors[name].numel() for name in stored):
                tensors[node.name] = known[node.name] = value.contiguous()
                buffers = buffers and (buffers | {node.name} if stored <= buffers else buffers)
                continue
        nodes.append(node)
    return replace(graph, tensors=tensors, nodes=tuple(nodes), buffers=buffers).pruned_of_unused()


def is_inference_norm(node: Node) -> bool:
    """Return whether a node is a batch norm that normalizes by stored statistics, not by those of the batch."""
    return node.op == BATCH_NORM and node.args[3] is not None and node.args[5] is False


def scale_and_shift(graph: Graph, norm: Node) -> tuple[Tensor, Tensor]:
    """Return the float64 (channels,) scale and shift that an inference batch norm applies to its input."""
    weight, bias, mean, variance = (graph.tensors[ref.name].double() if ref else None for ref in norm.args[1:5])
    assert mean is not None and variance is not None  # `is_inference_norm`
    scale = torch.rsqrt(variance + norm.args[7])
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def fold_batch_norm(graph: Graph) -> Graph:
    """Fold each batch norm that alone reads a convolution or Linear into that layer.

    This is for graphs that are about to run, never for one before hashing or merging: folding scales each output
    channel by its own factor, which destroys equality between channels and between a layer's weights.
    """
    tensors, changed, dropped = dict(graph.tensors), {}, set()
    for source, norm in _foldable(graph):
        weight = tensors[source.args[1].name]
        scale, shift = scale_and_shift(graph, norm)
        bias = source.argument(2)
        if bias is not None:
            shift = shift + tensors[bias.name].double() * scale
        folded = _scaled(weight, scale, source).to(weight.dtype)
        stem = source.args[1].name.removesuffix(".weight")
        if f"{stem}.folded.weight" in tensors:  # two layers share a weight, and each has a norm of its own
            stem = f"{stem}.{source.name}"
        names = f"{stem}.folded.weight", f"{stem}.folded.bias"
        tensors.update(zip(names, (folded, shift.to(weight.dtype)), strict=True))
        args = (source.args[0], Ref(names[0]), Ref(names[1]), *source.args[3:])
        changed[norm.name] = Node(norm.name, source.op, args, source.kwargs)
        dropped.add(source.name)
    nodes = tuple(changed.get(node.name, node) for node in graph.nodes if node.name not in dropped)
    return replace(graph, tensors=tensors, nodes=nodes).pruned_of_unused()


def _scaled(weight: Tensor, scale: Tensor, call: Node) -> Tensor:
    """Scale a layer's weight by a float64 factor (n_out,) for each output channel; one in float32 stays so.

    Products in float64 would take longer than all else that a server does to the weights as it loads them.
    """
    if call.op not in TRANSPOSED:
        factor = scale.to(weight.dtype) if weight.dtype == torch.float32 else scale
        return weight * factor.view(-1, *[1] * (weight.dim() - 1))
    groups = call.argument(6) or 1
    by_group = weight.double().view(groups, -1, *weight.shape[1:])
    return (by_group * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))).view(weight.shape)


def _foldable(graph: Graph) -> list[tuple[Node, Node]]:
    """Pair each convolution or Linear with the batch norm that alone reads it, if all their parameters are stored."""
    users, producers = graph.users(), {node.name: node for node in graph.nodes}
    pairs = []
    for norm in filter(is_inference_norm, graph.nodes):
        source = producers.get(norm.args[0].name)
        foldable = source is not None and (source.op == LINEAR or is_convolution(source))
        if source is None or not foldable or not _only_reader(graph, users, source):
            continue
        parameters = [ref.name for ref in (*source.args[1:3], *norm.args[1:5]) if isinstance(ref, Ref)]
        if all(name in graph.tensors for name in parameters):  # else computed, as by weight standardization
            pairs.append((source, norm))
    # Linear puts its features last, batch norm normalizes axis 1: the same axis in matrices alone
    shapes = value_shapes(graph, "cpu") if any(source.op == LINEAR for source, _ in pairs) else {}
    return [(source, norm) for source, norm in pairs if source.op != LINEAR or len(shapes[source.name]) == 2]


def fuse_epilogues(graph: Graph) -> Graph:
    """Replace each convolution and Linear that has stored parameters by a fused node with its epilogue.

    A fused node holds its layer, then an unscaled addition of a value of the same shape, then an activation, the
    latter two where each alone reads the one before. The network runs once on zeros, on the CPU.
    """
    users, types = graph.users(), value_types(graph, "cpu", _BATCH)
    types |= {i.name: ((_BATCH, *i.shape), getattr(torch, i.dtype)) for i in graph.inputs}
    replaced: dict[str, Node] = {}
    absorbed: set[str] = set()
    for node in graph.nodes:
        if not _is_layer(graph, node) or (node.op == CONV and len(types[node.name][0]) != 4):
            continue
        last, other, activation = node, None, "none"
        follower = _only_reader(graph, users, last)
        partner = _other_summand(follower, node.name)
        taken = follower is not None and (follower.name in absorbed or follower.name in replaced)
        if follower and partner and not taken and types.get(partner) == types[node.name]:
            absorbed.add(last.name)
            last, other = follower, Ref(partner)
            follower = _only_reader(graph, users, last)
        if follower and (name := activation_of(follower)):
            absorbed.add(last.name)
            last, activation = follower, name
        op, geometry = FUSED_LINEAR, tuple[Any, ...]()
        if node.op == CONV:
            found = window(node, graph.tensors[node.args[1].name].shape[2:])
            op, geometry = FUSED_CONV2D, (found.stride, found.padding, found.dilation, found.groups)
        args = (node.args[0], other, node.args[1], node.argument(2), *geometry, activation)
        replaced[last.name] = Node(last.name, op, args)
    nodes = tuple(replaced.get(n.name, n) for n in graph.nodes if n.name in replaced or n.name not in absorbed)
    return replace(graph, nodes=nodes).pruned_of_unused()


def _is_layer(graph: Graph, node: Node) -> bool:
    """Return whether a node is a convolution or Linear with stored weight and bias, whose input is not stored."""
    if node.op not in (CONV, LINEAR) or node.kwargs or node.args[0].name in graph.tensors:
        return False
    return all(ref.name in graph.tensors for ref in node.args[1:3] if ref is not None)


def activation_of(node: Node) -> str | None:
    """Return the name by which kernels know an activation; None for other calls."""
    if node.op == "aten.gelu.default" and node.kwargs:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if node.op == "aten.hardtanh.default":
        return "relu6" if node.args[1:] == (0.0, 6.0) else None
    return _ACTIVATIONS.get(node.op)


def _only_reader(graph: Graph, users: dict[str, list[Node]], node: Node) -> Node | None:
    readers = users.get(node.name, [])
    return readers[0] if len(readers) == 1 and node.name not in graph.outputs else None


def _other_summand(node: Node | None, name: str) -> str | None:
    """Return the value that an unscaled addition of two values adds to ``name``."""
    if node is None or node.op != "aten.add.Tensor" or node.kwargs or not all(isinstance(a, Ref) for a in node.args):
        return None
    return next((a.name for a in node.args if a.name != name), None)


def check_served(precision: Any, where: str = "--precision") -> None:
    """Refuse a name that is no precision.

    Args:
        precision: what was given.
        where: the file or flag that says so.

    Raises:
        RedppError: it is none of `SERVED`.
    """
    if precision not in SERVED:
        raise RedppError(
            f"precision is {str(precision)[:40]!r} in {where}", f"one of {', '.join(SERVED)}", f"correct {where}"
        )


def precision_dtype(precision: str) -> torch.dtype:
    """Return the dtype of activations and weights in a precision."""
    return _HALF.get(precision, torch.float32)


def set_switches(precision: str) -> None:
    """Allow or forbid TF32 in matrix products and convolutions on CUDA, for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def half_of(graph: Graph) -> str:
    """Return the 16-bit precision that some of a graph's tensors are stored in, as fp16 or bf16; empty for none."""
    stored = {tensor.dtype for tensor in graph.tensors.values()}
    return next((name for name, dtype in _HALF.items() if dtype in stored), "")


def in_precision(graph: Graph, precision: str) -> Graph:
    """Compute all floating-point values between a graph's inputs and outputs in a precision.

    Inputs and outputs keep their dtypes: the first and the last nodes cast them. fp32 and tf32 change nothing, so that
    a network stored in float64 or float16 runs in that. fp16 and bf16 cast tensors and the dtypes among the arguments;
    what a node makes in float32 from integers alone is cast behind it, so that no layer meets two dtypes. Integers
    stay. The network runs once on zeros, on the CPU.

    Raises:
        RedppError: a network with float64 values in fp16 or bf16.
    """
    if precision not in _HALF:
        return graph
    dtype, types = _HALF[precision], _dtypes(graph)
    if double := [name for name, found in types.items() if found == torch.float64]:
        raise RedppError(
            f"a network with float64 values ({', '.join(double[:3])}) in {precision}",
            "a network that computes in float32, for which 16 bits are enough",
            "serve it with precision fp32",
        )
    tensors = {name: t.to(dtype) if t.dtype in _CAST else t for name, t in graph.tensors.items()}
    inputs = {i.name: f"{i.name}.{precision}" for i in graph.inputs if types[i.name] in _CAST}
    outputs = {
        name: f"{name}.{str(types[name]).removeprefix('torch.')}" for name in graph.outputs if types[name] in _CAST
    }
    nodes = [
        *(_to(cast, name, dtype) for name, cast in inputs.items()),
        *(call for node in graph.nodes for call in _cast_calls(node, inputs, types, dtype)),
        *(_to(cast, name, types[name]) for name, cast in outputs.items()),
    ]
    named = tuple(outputs.get(name, name) for name in graph.outputs)
    return replace(graph, tensors=tensors, nodes=tuple(nodes), outputs=named)


def _dtypes(graph: Graph) -> dict[str, torch.dtype]:
    """Find the dtype of every tensor in a graph: calls', inputs' and stored ones."""
    types = {name: dtype for name, (_, dtype) in value_types(graph, "cpu").items()}
    types |= {i.name: getattr(torch, i.dtype) for i in graph.inputs}
    return types | {name: tensor.dtype for name, tensor in graph.tensors.items()}


def _to(name: str, source: str, dtype: torch.dtype) -> Node:
    return Node(name, _TO, (Ref(source),), {"dtype": dtype})


def _cast_calls(
    node: Node, inputs: dict[str, str], types: dict[str, torch.dtype], dtype: torch.dtype
) -> Iterable[Node]:
    """Return the call in another precision, followed by a cast where it makes floats from integers alone."""
    call = _cast(node, inputs, dtype)
    from_integers = not any(types.get(name, dtype).is_floating_point for name in node.refs())
    if types.get(node.name) in _CAST and from_integers and call == node:
        wide = f"{node.name}.wide"
        return replace(call, name=wide), _to(node.name, wide, dtype)
    return (call,)


def _cast(node: Node, inputs: dict[str, str], dtype: torch.dtype) -> Node:
    """Return the call with inputs by their cast names, and with its constant dtypes in the precision."""

    def convert(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return dtype if value in _CAST else value
        return type(value)(map(convert, value)) if isinstance(value, (list, tuple)) else value

    args, kwargs = (
        convert(map_refs(part, lambda name: Ref(inputs.get(name, name))))
        for part in (node.args, tuple(node.kwargs.values()))
    )
    return Node(node.name, node.op, args, dict(zip(node.kwargs, kwargs, strict=True)))
