"""ONNX files become graphs: operator by operator against an engine that reads the file, whole networks, refusals."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redpp_serve.capture import capture_file
from redpp_serve.capture.inputs import parse_input
from redpp_serve.capture.onnx_reader import read_onnx, settle_inputs
from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import find_layers

onnx = pytest.importorskip("onnx")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto

Constants = dict[str, Any]
IMAGE = ["N", 4, 8, 9]


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def write(
    path: Path,
    nodes: list[Any],
    constants: Constants | None = None,
    inputs: dict[str, list[Any]] | None = None,
    opset: int = 17,
    outputs: tuple[str, ...] = ("y",),
    **domains: int,
) -> Path:
    """Write a model; inputs are float32 unless the shape begins with a type."""
    values = []
    for name, shape in (inputs or {"x": IMAGE}).items():
        kind = shape[0] if isinstance(shape[0], str) and shape[0].isupper() and len(shape[0]) > 1 else "FLOAT"
        sizes = shape[1:] if kind == shape[0] else shape
        values.append(helper.make_tensor_value_info(name, getattr(TensorProto, kind), sizes))
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
    made = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs]
    for value in made:
        value.ClearField("type")
    graph = helper.make_graph(nodes, "g", values, made, stored)
    versions = [
        helper.make_opsetid("", opset),
        *(helper.make_opsetid(k.replace("_", "."), v) for k, v in domains.items()),
    ]
    path.write_bytes(helper.make_model(graph, opset_imports=versions, ir_version=8).SerializeToString())
    return path


def node(op: str, inputs: str = "x", outputs: str = "y", **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(","), outputs.split(","), **attributes)


def settled(path: Path) -> None:
    """Compare the module with the engine at batches of 1, 2 and 3."""
    settle_inputs(read_onnx(path), [])


def captured(path: Path, *inputs: str) -> Graph:
    return capture_file(path, [parse_input(text, k) for k, text in enumerate(inputs)]).graph


W4, B6 = weights(6, 4, 3, 3), weights(6)
SAME = {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]}
POOL = {"kernel_shape": [3, 2], "strides": [2, 2]}
SINGLE: dict[str, tuple[Any, Constants, int]] = {
    "conv": (node("Conv", "x,w,b", pads=[1, 1, 1, 1]), {"w": W4, "b": B6}, 17),
    "conv, uneven": (node("Conv", "x,w", pads=[0, 1, 2, 0], strides=[2, 1], dilations=[1, 2]), {"w": W4}, 7),
    "conv, same": (node("Conv", "x,w", **SAME), {"w": W4}, 11),
    "conv, same lower": (node("Conv", "x,w", **{**SAME, "auto_pad": "SAME_LOWER"}), {"w": W4}, 22),
    "conv, groups": (node("Conv", "x,w", group=4), {"w": weights(8, 1, 3, 3)}, 17),
    "transposed": (node("ConvTranspose", "x,w", strides=[2, 2], pads=[1, 1, 1, 1]), {"w": weights(4, 5, 3, 3)}, 17),
    "transposed, uneven": (
        node("ConvTranspose", "x,w", strides=[2, 2], pads=[0, 1, 1, 0]),
        {"w": weights(4, 5, 3, 3)},
        17,
    ),
    "transposed, shape": (
        node("ConvTranspose", "x,w", strides=[2, 2], output_shape=[16, 18]),
        {"w": weights(4, 5, 3, 3)},
        17,
    ),
    "batch norm": (
        node("BatchNormalization", "x,s,b,m,v", epsilon=1e-3),
        {"s": weights(4), "b": weights(4), "m": weights(4), "v": np.abs(weights(4)) + 0.5},
        9,
    ),
    "instance norm": (node("InstanceNormalization", "x,s,b"), {"s": weights(4), "b": weights(4)}, 17),
    "layer norm": (node("LayerNormalization", "x,s,b", axis=-2), {"s": weights(8, 9), "b": weights(8, 9)}, 17),
    "group norm": (node("GroupNormalization", "x,s,b", num_groups=2), {"s": weights(4), "b": weights(4)}, 21),
    "local response norm": (node("LRN", size=3), {}, 17),
    "max pool": (node("MaxPool", **POOL, pads=[0, 1, 1, 0]), {}, 12),
    "max pool, ceil": (node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), {}, 12),
    "max pool, same": (node("MaxPool", **POOL, auto_pad="SAME_UPPER"), {}, 17),
    "average pool": (node("AveragePool", **POOL, pads=[1, 0, 1, 0]), {}, 17),
    "average pool, uneven": (node("AveragePool", **POOL, pads=[0, 1, 1, 0]), {}, 17),
    "average pool, counted": (node("AveragePool", **POOL, pads=[0, 1, 1, 0], count_include_pad=1), {}, 17),
    "global pools": (node("GlobalAveragePool"), {}, 7),
    "global max": (node("GlobalMaxPool"), {}, 17),
    "pad": (node("Pad", pads=[0, 0, 1, 2, 0, 0, 0, 1], value=1.5), {}, 10),
    "pad, reflect": (node("Pad", "x,p", mode="reflect"), {"p": ints(0, 0, 1, 2, 0, 0, 0, 1)}, 17),
    "pad, edge, axes": (node("Pad", "x,p,,a", mode="edge"), {"p": ints(1, 2, 0, 1), "a": ints(2, 3)}, 18),
    "upsample": (node("Upsample", "x,s", mode="nearest"), {"s": np.array([1, 1, 2, 3], np.float32)}, 9),
    "upsample, linear": (node("Upsample", "x,s", mode="linear"), {"s": np.array([1, 1, 2, 2], np.float32)}, 9),
    "resize, nearest": (
        node("Resize", "x,,s", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        {"s": np.array([1, 1, 2, 2], np.float32)},
        13,
    ),
    "resize, uneven": (node("Resize", "x,,s", mode="nearest"), {"s": np.array([1, 1, 1.5, 0.7], np.float32)}, 13),
    "resize, linear": (node("Resize", "x,,s", mode="linear"), {"s": np.array([1, 1, 2, 0.6], np.float32)}, 13),
    "resize, corners": (
        node("Resize", "x,,s", mode="linear", coordinate_transformation_mode="align_corners"),
        {"s": np.array([1, 1, 2, 3], np.float32)},
        13,
    ),
    "resize, cubic": (node("Resize", "x,,s", mode="cubic"), {"s": np.array([1, 1, 2, 2], np.float32)}, 13),
    "relu6": (node("Clip", "x,a,b"), {"a": np.float32(0), "b": np.float32(6)}, 13),
    "clip": (node("Clip", min=-0.5, max=0.25), {}, 7),
    "clip, low": (node("Clip", "x,a"), {"a": np.float32(0.1)}, 13),
    "prelu": (node("PRelu", "x,s"), {"s": weights(4, 1, 1)}, 17),
    "hard sigmoid": (node("HardSigmoid", alpha=0.3, beta=0.4), {}, 17),
    "celu": (node("Celu", alpha=0.7), {}, 17),
    "elu": (node("Elu", alpha=0.7), {}, 17),
    "leaky": (node("LeakyRelu", alpha=0.2), {}, 17),
    "gelu": (node("Gelu", approximate="tanh"), {}, 20),
    "softmax, old": (node("Softmax", axis=1), {}, 11),
    "softmax": (node("Softmax", axis=1), {}, 13),
    "log softmax": (node("LogSoftmax"), {}, 17),
    "number on the left": (node("Sub", "c,x"), {"c": np.float32(2.5)}, 17),
    "vector": (node("Div", "x,c"), {"c": np.abs(weights(4, 1, 1)) + 1}, 17),
    "power": (node("Pow", "x,c"), {"c": np.float32(2)}, 17),
    "power of": (node("Pow", "c,x"), {"c": np.float32(2)}, 17),
    "largest": (node("Max", "x,c"), {"c": np.float32(0.1)}, 17),
    "transpose": (node("Transpose", perm=[0, 2, 3, 1]), {}, 17),
    "flatten": (node("Flatten"), {}, 17),
    "reshape": (node("Reshape", "x,s"), {"s": ints(0, -1, 9)}, 17),
    "reshape, free": (node("Reshape", "x,s"), {"s": ints(-1, 36, 8)}, 17),
    "slice": (node("Slice", starts=[1, 2], ends=[9, -1], axes=[2, 3]), {}, 9),
    "slice, steps": (node("Slice", "x,s,e,a,t"), {"s": ints(1), "e": ints(2**62), "a": ints(3), "t": ints(3)}, 17),
    "slice, back": (node("Slice", "x,s,e,a,t"), {"s": ints(-1), "e": ints(-(2**62)), "a": ints(2), "t": ints(-2)}, 17),
    "gather": (node("Gather", "x,i", axis=2), {"i": ints(0, 5, -1)}, 17),
    "gather one": (node("Gather", "x,i", axis=3), {"i": np.int64(-2)}, 17),
    "gather table": (node("Gather", "x,i", axis=1), {"i": ints(0, 1, 2, 3).reshape(2, 2)}, 17),
    "squeeze": (node("Squeeze", "u,a"), {"a": ints(2)}, 17),
    "unsqueeze": (node("Unsqueeze", axes=[1, 3]), {}, 11),
    "tile": (node("Tile", "x,r"), {"r": ints(1, 2, 1, 3)}, 17),
    "expand": (node("Expand", "x,s"), {"s": ints(1, 4, 8, 9)}, 17),
    "mean": (node("ReduceMean", axes=[2, 3], keepdims=0), {}, 13),
    "sum": (node("ReduceSum", "x,a"), {"a": ints(-1)}, 13),
    "largest of": (node("ReduceMax", axes=[1]), {}, 13),
    "norm": (node("ReduceL2", axes=[1]), {}, 13),
    "log sum exp": (node("ReduceLogSumExp", "x,a"), {"a": ints(1, 2)}, 18),
    "argmax": (node("ArgMax", axis=1, keepdims=0), {}, 17),
    "to space": (node("DepthToSpace", blocksize=2), {}, 17),
    "to space, crd": (node("DepthToSpace", blocksize=2, mode="CRD"), {}, 17),
    "einsum": (node("Einsum", "x,w", equation="nchw, cd -> ndhw"), {"w": weights(4, 5)}, 17),
    "cast": (node("Cast", to=7), {}, 17),
    "where": (node("Where", "m,x,c"), {"m": weights(8, 9) > 0, "c": np.float32(3)}, 17),
    "erf": (node("Erf"), {}, 17),
}
UNARY = (
    "Abs Neg Sqrt Exp Floor Ceil Round Sign Relu Selu Sigmoid HardSwish Mish Softplus Softsign Tanh Identity Dropout"
)


@pytest.mark.parametrize("name", [*SINGLE, *UNARY.split()])
def test_an_operator(name: str, tmp_path: Path) -> None:
    one, constants, opset = SINGLE.get(name) or (node(name), {}, 18)
    before = [node("Unsqueeze", "x,two", "u")] if "u" in one.input else []
    constants = {**constants, **({"two": ints(2)} if before else {})}
    after = []
    if name == "Sqrt":
        before, one = [node("Abs", "x", "a")], node("Sqrt", "a")
    settled(write(tmp_path / "m.onnx", [*before, one, *after], constants, opset=opset))


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", GATES)
def test_a_recurrent_operator(op: str, direction: str, tmp_path: Path) -> None:
    """Sequences (N, T, n) with time first inside, a state for each direction, and all outputs."""
    hidden, both = 5, 2 if direction == "bidirectional" else 1
    rows = GATES[op] * hidden
    constants = {"w": weights(both, rows, 3), "r": weights(both, rows, hidden, seed=1)}
    constants |= {"b": weights(both, 2 * rows, seed=2), "sizes": ints(both, 1, hidden), "ones": ints(0)}
    options = {"linear_before_reset": 1} if op == "GRU" else {"activations": ["Relu"] * both} if op == "RNN" else {}
    last = ["h", "c"] if op == "LSTM" else ["h"]
    nodes = [
        node("Transpose", "x", "time", perm=[1, 0, 2]),
        node(op, "time,w,r,b", ",".join(["all", *last]), hidden_size=hidden, direction=direction, **options),
        *(node("Transpose", name, f"{name}_out", perm=[1, 0, 2]) for name in last),
        node("Transpose", "all", "y", perm=[2, 0, 1, 3]),
    ]
    names = ("y", *(f"{name}_out" for name in last))
    graph = captured(write(tmp_path / "m.onnx", nodes, constants, {"x": ["N", 6, 3]}, 14, names))
    assert graph.output_names == names
    assert [layer.stays for layer in find_layers(graph)] == ["a recurrent operator stays whole"] * 2 * both


def test_a_recurrent_operator_begins_with_the_states_it_is_given(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "x", "time", perm=[1, 0, 2]),
        node("Transpose", "start", "state", perm=[1, 0, 2]),
        node("GRU", "time,w,r,,,state", "all", hidden_size=4, linear_before_reset=1),
        node("Transpose", "all", "y", perm=[2, 0, 1, 3]),
    ]
    constants = {"w": weights(1, 12, 3), "r": weights(1, 12, 4)}
    graph = captured(write(tmp_path / "m.onnx", nodes, constants, {"x": ["N", 6, 3], "start": ["N", 1, 4]}))
    assert [spec.shape for spec in graph.inputs] == [(6, 3), (1, 4)]


def test_an_embedding_and_a_mask(tmp_path: Path) -> None:
    nodes = [node("Gather", "table,tokens", "e"), node("ReduceMean", "e", "y", axes=[1], keepdims=0)]
    path = write(tmp_path / "m.onnx", nodes, {"table": weights(2, 5)}, {"tokens": ["INT64", "N", 7]}, 13)
    graph = captured(path)
    assert [spec.name for spec in graph.inputs] == ["tokens"] and graph.inputs[0].dtype == "int64"


# --- sizes, layers, names ---


def heads() -> list[Any]:
    """Attention's way of splitting heads: the shape is computed, with the batch in it."""
    return [
        node("Shape", "x", "s"),
        node("Gather", "s,zero", "n"),
        node("Gather", "s,one", "t"),
        node("Unsqueeze", "n,zeros", "n1"),
        node("Unsqueeze", "t,zeros", "t1"),
        node("Concat", "n1,t1,four,minus", "shape", axis=0),
        node("Reshape", "x,shape", "h"),
        node("Transpose", "h", "ht", perm=[0, 2, 1, 3]),
        node("Shape", "ht", "hs"),
        node("Slice", "hs,minus,big", "last"),
        node("Cast", "last", "lastf", to=1),
        node("Sqrt", "lastf", "root"),
        node("Div", "ht,root", "y"),
    ]


def test_sizes_are_computed_with_a_free_batch(tmp_path: Path) -> None:
    constants = {"zero": np.int64(0), "one": np.int64(1), "zeros": ints(0), "four": ints(4), "minus": ints(-1)}
    path = write(tmp_path / "m.onnx", heads(), {**constants, "big": ints(2**62)}, {"x": ["N", 6, 12]})
    program = Program(captured(path))
    for batch in (1, 5):
        x = torch.randn(batch, 6, 12)
        assert torch.allclose(program(x)[0], x.reshape(batch, 6, 4, 3).transpose(1, 2) / 3**0.5)


def test_a_class_token_is_expanded_by_the_size_of_the_batch(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Slice", "s,zero,one", "n"),
        node("Concat", "n,one,wide", "shape", axis=0),
        node("Expand", "token,shape", "t"),
        node("Concat", "t,x", "y", axis=1),
    ]
    constants = {"zero": ints(0), "one": ints(1), "wide": ints(5), "token": weights(1, 1, 5)}
    assert captured(write(tmp_path / "m.onnx", nodes, constants, {"x": ["N", 3, 5]}))


def mlp() -> tuple[list[Any], Constants]:
    """The products of the exporters of PyTorch, Keras and scikit-learn."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["p"], "/net/net.0/MatMul"),
        helper.make_node("Add", ["b1", "p"], ["a"], "/net/net.0/Add"),
        node("Relu", "a", "r"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["g"], "/net/net.2/Gemm", alpha=0.5, beta=2.0),
        node("Sigmoid", "g", "sg"),
        node("Mul", "sg,g", "silu"),
        node("Gemm", "silu,head.weight,head.bias", "y", transB=1),
    ]
    constants = {"w1": weights(12, 32), "b1": weights(1, 32), "w2": weights(32, 16), "b2": weights(16)}
    return nodes, {**constants, "head.weight": weights(5, 16), "head.bias": weights(5)}


def test_products_with_stored_weights_are_layers(tmp_path: Path) -> None:
    nodes, constants = mlp()
    graph = captured(write(tmp_path / "m.onnx", nodes, constants, {"x": ["N", 12]}))
    assert [layer.name for layer in find_layers(graph)] == ["net.0", "net.2", "head"]
    assert [n.op.split(".")[1] for n in graph.nodes] == ["linear", "relu", "linear", "silu", "linear"]
    assert all(layer.bias for layer in find_layers(graph))


def test_layers_do_not_share_a_bias(tmp_path: Path) -> None:
    """Exporters store equal tensors once."""
    nodes = [node("Gemm", "x,w,b", "h", transB=1), node("Gemm", "h,v,b", "y", transB=1)]
    constants = {"w": weights(6, 6), "v": weights(6, 6, seed=1), "b": np.zeros(6, np.float32)}
    assert len(find_layers(captured(write(tmp_path / "m.onnx", nodes, constants, {"x": ["N", 6]})))) == 2


def test_channels_last_as_tensorflow_has_them(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "image", "c", perm=[0, 3, 1, 2]),
        node("Conv", "c,w,b", "h", **SAME),
        node("Clip", "h,zero,six", "r"),
        node("GlobalAveragePool", "r", "p"),
        node("Squeeze", "p,axes", "q"),
        node("MatMul", "q,head", "m"),
        node("Add", "m,bias", "z"),
        node("Softmax", "z", "y"),
    ]
    constants = {"w": W4, "b": B6, "zero": np.float32(0), "six": np.float32(6), "axes": ints(2, 3)}
    constants |= {"head": weights(6, 3), "bias": weights(3)}
    graph = captured(write(tmp_path / "m.onnx", nodes, constants, {"image": ["N", 9, 9, 4]}, 13))
    assert graph.inputs[0].shape == (9, 9, 4) and len(find_layers(graph)) == 2


def test_a_pipeline_of_scikit_learn(tmp_path: Path) -> None:
    """Standardised, two layers, probabilities, and a class that is looked up; the names of classes are left out."""
    ml = {"domain": "ai.onnx.ml"}
    nodes = [
        node("Scaler", "x", "s", offset=[0.5] * 4, scale=[2.0] * 4, **ml),
        node("MatMul", "s,w", "p"),
        node("Add", "p,b", "a"),
        node("Softmax", "a", "probabilities"),
        node("ArgMax", "probabilities", "best", axis=1, keepdims=0),
        node("ArrayFeatureExtractor", "classes,best", "found", **ml),
        node("Reshape", "found,flat", "label"),
        node("ArrayFeatureExtractor", "names,best", "name", **ml),
    ]
    constants = {"w": weights(4, 3), "b": weights(3), "classes": ints(7, 8, 9).reshape(1, 3), "flat": ints(-1)}
    constants["names"] = np.array([["a", "b", "c"]], dtype=object)
    path = write(
        tmp_path / "m.onnx", nodes, constants, {"x": ["N", 4]}, 13, ("label", "probabilities", "name"), ai_onnx_ml=1
    )
    found = capture_file(path, [])
    assert len(found.graph.outputs) == 2 and found.messages == ["left out output name, which is text"]
    x = torch.randn(6, 4)
    label, probabilities = Program(found.graph)(x)
    assert torch.equal(label, probabilities.argmax(1) + 7)


def test_a_network_of_pytorch_keeps_its_layers(tmp_path: Path) -> None:
    from torch import nn

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    for batch, axes in ((2, {"image": {0: "batch"}}), (1, None)):
        torch.onnx.export(
            net,
            (torch.randn(batch, 3, 8, 8),),
            str(tmp_path / "m.onnx"),
            dynamo=False,
            input_names=["image"],
            dynamic_axes=axes,
        )
        found = capture_file(tmp_path / "m.onnx", [])
        graph = found.graph
        assert found.messages == []
        assert [layer.name for layer in find_layers(graph)] == ["0", "4"] and graph.inputs[0].name == "image"
        x = torch.randn(3, 3, 8, 8)
        with torch.no_grad():
            assert torch.allclose(Program(graph)(x)[0], net(x), atol=1e-5)


# --- a batch that the file fixes, inputs ---

FIXED: dict[str, tuple[list[Any], Constants, list[int]]] = {
    "flatten": ([node("Reshape", "x,s")], {"s": ints(1, 60)}, [1, 3, 4, 5]),
    "flatten, open": ([node("Reshape", "x,s")], {"s": ints(1, -1)}, [1, 3, 4, 5]),
    "of four": ([node("Reshape", "x,s")], {"s": ints(4, 60)}, [4, 3, 4, 5]),
    "heads": (
        [node("Reshape", "x,s", "h"), node("Transpose", "h", perm=[0, 2, 1, 3])],
        {"s": ints(1, 6, 4, 3)},
        [1, 6, 12],
    ),
    "token": ([node("Concat", "t,x", axis=1)], {"t": weights(1, 1, 5)}, [1, 3, 5]),
    "merged": (
        [
            node("Transpose", "x", "q", perm=[1, 0, 2]),
            node("Reshape", "q,s", "f"),
            node("MatMul", "f,w", "m"),
            node("Reshape", "m,u", "v"),
            node("Transpose", "v", perm=[1, 0, 2]),
        ],
        {"s": ints(3, 5), "w": weights(5, 7), "u": ints(3, 1, 7)},
        [1, 3, 5],
    ),
    "heads of a sequence": (
        [
            node("Transpose", "x", "q", perm=[1, 0, 2]),
            node("Reshape", "q,s", "f"),
            node("Transpose", "f", "h", perm=[1, 0, 2]),
            node("Reshape", "h,u", "y"),
        ],
        {"s": ints(3, 2, 4), "u": ints(1, 2, 3, 4)},
        [1, 3, 8],
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_batch_is_made_free(name: str, tmp_path: Path) -> None:
    nodes, constants, shape = FIXED[name]
    graph = captured(write(tmp_path / "m.onnx", nodes, constants, {"x": shape}))
    assert len(Program(graph)(torch.randn(5, *shape[1:]))[0]) == 5


def test_a_batch_that_cannot_be_freed_is_refused(tmp_path: Path) -> None:
    for nodes, constants in (
        ([node("Add", "x,c")], {"c": weights(2, 3)}),
        ([node("Reshape", "x,s", "f"), node("Gather", "f,i")], {"s": ints(-1), "i": ints(0, 1, 2).reshape(1, 3)}),
    ):
        path = write(tmp_path / "m.onnx", nodes, constants, {"x": [len(constants.get("c", [0])), 3]})
        with pytest.raises(RedppError, match="for batches of .* only.*dynamic_axes"):
            captured(path)


def test_inputs_are_read_from_the_file_or_given(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [node("GlobalAveragePool")], {}, {"x": ["N", 4, "H", "W"]})
    with pytest.raises(RedppError, match=r"leaves sizes of its input x \?x4x\?x\?:float32 open.*--input"):
        captured(path)
    assert captured(path, "4x8x6").inputs[0].shape == (4, 8, 6)
    for given, says in (
        (["3x8x6"], "--input 3x8x6 for the input x"),
        (["4x8"], "--input 4x8"),
        (["4x8x6"] * 2, "2 --input given"),
    ):
        with pytest.raises(RedppError, match=says):
            captured(path, *given)


def test_names_of_inputs_become_arguments(tmp_path: Path) -> None:
    names = ["images:0", "class", "images_0", "3"]
    nodes = [helper.make_node("Concat", names, ["y"], axis=1)]
    graph = captured(write(tmp_path / "m.onnx", nodes, {}, {name: ["N", 2] for name in names}))
    assert [spec.name for spec in graph.inputs] == ["images_0", "input_class", "images_0_", "input_3"]
    keras = ["input_1", "input_0", "mask"]  # others than the numbers that inputs without a name have
    nodes = [helper.make_node("Concat", keras, ["y"], axis=1)]
    graph = captured(write(tmp_path / "k.onnx", nodes, {}, {name: ["N", 2] for name in keras}))
    assert [spec.name for spec in graph.inputs] == keras


def test_outputs_keep_the_names_of_the_file(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["head/out:0"]), helper.make_node("Abs", ["x"], ["x" * 999])]
    graph = captured(write(tmp_path / "m.onnx", nodes, {}, {"x": ["N", 3]}, outputs=("head/out:0", "x" * 999)))
    assert graph.output_names == ("head_out_0", "x" * 200)


def test_integers_of_a_file_keep_the_range_that_the_user_gives(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [node("Cast", to=TensorProto.FLOAT)], {}, {"x": ["INT64", "N", 3]})
    (spec,) = captured(path, "3:int64:0..9").inputs
    assert (spec.name, spec.ranges) == ("x", ((0, 9),))


# --- refusals ---


def lstm(path: Path, inputs: str = "x,w,r", **attributes: Any) -> None:
    constants = {"w": weights(1, 8, 3), "r": weights(1, 8, 2), "lengths": np.array([5], np.int32)}
    write(path, [node("LSTM", inputs, hidden_size=2, **attributes)], constants, {"x": [5, "N", 3]})


def changed(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path, [node("Relu")])
        model = onnx.load(path)
        change(model)
        path.write_bytes(model.SerializeToString())

    return make


def function(model: Any) -> None:
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], [node("Relu", "a", "b")], model.opset_import))


def circle(model: Any) -> None:
    model.graph.node[0].input[0] = "y"


def huge(model: Any) -> None:
    tensor = model.graph.initializer.add(name="w", data_type=1, raw_data=b"abcd")
    tensor.dims.extend([2**40, 2**40])


def outside(location: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        tensor = model.graph.initializer.add(name="w", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)

    return change


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "damaged": (lambda p: p.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xab\x10\x00\x00"), "cannot be read"),
    "lengths": (lambda p: lstm(p, "x,w,r,,lengths"), "LSTM '' takes the length of each sequence"),
    "clipped": (lambda p: lstm(p, clip=3.0), "peepholes, a clip or coupled gates"),
    "other activations": (lambda p: lstm(p, activations=["Relu", "Tanh", "Tanh"]), "activations relu, tanh, tanh"),
    "misshapen": (lambda p: lstm(p, "x,w,w"), "sizes that do not fit each other"),
    "computed weights": (
        lambda p: write(p, [node("RNN", "x,x,w", hidden_size=8)], {"w": weights(4, 8, 8)}),
        "weights that are computed",
    ),
    "control flow": (
        lambda p: write(p, [node("If", "x", then_branch=helper.make_graph([], "t", [], []))], {}, {"x": ["N", 1]}),
        "control flow: If",
    ),
    "quantised": (lambda p: write(p, [node("DequantizeLinear", "x,s")], {"s": np.float32(1)}), "quantized: Dequ"),
    "foreign": (
        lambda p: write(p, [node("FusedConv", domain="com.microsoft")], com_microsoft=1),
        "com.microsoft.FusedConv",
    ),
    "function": (changed(function), "functions of its own"),
    "circle": (changed(circle), "reads 'y' before"),
    "twice": (lambda p: write(p, [node("Relu"), node("Abs")]), "makes 'y' twice"),
    "no opset": (changed(lambda m: m.ClearField("opset_import")), "names no opset"),
    "old opset": (lambda p: write(p, [node("Relu")], opset=6), "opset 6.*from 7"),
    "sparse": (changed(lambda m: m.graph.sparse_initializer.add()), "sparse weights"),
    "no outputs": (changed(lambda m: m.graph.ClearField("output")), "1 inputs and 0 outputs"),
    "huge": (changed(huge), "has 4 bytes, not"),
    "absolute": (changed(outside("/etc/passwd")), "outside its folder"),
    "parent": (changed(outside("../w.bin")), "outside its folder"),
    "nameless": (changed(outside("")), "outside its folder"),
    "absent": (changed(outside("w.bin")), "cannot be read from 'w.bin'.*beside it"),
    "bomb": (
        lambda p: write(p, [node("ConstantOfShape", "s", "c"), node("Add", "x,c")], {"s": ints(2**20, 2**20)}),
        "makes a constant of 1099511627776 numbers",
    ),
    "growth": (
        lambda p: write(p, [node("Tile", "x,r")], {"r": ints(1, 2**13, 2**13, 1)}),
        "makes .* numbers of one input",
    ),
    "text": (lambda p: write(p, [node("Gather", "t,i")], {"t": np.array(["a"], object), "i": ints(0)}), "all text"),
    "constant": (lambda p: write(p, [node("Relu", "c")], {"c": weights(3)}), "does not depend on its inputs"),
    "control characters": (lambda p: write(p, [node("Relu", "x\x1b[2J")]), r"reads 'x\?\[2J'"),
    "complex": (changed(lambda m: m.graph.initializer.add(name="w", data_type=14, dims=[1])), "COMPLEX64"),
    "nan": (
        lambda p: write(p, [node("Add", "x,c")], {"c": np.full(9, np.nan, np.float32)}),
        "NaN among its weights: c",
    ),
    "statistics": (
        lambda p: write(p, [node("BatchNormalization", "x,s,s,s,s", training_mode=1)], {"s": weights(4)}, opset=15),
        "statistics of the batch",
    ),
    "too long": (
        lambda p: write(
            p, [node("Relu", f"v{k}" if k else "x", f"v{k + 1}") for k in range(10_000)] + [node("Abs", "v10000")]
        ),
        "10001 calls that are not constant, more than 10000",
    ),
    "too wide": (
        lambda p: write(
            p, [node("Sum", ",".join(map("x{}".format, range(257))))], {}, {f"x{k}": ["N", 1] for k in range(257)}
        ),
        "257 inputs, more than 256",
    ),
    "mixed items": (
        lambda p: write(p, [node("ReduceMean", axes=[0])], opset=13),
        "depends on the others|outputs of shape",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_network_is_refused_quickly(name: str, tmp_path: Path) -> None:
    make, says = REFUSED[name]
    make(tmp_path / "m.onnx")
    start = time.monotonic()
    with pytest.raises(RedppError, match=says) as caught:
        captured(tmp_path / "m.onnx")
    assert time.monotonic() - start < 20 and "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_weights_in_another_file(tmp_path: Path) -> None:
    nodes, constants = mlp()
    path = write(tmp_path / "m.onnx", nodes, constants, {"x": ["N", 12]})
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").stat().st_size > 2000
    assert len(find_layers(captured(path))) == 3
    data = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(data[:100])
    with pytest.raises(RedppError, match="cannot be read from 'w.bin'"):
        captured(path)
    (tmp_path / "real").write_bytes(data)
    (tmp_path / "w.bin").unlink()
    os.symlink(tmp_path / "real", tmp_path / "w.bin")
    with pytest.raises(RedppError, match="outside its folder"):
        captured(path)


def test_without_onnx_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.onnx", [node("Relu")])
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(RedppError, match="pip install onnx"):
        captured(path)


def test_the_reference_evaluator_stands_in_for_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    nodes, constants = mlp()
    settled(write(tmp_path / "m.onnx", nodes, constants, {"x": ["N", 12]}))
