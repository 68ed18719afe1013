"""Graphs whose every operator is allowed, and that do not run, or would take gigabytes or hours."""

from collections.abc import Callable
from typing import Any

from tests.attacks.artifacts import forged

X: dict[str, Any] = {"ref": "x"}
BIG = 2_000_000_000
Call = tuple[str, list[Any]]


def ending_in(*calls: Call) -> Callable[[dict[str, Any]], Any]:
    """Replace the output of `tiny` by the last of these calls; ``{"ref": "n0"}`` is the first one's result."""

    def edit(document: dict[str, Any]) -> None:
        document["nodes"] += [
            {"name": f"n{k}", "op": op, "args": args, "kwargs": {}} for k, (op, args) in enumerate(calls)
        ]
        document["outputs"] = [f"n{len(calls) - 1}"]

    return edit


def chain(op: str, times: int, arguments: Callable[[dict[str, Any]], list[Any]], before: int = 0) -> list[Call]:
    """Return calls each of which takes the result of the one before; the first that of call ``before`` - 1, or x."""
    values = [{"ref": f"n{before + k - 1}"} if before + k else X for k in range(times)]
    return [(op, arguments(value)) for value in values]


def shaped(*shape: int) -> Callable[[dict[str, Any]], Any]:
    """Declare another shape of the input."""
    return lambda document: document["inputs"][0].update(shape=list(shape))


FIRST: Call = ("py.getitem", [{"ref": "n1"}, 0])
WIDE: Call = ("aten.expand.default", [{"ref": "b"}, [1 << 40, 16]])

BOMBS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "full": ending_in(("aten.full.default", [[BIG], 1.0])),
    "zeros": ending_in(("aten.zeros.default", [[BIG, BIG]])),
    "ones": ending_in(("aten.ones.default", [[1 << 62]])),
    "arange": ending_in(("aten.arange.default", [BIG])),
    "linspace": ending_in(("aten.linspace.default", [0, 1, BIG])),
    "logspace": ending_in(("aten.logspace.default", [0, 1, BIG])),
    "eye": ending_in(("aten.eye.default", [100_000])),
    "window": ending_in(("aten.hann_window.default", [BIG])),
    "triangle": ending_in(("aten.tril_indices.default", [100_000, 100_000])),
    "new tensor": ending_in(("aten.new_zeros.default", [X, [BIG, 4]])),
    "pad": ending_in(("aten.pad.default", [X, [BIG, BIG]])),
    "constant pad": ending_in(("aten.constant_pad_nd.default", [X, [0, BIG]])),
    "repeat": ending_in(("aten.repeat.default", [X, [100_000, 100_000]])),
    "tile": ending_in(("aten.tile.default", [X, [100_000, 100_000]])),
    "repeat interleave": ending_in(("aten.repeat_interleave.self_int", [X, BIG])),
    "upsample": ending_in(
        ("aten.unsqueeze.default", [X, 0]),
        ("aten.unsqueeze.default", [{"ref": "n0"}, 0]),
        ("aten.upsample_nearest2d.default", [{"ref": "n1"}, [100_000, 100_000]]),
    ),
    "bilinear upsample": ending_in(
        ("aten.unsqueeze.default", [X, 0]),
        ("aten.unsqueeze.default", [{"ref": "n0"}, 0]),
        ("aten.upsample_bilinear2d.default", [{"ref": "n1"}, [100_000, 100_000], False]),
    ),
    "vander": ending_in(("aten.vander.default", [{"ref": "b"}, BIG])),
    "diagonal": ending_in(*chain("aten.diag_embed.default", 11, lambda v: [v])),
    "doubled by cat": ending_in(*chain("aten.cat.default", 34, lambda v: [[v, v], 0])),
    "doubled by stack": ending_in(*chain("aten.stack.default", 60, lambda v: [[v, v], 0])),
    "outer products": ending_in(
        ("aten.flatten.using_ints", [X]),
        ("aten.outer.default", [{"ref": "n0"}, {"ref": "n0"}]),
        ("aten.flatten.using_ints", [{"ref": "n1"}]),
        ("aten.outer.default", [{"ref": "n2"}, {"ref": "n2"}]),
        ("aten.flatten.using_ints", [{"ref": "n3"}]),
        ("aten.outer.default", [{"ref": "n4"}, {"ref": "n4"}]),
        ("aten.flatten.using_ints", [{"ref": "n5"}]),
        ("aten.outer.default", [{"ref": "n6"}, {"ref": "n6"}]),
    ),
    "view that is copied": ending_in(WIDE, ("aten.contiguous.default", [{"ref": "n0"}])),
    "view that is summed": ending_in(WIDE, ("aten.sum.default", [{"ref": "n0"}])),
    "view that is taken apart": ending_in(WIDE, ("aten.unbind.int", [{"ref": "n0"}, 0]), FIRST),
    "view that is split": ending_in(WIDE, ("aten.split.Tensor", [{"ref": "n0"}, 1]), FIRST),
    "many chunks": ending_in(WIDE, ("aten.chunk.default", [{"ref": "n0"}, BIG]), FIRST),
    "many sections": ending_in(WIDE, ("aten.tensor_split.sections", [{"ref": "n0"}, BIG]), FIRST),
    "list times a number": ending_in(("py.mul", [[0], BIG]), ("py.getitem", [{"ref": "n0"}, 0])),
    "result times a number": ending_in(("aten.unbind.int", [X, 0]), ("py.mul", [{"ref": "n0"}, BIG]), FIRST),
    "text times a number": ending_in(("py.mul", ["a", BIG]), ("py.getitem", [{"ref": "n0"}, 0])),
    "format of a text": ending_in(("py.mod", ["%99999999999d", 1]), ("py.getitem", [{"ref": "n0"}, 0])),
    "squared 40 times": ending_in(("aten.sym_size.int", [X, 1]), *chain("py.mul", 40, lambda v: [v, v], 1)),
    "differences": ending_in(("aten.diff.default", [X, BIG])),
    "matrix product": ending_in(
        ("aten.full.default", [[30_000, 30_000], 1.0]),
        ("aten.mm.default", [{"ref": "n0"}, {"ref": "n0"}]),
        ("aten.mm.default", [{"ref": "n1"}, {"ref": "n0"}]),
    ),
    "decomposition": ending_in(
        ("aten.full.default", [[20_000, 20_000], 1.0]), ("aten.linalg_inv.default", [{"ref": "n0"}])
    ),
    "distances": ending_in(
        ("aten.full.default", [[20_000, 20_000], 1.0]), ("aten.cdist.default", [{"ref": "n0"}, {"ref": "n0"}])
    ),
    "window of a pool": ending_in(
        ("aten.full.default", [[1, 1, 20_000, 20_000], 1.0]),
        ("aten.max_pool2d.default", [{"ref": "n0"}, [5000, 5000], [1, 1], [2500, 2500]]),
    ),
    "many large steps": ending_in(
        ("aten.full.default", [[30_000, 10_000], 1.0]), *chain("aten.sin.default", 999, lambda v: [v], 1)
    ),
    "large input": shaped(1_000_000, 1_000_000),
    "input beyond 64 bits": shaped(1 << 40, 1 << 40),
    "input of many dimensions": shaped(*[2] * 60),
}
BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "text for a tensor": ending_in(("aten.relu.default", ["text"])),
    "nothing for a tensor": ending_in(("aten.relu.default", [])),
    "step of zero": ending_in(("aten.slice.Tensor", [X, 0, 0, 9, 0])),
    "index out of range": ending_in(("aten.select.int", [X, 1, 99])),
    "item out of range": ending_in(("aten.unbind.int", [X, 1]), ("py.getitem", [{"ref": "n0"}, 99])),
    "item by a text": ending_in(("aten.unbind.int", [X, 1]), ("py.getitem", [{"ref": "n0"}, "__class__"])),
    "shapes that do not fit": ending_in(("aten.mm.default", [X, X])),
    "division by zero": ending_in(("py.floordiv", [1, 0])),
    "negative size": ending_in(("aten.full.default", [[-1], 1.0])),
    "sizes of texts": ending_in(("aten.reshape.default", [X, ["8"]])),
    "reshape to another size": ending_in(("aten.reshape.default", [X, [7]])),
    "unknown equation": ending_in(("aten.einsum.default", ["->->", [X]])),
    "unknown mode": ending_in(("aten.pad.default", [X, [1, 1], "\x1b[31m\u202e"])),
    "list for a number": ending_in(("py.add", [[1], [2]])),
    "cat of nothing": ending_in(("aten.cat.default", [[]])),
    "stride of zero": ending_in(("aten.unfold.default", [X, 0, 1, 0])),
    "groups of zero": ending_in(("aten.channel_shuffle.default", [X, 0])),
    "nan for a size": ending_in(("aten.full.default", [[{"float": "nan"}], 1.0])),
    "input of another shape": shaped(9),
    "input without dimensions": shaped(),
}
UNSEEN = ending_in(("aten.softmax.int", [X, 9]))  # no such dimension, which the meta device does not look at


def bomb(name: str) -> bytes:
    """Return a whole artifact, its sums right, with one of the graphs above."""
    return forged({**BOMBS, **BROKEN}[name])
