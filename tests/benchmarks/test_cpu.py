"""The CPU benchmark times only what is right, and results/cpu.md shows its committed figures."""

import json
from pathlib import Path

import numpy
import pytest
import torch

from benchmarks.cpu import RATIOS, markdown, measure, merged, targets
from benchmarks.cpu_arms import Arm, arms
from redpp_serve.graph.executor import Program
from tests.support.networks import network

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"


def test_a_wrong_or_failing_arm_is_named_and_not_timed() -> None:
    graph = network("residual")
    program = Program(graph)
    x = torch.randn(2, *graph.inputs[0].shape)

    def broken(_: torch.Tensor) -> None:
        raise RuntimeError("no such compiler")

    every = [
        Arm("stock", graph, lambda x: lambda x: program(x)[0]),
        Arm("original", graph, lambda x: lambda x: program(x)[0] * 1.01),
        Arm("pruned", graph, broken),
    ]
    with torch.inference_mode():
        row = measure(every, x, 0.01, numpy.random.default_rng(0))
    assert set(row["ms"]) == {"stock"} and row["ratios"] == {}
    assert "wrong by" in row["not timed"]["original"] and "no such compiler" in row["not timed"]["pruned"]


def test_every_arm_of_a_pair_computes_its_own_graph() -> None:
    """Without the peers, which need packages of their own and compile for seconds."""
    original, pruned = network("residual", 16), network("residual", 8)
    x = torch.randn(2, *original.inputs[0].shape)
    with torch.inference_mode():
        module = lambda x: Program(original)(x)[0]  # noqa: E731
        every = [arm for arm in arms(module, original, pruned, 1.0) if not arm.name.startswith(("compiled", "onnx"))]
        row = measure(every, x, 0.01, numpy.random.default_rng(0))
    assert set(row["ms"]) == {"stock", "original", "dense", "pruned", "dense_pruned"} and row["not timed"] == {}
    assert set(row["ratios"]) == set(list(RATIOS)[:4])


def rows(ratio: float | None) -> list[dict]:
    title = next(iter(RATIOS))
    return [{"network": "n", "rows": [{"batch": 1, "ms": {}, "ratios": {title: [ratio, 1.0, 2.0]} if ratio else {}}]}]


@pytest.mark.parametrize(("ratio", "verdict"), [(1.5, "met"), (1.49, "missed"), (None, "not measured")])
def test_targets(ratio: float | None, verdict: str) -> None:
    assert targets(rows(ratio))[0].startswith(f"{verdict}: n, batch 1: pruned over original")


def test_rows_measured_later_join_those_that_are_there() -> None:
    one = lambda name, *batches: {"network": name, "rows": [{"batch": b, "ms": name} for b in batches]}  # noqa: E731
    found = merged(merged([one("a", 1, 8)], one("b", 1)), one("a", 8, 4) | {"macs": 3})
    assert [(n["network"], [row["batch"] for row in n["rows"]]) for n in found] == [("a", [1, 4, 8]), ("b", [1])]
    assert found[0]["macs"] == 3


def test_the_readme_shows_the_committed_figures() -> None:
    networks = json.loads(RESULTS.read_text(encoding="utf-8"))["networks"]
    text = (ROOT / "benchmarks" / "results" / "cpu.md").read_text(encoding="utf-8")
    assert markdown(networks) in text.split("<!-- table -->")[1].split("<!-- /table -->")[0]
