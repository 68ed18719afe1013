"""Final codebooks: few values where the outputs allow it, more where they do not, and never beyond the budget."""

import pytest
import torch

from redpp_serve.graph.layers import find_layers
from redpp_serve.pruning.final_codebooks import LEVELS, hash_within
from tests.support.judging import compare_outputs
from tests.support.networks import KINDS, Builder, natural, quantised, trained


def hashed(graph, budget, count=12):
    return hash_within(graph, find_layers(graph), natural(graph, count), budget)


def sizes(found):
    return {name: book.codebook.size for name, book in found.hashed.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [0.03, 0.2])
def test_the_budget_is_kept_and_the_error_is_the_one_measured(kind, budget):
    graph = trained(kind)
    found = hashed(graph, budget)
    error = compare_outputs(graph, found.graph, natural(graph, 12)).error
    assert error <= budget and found.added**0.5 == pytest.approx(error, rel=1e-4, abs=1e-7)
    assert set(found.hashed) == {layer.name for layer in find_layers(graph)}
    for name, size in sizes(found).items():
        weight = found.graph.tensors[f"{name}.weight"]
        assert len(weight.unique()) == size <= LEVELS[-1]
        assert weight is found.hashed[name].weight or torch.equal(weight, found.hashed[name].weight)
    others = set(graph.tensors) - {f"{name}.weight" for name in found.hashed}
    assert all(found.graph.tensors[name] is graph.tensors[name] for name in others)


def test_sixteen_values_are_enough_where_the_budget_allows_them():
    found = sizes(hashed(trained("residual", 32), 1.0))
    assert found.pop("head") <= 12  # it has no more weights
    assert set(found.values()) == {LEVELS[0]}


def test_a_smaller_budget_takes_more_values():
    graph = trained("residual", 32)
    total = [sum(sizes(hashed(graph, budget)).values()) for budget in (1.0, 0.1, 0.03, 0.01)]
    assert total == sorted(total) and total[0] < total[-1]


def test_the_layer_that_moves_the_outputs_keeps_more():
    """Two layers of equal weights side by side, one of which counts a hundredth in the sum."""
    b = Builder(40)
    loud, quiet = (b.linear("x", name, 40, 40, bias=False) for name in ("loud", "quiet"))
    b.tensors["quiet.weight"] = b.tensors["loud.weight"].flip(0) / 100
    graph = b.graph(b.add(loud, quiet))
    found = sizes(hashed(graph, 0.03))
    assert found["quiet"] == LEVELS[0] < found["loud"]


def test_without_a_budget_all_get_the_finest():
    graph = trained("chain", 32)
    found = hashed(graph, 0.0)
    assert min(sizes(found)[name] for name in ("inner", "second")) > LEVELS[-2] and 0 < found.added < 1e-3


def test_zeros_stay_zeros():
    graph = trained("chain", 24)
    weight = graph.tensors["inner.weight"].clone()
    weight[:, 1] = 0
    weight[3] = 0
    found = hashed(graph.with_tensors({"inner.weight": weight}), 0.5)
    assert ((weight == 0) == (found.graph.tensors["inner.weight"] == 0)).all()


def test_constant_and_quantised_layers_are_left_as_they_are():
    graph = quantised(trained("chain", 24), 0.5)
    graph = graph.with_tensors(
        {
            "second.weight": torch.full_like(graph.tensors["second.weight"], 0.3),
            "head.weight": torch.zeros_like(graph.tensors["head.weight"]),
        }
    )
    found = hashed(graph, 0.1)
    assert sizes(found)["second"] == sizes(found)["head"] == 1
    assert (
        all(torch.equal(found.graph.tensors[name], tensor) for name, tensor in graph.tensors.items())
        and found.added == 0
    )


def test_no_layer_is_no_error():
    graph = trained("chain")
    found = hash_within(graph, [], natural(graph, 4), 0.1)
    assert found.hashed == {} and found.added == 0


def test_big_networks_are_measured_on_fewer_inputs():
    graph = trained("chain")
    layers, inputs = find_layers(graph), natural(graph, 12)
    limited = hash_within(graph, layers, inputs, 0.3, probe_macs=1.0)
    few = hash_within(graph, layers, tuple(x[:5] for x in inputs), 0.3)
    assert limited.added == few.added != hash_within(graph, layers, inputs, 0.3).added


def test_progress_counts_the_layers():
    graph, steps = trained("chain"), []
    hash_within(graph, find_layers(graph), natural(graph, 4), 0.3, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_deterministic():
    graph = trained("depthwise")
    first, second = (hashed(graph, 0.1) for _ in range(2))
    assert all(torch.equal(tensor, second.graph.tensors[name]) for name, tensor in first.graph.tensors.items())
