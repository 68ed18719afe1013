"""Each gate fails on its own number and passes otherwise; labelled data is read strictly."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from redpp_serve.capture.export import capture
from redpp_serve.errors import GateFailed, RedppError
from redpp_serve.graph.graph import InputSpec, Ref
from redpp_serve.graph.layers import find_layers
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.options import Options
from redpp_serve.pruning.judge import Agreement, Difference, Head, Reference
from redpp_serve.pruning.matching import smooth_noise
from redpp_serve.pruning.verification import check_gate, layer_errors, load_verify_data
from tests.support.judging import compare_outputs
from tests.support.networks import Builder, network, outputs


def difference(error, same=None, of=100):
    """A comparison on one family; ``same`` of ``of`` inputs have the same class, where there are classes."""
    agreement = {} if same is None else {"family": Agreement(same, of)}
    return Difference((Head("y", {"family": error}, agreement),), of)


GOOD = difference(0.05, 98)


def scaled(graph, factor, name="head.weight"):
    return graph.with_tensors({name: graph.tensors[name] * factor})


def test_the_relative_error_of_outputs_is_that_of_their_norms():
    graph = network("tokens")
    graph.tensors["head.weight"] *= 1.0
    inputs = smooth_noise(graph.inputs, 19, 0)
    found = compare_outputs(graph, scaled(graph, 1.25), inputs)
    assert found.error == pytest.approx(0.25, rel=1e-5) and found.images == 19
    assert found.agreement is None  # (N, tokens, 3) has no class dimension
    assert compare_outputs(graph, graph, inputs).error == 0


def test_agreement_counts_equal_classes():
    b = Builder(4)
    graph = b.graph(b.op("y", "mul.Tensor", Ref("x"), b.tensor("s", torch.ones(4))))
    graph = replace(graph, classes=frozenset({"output_0"}))
    other = graph.with_tensors({"s": torch.tensor([1.0, -1.0, 1.0, 1.0])})
    x = torch.eye(4)
    assert compare_outputs(graph, other, (x,)).agreement == 0.75
    assert compare_outputs(graph, graph, (x,)).agreement == 1.0


def test_not_a_number_is_an_error_not_a_pass():
    graph = network("mlp")
    found = compare_outputs(graph, scaled(graph, math.nan), smooth_noise(graph.inputs, 2, 0))
    with pytest.raises(GateFailed):
        check_gate(Options(), found, None)


def test_layer_errors_name_layers_and_skip_changed_shapes():
    graph = network("chain")
    other = scaled(graph, 1.5, "second.weight")
    reference = Reference(graph, smooth_noise(graph.inputs, 5, 0))
    errors = layer_errors(reference, other, find_layers(other))
    assert errors["stem"] == errors["inner"] == 0 and errors["second"] > 0.3 and errors["head"] > 0.1
    narrow = graph.with_tensors(
        {
            f"second_bn.{k}": graph.tensors[f"second_bn.{k}"][:2]
            for k in ("weight", "bias", "running_mean", "running_var")
        }
        | {
            "second.weight": graph.tensors["second.weight"][:2],
            "second.bias": graph.tensors["second.bias"][:2],
            "head.weight": graph.tensors["head.weight"][:, :2],
        }
    )
    assert set(layer_errors(reference, narrow, find_layers(narrow))) == {"stem", "inner", "head"}


GATES = [
    (Options(max_error=0.04), GOOD, None, "0.0500", "--max-error"),
    (Options(), difference(0.11), None, "0.1100", "--max-error"),
    (Options(method="red++", max_error=0.01), GOOD, None, "0.0500", "--max-error"),
    (Options(keep=0.5, max_error=0.01), GOOD, None, "0.0500", "--max-error"),
    (Options(target_macs=0.5, max_error=0.01), GOOD, None, "0.0500", "--max-error"),
    (Options(target_latency=0.5, max_error=0.01), GOOD, None, "0.0500", "--max-error"),
    (Options(min_agreement=0.99), GOOD, None, "98.0%", "--min-agreement"),
    (Options(min_agreement=0.5), difference(0.0), None, "no top-1 agreement", "--min-agreement"),
    (Options(keep=0.5), difference(0.51, 90), None, "0.5100", "--max-error"),
    (Options(target_macs=0.5), difference(0.4, 29), None, "29.0%", "--min-agreement"),
    (Options(max_accuracy_drop=0.5), GOOD, (0.93, 0.92), "1.00 points", "--max-accuracy-drop"),
]
PASSES = [
    (Options(), GOOD, None),
    (Options(max_error=0.05), GOOD, None),
    (Options(keep=0.5), difference(0.49, 31), None),
    (Options(keep=0.5, max_error=5.0), difference(3.0, 10), None),
    (Options(target_macs=0.5, min_agreement=0.0), difference(0.49, 10), None),
    (Options(target_macs=0.5, max_error=0.05), GOOD, None),
    (Options(method="red++"), difference(3.0), None),
    (Options(min_agreement=0.98), GOOD, None),
    (Options(max_accuracy_drop=1.0), GOOD, (0.75, 0.75)),
    (Options(max_accuracy_drop=0.0), GOOD, (0.75, 0.8)),
]


@pytest.mark.parametrize(("options", "difference", "accuracy", "number", "flag"), GATES)
def test_a_missed_limit_names_the_number_and_the_flag(options, difference, accuracy, number, flag):
    with pytest.raises(GateFailed) as failure:
        check_gate(options, difference, accuracy)
    assert number in failure.value.found and flag in failure.value.expected and failure.value.exit_code == 3


@pytest.mark.parametrize(("options", "difference", "accuracy"), PASSES)
def test_a_number_within_its_limit_passes(options, difference, accuracy):
    check_gate(options, difference, accuracy)


SHAPE = (3, 6, 5)


def save(tmp_path, **arrays):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return path


def test_labelled_data_measures_accuracy(tmp_path):
    graph = network("chain")
    x = torch.randn(70, *SHAPE)
    labels = torch.cat([y for (y,) in [outputs_for(graph, x)]]).argmax(1).numpy()
    labels[:7] = (labels[:7] + 1) % 3
    data = load_verify_data(save(tmp_path, inputs=x.numpy(), labels=labels.astype(np.uint8)), graph, None)
    assert data.accuracy(graph) == pytest.approx(63 / 70)


def outputs_for(graph, x):
    from redpp_serve.graph.executor import Program

    with torch.no_grad():
        return Program(graph)(x)


def test_image_bytes_are_normalised_as_the_server_does(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    path = save(tmp_path, inputs=x, labels=np.zeros(4, int))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    preprocess = Preprocess("RGB", *SHAPE[1:], mean, std, fit="crop", resize=(99, 99))
    (got,) = load_verify_data(path, network("chain"), preprocess).inputs
    expected = (x / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(load_verify_data(path, network("chain"), None).inputs[0], x / 255, rtol=1e-6)


def test_bytes_of_vectors_keep_their_shape(tmp_path):
    path = save(tmp_path, inputs=np.full((4, 5), 51, np.uint8), labels=np.zeros(4, int))
    (got,) = load_verify_data(path, network("mlp"), None).inputs
    assert got.shape == (4, 5) and torch.allclose(got, torch.tensor(0.2))


NINE = Preprocess("L", 5, 5, (9.0,), (9.0,))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.bool_])
def test_other_types_are_taken_as_they_are(tmp_path, dtype):
    x = np.ones((2, 5), dtype)
    (got,) = load_verify_data(save(tmp_path, inputs=x, labels=np.zeros(2, int)), network("mlp"), NINE).inputs
    assert got.dtype == torch.float32 and (got == 1).all()


OK_X, OK_Y = np.zeros((4, *SHAPE), np.float32), np.zeros(4, int)
BAD = {
    "no labels": ({"inputs": OK_X}, "labels"),
    "no inputs": ({"labels": OK_Y}, "inputs"),
    "other names": ({"x": OK_X, "y": OK_Y}, "inputs"),
    "channels last": ({"inputs": OK_X.transpose(0, 2, 3, 1), "labels": OK_Y}, "(4, 6, 5, 3)"),
    "fewer labels": ({"inputs": OK_X, "labels": OK_Y[:3]}, "(3,)"),
    "one-hot labels": ({"inputs": OK_X, "labels": np.eye(4, dtype=int)}, "(4, 4)"),
    "empty": ({"inputs": OK_X[:0], "labels": OK_Y[:0]}, "(0,"),
    "no batch": ({"inputs": OK_X[0], "labels": OK_Y}, "(3, 6, 5)"),
    "a scalar": ({"inputs": np.float32(1), "labels": OK_Y}, "()"),
    "float labels": ({"inputs": OK_X, "labels": OK_Y + 0.5}, "float64"),
    "strings": ({"inputs": OK_X.astype("U3"), "labels": OK_Y}, "U3"),
    "objects": ({"inputs": OK_X.astype(object), "labels": OK_Y}, "pickle"),
}


@pytest.mark.parametrize("case", BAD)
def test_arrays_that_do_not_fit_are_refused(tmp_path, case):
    arrays, word = BAD[case]
    with pytest.raises(RedppError) as refusal:
        load_verify_data(save(tmp_path, **arrays), network("chain"), None)
    assert "--verify-data" in refusal.value.found and word in refusal.value.found


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "npy", "cut"])
def test_files_that_are_no_npz_are_refused(tmp_path, kind):
    path = save(tmp_path, inputs=OK_X, labels=OK_Y)
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "npy":
        np.save(tmp_path / "data", OK_X)
        (tmp_path / "data.npy").rename(path)
    elif kind != "missing":
        path.write_bytes({"text": b"inputs,labels\n", "empty": b"", "cut": data[: len(data) // 2]}[kind])
    with pytest.raises(RedppError, match="--verify-data"):
        load_verify_data(path, network("chain"), None)


def test_a_network_of_two_inputs_takes_no_verify_data(tmp_path):
    b = Builder(5)
    b.inputs.append(InputSpec("z", (5,)))
    graph = b.graph(b.linear(b.op("s", "add.Tensor", Ref("x"), Ref("z")), "head", 5, 2))
    assert len(outputs(graph)) == 1
    with pytest.raises(RedppError):
        load_verify_data(save(tmp_path, inputs=np.zeros((4, 5), np.float32), labels=OK_Y), graph, None)


def test_accuracy_needs_class_scores(tmp_path):
    """One score map an image would count its pixels as right answers."""
    graph = capture(nn.Conv2d(3, 4, 1).eval(), [InputSpec("x", (3, 2, 2))], [])
    np.savez(tmp_path / "d.npz", inputs=np.zeros((8, 3, 2, 2), "float32"), labels=np.zeros(8, "int64"))
    with pytest.raises(RedppError, match="class scores"):
        load_verify_data(tmp_path / "d.npz", graph, None)
