"""A graph of somebody else is refused before it takes memory or time; networks in use are not."""

import itertools
import resource
import time
from dataclasses import replace

import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import load
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref, Size
from redpp_serve.packaging.bounds import MEMORY_VARIABLE, body_limits, check_answers, check_runs
from redpp_serve.packaging.server_config import limits_for
from tests.attacks.artifacts import forged
from tests.attacks.graphs import BOMBS, BROKEN, UNSEEN, bomb
from tests.support.rule_networks import OPEN


@pytest.mark.parametrize("name", [*BOMBS, *BROKEN])
def test_bombs_are_refused_at_no_cost(name: str) -> None:
    graph = load(bomb(name)).graph
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RedppError, match="does not run" if name in BROKEN else "would take|does not run") as caught:
        check_runs(graph)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_what_the_meta_device_overlooks_is_found_by_a_run() -> None:
    graph = load(forged(UNSEEN)).graph
    check_runs(graph)
    with pytest.raises(RedppError, match="the network does not run: Dimension out of range"):
        check_answers(graph)
    with pytest.raises(RedppError, match="would take"):
        check_answers(load(bomb("full")).graph)


@pytest.mark.parametrize("network", OPEN)
def test_networks_run(network: str) -> None:
    build, _ = OPEN[network]
    check_answers(build(), 4)


def memory(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """Allow as many float32 numbers."""
    monkeypatch.setenv(MEMORY_VARIABLE, str(4 * numbers / 2**30))


def doubled(times: int) -> Graph:
    """Map x (N, 64) to (N, 64 * 2**times)."""
    names = ["x", *(f"n{k}" for k in range(times))]
    nodes = [Node(y, "aten.cat.default", ([Ref(x), Ref(x)], 1)) for x, y in itertools.pairwise(names)]
    return Graph((InputSpec("x", (64,)),), {}, tuple(nodes), (names[-1],))


def test_what_lives_at_once_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two values have 64 * 8 and 64 * 16 numbers; what nothing reads any more is gone."""
    memory(monkeypatch, 64 * 24)
    check_runs(doubled(4))
    memory(monkeypatch, 64 * 24 - 1)
    with pytest.raises(RedppError, match="n3"):
        check_runs(doubled(4))


def test_the_batch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 64 * 100)
    check_runs(doubled(4), 3)
    with pytest.raises(RedppError, match="GiB of memory"):
        check_runs(doubled(4), 5)


def test_sizes_that_vary_count_at_their_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 64 * 100)
    spec = InputSpec("x", (64,), varying=((0, Size("W", 64, 1024)),))
    with pytest.raises(RedppError, match="GiB of memory"):
        check_runs(replace(doubled(4), inputs=(spec,)))


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "much", "\x1b"])
def test_memory_that_is_no_number(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEMORY_VARIABLE, given)
    with pytest.raises(RedppError, match="a number of GiB above 0"):
        check_runs(doubled(1))


def test_what_needs_values_runs_for_real_where_it_is_small() -> None:
    """The mask is stored, so the size of the result is known only from its values."""
    mask = torch.tensor([True, False] * 32)
    nodes = (
        Node("t", "aten.t.default", (Ref("x"),)),
        Node("y", "aten.index.Tensor", (Ref("t"), [Ref("mask")])),
        Node("z", "aten.t.default", (Ref("y"),)),
    )
    graph = Graph((InputSpec("x", (64,)),), {"mask": mask}, nodes, ("z",))
    assert Program(graph)(torch.ones(3, 64))[0].shape == (3, 32)
    check_runs(graph, 3)


def test_limits_of_bodies_are_those_of_the_largest_input_and_its_answer() -> None:
    """An image of any size up to 1280, and a map of eight channels at a fifth of it."""
    varying = ((1, Size("H", 32, 1280)), (2, Size("W", 32, 1280)))
    node = Node("y", "aten.conv2d.default", (Ref("x"), Ref("w"), None, [5, 5]))
    graph = Graph((InputSpec("x", (3, 64, 64), varying=varying),), {"w": torch.zeros(8, 3, 5, 5)}, (node,), ("y",))
    image, answer = ((3, 1280, 1280), "float32"), ((8, 256, 256), "float32")
    assert body_limits(graph, 1) == limits_for([image], [answer])
    assert body_limits(graph, 8) == limits_for([image], [answer], 8) != body_limits(graph, 1)
