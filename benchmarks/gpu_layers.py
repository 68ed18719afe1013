"""The cells of single layers: Linear at the issue's shapes, and the convolutions of ResNet-50 and MobileNetV2.

Weights are the values of a real codebook (k-means of Gaussian weights) at random places, so every candidate of a cell
computes the same function, and no table of values is read at one place only.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu_checkout  # noqa: F401 - before the project
from benchmarks.gpu_cells import Call, Cell, Contender, tensors_bytes
from benchmarks.gpu_models import MODELS, SIDE
from benchmarks.gpu_peers import COMPILED_ROWS, compiled_linear, linear_peers
from benchmarks.gpu_timing import Bench
from redpp_serve import kernels
from redpp_serve.kernels.epilogue import ACTIVATIONS
from redpp_serve.options import HashTarget
from redpp_serve.pruning.hashing import hash_weight

VALUES = (16, 8)  # of a codebook
DECODES = {16: ("auto", "prmt16", "pair", "pointer"), 8: ("auto", "prmt8", "prmt16", "pair", "pointer")}
# The split's gathers grow with the rows and its index takes four bytes a weight: beyond this it is only slow.
SPLIT_WEIGHTS, SPLIT_ROWS, SPLIT_BATCH = 1 << 24, 8, 1
SAMPLE = 1 << 16


@dataclass(frozen=True)
class CodebookWeight:
    """``weight`` = ``values[index]``, (n_out, n_in); ``packed`` is the index as `codebook_linear` takes it."""

    values: Tensor
    index: Tensor
    weight: Tensor

    @functools.cached_property
    def packed(self) -> Tensor:
        return kernels.pack_indices(self.index)


@functools.cache
def gaussian_codebook(count: int) -> Tensor:
    """The values that k-means finds for normally distributed weights, (count,) fp32, ascending."""
    sample = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0))
    found = hash_weight(sample, "kmeans", HashTarget(values=count)).codebook
    return torch.from_numpy(found.values[found.frequencies > 0]).unique().float()


def codebook_weight(bench: Bench, n_out: int, n_in: int, count: int, seed: int = 0) -> CodebookWeight:
    """Gaussian weights of a trained layer's size, each at the nearest of ``count`` values."""
    values = gaussian_codebook(count).to(bench.device) * n_in**-0.5
    weight = bench.randn(n_out, n_in, seed=seed, scale=n_in**-0.5).float()
    index = torch.bucketize(weight, (values[1:] + values[:-1]) / 2)
    values = values.to(bench.dtype)
    return CodebookWeight(values, index, values[index])


def linear_cells(bench: Bench, shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...]) -> Iterator[Cell]:
    """Yield cells by rows: small batches of every shape first; torch.compile, slowest to build, last."""
    weights = functools.cache(lambda n_out, n_in, count: codebook_weight(bench, n_out, n_in, count, seed=count))
    for m, (n_out, n_in) in itertools.product(rows, shapes):
        books = {count: weights(n_out, n_in, count) for count in VALUES}
        yield _linear_cell(bench, bench.randn(m, n_in, seed=m), books)
    for m, (n_out, n_in) in itertools.product(COMPILED_ROWS, shapes):
        if m in rows:
            x, weight = bench.randn(m, n_in, seed=m), weights(n_out, n_in, VALUES[0]).weight
            fields = {"n_out": n_out, "n_in": n_in, "rows": m, "peer": "torch.compile"}
            expected = functools.partial(_linear_expected, x, weight)
            yield Cell("linear", fields, [_dense_linear(x, weight), compiled_linear(x, weight, bench)], expected)


def _linear_cell(bench: Bench, x: Tensor, books: dict[int, CodebookWeight]) -> Cell:
    main = books[VALUES[0]]
    m, (n_out, n_in) = len(x), main.weight.shape
    flop, ends = 2 * m * n_out * n_in, tensors_bytes(x) + m * n_out * x.element_size()
    dense = _dense_linear(x, main.weight)
    fused = Contender("fused", lambda: _bound(kernels.fused_linear, x, main.weight.clone()), dense.moved, flop)
    contenders, absent = [dense, fused], {}
    for count, book in books.items():
        right = None if book is main else functools.cache(functools.partial(_linear_expected, x, book.weight))
        for decode in DECODES[count]:

            def fresh(book: CodebookWeight = book, decode: str = decode) -> Call:
                return _bound(
                    kernels.codebook_linear, x, book.packed.clone(), book.values.clone(), None, "none", decode
                )

            moved = ends + n_out * -(-n_in // 2) + tensors_bytes(book.values)
            contenders.append(Contender(f"codebook{count}:{decode}", fresh, moved, flop, right))
    if n_out * n_in <= SPLIT_WEIGHTS and m <= SPLIT_ROWS:
        contenders.append(Contender("split", lambda: _split_linear(x, main), ends + 5 * n_out * n_in, flop))
    else:
        absent["split"] = f"left out above {SPLIT_ROWS} rows or {SPLIT_WEIGHTS} weights"
    peers, missing = linear_peers(x, main.weight, bench)
    fields = {"n_out": n_out, "n_in": n_in, "rows": m}
    return Cell(
        "linear", fields, [*contenders, *peers], functools.partial(_linear_expected, x, main.weight), absent | missing
    )


def _dense_linear(x: Tensor, weight: Tensor) -> Contender:
    moved = tensors_bytes(x, weight) + len(x) * len(weight) * x.element_size()
    return Contender("dense", lambda: _bound(F.linear, x, weight.clone()), moved, 2 * len(x) * weight.numel())


def _linear_expected(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def _split_linear(x: Tensor, book: CodebookWeight) -> Call:
    """RED++'s own form: the products of each input with the values that its outputs use, then a gather and a sum."""
    count, n_in = len(book.values), book.index.shape[1]
    at = torch.arange(n_in, device=x.device)
    index = (book.index + count * at).to(torch.int32)
    values, channel = book.values.repeat(n_in), at.repeat_interleave(count)
    return _bound(kernels.split_linear, x, values, channel, index, torch.ones_like(index, dtype=torch.int8))


def _bound(function: Callable[..., Tensor], *arguments: object, **keywords: object) -> Call:
    """A call with its operands; hashed by identity, so that one call can stand in a pass several times."""
    return lambda: function(*arguments, **keywords)


@dataclass(frozen=True)
class ConvShape:
    """A convolution (dilation 1) with bias, activation and, where the network adds one, a residual."""

    n_in: int
    n_out: int
    kernel: int
    stride: int
    padding: int
    groups: int
    side: int
    activation: str
    residual: bool

    def at_width(self, width: float) -> ConvShape:
        """With that part of its channels, in multiples of 8; an image's three stay."""
        n_in, n_out = (c if c == 3 else max(8, int(c * width) // 8 * 8) for c in (self.n_in, self.n_out))
        return ConvShape(
            n_in,
            n_out,
            self.kernel,
            self.stride,
            self.padding,
            n_in if self.groups > 1 else 1,
            self.side,
            self.activation,
            self.residual,
        )

    @property
    def fields(self) -> dict[str, object]:
        residual = "+residual" if self.residual else ""
        return {
            "layer": f"{self.n_in}->{self.n_out} {self.kernel}x{self.kernel}/{self.stride}@{self.side}"
            f"{' depthwise' if self.groups > 1 else ''}",
            "epilogue": f"bias{residual}+{self.activation}",
        }


def conv_shapes(network: str, side: int = SIDE) -> list[ConvShape]:
    """The distinct convolutions of a network, in order of execution; each activation is that of the layer behind it."""
    found: dict[ConvShape, None] = {}
    with torch.device("meta"):
        module = MODELS[network]().eval()
        handles = []

        def see(conv: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
            depthwise = conv.groups > 1
            last = conv.kernel_size[0] == 1 and not depthwise and conv.out_channels != conv.in_channels
            residual = network != "mobilenet_v2" and last and conv.out_channels == 4 * conv.in_channels
            linear = network == "mobilenet_v2" and last and conv.out_channels < conv.in_channels
            activation = "none" if linear else "relu6" if network == "mobilenet_v2" else "relu"
            found[
                ConvShape(
                    conv.in_channels,
                    conv.out_channels,
                    conv.kernel_size[0],
                    conv.stride[0],
                    conv.padding[0],
                    conv.groups,
                    inputs[0].shape[-1],
                    activation,
                    residual,
                )
            ] = None

        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                handles.append(part.register_forward_pre_hook(see))
        module(torch.empty(1, 3, side, side))
    return list(found)


def conv_cells(
    bench: Bench, networks: tuple[str, ...], batches: tuple[int, ...], every: int = 1, side: int = SIDE
) -> Iterator[Cell]:
    """Yield each distinct shape once, by batch, then width, then layer. ``every`` takes one of so many layers."""
    shapes = [(network, shape) for network in networks for shape in conv_shapes(network, side)[::every]]
    seen = set()
    for batch, width, (network, shape) in itertools.product(batches, (1.0, 0.5), shapes):
        scaled = shape.at_width(width) if width < 1 else shape
        if (batch, scaled) not in seen:
            seen.add((batch, scaled))
            yield conv_cell(bench, network, scaled, batch, width)


def conv_cell(bench: Bench, network: str, shape: ConvShape, batch: int, width: float = 1.0) -> Cell:
    """Operands are made with the first call: a cell that is not reached takes no memory."""
    out = (shape.side + 2 * shape.padding - shape.kernel) // shape.stride + 1
    outputs, per_group = batch * shape.n_out * out * out, shape.n_in // shape.groups
    item = torch.empty((), dtype=bench.dtype).element_size()
    weights = shape.n_out * per_group * shape.kernel**2
    moved = item * (batch * shape.n_in * shape.side**2 + weights + shape.n_out + (2 if shape.residual else 1) * outputs)
    flop = 2 * outputs * per_group * shape.kernel**2
    operands = functools.cache(lambda: _conv_operands(bench, shape, batch, out))
    window = (shape.stride, shape.padding)

    def fresh(call: Callable[..., Tensor]) -> Callable[[], Call]:
        def make() -> Call:
            x, weight, bias, residual = operands()
            return _bound(call, x.clone(), weight.clone(), bias, None if residual is None else residual.clone())

        return make

    def library(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        y = F.conv2d(x, weight, bias, *window, 1, shape.groups)
        y = y if residual is None else y + residual
        return ACTIVATIONS[shape.activation](y)

    def cudnn(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        pairs = [shape.stride] * 2, [shape.padding] * 2, [1, 1], shape.groups
        if residual is None:
            return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *pairs)
        return torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *pairs)

    def fused(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        return kernels.fused_conv2d(
            x, weight, bias, residual, activation=shape.activation, stride=window[0], padding=window[1]
        )

    def depthwise(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        return kernels.depthwise_conv2d(x, weight, bias, shape.activation, *window)

    contenders, absent = [Contender("dense", fresh(library), moved, flop)], {}
    if shape.activation == "relu":
        contenders.append(Contender("cudnn", fresh(cudnn), moved, flop))
    else:
        absent["cudnn"] = f"its fused epilogue has no {shape.activation}"
    contenders.append(
        Contender("depthwise", fresh(depthwise), moved, flop)
        if shape.groups > 1
        else Contender("fused", fresh(fused), moved, flop)
    )
    if batch <= SPLIT_BATCH and shape.n_in * shape.n_out <= 1 << 16 and shape.groups == 1:
        split = functools.partial(_split_conv, operands, window, shape.activation)
        contenders.append(Contender("split", split, moved + 5 * shape.n_in * shape.n_out, flop))
    fields = {"network": network, "width": width, "batch": batch, **shape.fields}
    return Cell("conv", fields, contenders, lambda: _conv_expected(*operands(), shape), absent)


Operands = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _conv_operands(bench: Bench, shape: ConvShape, batch: int, out: int) -> Operands:
    """Input, weight (16 values), bias and residual, channels_last."""
    per_group = shape.n_in // shape.groups
    x = bench.randn(batch, shape.n_in, shape.side, shape.side, seed=1).contiguous(memory_format=torch.channels_last)
    book = codebook_weight(bench, shape.n_out, per_group * shape.kernel**2, VALUES[0])
    weight = book.weight.view(shape.n_out, per_group, shape.kernel, shape.kernel).contiguous(
        memory_format=torch.channels_last
    )
    residual = bench.randn(batch, shape.n_out, out, out, seed=3) if shape.residual else None
    residual = residual if residual is None else residual.contiguous(memory_format=torch.channels_last)
    return x, weight, bench.randn(shape.n_out, seed=2), residual


def _conv_expected(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, shape: ConvShape) -> Tensor:
    """In fp32 without TF32 (fp64 convolutions of these sizes would take longer than all else)."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        y = F.conv2d(x.float(), weight.float(), bias.float(), shape.stride, shape.padding, 1, shape.groups)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    y = y if residual is None else y + residual.float()
    return ACTIVATIONS[shape.activation](y)


def _split_conv(operands: Callable[[], Operands], window: tuple[int, int], activation: str) -> Call:
    """Store every kernel of an input once; random ones are all distinct, as they nearly are in hashed networks."""
    x, weight, bias, residual = operands()
    n_out, n_in = weight.shape[:2]
    kernels_of_inputs = weight.transpose(0, 1).reshape(n_in * n_out, *weight.shape[2:]).contiguous()
    if weight.shape[2:].numel() == 1:  # of a 1 x 1 convolution the values themselves repeat
        return _split_pointwise(x, weight, bias, residual, activation)
    channel = torch.arange(n_in, device=x.device).repeat_interleave(n_out)
    index = (torch.arange(n_in, device=x.device) * n_out + torch.arange(n_out, device=x.device)[:, None]).to(
        torch.int32
    )
    return _split_call(x, kernels_of_inputs, channel, index, bias, residual, activation, *window)


def _split_pointwise(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Call:
    n_out, n_in = weight.shape[:2]
    values, flat = weight.reshape(n_out, n_in).unique(return_inverse=True)
    at = torch.arange(n_in, device=x.device)
    index = (flat + len(values) * at).to(torch.int32)
    channel = at.repeat_interleave(len(values))
    return _split_call(x, values.repeat(n_in)[:, None, None], channel, index, bias, residual, activation, 1, 0)


def _split_call(
    x: Tensor,
    unique: Tensor,
    channel: Tensor,
    index: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    activation: str,
    stride: int,
    padding: int,
) -> Call:
    x, sign = x.clone(), torch.ones_like(index, dtype=torch.int8)

    def call() -> Tensor:
        y = kernels.split_conv2d(x, unique, channel, index, sign, bias, stride, padding)
        return ACTIVATIONS[activation](y if residual is None else y + residual)

    return call
