"""The graph: names, readers, and the passes that return another graph."""

import weakref
from dataclasses import replace

import pytest
import torch

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref, map_refs, once_per_graph


def graph() -> Graph:
    """cat(x + w, x, k=x) with a node and a tensor that nothing needs."""
    nodes = (
        Node("a", "aten.add.Tensor", (Ref("x"), Ref("w"))),
        Node("unused", "aten.mul.Tensor", (Ref("a"), Ref("v"))),
        Node("y", "aten.cat.default", ([Ref("a"), Ref("x")], 1)),
    )
    tensors = {"w": torch.ones(4), "v": torch.ones(4), "i": torch.ones(2, dtype=torch.int64)}
    return Graph((InputSpec("x", (4,)), InputSpec("ids", (2,), "int64")), tensors, nodes, ("y",))


def test_refs_reach_into_lists_and_keywords_in_order() -> None:
    node = Node("n", "aten.cat.default", ([Ref("a"), [Ref("b"), 3]], 1, "c"), {"k": (Ref("d"), None), "e": Ref("a")})
    assert list(node.refs()) == ["a", "b", "d", "a"]


def test_node_by_name() -> None:
    assert graph().node("a").op == "aten.add.Tensor"
    with pytest.raises(KeyError):
        graph().node("x")


def test_users_counts_each_reading() -> None:
    users = graph().users()
    assert [n.name for n in users["x"]] == ["a", "y"]
    assert [n.name for n in users["a"]] == ["unused", "y"]
    assert "y" not in users
    twice = replace(graph(), nodes=(Node("m", "aten.mul.Tensor", (Ref("x"), Ref("x"))),))
    assert len(twice.users()["x"]) == 2


def test_unused_nodes_and_tensors_go_and_inputs_stay() -> None:
    pruned = graph().pruned_of_unused()
    assert [n.name for n in pruned.nodes] == ["a", "y"]
    assert set(pruned.tensors) == {"w"}
    assert pruned.inputs == graph().inputs
    assert vars(pruned.pruned_of_unused()) == vars(pruned)


def test_a_tensor_that_is_an_output_is_used() -> None:
    assert set(replace(graph(), outputs=("v",)).pruned_of_unused().tensors) == {"v"}


def test_changes_return_another_graph() -> None:
    before = graph()
    sub = Node("a", "aten.sub.Tensor", before.nodes[0].args)
    after = before.with_tensors({"w": torch.zeros(4)}).with_nodes({"a": sub})
    assert after.tensors["w"].sum() == 0 and before.tensors["w"].sum() == 4
    assert after.node("a").op == "aten.sub.Tensor" and before.node("a").op == "aten.add.Tensor"
    assert [n.name for n in after.nodes] == [n.name for n in before.nodes]


@pytest.mark.parametrize(
    ("names", "inputs", "nodes"),
    [
        ({"x": "image"}, ["image", "ids"], ["a", "unused", "y"]),
        ({"x": "a"}, ["a", "ids"], ["a_0", "unused", "y"]),
        ({"x": "ids", "ids": "x"}, ["ids", "x"], ["a", "unused", "y"]),
        ({"y": "output_0", "x": "w"}, ["w", "ids"], ["a", "unused", "output_0"]),
        ({}, ["x", "ids"], ["a", "unused", "y"]),
    ],
)
def test_renamed_values_are_read_by_their_new_names(names: dict[str, str], inputs: list[str], nodes: list[str]) -> None:
    before = replace(graph(), buffers=frozenset({"w"}))
    after = before.renamed(names)
    assert [spec.name for spec in after.inputs] == inputs and [node.name for node in after.nodes] == nodes
    every = [*inputs, *after.tensors, *nodes]
    assert len(set(every)) == len(every) and {ref for node in after.nodes for ref in node.refs()} <= set(every)
    x = torch.arange(8.0).view(2, 4)
    ids = torch.zeros(2, 2, dtype=torch.int64)
    assert torch.equal(Program(after)(x, ids)[0], Program(before)(x, ids)[0])
    assert after.buffers is not None and after.buffers <= after.tensors.keys() and len(after.buffers) == 1


def test_precision_changes_floating_point_alone() -> None:
    half = graph().to(torch.float16)
    assert {k: t.dtype for k, t in half.tensors.items()} == {"w": torch.float16, "v": torch.float16, "i": torch.int64}
    assert [i.dtype for i in half.inputs] == ["float16", "int64"]


def test_map_refs_keeps_structure() -> None:
    assert map_refs([Ref("a"), (Ref("b"), 2), "a", None], str.upper) == ["A", ("B", 2), "a", None]


def test_what_is_derived_is_computed_once_for_each_graph_and_dies_with_it() -> None:
    calls: list[tuple[int, ...]] = []

    @once_per_graph
    def count(given: Graph, *extra: int) -> int:
        calls.append(extra)
        return len(given.nodes)

    one, other = graph(), graph()
    assert [count(one), count(one), count(one, 2), count(other), count(one, 2)] == [3] * 5
    assert calls == [(), (2,), ()]
    gone = weakref.ref(one)
    del one
    assert gone() is None
