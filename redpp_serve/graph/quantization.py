"""Eight bits for weights and activations: ranges found once, and the pass that puts them into a graph.

Weights take 255 levels for each output channel, symmetric about zero; what a layer reads takes 256 levels between the
least and the largest value that the calibration inputs gave it (zero included). Both are what the engines' int8
kernels compute, so the pass says in plain PyTorch what they give; `engines` translates its two operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, Node, Ref
from redpp_serve.graph.operators import FUSED_CONV2D, FUSED_LINEAR, INT8_VALUES, INT8_WEIGHT, LEVELS

WEIGHT_LIMIT = 127
_NOISE, _OFF_GRID = 1e-5, 1e-3  # of float32: between equal values, of the largest; beside a level, in steps
_MOST_PARTS = 8  # steps between the two nearest values in use
Ranges = Mapping[str, tuple[float, float]]  # by the name of a value


def quantizable(graph: Graph) -> list[Node]:
    """Return the layers of a fused graph that can run in eight bits: those with stored float32 weights."""
    return [
        node
        for node in graph.nodes
        if node.op in (FUSED_CONV2D, FUSED_LINEAR) and graph.tensors[node.args[2].name].dtype == torch.float32
    ]


@torch.no_grad()
def find_ranges(graph: Graph, inputs: Sequence[Tensor], chunk: int = 8) -> dict[str, tuple[float, float]]:
    """Return the least and the largest value of everything that a layer of a fused graph reads or gives.

    Args:
        graph: the result of `passes.fuse_epilogues`.
        inputs: calibration inputs, (images, ...) for each network input.
        chunk: number of inputs that run at once.
    """
    layers = quantizable(graph)
    names = list(dict.fromkeys(name for node in layers for name in (node.args[0].name, node.name)))
    program = Program(graph, names)
    found: dict[str, tuple[float, float]] = {}
    for part in zip(*(torch.split(x, chunk) for x in inputs), strict=True):
        for name, value in zip(names, program(*part), strict=True):
            low, high = found.get(name, (0.0, 0.0))
            found[name] = min(low, float(value.min())), max(high, float(value.max()))
    return found


def in_int8(graph: Graph, ranges: Ranges) -> Graph:
    """Quantize the layers of a fused graph whose input has a range; the others stay as they are."""
    tensors, nodes, done = dict(graph.tensors), list[Node](), dict[str, str]()
    chosen = {node.name for node in quantizable(graph) if node.args[0].name in ranges}
    for node in graph.nodes:
        if node.name not in chosen:
            nodes.append(node)
            continue
        x, weight = node.args[0].name, node.args[2].name
        for name, made in ((x, _values(x, *ranges[x])), (weight, _weight(weight, tensors))):
            if name not in done:
                done[name] = made.name
                nodes.append(made)
        nodes.append(node.with_arguments({0: Ref(done[x]), 2: Ref(done[weight])}))
    return replace(graph, tensors=tensors, nodes=tuple(nodes)).pruned_of_unused()


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (n_out, ...) to -127..127 times a scale for each output channel.

    Where the values of a channel are such multiples already, as those of a uniform codebook are, they stay.

    Returns:
        The int8 weight and the float32 scales (n_out,).
    """
    flat = weight.flatten(1)
    most = flat.abs().amax(1).clamp_min(WEIGHT_LIMIT * torch.finfo(torch.float32).tiny)
    scale = most / WEIGHT_LIMIT
    if len(flat) and _farthest_level(flat[most.argmax()]):
        least = flat.abs().masked_fill(flat == 0, torch.inf).amin(1)  # of nearly all channels it is one step
        levels = (most / least).round()
        steps = flat * (levels / most)[:, None]
        known = (levels > 0) & (levels <= WEIGHT_LIMIT) & ((steps - steps.round()).abs().amax(1) < _OFF_GRID)
        for row in (~known).nonzero().flatten().tolist():
            levels[row] = _farthest_level(flat[row]) or WEIGHT_LIMIT
        scale = most / levels
    return (flat / scale[:, None]).round_().to(torch.int8).view(weight.shape), scale


def _farthest_level(row: Tensor) -> int:
    """Return how many steps the largest of the values (n,) is, where all are a few steps of one size; else 0.

    The step divides the least difference between two of them, as levels between may be in no use.
    """
    sizes = torch.unique(row.abs())
    most = sizes[-1]
    if len(sizes) > WEIGHT_LIMIT + 1 or not 0 < most < torch.inf:
        return 0
    gaps = torch.diff(sizes, prepend=sizes.new_zeros(1))
    least = gaps[gaps > _NOISE * most].min()
    for parts in range(1, _MOST_PARTS + 1):
        levels = round(float(parts * most / least))
        steps = sizes * (levels / most)
        if 0 < levels <= WEIGHT_LIMIT and float((steps - steps.round()).abs().max()) < _OFF_GRID:
            return levels
    return 0


def scale_and_zero(low: float, high: float) -> tuple[float, int]:
    """Return the step and the level of zero of 256 levels between two values that enclose zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (LEVELS - 1) or 1.0
    return scale, round(-low / scale)


def symmetric(ranges: Ranges) -> dict[str, tuple[float, float]]:
    """Widen ranges so that zero is their middle, for engines whose levels lie about zero."""
    most = {name: max(abs(low), abs(high)) for name, (low, high) in ranges.items()}
    return {name: (-limit, limit) for name, limit in most.items()}


def _values(name: str, low: float, high: float) -> Node:
    return Node(f"{name}.int8", INT8_VALUES, (Ref(name), *scale_and_zero(low, high)))


def _weight(name: str, tensors: dict[str, Tensor]) -> Node:
    rounded, scale = quantize_weight(tensors[name])
    tensors[f"{name}.levels"], tensors[f"{name}.scale"] = rounded, scale
    return Node(f"{name}.int8", INT8_WEIGHT, (Ref(f"{name}.levels"), Ref(f"{name}.scale")))
