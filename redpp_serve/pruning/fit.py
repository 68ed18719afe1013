"""Reconstructive merging: fewer channels, and readers whose weights are fitted to make up for the ones that left.

Exact merging is the special case in which a channel equals another. Here a channel may be any linear combination
of the kept ones. All sets are narrowed at once, with a quick fit of their readers; then every reader, in order of
execution, gets the ridge least-squares weights that map the *pruned* network's input of the layer to the *original*
network's output. Where a layer adds to a residual stream, its target makes up for the error the stream already has,
so that errors do not pile up. The activations come from synthetic inputs, so no data is needed.

Readers of narrowed channels made up for at once, from moments that were gathered before; and where constants go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.channels.coupling import Coupling, Reader
from redpp_serve.channels.narrowing import Kept
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph, Node, Ref
from redpp_serve.graph.layers import Layer, find_layers
from redpp_serve.graph.passes import is_inference_norm, scale_and_shift
from redpp_serve.pruning.least_squares import Sums, solve
from redpp_serve.pruning.observation import Observed, output_axis, samples, spread
from redpp_serve.pruning.piecewise import Piecewise, chunk_size

_RIDGE = 1e-6  # of channels scaled to unit variance


def quick_fit(observed: Observed, kept: Mapping[str, Tensor]) -> Graph:
    """The network with only those channels of those sets, its readers making up for the ones that left.

    Each channel that left is replaced by the linear combination of kept ones that predicts it best; means are
    preserved. The fit is to the activations of the whole network, so errors of several sets add up.
    """
    graph = observed.coupling.graph
    weights: dict[str, Tensor] = {}
    nodes = {}
    for channel_set in observed.coupling.open:
        if channel_set.name not in kept or len(kept[channel_set.name]) == channel_set.channels:
            continue
        for reader in channel_set.readers:
            mix = mix_of(observed.grams[channel_set.name, reader.value], kept[channel_set.name])
            old = weights.get(reader.tensor, graph.tensors[reader.tensor].double())
            weights[reader.tensor] = _mixed(old, reader, kept[channel_set.name], mix)
            nodes[reader.node] = reader
    narrow, places = observed.coupling.narrow(kept), observed.coupling.kept(kept)
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


_MAX_UNKNOWNS = 6000  # for one output; beyond, the quick fit stays and each output gets a scale and a constant
_SAMPLES = 128  # output positions of an input, unless a layer has many unknowns
_LEAST_SCALE = 1e-3  # of the largest: a batch norm's scale below it hides its channel, whose target stays as it is


@dataclass(frozen=True)
class Reconstruction:
    """What merging did to one channel set of channels; ``error`` is the relative RMS error of its readers' outputs."""

    layer: str
    channels: int
    kept: int
    error: float


@dataclass(frozen=True)
class Epilogue:
    """What follows a layer: the batch norm that alone reads it, if any, and the value that is added to the result."""

    norm: str | None
    other: str | None


def reconstruct(
    coupling: Coupling,
    original: Graph,
    kept: Mapping[str, Tensor],
    start: Graph,
    inputs: Sequence[Tensor],
    *,
    rows: Kept = lambda name: {},
    compensate: bool = True,
    every_layer: bool = True,
    frozen: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Graph, list[Reconstruction]]:
    """Fit the readers of narrowed channels, in order of execution.

    Args:
        coupling: the network before narrowing (possibly already hashed and merged) and its sets.
        original: the network whose outputs are the target; same node names.
        kept: for each channel set the channels that stay, (k,) int64 ascending.
        start: the network narrowed to them, `quick_fit`.
        inputs: (images, ...) for each network input, on the device to compute on.
        rows: by value, which of the original's entries ``coupling.graph`` still has, where exact merging took some.
        compensate: make up for the residual stream's error where a layer adds to it.
        every_layer: also fit layers that only read values with errors.
        frozen: weights that stay as they are.

    Returns:
        the fitted network, and for each narrowed channel set what was done.
    """
    narrowed = [
        channel_set
        for channel_set in coupling.open
        if len(kept.get(channel_set.name, ())) not in (0, channel_set.channels)
    ]
    readers = {reader.node for channel_set in narrowed for reader in channel_set.readers}
    layers = [x for x in find_layers(start) if x.groups == 1]
    first = next((k for k, x in enumerate(layers) if x.node.name in readers), len(layers))
    todo = [x for k, x in enumerate(layers) if x.node.name in readers or (every_layer and k > first)]
    todo = [x for x in todo if x.weight not in frozen]
    places = coupling.kept(kept)

    def cut(name: str, value: Tensor) -> Tensor:
        """What the narrowed network still has of a value of the original."""
        for chosen in (rows(name), places(name)):
            for axis, index in chosen.items():
                value = value.index_select(axis, index.to(value.device))
        return value

    chunk = chunk_size(original, len(inputs[0]))
    mine, theirs = Piecewise(start, inputs, chunk), Piecewise(original, inputs, chunk)
    place = {node.name: k for k, node in enumerate(start.nodes)}
    shapes = value_shapes(start)
    graph, errors = start, {}
    for done, layer in enumerate(todo):
        name, known = layer.node.name, {x for x, k in place.items() if k < place[layer.node.name]}
        mine.use(graph)
        mine.advance(place[name])
        theirs.advance(place[name])
        follows = epilogue(graph, layer.node, known, shapes, compensate)
        kept_rows = [next(iter(chosen.values())) for chosen in (rows(name), places(name)) if chosen]
        goal = _Goal(graph, original, layer, follows, kept_rows, cut)
        fit = _fit if graph.tensors[layer.weight][0].numel() <= _MAX_UNKNOWNS else _rescale
        graph, errors[name] = fit(graph, layer, goal, mine, theirs)
        progress(done + 1, len(todo))
    records = []
    for channel_set in narrowed:
        error = max((errors.get(reader.node, 0.0) for reader in channel_set.readers), default=0.0)
        records.append(Reconstruction(channel_set.name, channel_set.channels, len(kept[channel_set.name]), error))
    return graph, records


def epilogue(
    graph: Graph, node: Node, known: set[str], shapes: Mapping[str, tuple[int, ...]], compensate: bool = True
) -> Epilogue:
    """The batch norm that alone reads a layer, and the value, an input or ``known``, that its result is added to."""
    users, norm, value = graph.users(), None, node.name
    known = known | {spec.name for spec in graph.inputs}
    while value not in graph.outputs and len(users.get(value, [])) == 1:
        (user,) = users[value]
        stored = is_inference_norm(user) and all(ref.name in graph.tensors for ref in user.args[1:5] if ref)
        if stored and user.args[0] == Ref(value) and norm is None and ".conv" in node.op:
            norm = user.name
        elif user.op == "aten.add.Tensor" and compensate and len(user.args) == 2 and not user.kwargs:
            other = next((arg for arg in user.args if arg != Ref(value)), None)
            fits = isinstance(other, Ref) and other.name in known and shapes.get(other.name) == shapes[node.name]
            return Epilogue(norm, other.name if fits else None)
        elif user.op != "aten.clone.default":
            break
        value = user.name
    return Epilogue(norm, None)


class _Goal:
    """What a layer of the narrowed network should give, so that what follows it matches the original network."""

    def __init__(
        self,
        graph: Graph,
        original: Graph,
        layer: Layer,
        follows: Epilogue,
        kept_rows: Sequence[Tensor],
        cut: Callable[[str, Tensor], Tensor],
    ) -> None:
        self.layer, self.follows, self.cut = layer, follows, cut
        self.gain = torch.ones(layer.shape[0], dtype=torch.float64)
        self.shift, self.stream = torch.zeros_like(self.gain), torch.ones_like(self.gain)
        if follows.norm:
            was, shift_was = scale_and_shift(original, original.node(follows.norm))
            for index in kept_rows:
                was, shift_was = was[index], shift_was[index]
            now, shift_now = scale_and_shift(graph, graph.node(follows.norm))
            seen = now.abs() > _LEAST_SCALE * now.abs().max()
            self.stream = torch.where(seen, 1 / now, 0.0)
            self.gain = torch.where(seen, was * self.stream, 1.0)
            self.shift = (shift_was - shift_now) * self.stream

    def rows(self, mine: Piecewise, theirs: Piecewise, most: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunk by chunk: the layer's input, which output positions to fit to (at most about ``most`` an image), and
        the desired output there, (samples, n_out).
        """
        name, others = self.layer.node.name, [self.follows.other] if self.follows.other else []
        sides = mine.values([self.layer.node.args[0].name, *others]), theirs.values([name, *others])
        axis = 1 if self.layer.is_conv else -1
        gain, shift, stream = (x.to(mine.device) for x in (self.gain, self.shift, self.stream))
        for (x, *now), (y, *was) in zip(*sides, strict=True):
            picks = spread(y, axis, most)
            goal = samples(self.cut(name, y), axis, picks).double() * gain + shift
            for other, value, target in zip(others, now, was):
                gap = samples(self.cut(other, target), axis, picks).double() - samples(value, axis, picks)
                goal += stream * gap
            yield x, picks, goal


def _fit(graph: Graph, layer: Layer, goal: _Goal, mine: Piecewise, theirs: Piecewise) -> tuple[Graph, float]:
    """The graph with that layer's weight and constant fitted, and what is left as a relative RMS error."""
    weight = graph.tensors[layer.weight]
    unknowns = weight[0].numel()
    parts: list[Sums] = []
    for k, (x, picks, y) in enumerate(goal.rows(mine, theirs, max(_SAMPLES, unknowns // 6))):
        sums = Sums.of(_features(x, layer, picks), y)
        if k < 2:
            parts.append(sums)
        else:
            parts[k % 2].add(sums)
    start = weight.double().flatten(1).T.to(mine.device)
    new, constant, lost = solve(parts, start)
    graph = graph.with_tensors({layer.weight: new.T.reshape(weight.shape).to(weight)})
    return _with_constant(graph, layer, constant), math.sqrt(lost)


def _rescale(graph: Graph, layer: Layer, goal: _Goal, mine: Piecewise, theirs: Piecewise) -> tuple[Graph, float]:
    """The same for a layer with too many unknowns: each output of the quick fit gets a scale and a constant."""
    weight = graph.tensors[layer.weight]
    call = replace(graph, nodes=(layer.node,), inputs=(replace(graph.inputs[0], name=layer.node.args[0].name),))
    program = Program(call, [layer.node.name]).to(mine.device)
    bias = graph.tensors[layer.bias].double().to(mine.device) if layer.bias else 0.0
    sums, count = torch.zeros(5, layer.shape[0], dtype=torch.float64, device=mine.device), 0
    for x, picks, y in goal.rows(mine, theirs, _SAMPLES):
        with torch.no_grad():
            u = samples(program(x)[0], 1 if layer.is_conv else -1, picks).double() - bias
        sums += torch.stack([u.sum(0), y.sum(0), (u * u).sum(0), (u * y).sum(0), (y * y).sum(0)])
        count += len(u)
    u, y, uu, uy, yy = sums / count
    uu, uy, yy = (uu - u * u).clamp_min(0), uy - u * y, (yy - y * y).clamp_min(0)
    scale = torch.where(uu > 1e-12 * yy, uy / uu.clamp_min(1e-300), 1.0)
    lost = (yy - 2 * scale * uy + scale * scale * uu).clamp_min(0)
    column = scale.view(-1, *[1] * (weight.dim() - 1)).cpu()
    graph = graph.with_tensors({layer.weight: (weight.double() * column.to(weight.device)).to(weight)})
    return _with_constant(graph, layer, y - scale * u), math.sqrt(float(lost.sum()) / max(float(yy.sum()), 1e-300))


def _with_constant(graph: Graph, layer: Layer, constant: Tensor) -> Graph:
    """The layer gives ``constant`` (n_out,) beside its weight's share."""
    bias = graph.tensors[layer.bias].double().cpu() if layer.bias else 0.0
    return add_constant(graph, layer.node.name, constant.cpu() - bias)


def _features(value: Tensor, layer: Layer, picks: Tensor) -> Tensor:
    """The layer's input at those output positions as rows (samples, channels * taps)."""
    if not layer.is_conv:
        return samples(value, -1, picks)
    return samples(F.unfold(value, layer.shape[2:], layer.dilation, layer.padding, layer.stride), 1, picks)
