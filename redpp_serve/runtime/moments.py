"""Second moments of what each layer of a network reads: sums over many inputs, from which none of them can be told.

`Layout` says which sums belong to a graph, and bounds their memory; `Adder` adds inputs up to `Sums`; `Moments` is what
they amount to. `moments_file` stores them, `observer` fills them while a server answers requests.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from redpp_serve.graph.artifact import calls_document
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, Node, once_per_graph
from redpp_serve.graph.layers import CONV, LINEAR, channel_counts, is_convolution, weight_calls, window

POSITIONS = 256  # of one input that are added up, evenly spread, each time others
MOST_BYTES = 1 << 30  # of all sums of a network
_MOST_PATCH = 1152  # numbers in a patch up to which all pairs of them are added up
_MOST_TAPS = 1 << 20  # pairs of taps over all channels up to which each channel has its own
_MOST_OUTPUT = 2048  # numbers in an output up to which all pairs of them are added up
_LARGEST_OUTPUT = 1 << 22  # numbers in an output that is added up at all
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill an interval evenly


@dataclass(frozen=True)
class ValueMoments:
    """Sums over samples x (channels,) of one value, float64.

    Attributes:
        count: the number of samples: positions of a feature map or sequence, spread evenly, up to `POSITIONS` for each
            input; whole inputs for an output of the network.
        total: the sum of x, (channels,).
        squares: the sum of x², (channels,).
        gram: the sum of x xᵀ, (channels, channels), not centred; None where only squares were kept.
    """

    count: int
    total: Tensor
    squares: Tensor
    gram: Tensor | None = None

    def mean(self) -> Tensor:
        """Return the mean, (channels,)."""
        return self.total / self.count

    def variance(self) -> Tensor:
        """Return the variance of each channel, (channels,)."""
        return (self.squares / self.count - self.mean().square()).clamp_min(0)

    def covariance(self) -> Tensor | None:
        """Return the covariance, (channels, channels); None without a Gram matrix."""
        return None if self.gram is None else self.gram / self.count - torch.outer(self.mean(), self.mean())


@dataclass(frozen=True)
class PatchMoments:
    """Sums over the patches (channels, taps) that a convolution with a kernel reads, zero padding included, float64.

    Attributes:
        count: the number of patches, up to `POSITIONS` for each input, fewer of more than nine taps.
        total: their sum, (channels, taps).
        gram: the sum of products of two numbers of a patch, not centred: of all pairs, (channels * taps,
            channels * taps) with the taps of a channel side by side, as in the layer's weight; or of pairs of one
            channel, (channels, taps, taps); or the latter summed over channels, (taps, taps).
    """

    count: int
    total: Tensor
    gram: Tensor

    @property
    def whole(self) -> bool:
        """Whether all pairs of numbers are there, so that a least-squares fit of the layer is exact."""
        return len(self.gram) == self.total.numel() and self.gram.dim() == 2

    def covariance(self) -> Tensor:
        """Return the covariance in the form that ``gram`` has."""
        mean = self.total / self.count
        if self.whole:
            return self.gram / self.count - torch.outer(mean.flatten(), mean.flatten())
        products = mean[:, :, None] * mean[:, None]
        return self.gram / self.count - (products if self.gram.dim() == 3 else products.sum(0))

    def tap_correlation(self) -> Tensor:
        """Return how the input at one tap correlates with that at another, (taps, taps), with a diagonal of mean 1."""
        covariance, (channels, taps) = self.covariance(), self.total.shape
        if self.whole:
            covariance = covariance.view(channels, taps, channels, taps).diagonal(dim1=0, dim2=2).sum(-1)
        elif covariance.dim() == 3:
            covariance = covariance.sum(0)
        return covariance / covariance.diagonal().mean().clamp_min(1e-300)


@dataclass(frozen=True)
class Moments:
    """Second moments of a network over the inputs that a server observed.

    Attributes:
        images: the number of inputs that were added up.
        skipped: inputs that were left out because a value was not finite.
        fingerprint: `fingerprint` of the network.
        values: by name, the values that layers read, and (with squares alone) the layers' outputs.
        patches: by name of the call, what convolutions with a kernel larger than 1 x 1 read.
        outputs: by name, the network's outputs, each flattened to (channels,).
    """

    images: int
    skipped: int
    fingerprint: str
    values: Mapping[str, ValueMoments]
    patches: Mapping[str, PatchMoments]
    outputs: Mapping[str, ValueMoments]


@once_per_graph
def fingerprint(graph: Graph) -> str:
    """Return a digest of a network's calls, shapes and weights, which tells its moments from another network's."""
    digest = hashlib.sha256(json.dumps(calls_document(graph), sort_keys=True).encode())
    for name, tensor in sorted(graph.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Value:
    """A value to add up: its axis of channels, their number, and whether all pairs of them are wanted."""

    axis: int
    channels: int
    pairs: bool


@dataclass(frozen=True)
class _Patches:
    """The patches of a convolution to add up, with the shape of `PatchMoments.gram`."""

    value: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    channels: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Which sums belong to a network; two processes with the same code and network have the same ones.

    Attributes:
        values: by name, the values to add up.
        patches: by name of the call, the patches to add up.
        outputs: names of the network's outputs.
    """

    values: Mapping[str, _Value]
    patches: Mapping[str, _Patches]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, graph: Graph, most_bytes: int = MOST_BYTES) -> Layout:
        """Choose the sums for a network: all pairs of channels for the narrowest values, as far as the memory goes."""
        read: dict[str, _Value] = {}
        made: dict[str, _Value] = {}
        patches: dict[str, _Patches] = {}
        for name, node in ((name, node) for name, calls in weight_calls(graph).items() for node in calls):
            if node.op != LINEAR and not is_convolution(node):
                continue
            x, weight = node.args[0].name, graph.tensors[name]
            axis = -1 if node.op == LINEAR else 1
            groups = window(node, tuple(weight.shape[2:])).groups if axis == 1 else 1
            inputs, outputs = channel_counts(node, tuple(weight.shape), groups)
            read.setdefault(x, _Value(axis, inputs, True))
            made[node.name] = _Value(axis, outputs, False)
            if node.op == CONV and tuple(weight.shape[2:]) != (1, 1):
                patches[node.name] = _patches(node, weight)
        sizes = {("value", name): value.channels**2 for name, value in read.items()}
        sizes |= {("patch", name): math.prod(one.shape) for name, one in patches.items()}
        left, fits = most_bytes, set()
        for key, size in sorted(sizes.items(), key=lambda item: item[1]):
            left -= 8 * size
            if left >= 0:
                fits.add(key)
        values = {n: v if ("value", n) in fits else _Value(v.axis, v.channels, False) for n, v in read.items()}
        kept = {name: one for name, one in patches.items() if ("patch", name) in fits}
        return cls({**made, **values}, kept, tuple(dict.fromkeys(graph.outputs)))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of `Sums` by its name, but for those of outputs."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, value in self.values.items():
            shapes[f"value/{name}/total"] = (value.channels,)
            pairs = {f"value/{name}/gram": (value.channels, value.channels)}
            shapes |= pairs if value.pairs else {f"value/{name}/squares": (value.channels,)}
        for name, one in self.patches.items():
            shapes[f"patch/{name}/total"] = (one.channels, one.kernel[0] * one.kernel[1])
            shapes[f"patch/{name}/gram"] = one.shape
        return shapes


def _patches(node: Node, weight: Tensor) -> _Patches:
    height, width = weight.shape[2:]
    found = window(node, (height, width))
    channels = found.groups * weight.shape[1]
    taps = height * width
    if weight.shape[1] > 1 and channels * taps <= _MOST_PATCH:
        shape: tuple[int, ...] = (channels * taps, channels * taps)
    else:
        shape = (channels, taps, taps) if channels * taps**2 <= _MOST_TAPS else (taps, taps)
    return _Patches(node.args[0].name, (height, width), found.stride, found.padding, found.dilation, channels, shape)


@dataclass
class Sums:
    """Sums that grow; equal layouts can be added to each other.

    Attributes:
        images: the number of inputs that were added up.
        skipped: the number that were not, because a value was not finite.
        counts: samples by ``kind/name``, with the kinds ``value``, ``patch`` and ``output``.
        tensors: float64 sums by ``kind/name/what``, with ``total`` and ``squares`` or ``gram``.
    """

    images: int = 0
    skipped: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def moments(self, fingerprint: str) -> Moments:
        """Return what the sums amount to, as the moments of the network with that fingerprint."""

        def values(kind: str) -> dict[str, ValueMoments]:
            return {name: self._value(f"{kind}/{name}") for name in self._names(kind)}

        patches = {
            name: PatchMoments(
                self.counts[f"patch/{name}"], self.tensors[f"patch/{name}/total"], self.tensors[f"patch/{name}/gram"]
            )
            for name in self._names("patch")
        }
        return Moments(self.images, self.skipped, fingerprint, values("value"), patches, values("output"))

    def _names(self, kind: str) -> list[str]:
        return [key.removeprefix(f"{kind}/") for key in self.counts if key.startswith(f"{kind}/")]

    def _value(self, key: str) -> ValueMoments:
        gram = self.tensors.get(f"{key}/gram")
        squares = self.tensors[f"{key}/squares"] if gram is None else gram.diagonal()
        return ValueMoments(self.counts[key], self.tensors[f"{key}/total"], squares, gram)

    def add_rows(self, key: str, rows: Tensor, pairs: bool) -> None:
        """Add samples (samples, channels) to a value's sums."""
        self.counts[key] = self.counts.get(key, 0) + len(rows)
        rows = rows.double()
        self._at(f"{key}/total", rows.shape[1:]).add_(rows.sum(0))
        if pairs:
            self._at(f"{key}/gram", 2 * rows.shape[1:]).addmm_(rows.T, rows)
        else:
            self._at(f"{key}/squares", rows.shape[1:]).add_(rows.square().sum(0))

    def add_patches(self, key: str, patches: Tensor, shape: Sequence[int]) -> None:
        """Add patches (samples, channels, taps) to a convolution's sums of that shape."""
        self.counts[key] = self.counts.get(key, 0) + len(patches)
        patches = patches.double()
        self._at(f"{key}/total", patches.shape[1:]).add_(patches.sum(0))
        gram = self._at(f"{key}/gram", shape)
        if len(shape) == 3:
            by_channel = patches.permute(1, 2, 0).contiguous()  # else the product takes each channel by itself
            gram.add_(by_channel @ by_channel.mT)
        else:
            flat = patches.flatten(1) if shape[0] > patches.shape[2] else patches.flatten(0, 1)
            gram.addmm_(flat.T, flat)

    def _at(self, key: str, shape: Sequence[int]) -> Tensor:
        if key not in self.tensors:
            self.tensors[key] = torch.zeros(*shape, dtype=torch.float64)
        return self.tensors[key]


class Adder:
    """Adds inputs up: it runs the network on each and samples the values. One input at a time bounds the memory.

    Args:
        graph: the network as it is stored, on the CPU.
        layout: what to add up; by default `Layout.of` the graph.

    Attributes:
        sums: what was added up so far; replace it to begin anew.
    """

    def __init__(self, graph: Graph, layout: Layout | None = None) -> None:
        self.layout = layout or Layout.of(graph)
        self.sums = Sums()
        self._wanted = [*self.layout.values, *self.layout.outputs]
        self._program = Program(graph, self._wanted)
        self._seen = 0

    @torch.no_grad()
    def add(self, inputs: Sequence[Tensor], pause: Callable[[], None] = lambda: None) -> None:
        """Add one input; one with a value that is not finite is left out.

        Args:
            inputs: (1, ...) for each of the network's inputs.
            pause: called between the steps of adding up, which take milliseconds each; it may take its time.
        """
        results = self._program(*inputs)
        if not all(map(_is_finite, (*inputs, *results))):
            self.sums.skipped += 1
            return
        found = dict(zip(self._wanted, results, strict=True))
        self._seen += 1
        offset = self._seen * _GOLDEN % 1.0
        for name, value in self.layout.values.items():
            pause()
            self.sums.add_rows(f"value/{name}", _rows(found[name], value, offset), value.pairs)
        for name, one in self.layout.patches.items():
            pause()
            self.sums.add_patches(f"patch/{name}", _sampled_patches(found[one.value], one, offset), one.shape)
        for name in self.layout.outputs:
            row = found[name].reshape(1, -1)
            if row.shape[1] <= _LARGEST_OUTPUT:
                self.sums.add_rows(f"output/{name}", row, row.shape[1] <= _MOST_OUTPUT)
        self.sums.images += 1


def _is_finite(value: Tensor) -> bool:
    # A sum is one pass over the memory and hides no NaN and no infinity; one that overflows costs an odd input.
    wide = torch.promote_types(value.dtype, torch.float32)
    return not value.is_floating_point() or math.isfinite(float(value.sum(dtype=wide)))


def _every(count: int, offset: float, most: int = POSITIONS) -> slice:
    """Return up to ``most`` evenly spread ones of ``count`` positions, beginning at a share of their distance."""
    step = -(-count // most)
    return slice(int(offset * step), None, step)


def _rows(x: Tensor, value: _Value, offset: float) -> Tensor:
    """Return positions of a value of one input as rows, (samples, channels)."""
    if value.axis == 1:
        x = x.flatten(2).transpose(1, 2) if x.dim() > 2 else x
    rows = x.flatten(0, -2)
    return rows[_every(len(rows), offset)]


def _sampled_patches(x: Tensor, one: _Patches, offset: float) -> Tensor:
    """Return patches of a convolution's input (1, channels, height, width), (samples, channels, taps)."""
    vertical, horizontal = one.padding
    x = torch.nn.functional.pad(x, (horizontal, horizontal, vertical, vertical))
    starts, taps = [], []
    for axis in (0, 1):
        reach = one.dilation[axis] * (one.kernel[axis] - 1)
        starts.append(torch.arange(0, x.shape[2 + axis] - reach, one.stride[axis]))
        taps.append(torch.arange(0, reach + 1, one.dilation[axis]))
    count, width = len(x) * len(starts[0]) * len(starts[1]), len(starts[1])
    most = max(1, min(POSITIONS, 9 * POSITIONS // (len(taps[0]) * len(taps[1]))))  # large patches overlap
    picks = torch.arange(count)[_every(count, offset, most)]
    at, image = picks % (len(starts[0]) * width), picks // (len(starts[0]) * width)
    down = starts[0][at // width][:, None, None] + taps[0][:, None]
    right = starts[1][at % width][:, None, None] + taps[1]
    return x[image[:, None, None], :, down, right].movedim(-1, 1).flatten(2)
