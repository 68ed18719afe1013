"""RED++'s own stages as rows: what hashing, exact merging and splitting do to operations, bytes and accuracy."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import find_layers
from redpp_serve.graph.weights import encode
from redpp_serve.options import Options
from redpp_serve.pruning.accounting import count_dense
from redpp_serve.pruning.hashing import hash_weight
from redpp_serve.pruning.pipeline import prune

from .subject import Subject

STAGES = ("original", "hash", "hash + exact merge", "hash + exact merge + split")


def stage_rows(subject: Subject) -> list[dict[str, Any]]:
    """One row a stage: multiplications and additions of all layers for one input, bytes of their weights, accuracy.

    A hashed weight is stored as its codebook and packed indices, a split one as unique kernels and indices.
    """
    options = Options(method="red++")
    layers = find_layers(subject.graph)
    hashed = {
        layer.weight: hash_weight(subject.graph.tensors[layer.weight], options.hash, options.hash_target).weight
        for layer in layers
    }
    hash_only = subject.graph.with_tensors(hashed)
    pruned = prune(subject.graph, options)
    rows = [
        _dense_row(name, graph, subject)
        for name, graph in zip(STAGES[:3], (subject.graph, hash_only, pruned.pruned), strict=True)
    ]
    split = asdict(pruned.counting.kernel)
    # splitting is exact, and the pipeline checks that it is
    rows.append({"stage": STAGES[3], **split, "accuracy": rows[2]["accuracy"]})
    return rows


def _dense_row(name: str, graph: Graph, subject: Subject) -> dict[str, Any]:
    layers = find_layers(graph)
    counts = [count_dense(layer) for layer in layers]
    return {
        "stage": name,
        "multiplications": sum(c.multiplications for c in counts),
        "additions": sum(c.additions for c in counts),
        "bytes": sum(_stored_bytes(graph, layer.weight) for layer in layers),
        "accuracy": subject.accuracy(graph),
    }


def _stored_bytes(graph: Graph, weight: str) -> int:
    tensor = graph.tensors[weight]
    packed = encode(tensor)
    if packed is None:
        return tensor.numel() * tensor.element_size()
    return packed.codebook.numel() * packed.codebook.element_size() + packed.indices.numel()
