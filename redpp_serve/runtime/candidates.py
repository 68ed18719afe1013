"""The kernels that can run a layer on a device, and the rules that say which of them are worth timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from redpp_serve.graph.graph import Graph, Node
from redpp_serve.graph.weights import repeats
from redpp_serve.kernels.codebook_linear.heuristics import best_decode
from redpp_serve.runtime import fused_layer as forms
from redpp_serve.runtime.fused_layer import Form, FusedLayer, available, fused_layer, onednn_conv2d, onednn_linear

# Limits of the rules; the timings behind them are in the project's benchmarks.
CODEBOOK_BYTES = 8 << 20  # a smaller weight stays in a cache, and reading less of it gains nothing
CODEBOOK_ROWS = 32  # with more, the products take longer than reading the weight
CODEBOOK_ROWS_FEW_VALUES = 64  # the same for at most 8 values and at least 8192 outputs: their decoding is cheaper
SPLIT_SHARE = 0.1  # of the dense layer's operations: gathering and adding costs about ten times as much each
ONEDNN_CALL_PRODUCTS = 1 << 23  # above, the 25 us that oneDNN's fused convolution takes to start do not show
ONEDNN_LINEAR_PRODUCTS = 1 << 20  # below, the call itself takes longer than the library's


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer.

    Attributes:
        kernel: the kernel's name.
        worth_timing: whether the rules expect that it may be faster than the others.
        reason: the reason of that, in words.
        make: returns a node of the layer's name and, by name, the tensors that it reads beside its input and its
            summand, in this kernel's form, on the device; the node and the names are the same for each batch size. It,
            or the node, may raise where the device lacks the kernel.
    """

    kernel: str
    worth_timing: bool
    reason: str
    make: Callable[[], Form]


def candidates(
    graph: Graph, node: Node, x_shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> list[Candidate]:
    """Return the kernels that can run a layer; ``dense``, to which the others are compared, comes first.

    Args:
        graph: the network: fused, in the precision that it runs in, on the device.
        node: the node of one of its fused layers.
        x_shape: the shape of the layer's input, with the batch.
        device: where the layer runs.
        dtype: the dtype of the precision; a layer in another has the dense kernel alone.
    """
    layer = fused_layer(graph, node)
    found = [_dense(layer, x_shape, device)]
    if layer.values.dtype == dtype:
        if device.type == "cpu":
            found += _on_cpu(layer, x_shape)
        elif device.type == "cuda":
            found += _on_cuda(layer)
        found += _from_repeats(layer, x_shape, device)
    return found


def signature(graph: Graph, node: Node, x_shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Name everything that a layer's times depend on, apart from the device; equal layers have equal names."""
    layer = fused_layer(graph, node)
    found = repeats(layer.values, layer.groups)
    parts = {
        "op": node.op,
        "x": "x".join(map(str, x_shape)),
        "weight": "x".join(map(str, layer.values.shape)),
        "dtype": str(layer.values.dtype).removeprefix("torch."),
        "bias": int(layer.bias is not None),
        "sum": int(layer.other is not None),
        "activation": layer.activation,
        "values": "many" if found.values is None else len(found.values),
        "split": "none" if found.split_share is None else f"{found.split_share:.0e}",
    }
    if layer.is_conv:
        parts["window"] = "/".join("x".join(map(str, pair)) for pair in layer.geometry)
        parts["groups"] = layer.groups
    return " ".join(f"{key}={value}" for key, value in parts.items())


def with_kernels(graph: Graph, choice: Mapping[str, Candidate]) -> Graph:
    """Run each layer named in ``choice`` by that candidate; drop the weights that no node reads any more."""
    made = {name: candidate.make() for name, candidate in choice.items()}
    tensors = {name: tensor for _, stored in made.values() for name, tensor in stored.items()}
    changed = graph.with_nodes({name: node for name, (node, _) in made.items()})
    return replace(changed, tensors={**graph.tensors, **tensors}).pruned_of_unused()


def _dense(layer: FusedLayer, x_shape: tuple[int, ...], device: torch.device) -> Candidate:
    if device.type != "cpu" or not layer.is_conv or not available(layer.values.dtype):
        return Candidate("dense", True, "the library's call, then the epilogue", lambda: forms.plain(layer))
    # laid out for one image whatever the batch: each bucket would else hold a form of its own
    return Candidate("dense", True, "oneDNN with packed weights", lambda: onednn_conv2d(layer, (1, *x_shape[1:])))


def _on_cpu(layer: FusedLayer, x_shape: tuple[int, ...]) -> Iterator[Candidate]:
    if not available(layer.values.dtype):
        return
    products = layer.rows(x_shape) * layer.values.numel()
    if layer.is_conv:
        worth = products <= ONEDNN_CALL_PRODUCTS
        yield Candidate(
            "library", worth, f"torch's own call starts sooner, {products} products", lambda: forms.plain(layer)
        )
    else:
        worth = products >= ONEDNN_LINEAR_PRODUCTS
        yield Candidate("onednn", worth, f"packed weights, {products} products", lambda: onednn_linear(layer))


def _on_cuda(layer: FusedLayer) -> Iterator[Candidate]:
    if layer.is_conv and layer.activation == "relu":
        yield Candidate("cudnn", True, "cuDNN takes bias, sum and ReLU along", lambda: forms.cudnn(layer))
    if layer.is_depthwise and layer.other is None:
        yield Candidate("depthwise", True, "bound by memory: one pass", lambda: forms.depthwise(layer))
    if layer.groups == 1:
        epilogue = layer.bias is not None or layer.other is not None or layer.activation != "none"
        reason = "one kernel with its epilogue" if epilogue else "no epilogue to take along"
        yield Candidate("fused", epilogue, reason, lambda: forms.fused(layer))


def _from_repeats(layer: FusedLayer, x_shape: tuple[int, ...], device: torch.device) -> Iterator[Candidate]:
    found = repeats(layer.values, layer.groups)
    if not layer.is_conv and found.values is not None:
        worth, reason = _codebook_rule(layer, len(found.values), layer.rows(x_shape))
        for decode in _decodes(layer, len(found.values), device):
            yield Candidate(f"codebook:{decode}", worth, reason, partial(forms.codebook, layer, decode))
    if found.split_share is not None:
        worth = device.type == "cpu" and layer.values[0, 0].numel() > 1 and found.split_share <= SPLIT_SHARE
        reason = f"{found.split_share:.1%} of the dense operations (worth it on a CPU, for k x k, to {SPLIT_SHARE:.0%})"
        yield Candidate("split", worth, reason, lambda: forms.split(layer))


def _codebook_rule(layer: FusedLayer, values: int, rows: int) -> tuple[bool, str]:
    size = layer.values.numel() * layer.values.element_size()
    most = CODEBOOK_ROWS_FEW_VALUES if values <= 8 and layer.values.shape[0] >= 8192 else CODEBOOK_ROWS
    limits = f"worth it from {CODEBOOK_BYTES >> 20} MiB, to {most} rows"
    reason = f"{values} values, {size / 2**20:.1f} MiB, {rows} rows ({limits})"
    return size >= CODEBOOK_BYTES and rows <= most, reason


def _decodes(layer: FusedLayer, values: int, device: torch.device) -> list[str]:
    """Return the strategies of decoding to choose from for a weight."""
    if device.type != "cuda":
        return ["auto"]
    best = best_decode(values, layer.values.element_size())
    return [best, "pair", "pointer"] if best != "pointer" else [best]
