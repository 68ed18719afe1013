"""The precision that a network runs in: torch's switches for fp32 and tf32, a cast of the graph for fp16 and bf16.

Batch norm in inference is an affine map for each channel; here it is read, and folded when a graph is to run.

Constant folding: what a graph computes from stored tensors alone is stored instead.

Layers take over what follows them: the addition and the activation that alone read a convolution or Linear.

Device-independent: the nodes keep their plain weights and mean plain PyTorch. `candidates` turns them into calls of a
kernel for the device that serves. Original and pruned networks get the same treatment.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import value_shapes, value_types
from redpp_serve.graph.graph import Graph, Node, Ref, conv2d_geometry, map_refs
from redpp_serve.graph.operators import FUSED_CONV2D, FUSED_LINEAR, resolve

BATCH_NORM = "aten.batch_norm.default"
CONV, LINEAR = "aten.conv2d.default", "aten.linear.default"


def is_inference_norm(node: Node) -> bool:
    """Whether a node is a batch norm that normalises by stored statistics, not by those of the batch."""
    return node.op == BATCH_NORM and node.args[3] is not None and node.args[5] is False


def scale_and_shift(graph: Graph, norm: Node) -> tuple[Tensor, Tensor]:
    """The float64 (channels,) scale and shift that an inference batch norm applies to its input."""
    weight, bias, mean, variance = (graph.tensors[ref.name].double() if ref else None for ref in norm.args[1:5])
    assert mean is not None and variance is not None  # `is_inference_norm`
    scale = torch.rsqrt(variance + norm.args[7])
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def fold_batch_norm(graph: Graph) -> Graph:
    """The same function with each batch norm that alone reads a convolution or Linear folded into it.

    Done when a graph is loaded to run, never before hashing or merging: folding scales each output channel by
    its own factor, which destroys equality between channels and between a layer's weights.
    """
    tensors, changed, dropped = dict(graph.tensors), {}, set()
    for source, norm in _foldable(graph):
        weight = tensors[source.args[1].name]
        scale, shift = scale_and_shift(graph, norm)
        bias = source.args[2] if len(source.args) > 2 else None
        if bias is not None:
            shift = shift + tensors[bias.name].double() * scale
        folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
        stem = source.args[1].name.removesuffix(".weight")
        if f"{stem}.folded.weight" in tensors:  # two layers share a weight, and each has a norm of its own
            stem = f"{stem}.{source.name}"
        names = f"{stem}.folded.weight", f"{stem}.folded.bias"
        tensors.update(zip(names, (folded.to(weight.dtype), shift.to(weight.dtype))))
        args = (source.args[0], Ref(names[0]), Ref(names[1]), *source.args[3:])
        changed[norm.name] = Node(norm.name, source.op, args, source.kwargs)
        dropped.add(source.name)
    nodes = tuple(changed.get(node.name, node) for node in graph.nodes if node.name not in dropped)
    return replace(graph, tensors=tensors, nodes=nodes).pruned_of_unused()


def _foldable(graph: Graph) -> list[tuple[Node, Node]]:
    """Each convolution or Linear with the batch norm that alone reads it, where all their parameters are stored."""
    users, producers = graph.users(), {node.name: node for node in graph.nodes}
    pairs = []
    for norm in graph.nodes:
        source = producers.get(norm.args[0].name) if is_inference_norm(norm) else None
        if source is None or source.op not in (CONV, LINEAR):
            continue
        if len(users[source.name]) > 1 or source.name in graph.outputs:
            continue
        parameters = [ref.name for ref in (*source.args[1:3], *norm.args[1:5]) if isinstance(ref, Ref)]
        if all(name in graph.tensors for name in parameters):  # else computed, as by weight standardization
            pairs.append((source, norm))
    # Linear puts its features last, batch norm normalises axis 1: the same axis in matrices alone
    shapes = value_shapes(graph, "cpu") if any(source.op == LINEAR for source, _ in pairs) else {}
    return [(source, norm) for source, norm in pairs if source.op != LINEAR or len(shapes[source.name]) == 2]


@torch.no_grad()
def fold_constants(graph: Graph) -> Graph:
    """The graph with such values stored under the names of the calls that gave them, where they are no larger.

    Standardised or normalised weights and concatenated biases become a layer's own weight and bias, so that the layer
    takes part in everything that works on stored weights.
    """
    tensors, nodes = dict(graph.tensors), []
    for node in graph.nodes:
        refs = set(node.refs())
        if refs and refs <= tensors.keys():
            values = [map_refs(part, tensors.get) for part in (node.args, tuple(node.kwargs.values()))]
            value = resolve(node.op)(*values[0], **dict(zip(node.kwargs, values[1])))
            if isinstance(value, Tensor) and value.numel() <= sum(tensors[name].numel() for name in refs):
                tensors[node.name] = value.contiguous()
                continue
        nodes.append(node)
    return replace(graph, tensors=tensors, nodes=tuple(nodes)).pruned_of_unused()


_CONV, _LINEAR, _ADD = "aten.conv2d.default", "aten.linear.default", "aten.add.Tensor"
_ACTIVATIONS = {
    f"aten.{name}.default": name for name in ("relu", "relu6", "silu", "sigmoid", "hardswish", "hardsigmoid", "gelu")
}
_BATCH = 2  # of the run that finds the shapes: a summand that is one row for all inputs shows


def fuse_epilogues(graph: Graph) -> Graph:
    """The same function with each convolution and Linear that has stored parameters as a node of `layer_ops`.

    Such a node holds its layer, then an unscaled addition of a value of the same shape, then an activation, as far as
    each alone reads the one before. Runs the network once on zeros, on the CPU.
    """
    users, types = graph.users(), value_types(graph, "cpu", _BATCH)
    types |= {i.name: ((_BATCH, *i.shape), getattr(torch, i.dtype)) for i in graph.inputs}
    replaced: dict[str, Node] = {}
    absorbed: set[str] = set()
    for node in graph.nodes:
        if not _is_layer(graph, node) or (node.op == _CONV and len(types[node.name][0]) != 4):
            continue
        last, other, activation = node, None, "none"
        follower = _only_reader(graph, users, last)
        partner = _other_summand(follower, node.name)
        if partner and follower.name not in {*absorbed, *replaced} and types.get(partner) == types[node.name]:
            absorbed.add(last.name)
            last, other = follower, Ref(partner)
            follower = _only_reader(graph, users, last)
        if follower and (name := _activation(follower)):
            absorbed.add(last.name)
            last, activation = follower, name
        x, weight, *rest = node.args
        bias = rest[0] if rest else None
        if node.op == _CONV:
            call = FUSED_CONV2D, (x, other, weight, bias, *conv2d_geometry(node), activation)
        else:
            call = FUSED_LINEAR, (x, other, weight, bias, activation)
        replaced[last.name] = Node(last.name, *call)
    nodes = tuple(replaced.get(n.name, n) for n in graph.nodes if n.name in replaced or n.name not in absorbed)
    return replace(graph, nodes=nodes).pruned_of_unused()


def _is_layer(graph: Graph, node: Node) -> bool:
    """A convolution or Linear whose weight and bias are stored, and its input is not."""
    if node.op not in (_CONV, _LINEAR) or node.kwargs or node.args[0].name in graph.tensors:
        return False
    return all(ref.name in graph.tensors for ref in node.args[1:3] if ref is not None)


def _activation(node: Node) -> str | None:
    """The name by which kernels know an activation."""
    if node.op == "aten.gelu.default" and node.kwargs:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if node.op == "aten.hardtanh.default":
        return "relu6" if node.args[1:] == (0.0, 6.0) else None
    return _ACTIVATIONS.get(node.op)


def _only_reader(graph: Graph, users: dict[str, list[Node]], node: Node) -> Node | None:
    readers = users.get(node.name, [])
    return readers[0] if len(readers) == 1 and node.name not in graph.outputs else None


def _other_summand(node: Node | None, name: str) -> str | None:
    """What an unscaled add of two values adds to ``name``."""
    if node is None or node.op != _ADD or node.kwargs or not all(isinstance(a, Ref) for a in node.args):
        return None
    return next((a.name for a in node.args if a.name != name), None)


PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_CAST = (torch.float32, torch.float16, torch.bfloat16)
_TO = "aten._to_copy.default"


def check_precision(precision: Any, where: str = "--precision") -> None:
    """Refuses a name that is no precision; ``where`` names the file or flag that says so.

    Raises:
        RedppError: naming those that there are.
    """
    if precision not in PRECISIONS:
        raise RedppError(
            f"precision is {str(precision)[:40]!r} in {where}", f"one of {', '.join(PRECISIONS)}", f"correct {where}"
        )


def precision_dtype(precision: str) -> torch.dtype:
    """The dtype of activations and weights in a precision."""
    return _HALF.get(precision, torch.float32)


def set_switches(precision: str) -> None:
    """Allow or forbid TF32 in matrix products and convolutions on CUDA, for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def in_precision(graph: Graph, precision: str) -> Graph:
    """The graph with all floating-point values between its inputs and outputs in a precision.

    Inputs and outputs keep their dtypes: the first and the last nodes cast them. fp32 and tf32 change nothing, so that
    a network stored in float64 or float16 runs in that. fp16 and bf16 cast tensors and the dtypes among the arguments;
    what a node makes in float32 from integers alone is cast behind it, so that no layer meets two dtypes. Integers
    stay. Runs the network once on zeros, on the CPU.

    Raises:
        RedppError: a network with float64 values in fp16 or bf16.
    """
    if precision not in _HALF:
        return graph
    dtype, types = _HALF[precision], {name: found for name, (_, found) in value_types(graph, "cpu").items()}
    types |= {i.name: getattr(torch, i.dtype) for i in graph.inputs}
    types |= {name: tensor.dtype for name, tensor in graph.tensors.items()}
    if double := [name for name, found in types.items() if found == torch.float64]:
        raise RedppError(
            f"a network with float64 values ({', '.join(double[:3])}) in {precision}",
            "a network that computes in float32, which 16 bits can stand in for",
            "serve it with precision fp32",
        )
    tensors = {name: t.to(dtype) if t.dtype in _CAST else t for name, t in graph.tensors.items()}
    inputs = {i.name: f"{i.name}.{precision}" for i in graph.inputs if types[i.name] in _CAST}
    nodes = [Node(cast, _TO, (Ref(name),), {"dtype": dtype}) for name, cast in inputs.items()]
    for node in graph.nodes:
        call = _cast(node, inputs, dtype)
        from_integers = not any(types.get(name, dtype).is_floating_point for name in node.refs())
        if types.get(node.name) in _CAST and from_integers and call == node:
            nodes.append(replace(call, name=f"{node.name}.wide"))
            call = Node(node.name, _TO, (Ref(f"{node.name}.wide"),), {"dtype": dtype})
        nodes.append(call)
    outputs = {
        name: f"{name}.{str(types[name]).removeprefix('torch.')}" for name in graph.outputs if types[name] in _CAST
    }
    nodes += [Node(cast, _TO, (Ref(name),), {"dtype": types[name]}) for name, cast in outputs.items()]
    named = tuple(outputs.get(name, name) for name in graph.outputs)
    return replace(graph, tensors=tensors, nodes=tuple(nodes), outputs=named)


def _cast(node: Node, inputs: dict[str, str], dtype: torch.dtype) -> Node:
    """The call with inputs by their cast names, and with its constant dtypes in the precision."""

    def convert(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return dtype if value in _CAST else value
        return type(value)(map(convert, value)) if isinstance(value, (list, tuple)) else value

    args, kwargs = (
        map_refs(part, lambda name: Ref(inputs.get(name, name))) for part in (node.args, tuple(node.kwargs.values()))
    )
    return Node(node.name, node.op, convert(args), dict(zip(node.kwargs, convert(kwargs))))
