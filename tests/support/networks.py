"""Random small networks as graphs, built without torch.export, and what the tests of pruning do with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from redpp_serve.channels.coupling import ChannelSet, couple
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.pruning.matching import smooth_noise

torch.set_num_threads(1)  # networks this small wait for threads longer than they compute

KINDS = ("chain", "residual", "depthwise", "flatten", "mlp", "tokens", "branches", "bare")
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
many = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)


class Builder:
    """Adds one operator at a time; each method returns the new value's name. Weights are random, scaled to keep
    activations near 1."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs = [InputSpec("x", shape)]
        self.tensors: dict[str, Tensor] = {}
        self.nodes: list[Node] = []

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def tensor(self, name: str, value: Tensor) -> Ref:
        self.tensors[name] = value
        return Ref(name)

    def op(self, name: str, op: str, *args: object) -> str:
        self.nodes.append(Node(name, f"aten.{op}", args))
        return name

    def conv(
        self, x: str, name: str, n_in: int, n_out: int, k: int = 3, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> str:
        per_group = n_in // groups
        weight = self.tensor(f"{name}.weight", self.random(n_out, per_group, k, k) * (2 / (per_group * k * k)) ** 0.5)
        add = self.tensor(f"{name}.bias", 0.1 * self.random(n_out)) if bias else None
        return self.op(name, "conv2d.default", Ref(x), weight, add, [stride] * 2, [k // 2] * 2, [1, 1], groups)

    def linear(self, x: str, name: str, n_in: int, n_out: int, bias: bool = True) -> str:
        weight = self.tensor(f"{name}.weight", self.random(n_out, n_in) * (2 / n_in) ** 0.5)
        return self.op(
            name,
            "linear.default",
            Ref(x),
            weight,
            *([self.tensor(f"{name}.bias", 0.1 * self.random(n_out))] if bias else []),
        )

    def norm(self, x: str, name: str, n: int) -> str:
        spread = lambda: 0.5 + torch.rand(n, generator=self.generator)  # noqa: E731
        values = {
            "weight": spread(),
            "bias": 0.2 * self.random(n),
            "running_mean": 0.2 * self.random(n),
            "running_var": spread(),
        }
        refs = [self.tensor(f"{name}.{key}", value) for key, value in values.items()]
        return self.op(name, "batch_norm.default", Ref(x), *refs, False, 0.1, 1e-5, True)

    def relu(self, x: str) -> str:
        return self.op(f"{x}_relu", "relu.default", Ref(x))

    def mean(self, x: str) -> str:
        return self.op(f"{x}_mean", "mean.dim", Ref(x), [2, 3])

    def flatten(self, x: str) -> str:
        return self.op(f"{x}_flat", "flatten.using_ints", Ref(x), 1)

    def add(self, a: str, b: str) -> str:
        return self.op(f"{a}_{b}", "add.Tensor", Ref(a), Ref(b))

    def graph(self, *outputs: str) -> Graph:
        return Graph(tuple(self.inputs), dict(self.tensors), tuple(self.nodes), outputs)


def network(kind: str, width: int = 8, seed: int = 0) -> Graph:
    """A network of one kind. Each has the open channel set ``inner`` (and more, for some)."""
    if kind in ("mlp", "tokens"):
        b = Builder(*([5] if kind == "mlp" else [6, 5]), seed=seed)
        hidden = b.relu(b.linear("x", "inner", 5, width))
        return b.graph(b.linear(b.relu(b.linear(hidden, "second", width, width + 1)), "head", width + 1, 3, bias=False))
    b = Builder(3, 6, 5, seed=seed)
    stem = b.conv("x", "stem", 3, 4, bias=False)
    stem = b.relu(stem if kind == "bare" else b.norm(stem, "stem_bn", 4))
    if kind == "bare":  # neither batch norm nor bias
        hidden = b.relu(b.conv(stem, "inner", 4, width, bias=False))
        second = b.relu(b.conv(hidden, "second", width, width, bias=False))
        return b.graph(b.conv(second, "head", width, 3, 1, bias=False))
    hidden = b.relu(b.norm(b.conv(stem, "inner", 4, width, bias=False), "inner_bn", width))
    if kind == "depthwise":
        hidden = b.relu(b.norm(b.conv(hidden, "spatial", width, width, groups=width), "spatial_bn", width))
    if kind == "flatten":
        pooled = b.op("pool", "max_pool2d.default", Ref(hidden), [2, 2])
        return b.graph(b.linear(b.flatten(pooled), "head", width * 6, 3))
    if kind == "branches":
        left = b.conv(hidden, "left", width, 4, bias=False)
        right = b.norm(b.conv(hidden, "right", width, 4, 1, bias=False), "right_bn", 4)
        return b.graph(b.linear(b.mean(b.add(left, right)), "head", 4, 3), b.linear(b.mean(hidden), "aux", width, 2))
    out = b.norm(b.conv(hidden, "second", width, 4, bias=kind == "chain"), "second_bn", 4)
    out = b.relu(b.add(stem, out) if kind in ("residual", "depthwise") else out)
    return b.graph(b.linear(b.mean(out), "head", 4, 3))


@st.composite
def networks(draw: st.DrawFn, kinds: Sequence[str] = KINDS) -> Graph:
    """Any of the kinds, any width, any weights; half of them quantised to few values, so that kernels repeat."""
    graph = network(draw(st.sampled_from(kinds)), draw(st.integers(2, 20)), draw(seeds))
    return quantised(graph) if draw(st.booleans()) else graph


def quantised(graph: Graph, step: float = 0.25) -> Graph:
    """Weights of convolutions and Linear on a coarse grid."""
    return graph.with_tensors({name: (t / step).round() * step for name, t in graph.tensors.items() if t.dim() > 1})


def inner_of(graph: Graph, name: str = "inner") -> ChannelSet:
    """The open channel set of that name: the channels that the layer produces, alone or first."""
    return next(channel_set for channel_set in couple(graph).open if channel_set.name == name)


def widths_of(graph: Graph) -> dict[str, int]:
    """The number of channels of each open channel set."""
    return {channel_set.name: channel_set.channels for channel_set in couple(graph).open}


def plant(graph: Graph, copies: dict[int, int], name: str = "inner") -> Graph:
    """Make channel ``a`` a copy of channel ``b`` for each item (a, b), in every part of the class."""
    changed = dict(graph.tensors)
    for part in inner_of(graph, name).parts:
        order = torch.arange(changed[part.tensor].shape[part.dim])
        for a, b in copies.items():
            order[part.positions[a]] = part.positions[b]
        changed[part.tensor] = changed[part.tensor].index_select(part.dim, order)
    return graph.with_tensors(changed)


def permuted(graph: Graph, order: Tensor, name: str = "inner") -> Graph:
    """The same function with the channels of a class in another order."""
    channel_set, changed = inner_of(graph, name), dict(graph.tensors)
    for place in (*channel_set.parts, *channel_set.readers):
        index = torch.arange(changed[place.tensor].shape[place.dim])
        index[place.positions.flatten()] = place.positions[order].flatten()
        changed[place.tensor] = changed[place.tensor].index_select(place.dim, index)
    return graph.with_tensors(changed)


def example(graph: Graph, count: int = 3, seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, *i.shape, dtype=torch.float64, generator=generator) for i in graph.inputs)


@torch.no_grad()
def outputs(graph: Graph, count: int = 3) -> tuple[Tensor, ...]:
    """What the graph gives in float64 for fixed random inputs."""
    return Program(graph.to(torch.float64))(*example(graph, count))


def difference(a: Graph, b: Graph) -> float:
    """Relative difference of two graphs' outputs in float64."""
    pairs = list(zip(outputs(a), outputs(b), strict=True))
    lost, norm = (
        sum(float(t.square().sum()) for t in part) for part in ([x - y for x, y in pairs], [x for x, _ in pairs])
    )
    return (lost / max(norm, 1e-300)) ** 0.5


@torch.no_grad()
def calibrated(graph: Graph, inputs: tuple[Tensor, ...]) -> Graph:
    """The graph with the statistics of each batch norm set to those of these inputs, as training leaves them."""
    for norm in [node for node in graph.nodes if node.op == "aten.batch_norm.default"]:
        (value,) = Program(graph, [norm.args[0].name])(*inputs)
        variance, mean = torch.var_mean(value, dim=[d for d in range(value.dim()) if d != 1], correction=0)
        graph = graph.with_tensors({norm.args[3].name: mean, norm.args[4].name: variance})
    return graph


def natural(graph: Graph, count: int, seed: int = 77) -> tuple[Tensor, ...]:
    """The inputs that `trained` networks are for: (count, ...) for each."""
    return tuple(2 * x + 0.5 for x in smooth_noise(graph.inputs, count, seed))


def trained(kind: str = "residual", width: int = 16, seed: int = 0) -> Graph:
    """A network whose batch norms hold the statistics of `natural` inputs."""
    graph = network(kind, width, seed)
    return calibrated(graph, natural(graph, 64))
