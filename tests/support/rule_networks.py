"""A small network for each operator that channels can pass, and what tests do with channel sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from redpp_serve.channels.coupling import ChannelSet, Coupling
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from tests.support.networks import Builder, outputs

R = Ref
Case = tuple[Callable[[], Graph], dict[str, int]]  # a network, its open channel sets and their channels
OPEN: dict[str, Case] = {}


def opens(**sets: int) -> Callable[[Callable[[Builder], Graph]], Callable[[Builder], Graph]]:
    """Register a network on (4, 6, 6) images, with the open channel sets it must have."""

    def register(build: Callable[[Builder], Graph]) -> Callable[[Builder], Graph]:
        OPEN[build.__name__] = (lambda seed=3: build(Builder(4, 6, 6, seed=seed)), sets)
        return build

    return register


def head(b: Builder, x: str, n: int) -> Graph:
    """Mean over the plane and a classifier."""
    return b.graph(b.linear(b.mean(x), "head", n, 3))


def items(b: Builder, value: str, *names: str) -> tuple[str, ...]:
    """The results of an operator that has several."""
    b.nodes += [Node(name, "py.getitem", (R(value), k)) for k, name in enumerate(names)]
    return names


@opens(first=8)
def convolution(b):
    return head(b, b.relu(b.conv("x", "first", 4, 8)), 8)


@opens(first=8, second=6)
def norm_and_activations(b):
    x = b.norm(b.conv("x", "first", 4, 8), "bn", 8)
    for k, op in enumerate(("relu6", "silu", "gelu", "hardswish", "tanh", "elu", "sigmoid", "softplus", "mish")):
        x = b.op(f"act{k}", f"{op}.default", R(x))
    x = b.op("leaky", "leaky_relu.default", R(x), 0.1)
    return head(b, b.conv(x, "second", 8, 6), 6)


@opens(first=8)
def three_that_meet(b):
    x, y, z = (b.conv("x", name, 4, 8) for name in ("first", "second", "third"))
    return head(b, b.op("sum", "addcmul.default", R(x), R(y), R(z)), 8)


@opens(first=8)
def unflattened(b):  # the channels themselves, then the positions in front of them
    x = b.op("wide", "unflatten.int", R(b.relu(b.conv("x", "first", 4, 8))), 1, [1, 8, 1])
    x = b.op("flat", "flatten.using_ints", R(b.op("whole", "squeeze.dim", R(x), 1)), 2)
    x = b.op("last", "transpose.int", R(x), 1, 2)
    x = b.op("rows", "unflatten.int", R(x), 1, [6, 6])
    return head(b, b.op("back", "permute.default", R(x), [0, 3, 1, 2]), 8)


@opens(first=8)
def counted_from_the_end(b):
    x = b.relu(b.conv("x", "first", 4, 8))
    low, high = items(b, b.op("parts", "split_with_sizes.default", R(x), [3, 5], -3), "low", "high")
    tail = b.op("tail", "narrow.default", R(x), -3, 3, 5)
    cut = b.op("cut", "slice.Tensor", R(x), -3, -5, 1 << 62)
    total = b.op("total", "add.Tensor", R(b.op("sum", "add.Tensor", R(tail), R(cut))), R(high))
    return head(b, b.op("cat", "cat.default", [R(low), R(total)], -3), 8)


@opens(first=4)
def grouped(b):  # 2 input and 3 output channels a group
    return head(b, b.relu(b.conv(b.relu(b.conv("x", "first", 4, 8)), "grouped", 8, 12, groups=4)), 12)


@opens(first=8)
def depthwise(b):
    x = b.norm(b.conv(b.relu(b.conv("x", "first", 4, 8)), "depthwise", 8, 8, groups=8), "bn", 8)
    return head(b, x, 8)


@opens(first=8)
def depthwise_multiplier(b):
    return head(b, b.conv(b.relu(b.conv("x", "first", 4, 8)), "depthwise", 8, 16, groups=8), 16)


@opens(first=6, second=8)
def dilated(b):
    x = b.relu(b.conv("x", "first", 4, 6))
    weight = b.tensor("second.weight", b.random(8, 6, 3, 3) / 7)
    x = b.op("second", "conv2d.default", R(x), weight, None, [1, 1], [2, 2], [2, 2], 1)
    return head(b, x, 8)


@opens(first=6, up=8, second=4)
def transposed(b):
    x = b.relu(b.conv("x", "first", 4, 6))
    args = (b.tensor("up.weight", b.random(6, 8, 2, 2) / 3), b.tensor("up.bias", b.random(8)))
    x = b.op("up", "conv_transpose2d.input", R(x), *args, [2, 2], [0, 0], [0, 0], 1, [1, 1])
    return head(b, b.conv(x, "second", 8, 4), 4)


@opens(first=2)
def transposed_grouped(b):
    x = b.relu(b.conv("x", "first", 4, 6))
    args = (b.tensor("up.weight", b.random(6, 4, 2, 2) / 3), b.tensor("up.bias", b.random(8)))
    x = b.op("up", "conv_transpose2d.input", R(x), *args, [2, 2], [0, 0], [0, 0], 2, [1, 1])
    return head(b, b.relu(x), 8)


@opens(stem=8, inner=6, last=5)
def residual(b):
    x = b.relu(b.norm(b.conv("x", "stem", 4, 8), "bn0", 8))
    y = b.norm(b.conv(b.relu(b.conv(x, "inner", 8, 6)), "outer", 6, 8), "bn1", 8)
    return head(b, b.relu(b.conv(b.relu(b.add(x, y)), "last", 8, 5)), 5)


@opens(trunk=8, squeeze=3)
def squeeze_excite(b):
    x = b.relu(b.norm(b.conv("x", "trunk", 4, 8), "bn", 8))
    s = b.op("pool", "mean.dim", R(x), [2, 3], True)
    s = b.op("gate", "sigmoid.default", R(b.conv(b.relu(b.conv(s, "squeeze", 8, 3, 1)), "excite", 3, 8, 1)))
    return head(b, b.op("scaled", "mul.Tensor", R(x), R(s)), 8)


@opens(trunk=8, squeeze=3)
def squeeze_excite_of_linears(b):
    x = b.conv("x", "trunk", 4, 8)
    s = b.linear(b.relu(b.linear(b.mean(x), "squeeze", 8, 3)), "excite", 3, 8)
    s = b.op("wide", "expand_as.default", R(b.op("shaped", "reshape.default", R(s), [-1, 8, 1, 1])), R(x))
    return head(b, b.op("scaled", "mul.Tensor", R(x), R(s)), 8)


@opens(left=5, right=3, second=6)
def concatenation(b):
    left, right = b.relu(b.conv("x", "left", 4, 5)), b.norm(b.conv("x", "right", 4, 3, 1), "bn", 3)
    x = b.op("cat", "cat.default", [R(left), R("x"), R(right)], 1)
    return head(b, b.conv(x, "second", 12, 6), 6)


@opens(first=6, grow=4, grow2=3)
def dense_block(b):
    x = b.conv("x", "first", 4, 6)
    y = b.conv(b.relu(b.norm(x, "bn0", 6)), "grow", 6, 4)
    xy = b.op("cat", "cat.default", [R(x), R(y)], 1)
    z = b.conv(b.relu(b.norm(xy, "bn1", 10)), "grow2", 10, 3)
    return head(b, b.norm(b.op("cat2", "cat.default", [R(xy), R(z)], 1), "bn2", 13), 13)


@opens(first=5, **{"first[2]": 3}, second=4)
def split_in_two(b):
    x = b.relu(b.conv("x", "first", 4, 8))
    pieces = b.op("split", "split_with_sizes.default", R(x), [5, 3], 1)
    front, back = items(b, pieces, "front", "back")
    x = b.add(b.conv(front, "second", 5, 4), b.conv(back, "third", 3, 4))
    return head(b, x, 4)


@opens(first=4)
def chunk_and_multiply(b):
    x = b.conv("x", "first", 4, 8)
    first, second = items(b, b.op("chunk", "chunk.default", R(x), 2, 1), "half0", "half1")
    return head(b, b.op("gated", "mul.Tensor", R(first), R(b.op("gate", "sigmoid.default", R(second)))), 4)


@opens(first=2, **{"first[2]": 6}, second=3)
def sliced(b):
    x = b.relu(b.conv("x", "first", 4, 8))
    front = b.op("front", "slice.Tensor", R(x), 1, 0, 2)
    back = b.op("back", "slice.Tensor", R(x), 1, 2, 9223372036854775807)
    parts = b.conv(front, "second", 2, 3), b.op("part", "narrow.default", R(back), 1, 0, 6)
    y = b.op("cat", "cat.default", [R(p) for p in parts], 1)
    return b.graph(b.linear(b.mean(y), "head", 9, 3))


@opens(first=8)
def pools(b):
    x = b.op("max", "max_pool2d.default", R(b.conv("x", "first", 4, 8)), [2, 2])
    x = b.op("avg", "adaptive_avg_pool2d.default", R(b.op("avg2", "avg_pool2d.default", R(x), [2, 2])), [1, 1])
    return b.graph(b.linear(b.flatten(x), "head", 8, 3))


@opens(first=8)
def max_pool_with_indices(b):
    pair = b.op("pair", "adaptive_max_pool2d.default", R(b.conv("x", "first", 4, 8)), [1, 1])
    return b.graph(b.linear(b.flatten(*items(b, pair, "max")), "head", 8, 3))


@opens(first=5, fc=7)
def flatten_into_linear(b):
    x = b.flatten(b.relu(b.norm(b.conv("x", "first", 4, 5), "bn", 5)))
    x = b.linear(x, "fc", 180, 7)
    return b.graph(b.linear(b.relu(x), "head", 7, 3))


@opens(first=5)
def batch_norm_of_a_flatten(b):
    x = b.norm(b.flatten(b.conv("x", "first", 4, 5)), "bn", 180)
    return b.graph(b.linear(x, "head", 180, 3))


@opens(first=8, second=6)
def shuffle_operator(b):
    x = b.op("shuffle", "channel_shuffle.default", R(b.relu(b.conv("x", "first", 4, 8))), 2)
    return head(b, b.conv(x, "second", 8, 6), 6)


def _shuffled(b, x, n, groups):
    x = b.op(f"{x}_view", "reshape.default", R(x), [-1, groups, n // groups, 6, 6])
    x = b.op(f"{x}_swap", "transpose.int", R(x), 1, 2)
    return b.op(f"{x}_back", "reshape.default", R(b.op(f"{x}_copy", "contiguous.default", R(x))), [-1, n, 6, 6])


@opens(left=3, right=4, **{"right[2]": 2}, third=4)  # by who reads them; one channel of left is alone in that
def shuffle_of_views(b):
    left, right = b.relu(b.conv("x", "left", 4, 4)), b.norm(b.conv("x", "right", 4, 6), "bn", 6)
    x = _shuffled(b, b.op("cat", "cat.default", [R(left), R(right)], 1), 10, 2)
    items(b, b.op("chunk", "chunk.default", R(x), 2, 1), "half0", "half1")
    third = b.conv("half0", "third", 5, 4)
    return head(b, b.op("cat2", "cat.default", [R("half1"), R(third)], 1), 9)


@opens(first=6)
def resized(b):
    x = b.op("up", "upsample_bilinear2d.vec", R(b.conv("x", "first", 4, 6)), [9, 9], False, None)
    x = b.op("nearest", "upsample_nearest2d.vec", R(x), [12, 12], None)
    x = b.op("pad", "pad.default", R(x), [1, 1, 2, 0], "reflect", None)
    return head(b, b.op("pad2", "constant_pad_nd.default", R(x), [1, 0, 0, 1], 0.5), 6)


@opens(stem=4, wide=4)
def padded_shortcut(b):  # option A of the CIFAR residual networks
    x = b.relu(b.conv("x", "stem", 4, 4))
    y = b.norm(b.conv(x, "wide", 4, 8, stride=2), "bn", 8)
    short = b.op("steps", "slice.Tensor", R(b.op("rows", "slice.Tensor", R(x), 2, 0, 100, 2)), 3, 0, 100, 2)
    short = b.op("pad", "pad.default", R(short), [0, 0, 0, 0, 2, 2], "constant", 0)
    return head(b, b.relu(b.add(short, y)), 8)


@opens(hidden=9)
def layer_norm_block(b):
    b.inputs[0] = InputSpec("x", (5, 4))
    x = b.linear("x", "embed", 4, 6)
    scale, shift = b.tensor("ln.weight", b.random(6)), b.tensor("ln.bias", b.random(6))
    y = b.op("ln", "layer_norm.default", R(x), [6], scale, shift, 1e-5)
    y = b.linear(b.op("act", "gelu.default", R(b.linear(y, "hidden", 6, 9))), "back", 9, 6)
    y = b.op("scaled", "mul.Tensor", R(y), b.tensor("gamma", b.random(6)))
    return b.graph(b.linear(b.op("mean", "mean.dim", R(b.add(x, y)), [1]), "head", 6, 3))


@opens(first=3, second=6)
def group_norm(b):
    x = b.conv("x", "first", 4, 12)
    scale, shift = b.tensor("gn.weight", b.random(12)), b.tensor("gn.bias", b.random(12))
    x = b.op("gn", "group_norm.default", R(x), 3, scale, shift, 1e-5, True)
    return head(b, b.conv(b.relu(x), "second", 12, 6), 6)


@opens(q=3, proj=6)
def attention_operator(b):
    b.inputs[0] = InputSpec("x", (5, 4))
    heads = []
    for name in ("q", "k", "values"):
        y = b.op(f"{name}_split", "reshape.default", R(b.linear("x", name, 4, 12)), [-1, 5, 3, 4])
        heads.append(R(b.op(f"{name}_heads", "transpose.int", R(y), 1, 2)))
    y = b.op("attention", "scaled_dot_product_attention.default", *heads)
    y = b.op("joined", "reshape.default", R(b.op("swap", "transpose.int", R(y), 1, 2)), [-1, 5, 12])
    return b.graph(b.linear(b.op("mean", "mean.dim", R(b.linear(y, "proj", 12, 6)), [1]), "head", 6, 3))


@opens(qkv=3, proj=6)
def attention_of_products(b):  # one Linear for all three, a softmax, a bias for each head, a mask for all
    b.inputs[0] = InputSpec("x", (5, 4))
    y = b.op("split", "reshape.default", R(b.linear("x", "qkv", 4, 36)), [-1, 5, 3, 3, 4])
    y = b.op("unbound", "unbind.int", R(b.op("moved", "permute.default", R(y), [2, 0, 3, 1, 4])))
    items(b, y, *"qkv")
    q = b.op("cosine", "mul.Tensor", R("q"), b.tensor("rotary", b.random(5, 4)))
    y = b.op("scores", "matmul.default", R(q), R(b.op("kt", "transpose.int", R("k"), -2, -1)))
    y = b.op("biased", "add.Tensor", R(b.op("halved", "mul.Tensor", R(y), 0.5)), b.tensor("bias", b.random(3, 5, 5)))
    y = b.op("masked", "add.Tensor", R(y), b.tensor("mask", b.random(1, 1, 5, 5)))
    y = b.op("mixed", "matmul.default", R(b.op("softmax", "softmax.int", R(y), -1)), R("v"))
    y = b.op("joined", "reshape.default", R(b.op("swap", "transpose.int", R(y), 1, 2)), [-1, 5, 12])
    return b.graph(b.linear(b.op("mean", "mean.dim", R(b.linear(y, "proj", 12, 6)), [1]), "head", 6, 3))


@opens(qkv=3, proj=6)
def class_token(b):  # a stored token in front and stored positions, then an attention over the normalised tokens
    b.inputs[0] = InputSpec("x", (5, 4))
    batch = R(b.op("batch", "sym_size.int", R("x"), 0))
    y = b.op("token_each", "expand.default", b.tensor("token", b.random(1, 1, 8)), [batch, -1, -1])
    y = b.op("tokens", "cat.default", [R(y), R(b.linear("x", "embed", 4, 8))], 1)
    y = b.op("placed", "add.Tensor", R(y), b.tensor("place", b.random(6, 8)))
    y = b.op("ln", "layer_norm.default", R(y), [8], b.tensor("ln.weight", b.random(8)), None, 1e-5)
    y = b.op("split", "reshape.default", R(b.linear(y, "qkv", 8, 36)), [-1, 6, 3, 3, 4])
    y = b.op("unbound", "unbind.int", R(b.op("moved", "permute.default", R(y), [2, 0, 3, 1, 4])))
    y = b.op("attention", "scaled_dot_product_attention.default", *map(R, items(b, y, *"qkv")))
    y = b.op("joined", "reshape.default", R(b.op("swap", "transpose.int", R(y), 1, 2)), [-1, 6, 12])
    return b.graph(b.linear(b.op("mean", "mean.dim", R(b.linear(y, "proj", 12, 6)), [1]), "head", 6, 3))


@opens(embed=7, read=6)
def positions_before_a_linear(b):  # stored positions that differ from token to token, no norm behind them
    b.inputs[0] = InputSpec("x", (5, 4))
    batch = R(b.op("batch", "sym_size.int", R("x"), 0))
    y = b.op("token_each", "expand.default", b.tensor("token", b.random(1, 2, 7)), [batch, -1, -1])
    y = b.op("tokens", "cat.default", [R(y), R(b.linear("x", "embed", 4, 7))], 1)
    return b.graph(b.linear(b.op("mean", "mean.dim", R(b.linear(y, "read", 7, 6)), [1]), "head", 6, 3))


@opens(first=5)
def gated_unit(b):
    return head(b, b.op("glu", "glu.default", R(b.conv("x", "first", 4, 10)), 1), 5)


@opens(first=8, last=5)
def shared_module(b):  # the same convolution twice
    x = b.relu(b.conv("x", "first", 4, 8))
    weight, bias = b.tensor("twice.weight", b.random(8, 8, 3, 3) / 6), b.tensor("twice.bias", b.random(8))
    for k in range(2):
        x = b.op(f"call{k}", "conv2d.default", R(x), weight, bias, [1, 1], [1, 1], [1, 1], 1)
    return head(b, b.conv(x, "last", 8, 5), 5)


@opens(first=6, second=5)
def tied_readers(b):  # two values read by one weight: their channels go together
    left, right = b.relu(b.conv("x", "first", 4, 6)), b.conv("x", "other", 4, 6)
    weight = b.tensor("second.weight", b.random(5, 6, 1, 1))
    a, c = (b.op(f"read_{v}", "conv2d.default", R(v), weight, None, [1, 1], [0, 0], [1, 1], 1) for v in (left, right))
    return head(b, b.op("product", "mul.Tensor", R(a), R(c)), 5)


@opens(first=8, second=6)
def prelu(b):
    x = b.op("act", "prelu.default", R(b.conv("x", "first", 4, 8)), b.tensor("act.weight", b.random(8)))
    x = b.op("act2", "prelu.default", R(b.conv(x, "second", 8, 6)), b.tensor("act2.weight", b.random(1)))
    return head(b, x, 6)


@opens(first=8)
def affine_parameters(b):  # scale, shift and a positional term that are no layer's own
    x = b.op("scaled", "mul.Tensor", R(b.conv("x", "first", 4, 8)), b.tensor("gamma", b.random(8, 1, 1)))
    x = b.op("placed", "add.Tensor", R(x), b.tensor("place", b.random(1, 8, 6, 6)))
    return head(b, b.op("plane", "add.Tensor", R(x), b.tensor("same", b.random(1, 1, 6, 6))), 8)


@opens(embed=7, hidden=6)
def tokens_mixed(b):  # an MLP over positions leaves the channels open, and so does one over channels
    b.inputs[0] = InputSpec("x", (5, 4))
    x = b.op("swap", "transpose.int", R(b.linear("x", "embed", 4, 7)), 1, 2)
    x = b.op("swap2", "transpose.int", R(b.linear(b.relu(b.linear(x, "mix", 5, 8)), "mix2", 8, 5)), 1, 2)
    return b.graph(b.linear(b.op("mean", "mean.dim", R(b.relu(b.linear(x, "hidden", 7, 6))), [1]), "head", 6, 3))


@opens(first=6, second=5)
def windows(b):  # window partition, roll, and back, on channels-last values
    x = b.op("last", "permute.default", R(b.conv("x", "first", 4, 6)), [0, 2, 3, 1])
    x = b.op("rolled", "roll.default", R(x), [-1, -1], [1, 2])
    x = b.op("cut", "reshape.default", R(x), [-1, 2, 3, 2, 3, 6])
    x = b.op("windows", "reshape.default", R(b.op("order", "permute.default", R(x), [0, 1, 3, 2, 4, 5])), [-1, 9, 6])
    x = b.linear(x, "second", 6, 5)
    x = b.op("cut2", "reshape.default", R(x), [-1, 2, 2, 3, 3, 5])
    x = b.op("order2", "permute.default", R(x), [0, 1, 3, 2, 4, 5])
    x = b.op("merged", "reshape.default", R(x), [-1, 36, 5])
    return b.graph(b.linear(b.op("mean", "mean.dim", R(x), [1]), "head", 5, 3))


@opens(first=6, second=5)
def patch_merging(b):  # four neighbours side by side
    x = b.op("last", "permute.default", R(b.conv("x", "first", 4, 6)), [0, 2, 3, 1])
    x = b.op("cut", "reshape.default", R(x), [-1, 3, 2, 3, 2, 6])
    x = b.op("order", "permute.default", R(x), [0, 1, 3, 4, 2, 5])
    x = b.linear(b.op("flat", "flatten.using_ints", R(x), 3), "second", 24, 5)
    return b.graph(b.linear(b.op("mean", "mean.dim", R(x), [1, 2]), "head", 5, 3))


@opens(first=6)
def selected_branches(b):  # two branches stacked, weighted by a softmax over the branches and summed
    x = b.conv("x", "first", 4, 6)
    y = b.op("stack", "stack.default", [R(x), R(b.relu(x))], 1)
    w = b.op("mean", "mean.dim", R(y), [3, 4], True)
    w = b.op("softmax", "softmax.int", R(w), 1)
    return head(b, b.op("sum", "sum.dim_IntList", R(b.op("weighted", "mul.Tensor", R(y), R(w))), [1]), 6)


@opens(first=6)
def index_by_constants(b):
    order = b.tensor("order", torch.tensor([5, 4, 3, 0, 1, 2]))
    x = b.op("swap", "index_select.default", R(b.conv("x", "first", 4, 6)), 1, order)
    return head(b, x, 6)


def widths_of(coupling: Coupling) -> dict[str, int]:
    """The open channel sets and their channels."""
    return {c.name: c.channels for c in coupling.open}


def some_kept(coupling: Coupling, seed: int) -> dict[str, Tensor]:
    """A random subset of each open channel set, at least one channel."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for c in coupling.open:
        count = int(torch.randint(1, c.channels + 1, (1,), generator=generator))
        kept[c.name] = torch.randperm(c.channels, generator=generator)[:count].sort().values
    return kept


def without(coupling: Coupling, kept: Mapping[str, Tensor]) -> Graph:
    """The whole network with the readers' columns of all other channels at zero."""
    tensors = {}
    for c in coupling.open:
        gone = torch.ones(c.channels, dtype=torch.bool)
        gone[kept.get(c.name, torch.arange(c.channels))] = False
        for reader in c.readers:
            weight = tensors.get(reader.tensor, coupling.graph.tensors[reader.tensor])
            tensors[reader.tensor] = weight.index_fill(reader.dim, reader.positions[gone].flatten(), 0)
    return coupling.graph.with_tensors(tensors)


def with_copies(coupling: Coupling, channel_set: ChannelSet, copies: Mapping[int, int]) -> Graph:
    """Channel ``a`` made a copy of channel ``b`` for each item (a, b), in every part of the channel set."""
    tensors = {}
    for part in channel_set.parts:
        value = tensors.get(part.tensor, coupling.graph.tensors[part.tensor]).clone()
        for a, b in copies.items():
            value.index_copy_(part.dim, part.positions[a], value.index_select(part.dim, part.positions[b]))
        tensors[part.tensor] = value
    return coupling.graph.with_tensors(tensors)


def permuted(coupling: Coupling, channel_set: ChannelSet, order: Tensor) -> Graph:
    """The channels of one channel set in another order, in all its tensors."""
    tensors = {}
    places = {(p.tensor, p.dim): p.positions for p in (*channel_set.parts, *channel_set.readers)}
    for (name, dim), positions in places.items():
        value = tensors.get(name, coupling.graph.tensors[name])
        moved = value.index_select(dim, positions[order].flatten())
        tensors[name] = value.index_copy(dim, positions.flatten(), moved)
    return coupling.graph.with_tensors(tensors)


def gap(a: Graph, b: Graph, count: int = 3) -> float:
    """The largest relative difference of two networks' outputs in float64."""
    pairs = zip(outputs(a, count), outputs(b, count), strict=True)
    return max(float((x - y).norm() / x.norm()) if x.shape == y.shape else float("inf") for x, y in pairs)
