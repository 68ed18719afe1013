"""A network and a narrower one of the same node names, with what is left of each value; made by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from redpp_serve.channels.narrowing import Kept
from redpp_serve.graph.graph import Graph
from tests.support.networks import network


def whole(name: str) -> dict[int, Tensor]:
    """Every value has all its channels."""
    return {}


def pair(kind: str, width: int = 8, keep: tuple[int, ...] = (0, 2, 3, 5), seed: int = 0) -> tuple[Graph, Graph, Kept]:
    """The network, the one with only those of the channels behind ``inner``, and their positions by value."""
    graph, where = network(kind, width, seed), torch.tensor(keep)
    rows = [t for t in graph.tensors if t.split(".")[0] in ("inner", "inner_bn", "spatial", "spatial_bn")]
    changed = {name: graph.tensors[name][where] for name in rows}
    for reader in ("second", "left", "right", "aux", "head" if kind == "flatten" else ""):
        if f"{reader}.weight" in graph.tensors:
            weight = graph.tensors[f"{reader}.weight"]
            shape = (len(where) * (weight.shape[1] // width), *weight.shape[2:])
            changed[f"{reader}.weight"] = weight.view(len(weight), width, -1)[:, where].reshape(len(weight), *shape)
    nodes = {n.name: replace(n, args=(*n.args[:6], len(where))) for n in graph.nodes if n.name == "spatial"}
    narrow = graph.with_tensors(changed).with_nodes(nodes)
    axis = {"mlp": 1, "tokens": 2}.get(kind, 1)
    inner = {n.name for n in graph.nodes if n.name.split("_")[0] in ("inner", "spatial")} - {"inner_bn_relu_mean"}
    return narrow, graph, lambda name: {axis: where} if name in inner | set(rows) else {}
