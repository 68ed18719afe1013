"""Random networks on images, drawn block by block: any order of the blocks gives a network that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import strategies as st

from redpp_serve.graph.graph import Graph, Node, Ref
from tests.support.networks import Builder, seeds

SIDE = 4
Block = Callable[[Builder, str, str, int], tuple[str, int]]  # a value, a new name, its channels -> the same after it


def _conv(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    return b.relu(b.norm(b.conv(x, name, n, 6, bias=False), f"{name}_bn", 6)), 6


def _wide(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    return b.op(f"{name}_act", "silu.default", Ref(b.conv(x, name, n, 8, 1))), 8


def _depthwise(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    return b.relu(b.norm(b.conv(x, name, n, n, groups=n), f"{name}_bn", n)), n


def _grouped(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    return b.conv(x, name, n, n, groups=2 if n % 2 == 0 else n), n


def _residual(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    return b.relu(b.add(x, b.conv(b.relu(b.conv(x, f"{name}a", n, 5)), f"{name}b", 5, n))), n


def _gate(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    s = b.op(f"{name}_pool", "mean.dim", Ref(x), [2, 3], True)
    s = b.conv(b.relu(b.conv(s, f"{name}a", n, 3, 1)), f"{name}b", 3, n, 1)
    return b.op(name, "mul.Tensor", Ref(x), Ref(b.op(f"{name}_gate", "sigmoid.default", Ref(s)))), n


def _dense(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    return b.op(f"{name}_cat", "cat.default", [Ref(x), Ref(b.conv(b.relu(x), name, n, 3))], 1), n + 3


def _shuffle(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    groups = 2 if n % 2 == 0 else 1
    y = b.op(f"{name}_view", "reshape.default", Ref(x), [-1, groups, n // groups, SIDE, SIDE])
    y = b.op(f"{name}_swap", "transpose.int", Ref(y), 1, 2)
    return b.op(name, "reshape.default", Ref(y), [-1, n, SIDE, SIDE]), n


def _halves(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    """One half goes through a convolution, the other passes by."""
    sizes = [n // 2, n - n // 2]
    pieces = b.op(f"{name}_split", "split_with_sizes.default", Ref(x), sizes, 1)
    for k in range(2):
        b.nodes.append(Node(f"{name}_{k}", "py.getitem", (Ref(pieces), k)))
    y = b.relu(b.conv(f"{name}_0", name, sizes[0], sizes[0]))
    return b.op(f"{name}_cat", "cat.default", [Ref(f"{name}_1"), Ref(y)], 1), n


def _glu(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    return b.op(f"{name}_glu", "glu.default", Ref(b.conv(x, name, n, 10)), 1), 5


def _group_norm(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    scale, shift = b.tensor(f"{name}.weight", b.random(n)), b.tensor(f"{name}.bias", b.random(n))
    return b.op(name, "group_norm.default", Ref(x), 2 if n % 2 == 0 else n, scale, shift, 1e-5, True), n


def _scale(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    x = b.op(f"{name}_scale", "mul.Tensor", Ref(x), b.tensor(f"{name}.gamma", 1 + b.random(n, 1, 1)))
    return b.op(name, "prelu.default", Ref(x), b.tensor(f"{name}.weight", b.random(n))), n


def _widen(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    padded = b.op(f"{name}_pad", "pad.default", Ref(x), [0, 0, 0, 0, 1, 2], "constant", 0)
    return b.add(padded, b.conv(x, name, n, n + 3)), n + 3


def _linear(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    """A Linear over channels-last positions, and back."""
    y = b.op(f"{name}_last", "permute.default", Ref(x), [0, 2, 3, 1])
    y = b.op(f"{name}_act", "gelu.default", Ref(b.linear(y, name, n, 7)))
    return b.op(f"{name}_first", "permute.default", Ref(y), [0, 3, 1, 2]), 7


def _attention(b: Builder, x: str, name: str, n: int) -> tuple[str, int]:
    """Three heads of two channels over the positions."""
    y = b.op(f"{name}_tokens", "transpose.int", Ref(b.op(f"{name}_flat", "flatten.using_ints", Ref(x), 2)), 1, 2)
    heads = []
    for role in "qkv":
        z = b.linear(y, f"{name}_{role}", n, 6)
        z = b.op(f"{name}_{role}s", "reshape.default", Ref(z), [-1, SIDE * SIDE, 3, 2])
        heads.append(Ref(b.op(f"{name}_{role}h", "transpose.int", Ref(z), 1, 2)))
    y = b.op(f"{name}_mix", "scaled_dot_product_attention.default", *heads)
    y = b.op(f"{name}_swap", "transpose.int", Ref(y), 2, 3)
    return b.op(f"{name}_join", "reshape.default", Ref(y), [-1, 6, SIDE, SIDE]), 6


BLOCKS: dict[str, Block] = {
    "conv": _conv,
    "wide": _wide,
    "depthwise": _depthwise,
    "grouped": _grouped,
    "residual": _residual,
    "gate": _gate,
    "dense": _dense,
    "shuffle": _shuffle,
    "halves": _halves,
    "glu": _glu,
    "group_norm": _group_norm,
    "scale": _scale,
    "widen": _widen,
    "linear": _linear,
    "attention": _attention,
}


def build(blocks: Sequence[str], seed: int, flat: bool) -> Graph:
    """The blocks in order on (3, SIDE, SIDE) images, then a mean or a flatten, and a classifier."""
    b = Builder(3, SIDE, SIDE, seed=seed)
    x, n = b.relu(b.conv("x", "stem", 3, 6)), 6
    for k, block in enumerate(blocks):
        x, n = BLOCKS[block](b, x, f"{block}{k}", n)
    x = b.flatten(x) if flat else b.mean(x)
    return b.graph(b.linear(x, "head", n * (SIDE**2 if flat else 1), 3))


@st.composite
def random_networks(draw: st.DrawFn) -> Graph:
    """One to six blocks of any kind."""
    blocks = draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=6))
    return build(blocks, draw(seeds), draw(st.booleans()))
