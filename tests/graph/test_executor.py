"""The executor: what runs, on which device, and what it keeps in memory."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.graph.operators import INT8_VALUES, INT8_WEIGHT

X = (InputSpec("x", (4,)),)


class Watch(TorchDispatchMode):
    """Notes each call's name, and how many earlier results are still in memory when it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.alive: list[int] = []
        self._results: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.alive.append(sum(ref() is not None for ref in self._results))
        self.calls.append(str(func))
        result = func(*args, **(kwargs or {}))
        self._results.append(weakref.ref(result))
        return result


def chain(length: int) -> Graph:
    nodes = [Node("n0", "aten.neg.default", (Ref("x"),))]
    nodes += [Node(f"n{k}", "aten.neg.default", (Ref(f"n{k - 1}"),)) for k in range(1, length)]
    return Graph(X, {}, tuple(nodes), (f"n{length - 1}",))


def test_every_call_is_timed() -> None:
    seconds = Program(chain(5)).seconds(torch.ones(2, 4))
    assert list(seconds) == [f"n{k}" for k in range(5)] and all(0 < value < 60 for value in seconds.values())


def test_intermediate_values_are_freed() -> None:
    program, x = Program(chain(12)), torch.ones(2, 4)
    with Watch() as watch:
        program(x)
    assert len(watch.calls) == 12 and max(watch.alive) <= 2


def test_a_value_stays_until_its_last_reader() -> None:
    nodes = (*chain(6).nodes, Node("y", "aten.add.Tensor", (Ref("n0"), Ref("n5"))))
    x = torch.randn(2, 4)
    (y,) = Program(Graph(X, {}, nodes, ("y",)))(x)
    assert torch.equal(y, -x + x)


def test_wanted_values_are_kept_and_nothing_later_runs() -> None:
    x = torch.randn(2, 4)
    program = Program(chain(12), wanted=["n1", "n2", "x"])
    with Watch() as watch:
        first, second, same = program(x)
    assert torch.equal(first, x) and torch.equal(second, -x) and same is x
    assert watch.calls == ["aten.neg.default"] * 3


def test_branches_that_no_one_wants_do_not_run() -> None:
    nodes = (*chain(2).nodes, Node("other", "aten.exp.default", (Ref("w"),)))
    program, x = Program(Graph(X, {"w": torch.ones(1)}, nodes, ("n1",))), torch.ones(1, 4)
    with Watch() as watch:
        program(x)
    assert watch.calls == ["aten.neg.default"] * 2 and list(program.buffers()) == []


def test_tensors_and_inputs_can_be_outputs_and_repeat() -> None:
    program = Program(Graph(X, {"w": torch.ones(3)}, (), ("w", "x", "w")))
    x = torch.randn(2, 4)
    a, b, c = program(x)
    assert a is c and torch.equal(a, torch.ones(3)) and b is x
    assert program(x)[0] is a  # and a second run still finds it


def test_keywords_lists_and_constants() -> None:
    """A constant 0 or 1 is a number, not the value in that place."""
    nodes = (
        Node("rows", "aten.sym_size.int", (Ref("x"), 0)),
        Node("n", "py.mul", (Ref("rows"), 1)),
        Node("z", "aten.full.default", ([Ref("n"), 1], 0.5), {"dtype": torch.float64}),
        Node("s", "aten.add.Tensor", (Ref("x"), Ref("w")), {"alpha": 2}),
        Node("y", "aten.cat.default", ([Ref("s"), Ref("z")], 1)),
        Node("c", "aten.clamp.Tensor", (Ref("y"),), {"min": Ref("w2"), "max": None}),
    )
    x, w = torch.randn(3, 4), torch.randn(4)
    (y,) = Program(Graph(X, {"w": w, "w2": torch.zeros(1)}, nodes, ("c",)))(x)
    assert torch.equal(y, torch.cat([x + 2 * w, torch.full((3, 1), 0.5)], 1).double().clamp(min=0))


def test_several_inputs_and_lists_of_results() -> None:
    inputs = (InputSpec("a", (4,)), InputSpec("b", (), "int64"))
    nodes = (
        Node("halves", "aten.chunk.default", (Ref("a"), 2, 1)),
        Node("h", "py.getitem", (Ref("halves"), 1)),
        Node("y", "aten.index_select.default", (Ref("h"), 0, Ref("b"))),
    )
    a = torch.randn(3, 4)
    (y,) = Program(Graph(inputs, {}, nodes, ("y",)))(a, torch.tensor([2, 0]))
    assert torch.equal(y, a[[2, 0], 2:])


def test_runs_leave_inputs_and_weights_alone_and_repeat() -> None:
    w = torch.randn(4)
    nodes = (Node("m", "aten.mul.Tensor", (Ref("x"), Ref("w"))), Node("y", "aten.relu.default", (Ref("m"),)))
    program, x = Program(Graph(X, {"w": w}, nodes, ("y",))), torch.randn(2, 4)
    before, first = (x.clone(), w.clone()), program(x)[0]
    assert torch.equal(program(x)[0], first) and torch.equal(x, before[0]) and torch.equal(w, before[1])


def test_tensors_made_in_the_graph_lie_on_the_device_of_the_inputs() -> None:
    nodes = (
        Node("n", "aten.arange.default", (4,)),
        Node("z", "aten.zeros.default", ([4],), {"dtype": torch.float32}),
        Node("l", "aten.zeros_like.default", (Ref("x"),)),
        Node("a", "aten.add.Tensor", (Ref("n"), Ref("z"))),
        Node("y", "aten.add.Tensor", (Ref("a"), Ref("l"))),
    )
    graph = Graph(X, {"w": torch.ones(1)}, nodes, ("y", "n", "w"))
    assert torch.equal(Program(graph)(torch.ones(1, 4))[0], torch.arange(4.0)[None])
    assert {t.device.type for t in Program(graph).to("meta")(torch.ones(1, 4, device="meta"))} == {"meta"}


def test_weights_are_no_parameters_and_not_in_the_state_dict() -> None:
    program = Program(Graph(X, {"w.x": torch.ones(4)}, (Node("y", "aten.mul.Tensor", (Ref("x"), Ref("w.x"))),), ("y",)))
    assert not list(program.parameters()) and not program.state_dict() and len(list(program.buffers())) == 1


def test_operators_off_the_list_do_not_run() -> None:
    with pytest.raises(KeyError):
        Program(Graph(X, {}, (Node("y", "aten.from_file.default", ("/etc/hostname",)),), ("y",)))


def test_torch_compile_traces_a_program_without_a_break() -> None:
    """Else a benchmark's peer would be cut into pieces. Its own graph goes through lists, keywords and a device."""
    nodes = (
        Node("size", "aten.sym_size.int", (Ref("x"), 0)),
        Node("ones", "aten.ones.default", ([Ref("size"), 4],), {"dtype": torch.float32}),
        Node("wide", "aten.cat.default", ([Ref("x"), Ref("ones")], 1)),
        Node("y", "aten.linear.default", (Ref("wide"), Ref("w"))),
    )
    program, x = Program(Graph(X, {"w": torch.randn(3, 8)}, nodes, ("y",))).eval(), torch.randn(2, 4)
    torch._dynamo.reset()
    with torch.no_grad():
        (got,) = torch.compile(program, backend="eager", fullgraph=True)(x)
        assert torch.equal(got, program(x)[0])


def test_a_program_that_moved_uses_its_new_tensors() -> None:
    program = Program(
        Graph(X, {"w": torch.randn(3, 4)}, (Node("y", "aten.linear.default", (Ref("x"), Ref("w"))),), ("y",))
    )
    x = torch.randn(2, 4)
    (before,) = program(x)
    (after,) = program.double()(x.double())
    assert after.dtype == torch.float64
    torch.testing.assert_close(after.float(), before)


def ran(graph: Graph, *inputs: Tensor) -> dict[str, Any]:
    """Return shape and dtype of each value of a real run."""
    found: dict[str, Any] = {}
    Program(graph).tell(lambda name, value: found.update({name: (tuple(value.shape), value.dtype)}), *inputs)
    return found


LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {
    # operator, shape of x, shape of the weight, what follows the bias
    "conv1d": ("aten.conv1d.default", (2, 4, 17), (6, 4, 3), ([2], [1], [2])),
    "conv2d": ("aten.conv2d.default", (2, 4, 9, 8), (6, 2, 3, 2), ([2, 1], [1, 0], [1, 2], 2)),
    "conv3d": ("aten.conv3d.default", (2, 4, 5, 6, 7), (6, 4, 1, 2, 3), ()),
    "depthwise": ("aten.conv2d.default", (3, 4, 9, 8), (8, 1, 3, 3), ([1, 1], [1, 1], [1, 1], 4)),
    "one image": ("aten.conv2d.default", (4, 9, 8), (6, 4, 3, 3), ()),
    "one number for both": ("aten.conv2d.default", (2, 4, 9, 8), (6, 4, 3, 3), ([2], [1])),
    "fused conv": ("fused.conv2d", (2, 4, 9, 8), (6, 2, 3, 3), ((2, 2), (1, 1), (1, 1), 2, "relu")),
    "linear": ("aten.linear.default", (2, 5, 4), (6, 4), ()),
    "linear of a vector": ("aten.linear.default", (4,), (6, 4), ()),
    "fused linear": ("fused.linear", (2, 4), (6, 4), ("gelu",)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("case", LAYERS)
def test_types_are_those_of_a_run(case: str, with_bias: bool, dtype: torch.dtype) -> None:
    op, shape, weight, rest = LAYERS[case]
    tensors = {"w": torch.randn(weight, dtype=dtype), "b": torch.randn(weight[0], dtype=dtype)}
    args = [Ref("x"), Ref("w"), Ref("b") if with_bias else None, *rest]
    if op.startswith("fused."):
        args.insert(1, None)
    nodes = (Node("y", op, tuple(args)), Node("z", "aten.relu.default", (Ref("y"),)))
    graph = Graph((InputSpec("x", shape[1:], str(dtype).removeprefix("torch.")),), tensors, nodes, ("z",))
    x = torch.randn(shape, dtype=dtype)
    assert Program(graph).types(x) == ran(graph, x)


@pytest.mark.parametrize(
    ("weight", "bias", "rest"),
    [((6, 3, 3, 3), 6, ()), ((6, 4, 3, 3), 5, ()), ((5, 2, 3, 3), 5, ([1], [0], [1], 2)), ((6, 4, 30, 3), 6, ())],
    ids=["channels", "bias", "groups", "kernel"],
)
def test_types_refuse_what_a_run_refuses(weight: tuple[int, ...], bias: int, rest: tuple[Any, ...]) -> None:
    tensors = {"w": torch.randn(weight), "b": torch.randn(bias)}
    node = Node("y", "aten.conv2d.default", (Ref("x"), Ref("w"), Ref("b"), *rest))
    with pytest.raises(RuntimeError):
        Program(Graph((InputSpec("x", (4, 9, 8)),), tensors, (node,), ("y",))).types(torch.zeros(2, 4, 9, 8))


def test_types_of_eight_bits_are_those_of_a_run_and_refused_alike() -> None:
    levels = torch.randint(-127, 128, (6, 4, 3, 3), dtype=torch.int8)
    tensors = {"l": levels, "s": torch.rand(6), "few": torch.rand(5), "floats": torch.rand(6, 4, 3, 3)}

    def graph(zero: int = 3, stored: str = "l", scale: str = "s") -> Graph:
        values = Node("v", INT8_VALUES, (Ref("x"), 0.1, zero))
        weight = Node("w", INT8_WEIGHT, (Ref(stored), Ref(scale)))
        nodes = (values, weight, Node("y", "aten.conv2d.default", (Ref("v"), Ref("w"))))
        return Graph((InputSpec("x", (4, 9, 8)),), tensors, nodes, ("y",))

    x = torch.randn(2, 4, 9, 8)
    for given in (graph(), graph(255), graph(stored="floats")):
        assert Program(given).types(x) == ran(given, x)
    for refused in (graph(256), graph(-1), graph(scale="few")):
        with pytest.raises(RuntimeError):
            Program(refused).types(x)


def test_types_are_found_where_zeros_are_refused() -> None:
    tensors = {"w": torch.zeros(9, 4), "b": torch.eye(3).flatten()}
    nodes = (
        Node("flat", "aten.linear.default", (Ref("x"), Ref("w"), Ref("b"))),
        Node("square", "aten.reshape.default", (Ref("flat"), [-1, 3, 3])),
        Node("y", "aten.linalg_inv.default", (Ref("square"),)),
    )
    found = Program(Graph(X, tensors, nodes, ("y",))).types(torch.zeros(2, 4))
    assert found["y"] == ((2, 3, 3), torch.float32)
