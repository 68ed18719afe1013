"""Counts add up, and the records of the report say what the network is."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from redpp_serve.graph.layers import find_layers, mac_count, parameter_count
from redpp_serve.graph.weights import split_weight
from redpp_serve.options import HASHES, HashTarget
from redpp_serve.pruning.accounting import Counts, count_dense, count_kernels, count_network, count_scalars, totals
from redpp_serve.pruning.fit import Reconstruction
from redpp_serve.pruning.hashing import hash_weight
from redpp_serve.pruning.records import HashRecord, HashSummary, LayerRecord, Share, SplitRecord, merge_record
from tests.support.networks import KINDS, network, quantised


def parts(graph):
    layers = {layer.name: layer for layer in find_layers(graph)}
    return layers, {name: split_weight(graph.tensors[layer.weight], layer.groups) for name, layer in layers.items()}


def written(record):
    """The record as the report holds it."""
    return json.loads(json.dumps(asdict(record), allow_nan=False))


def test_totals_are_those_of_the_dense_layers():
    for kind in KINDS:
        graph = network(kind)
        layers, _ = parts(graph)
        found = totals(graph, sum(map(count_dense, layers.values()), Counts()), 77)
        macs = sum(layer.macs for layer in layers.values())
        assert found["macs"] == found["multiplications"] == macs == mac_count(graph) and found["bytes"] == 77, kind
        assert found["additions"] == macs - sum(layer.positions * layer.shape[0] for layer in layers.values()), kind
        assert found["parameters"] == parameter_count(graph), kind


def test_both_readings_compare_dense_before_with_split_after():
    for kind in KINDS:
        before, after = network(kind), quantised(network(kind))
        layers, splits = parts(after)
        del splits["head"]  # excluded: stays dense
        found = count_network(find_layers(before), layers, after, splits).to_json()
        dense, head = sum(layer.macs for layer in layers.values()), layers["head"].macs
        kernel = sum(count_kernels(layers[n], s).multiplications for n, s in splits.items())
        weight = sum(count_scalars(layers[n], after.tensors[layers[n].weight]).multiplications for n in splits)
        assert found["kernel"]["multiplications"] == [dense, kernel + head], kind
        assert found["weight"]["multiplications"] == [dense, weight + head], kind
        for unit in found.values():
            assert set(unit) == {"multiplications", "additions", "bytes"}, kind
            assert all(b <= a for a, b in (unit["multiplications"], unit["additions"])), kind


@pytest.mark.parametrize("method", HASHES)
def test_the_record_of_a_hash(method):
    for shape in ((32, 8, 3, 3), (70, 40)):
        hashed = hash_weight(
            torch.randn(shape, generator=torch.Generator().manual_seed(0)), method, HashTarget(error=0.05)
        )
        record = written(HashRecord.of(hashed))
        assert record["values"] == len(hashed.weight.unique()) and 0.04 <= record["error"] <= 0.05
        assert set(record["alternatives"]) == set(HASHES) and record["zero_kernels"] < 0.1
        assert set(record["alternatives"][method]) == {"values", "entropy", "error"}
        assert (record["bandwidth"] is None) == (method != "kde")
        curve = record["density"]
        assert len(curve["x"]) == len(curve["y"]) <= 200 and (np.diff(curve["x"]) > 0).all() and min(curve["y"]) >= 0
        assert np.trapezoid(curve["y"], curve["x"]) == pytest.approx(1, abs=0.1)
        for name in ("edges", "modes"):
            assert all(curve["x"][0] <= v <= curve["x"][-1] for v in curve[name]) and len(curve[name]) > 3


def test_the_record_of_degenerate_weights_is_finite_json():
    weights = torch.zeros(20, 20), torch.full((9, 5, 3, 3), 2.0), torch.ones(1, 1), torch.zeros(2, 2, 1, 1)
    for weight in weights:
        record = written(HashRecord.of(hash_weight(weight, "kde", HashTarget(error=0.02))))
        assert record["values"] == 1 and record["error"] == 0, weight
        assert record["zero_kernels"] == float(weight.flatten()[0] == 0), weight


def test_zero_kernels_also_in_half_precision():
    weight = torch.randn(40, 8, 3, 3, generator=torch.Generator().manual_seed(0)) * 1e-3
    weight[:10] = 0
    for dtype in (torch.float32, torch.float16):
        assert HashRecord.of(hash_weight(weight.to(dtype), "kde", HashTarget(error=0.02))).zero_kernels == 0.25, dtype


def test_the_record_of_a_split():
    graph = quantised(network("chain"))
    layers, splits = parts(graph)
    record = SplitRecord.of(layers["inner"], splits["inner"])
    dense, counts = count_dense(layers["inner"]), count_kernels(layers["inner"], splits["inner"])
    assert record.kernels == 8 * 4 and record.unique_kernels == len(splits["inner"].kernels)
    assert record.multiplications == [30 * 9 * record.kernels, 30 * 9 * record.unique_kernels]
    assert record.multiplications[0] == layers["inner"].macs
    assert record.additions == [dense.additions, counts.additions]


def summary_of(layers, hashed, splits):
    errors = [h.codebook.error for h in hashed.values()]
    return HashSummary.of("kde", "t", 0.1, layers, hashed, splits), np.array(errors)


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
    hashed = {name: hash_weight(graph.tensors[layers[name].weight], "kde", HashTarget(error=0.02)) for name in layers}
    found, errors = summary_of(layers, hashed, splits)
    assert found.predicted_ratio == pytest.approx(found.measured_ratio, abs=0.01) and found.measured_error == 0.1
    assert found.predicted_error_typical == pytest.approx(np.sqrt((errors**2).sum()))
    assert found.predicted_error_bound == pytest.approx(np.prod(1 + errors) - 1)
    assert found.predicted_error_typical <= found.predicted_error_bound


def test_nothing_hashed_is_no_error():
    found, _ = summary_of({}, {}, {})
    assert found.predicted_ratio == found.measured_ratio == 0
    assert found.predicted_error_typical == found.predicted_error_bound == 0


def test_the_record_of_a_layer():
    before, after = network("chain", 8), network("chain", 4)
    (old,), (new,) = ([x for x in find_layers(g) if x.name == "second"] for g in (before, after))
    merge = merge_record(old, new, Reconstruction("second", 4, 3, 0.1), "")
    record = LayerRecord.of(before, old, new, hash=None, merge=merge, split=None, error=0.2)
    assert record.shape == [4, 8, 3, 3] and record.pruned_shape == [4, 4, 3, 3] and record.op == "conv2d"
    assert record.parameters == 4 * 8 * 9 + 4 and record.macs == 30 * 4 * 8 * 9
    assert record.hash is record.split is None and record.merge.error == 0.1 and record.error == 0.2
    assert merge_record(old, new, Reconstruction("second", 4, 4, 0.1), "").error is None
    assert merge_record(old, new, None, "").reason == "not narrowed"
    assert merge_record(old, new, None, "is an output").reason == "is an output"


def test_a_share_names_the_accuracy_only_where_it_was_measured():
    share = Share("hash", 0.1, None, 100, 2.0)
    assert "accuracy" not in share.to_json() and share.to_json()["agreement"] is None
    assert Share("hash", 0.1, None, 100, 2.0, 0.0).to_json()["accuracy"] == 0.0
