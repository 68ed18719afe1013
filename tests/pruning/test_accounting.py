"""The report's figures add up."""

import json

import numpy as np
import pytest
import torch

from redpp_serve.graph.layers import find_layers, mac_count, parameter_count
from redpp_serve.pruning.accounting import (
    both_readings,
    count_dense,
    count_kernels,
    count_scalars,
    hash_record,
    hash_summary,
    layer_record,
    split_record,
    split_weight,
    totals,
)
from redpp_serve.pruning.fit import Reconstruction
from redpp_serve.pruning.hashing import METHODS, Target, hash_weight
from tests.support.networks import KINDS, network, quantised


def parts(graph):
    layers = {layer.name: layer for layer in find_layers(graph)}
    return layers, {name: split_weight(graph.tensors[layer.weight], layer.groups) for name, layer in layers.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_totals_are_sums_over_layers(kind):
    graph = network(kind)
    layers, _ = parts(graph)
    found = totals(graph, (count_dense(layer) for layer in layers.values()), 77)
    macs = sum(layer.macs for layer in layers.values())
    assert found["macs"] == found["multiplications"] == macs == mac_count(graph) and found["bytes"] == 77
    assert found["additions"] == macs - sum(layer.positions * layer.shape[0] for layer in layers.values())
    assert found["parameters"] == parameter_count(graph)


@pytest.mark.parametrize("kind", KINDS)
def test_both_readings_compare_dense_before_with_split_after(kind):
    before, after = network(kind), quantised(network(kind))
    layers, splits = parts(after)
    del splits["head"]  # excluded: stays dense
    found = both_readings(dict(parts(before)[0]), layers, after, splits)
    dense = sum(layer.macs for layer in layers.values())
    head = layers["head"]
    kernel = sum(count_kernels(layers[n], s).multiplications for n, s in splits.items()) + head.macs
    weight = sum(count_scalars(layers[n], after.tensors[layers[n].weight]).multiplications for n in splits) + head.macs
    assert found["kernel"]["multiplications"] == [dense, kernel] and found["weight"]["multiplications"] == [
        dense,
        weight,
    ]
    for unit in found.values():
        assert set(unit) == {"multiplications", "additions", "bytes"} and all(
            b <= a for a, b in (unit["multiplications"], unit["additions"])
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(32, 8, 3, 3), (70, 40)])
def test_the_record_of_a_hash(method, shape):
    hashed = hash_weight(torch.randn(shape, generator=torch.Generator().manual_seed(0)), method, Target(error=0.05))
    record = json.loads(json.dumps(hash_record(hashed), allow_nan=False))
    assert record["values"] == len(hashed.weight.unique()) and 0.04 <= record["error"] <= 0.05
    assert set(record["alternatives"]) == set(METHODS) and record["zero_kernels"] < 0.1
    assert (record["bandwidth"] is None) == (method != "kde")
    curve = record["density"]
    assert len(curve["x"]) == len(curve["y"]) <= 200 and (np.diff(curve["x"]) > 0).all() and min(curve["y"]) >= 0
    assert np.trapezoid(curve["y"], curve["x"]) == pytest.approx(1, abs=0.1)
    for name in ("edges", "modes"):
        assert all(curve["x"][0] <= v <= curve["x"][-1] for v in curve[name]) and len(curve[name]) > 3


@pytest.mark.parametrize(
    "weight", [torch.zeros(20, 20), torch.full((9, 5, 3, 3), 2.0), torch.ones(1, 1), torch.zeros(2, 2, 1, 1)]
)
def test_the_record_of_degenerate_weights_is_finite_json(weight):
    record = json.loads(json.dumps(hash_record(hash_weight(weight, "kde", Target(error=0.02))), allow_nan=False))
    assert record["values"] == 1 and record["error"] == 0 and record["zero_kernels"] == float(weight.flatten()[0] == 0)


def test_zero_kernels_also_in_half_precision():
    weight = torch.randn(40, 8, 3, 3, generator=torch.Generator().manual_seed(0)) * 1e-3
    weight[:10] = 0
    for dtype in (torch.float32, torch.float16):
        assert hash_record(hash_weight(weight.to(dtype), "kde", Target(error=0.02)))["zero_kernels"] == 0.25


def test_the_record_of_a_split():
    graph = quantised(network("chain"))
    layers, splits = parts(graph)
    record = split_record(layers["inner"], splits["inner"])
    assert record["kernels"] == 8 * 4 and record["unique_kernels"] == len(splits["inner"].kernels)
    assert record["multiplications"][0] == layers["inner"].macs == 30 * 9 * record["kernels"]
    assert record["multiplications"][1] == 30 * 9 * record["unique_kernels"]


def test_the_prediction_from_frequencies_is_close_to_the_count():
    """Independent weights: what the frequencies predict is what the split finds."""
    generator = torch.Generator().manual_seed(0)
    graph = network("chain", 200)
    graph = graph.with_tensors(
        {
            "second.weight": torch.randint(0, 2, (4, 200, 3, 3), generator=generator) - 0.5,
            "inner.weight": torch.randint(-1, 2, (200, 4, 3, 3), generator=generator).float(),
        }
    )
    layers, splits = parts(graph)
    splits = {name: splits[name] for name in ("inner", "second")}
    hashed = {name: hash_weight(graph.tensors[layers[name].weight], "kde", Target(error=0.02)) for name in layers}
    first = {name: hash_weight(graph.tensors[layers[name].weight], "kde", Target(error=0.05)) for name in layers}
    found = hash_summary(layers, first, hashed, splits, "kde", "t", 0.1)
    assert (
        found["predicted_ratio"] == pytest.approx(found["measured_ratio"], abs=0.01) and found["measured_error"] == 0.1
    )
    errors = np.array([h.codebook.error for h in first.values()])
    assert found["predicted_error_typical"] == pytest.approx(np.sqrt((errors**2).sum()))
    assert found["predicted_error_bound"] == pytest.approx(np.prod(1 + errors) - 1)
    assert found["predicted_error_typical"] <= found["predicted_error_bound"]


def test_nothing_hashed_is_no_error():
    found = hash_summary({}, {}, {}, {}, "kde", "t", 0.0)
    assert (
        found["predicted_ratio"]
        == found["measured_ratio"]
        == found["predicted_error_typical"]
        == found["predicted_error_bound"]
        == 0
    )


def test_the_record_of_a_layer():
    before, after = network("chain", 8), network("chain", 4)
    (old,), (new,) = ([x for x in find_layers(g) if x.name == "second"] for g in (before, after))
    record = layer_record(before, old, new, None, None, Reconstruction("second", 4, 3, 0.1), "", 0.2)
    assert record["shape"] == [4, 8, 3, 3] and record["pruned_shape"] == [4, 4, 3, 3] and record["op"] == "conv2d"
    assert record["parameters"] == 4 * 8 * 9 + 4 and record["macs"] == 30 * 4 * 8 * 9
    assert record["hash"] is record["split"] is None and record["merge"]["error"] == 0.1 and record["error"] == 0.2
    assert layer_record(before, old, new, None, None, None, "", None)["merge"]["reason"] == "not narrowed"
    assert layer_record(before, old, new, None, None, None, "is an output", None)["merge"]["reason"] == "is an output"
