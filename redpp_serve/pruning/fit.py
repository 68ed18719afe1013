"""Fit the layers that read narrowed channels, so that they make up for the channels that left.

Exact merging is the special case in which a channel equals another; here a channel may be any linear combination of
the kept ones. The fit has two steps. `quick_fit` narrows all channel sets at once, from second moments that were
gathered before (`observation`). `reconstruct` then visits the layers in order of execution and gives each the ridge
least-squares weights that map its input in the *pruned* network to its output in the *original* one; a weight that
several calls share is fitted to all of them at its first call. Where a layer adds to a residual stream, its target also
makes up for the error that the stream already has, so errors do not pile up. All activations come from synthetic
inputs: no data is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redpp_serve.channels.coupling import ChannelSet, Coupling, Reader
from redpp_serve.channels.narrowing import Kept
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph, Node, Ref
from redpp_serve.graph.layers import Call, Layer, find_layers, is_convolution
from redpp_serve.graph.passes import is_inference_norm, scale_and_shift
from redpp_serve.pruning.constants import add_constant
from redpp_serve.pruning.least_squares import Sums, factor, solve
from redpp_serve.pruning.observation import Observed, images_for, output_axis, position_count, samples, spread
from redpp_serve.pruning.patches import patches
from redpp_serve.pruning.piecewise import Piecewise, chunk_size

_RIDGE = 1e-6  # for channels scaled to unit variance
_SAMPLES = 128  # output positions per input, unless a layer has many unknowns
_LEAST_SCALE = 1e-3  # relative to the largest; a batch norm with a smaller scale hides its channel from the fit


@dataclass(frozen=True)
class Fitting:
    """What stays the same for every width that is tried.

    Attributes:
        original: network whose values are the target; its node names are those of ``coupling.graph``.
        coupling: network before narrowing, possibly already hashed and merged, with its channel sets.
        inputs: (images, ...) for each network input, on the device to compute on.
        check: inputs of other families, which choose the ridges; none by default.
        merged: positions of the original's values that ``coupling.graph`` still has after exact merging.
        frozen: names of weights that must not change.
        most_unknowns: per output of a layer; beyond, the layer keeps its quick fit, and each of its outputs only gets
            a scale and a constant.
    """

    original: Graph
    coupling: Coupling
    inputs: Sequence[Tensor]
    check: Sequence[Tensor] = ()
    merged: Kept = lambda name: {}
    frozen: Collection[str] = ()
    most_unknowns: int = 2400


@dataclass(frozen=True)
class Reconstruction:
    """Result of narrowing one channel set.

    Attributes:
        layer: name of the set.
        channels: number of channels before.
        kept: number of channels after.
        error: largest relative RMS error among the outputs of the set's readers.
    """

    layer: str
    channels: int
    kept: int
    error: float


@dataclass(frozen=True)
class Epilogue:
    """Operators that follow a layer and that its fit takes into account.

    Attributes:
        norm: node of the batch norm that alone reads the layer, if any.
        other: name of the value that is added to the result, if any.
    """

    norm: str | None
    other: str | None


def then(first: Kept, second: Kept) -> Kept:
    """Compose two narrowings: the positions that are left after the second was applied to the result of the first."""

    def kept(name: str) -> dict[int, Tensor]:
        before, after = first(name), second(name)
        both = {axis: before[axis][after[axis]] for axis in before.keys() & after.keys()}
        return {**before, **after, **both}

    return kept


def quick_fit(observed: Observed, kept: Mapping[str, Tensor]) -> Graph:
    """Narrow channel sets to the kept channels, in one step from second moments.

    Each channel that leaves is replaced by the linear combination of kept ones that predicts it best, and the readers'
    means are preserved. The moments are those of the whole network, so the errors of several sets add up.

    Args:
        observed: moments of the network to narrow.
        kept: for each set the channels that stay, (k,) int64 ascending; other sets stay whole.
    """
    graph = observed.coupling.graph
    weights: dict[str, Tensor] = {}
    readers: dict[str, dict[str, Reader]] = {}
    for channel_set in _narrowed_sets(observed.coupling, kept):
        stay = kept[channel_set.name]
        for tensor, sharing in _by_weight(channel_set).items():
            grams = [observed.grams[channel_set.name, reader.value] for reader in sharing]
            mix = mix_of(torch.stack(grams).mean(0) if len(grams) > 1 else grams[0], stay)
            weight = weights.get(tensor, graph.tensors[tensor].double())
            weights[tensor] = _mixed(weight, sharing[0], stay, mix)
            readers.setdefault(tensor, {}).update({reader.node: reader for reader in sharing})
    narrow, where = observed.coupling.narrow(kept), observed.coupling.kept(kept)
    cut = {name: _cut(weight, where(name)).contiguous().to(graph.tensors[name]) for name, weight in weights.items()}
    narrow = narrow.with_tensors(cut)
    for tensor, by_node in readers.items():
        shifts = [_mean_shift(observed, reader, weights[tensor]) for reader in by_node.values()]
        shift, node = torch.stack(shifts).mean(0) if len(shifts) > 1 else shifts[0], next(iter(by_node))
        rows = _output_rows(where, node)
        narrow = add_constant(narrow, node, shift if rows is None else shift[rows])
    return narrow


def _by_weight(channel_set: ChannelSet) -> dict[str, list[Reader]]:
    """Collect the readers of a set that share a weight: calls of one layer read the same entries."""
    found: dict[str, list[Reader]] = {}
    for reader in channel_set.readers:
        found.setdefault(reader.tensor, []).append(reader)
    return found


def reconstruct(
    fitting: Fitting,
    kept: Mapping[str, Tensor],
    start: Graph,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Graph, list[Reconstruction]]:
    """Fit, in order of execution, the readers of narrowed channels and every layer behind the first of them.

    Args:
        fitting: networks and inputs.
        kept: for each set the channels that stay, (k,) int64 ascending.
        start: network narrowed to them by `quick_fit`.
        progress: called with the number of layers done and in all.

    Returns:
        the fitted network, and a record for each narrowed set.
    """
    narrowed = _narrowed_sets(fitting.coupling, kept)
    layers = _layers_to_fit(
        start, {reader.node for channel_set in narrowed for reader in channel_set.readers}, fitting.frozen
    )
    where = then(fitting.merged, fitting.coupling.kept(kept))
    sides = [_Sides(start, fitting.original, inputs) for inputs in (fitting.inputs, fitting.check) if inputs]
    place, shapes = {node.name: k for k, node in enumerate(start.nodes)}, value_shapes(start)
    graph, errors = start, dict[str, float]()
    for done, layer in enumerate(layers, start=1):
        name = layer.node.name
        places = position_count(shapes[name], layer.axis)
        images = images_for(layer.unknowns, places, len(fitting.inputs[0]))
        for side in sides:
            side.advance(graph, place[name], images)
        goals = [
            _Goal(graph, fitting.original, layer, call, epilogue(graph, call.node, shapes), where)
            for call in layer.calls
        ]
        fit = _fit if layer.unknowns <= fitting.most_unknowns else _rescale
        graph, lost = fit(graph, layer, goals, sides, images)
        errors |= {call.node.name: lost for call in layer.calls}
        progress(done, len(layers))
    records = []
    for channel_set in narrowed:
        error = max((errors.get(reader.node, 0.0) for reader in channel_set.readers), default=0.0)
        records.append(Reconstruction(channel_set.name, channel_set.channels, len(kept[channel_set.name]), error))
    return graph, records


class _Sides:
    """Both networks on the same inputs, at the same place."""

    def __init__(self, mine: Graph, theirs: Graph, inputs: Sequence[Tensor]) -> None:
        chunk = chunk_size(theirs, len(inputs[0]))
        self.mine, self.theirs = Piecewise(mine, inputs, chunk), Piecewise(theirs, inputs, chunk)

    def advance(self, graph: Graph, position: int, images: int) -> None:
        """Go on with ``graph`` as the narrowed network, to before the node at ``position``."""
        self.mine.use(graph)
        for run in (self.mine, self.theirs):
            run.advance(position, images)


def _narrowed_sets(coupling: Coupling, kept: Mapping[str, Tensor]) -> list[ChannelSet]:
    return [
        channel_set
        for channel_set in coupling.open
        if len(kept.get(channel_set.name, ())) not in (0, channel_set.channels)
    ]


def _layers_to_fit(graph: Graph, readers: Collection[str], frozen: Collection[str]) -> list[Layer]:
    """Find the first reader and all layers behind it that can be fitted, but for those with frozen weights."""
    layers = [layer for layer in find_layers(graph) if layer.can_be_fitted]
    reads = (k for k, layer in enumerate(layers) if any(call.node.name in readers for call in layer.calls))
    first = next(reads, len(layers))
    return [layer for layer in layers[first:] if layer.weight not in frozen]


def epilogue(graph: Graph, node: Node, shapes: Mapping[str, tuple[int, ...]]) -> Epilogue:
    """Find the batch norm that alone reads a layer, and the value that is added to the result.

    The added value counts only if an earlier node makes it, in the shape of the layer's output.
    """
    users, norm, value = graph.users(), None, node.name
    while value not in graph.outputs and len(users.get(value, ())) == 1:
        (user,) = users[value]
        if norm is None and is_convolution(node) and user.args[0] == Ref(value) and _is_stored_norm(graph, user):
            norm = user.name
        elif user.op == "aten.add.Tensor" and len(user.args) == 2 and not user.kwargs:
            other = next((arg for arg in user.args if arg != Ref(value)), None)
            if isinstance(other, Ref) and _runs_before(graph, other.name, node.name):
                return Epilogue(norm, other.name if shapes.get(other.name) == shapes[node.name] else None)
            break
        elif user.op != "aten.clone.default":
            break
        value = user.name
    return Epilogue(norm, None)


def _is_stored_norm(graph: Graph, node: Node) -> bool:
    return is_inference_norm(node) and all(ref.name in graph.tensors for ref in node.args[1:5] if ref)


def _runs_before(graph: Graph, first: str, second: str) -> bool:
    order = [node.name for node in graph.nodes]
    return first in order[: order.index(second)]


def mix_of(gram: Tensor, kept: Tensor, ridge: float = _RIDGE) -> Tensor:
    """Express each channel by the kept ones, (k, channels), by least squares; a kept channel is itself.

    Args:
        gram: second moments of the channels, (channels, channels) float64.
        kept: channels that stay, (k,) int64.
        ridge: for channels of unit variance; larger where the moments need it.
    """
    scale = gram.diagonal().clamp_min(1e-300).rsqrt()
    scale = torch.where(gram.diagonal() > 1e-14 * gram.diagonal().max(), scale, 0.0)
    correlation = gram * scale * scale[:, None]
    mix = torch.cholesky_solve(correlation[kept], factor(correlation[kept][:, kept], ridge))
    mix = mix * scale[kept][:, None] * (1 / scale).nan_to_num(posinf=0.0)
    mix[:, kept] = torch.eye(len(kept), dtype=gram.dtype)
    return mix


def _mixed(weight: Tensor, reader: Reader, kept: Tensor, mix: Tensor) -> Tensor:
    """Let the kept columns of a float64 weight take over the other columns, which become 0."""
    moved = weight.movedim(reader.dim, 0).clone()
    positions = reader.positions
    columns = moved[positions.flatten()].reshape(*positions.shape, -1)
    moved[positions.flatten()] = 0.0
    taken = torch.einsum("kc,cmr->kmr", mix, columns)
    moved[positions[kept].flatten()] = taken.reshape(-1, *moved.shape[1:])
    return moved.movedim(0, reader.dim)


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


def _cut(value: Tensor, where: Mapping[int, Tensor]) -> Tensor:
    for axis, positions in where.items():
        value = value.index_select(axis, positions.to(value.device))
    return value


def _output_rows(where: Kept, node: str) -> Tensor | None:
    """Positions of a layer's output channels that are left; its output has one axis of channels."""
    return next(iter(where(node).values()), None)


class _Goal:
    """What a call of a layer of the narrowed network should give, so that what follows matches the original network."""

    def __init__(self, graph: Graph, original: Graph, layer: Layer, call: Call, follows: Epilogue, where: Kept) -> None:
        self.layer, self.call, self.where = layer, call, where
        self.others = [follows.other] if follows.other else []
        self.gain = torch.ones(layer.outputs, dtype=torch.float64)
        self.shift, self.stream = torch.zeros_like(self.gain), torch.ones_like(self.gain)
        if follows.norm:
            was, shift_was = scale_and_shift(original, original.node(follows.norm))
            rows = _output_rows(where, call.node.name)
            if rows is not None:
                was, shift_was = was[rows], shift_was[rows]
            now, shift_now = scale_and_shift(graph, graph.node(follows.norm))
            seen = now.abs() > _LEAST_SCALE * now.abs().max()
            self.stream = torch.where(seen, 1 / now, 0.0)
            self.gain = torch.where(seen, was * self.stream, 1.0)
            self.shift = (shift_was - shift_now) * self.stream

    def rows(self, networks: _Sides, most: int, images: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield chunk by chunk the call's input, output positions to fit to, and the desired output there.

        Args:
            networks: the pruned network and the original.
            most: about how many positions to use per image.
            images: how many images to use.

        Yields:
            input (images, ...), indices of positions (samples,), output (samples, n_out) float64.
        """
        name, axis, mine = self.call.node.name, self.layer.axis, networks.mine
        read = mine.values([self.call.node.args[0].name, *self.others], images)
        sides = read, networks.theirs.values([name, *self.others], images)
        gain, shift, stream = (x.to(mine.device) for x in (self.gain, self.shift, self.stream))
        for (x, *now), (y, *was) in zip(*sides, strict=True):
            picks = spread(y, axis, most, jitter=self.layer.is_transposed)
            goal = samples(_cut(y, self.where(name)), axis, picks).double() * gain + shift
            for other, value, target in zip(self.others, now, was, strict=True):
                gap = samples(_cut(target, self.where(other)), axis, picks).double() - samples(value, axis, picks)
                goal += stream * gap
            yield x, picks, goal


def _fit(
    graph: Graph, layer: Layer, goals: Sequence[_Goal], sides: Sequence[_Sides], images: int
) -> tuple[Graph, float]:
    """Fit a layer's weight and constant; return the graph and what is left as a relative RMS error."""
    weight = graph.tensors[layer.weight]
    by_output = weight.movedim(layer.out_dim, 0)
    most = max(_SAMPLES, layer.unknowns // 6)
    sums = []
    for side in sides:
        parts = (
            Sums.of(_features(x, goal, picks), y) for goal in goals for x, picks, y in goal.rows(side, most, images)
        )
        total = next(parts)
        for part in parts:
            total.add(part)
        sums.append(total)
    new, constant, lost = solve(sums[0], by_output.double().flatten(1).T.to(sides[0].mine.device), *sums[1:])
    fitted = new.T.reshape(by_output.shape).movedim(0, layer.out_dim).contiguous()
    graph = graph.with_tensors({layer.weight: fitted.to(weight)})
    return _with_constant(graph, layer, constant), math.sqrt(lost)


def _rescale(
    graph: Graph, layer: Layer, goals: Sequence[_Goal], sides: Sequence[_Sides], images: int
) -> tuple[Graph, float]:
    """Give each output of a layer with too many unknowns for `_fit` a scale and a constant."""
    weight, device = graph.tensors[layer.weight], sides[0].mine.device
    bias = graph.tensors[layer.bias].double().to(device) if layer.bias else 0.0
    sums, count = torch.zeros(5, layer.outputs, dtype=torch.float64, device=device), 0
    for goal in goals:
        node = goal.call.node
        call = replace(graph, nodes=(node,), inputs=(replace(graph.inputs[0], name=node.args[0].name),))
        program = Program(call, [node.name]).to(device)
        for x, picks, y in goal.rows(sides[0], _SAMPLES, images):
            with torch.no_grad():
                u = samples(program(x)[0], layer.axis, picks).double() - bias
            sums += torch.stack([u.sum(0), y.sum(0), (u * u).sum(0), (u * y).sum(0), (y * y).sum(0)])
            count += len(u)
    u, y, uu, uy, yy = sums / count
    uu, uy, yy = (uu - u * u).clamp_min(0), uy - u * y, (yy - y * y).clamp_min(0)
    scale = torch.where(uu > 1e-12 * yy, uy / uu.clamp_min(1e-300), 1.0)
    lost = (yy - 2 * scale * uy + scale * scale * uu).clamp_min(0)
    column = scale.view([-1 if d == layer.out_dim else 1 for d in range(weight.dim())]).cpu()
    graph = graph.with_tensors({layer.weight: (weight.double() * column.to(weight.device)).to(weight)})
    return _with_constant(graph, layer, y - scale * u), math.sqrt(float(lost.sum()) / max(float(yy.sum()), 1e-300))


def _with_constant(graph: Graph, layer: Layer, constant: Tensor) -> Graph:
    """Make ``constant`` (n_out,) all that the layer adds to its weight's share."""
    bias = graph.tensors[layer.bias].double().cpu() if layer.bias else 0.0
    return add_constant(graph, layer.node.name, constant.cpu() - bias)


def _features(value: Tensor, goal: _Goal, picks: Tensor) -> Tensor:
    """Return what the call reads at the picked output positions as rows (samples, channels * taps)."""
    layer = goal.layer
    if layer.axis == -1:
        return samples(value, -1, picks)
    return patches(value, goal.call.window, layer.shape[2:], picks, layer.is_transposed)
