"""The artifact file: exact round trips, equal bytes for equal content, writes that are whole."""

import errno
import hashlib
import io
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redpp_serve.files import deterministic_zip, write_atomically
from redpp_serve.graph.artifact import ENTRIES, build, calls_document, load
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from tests.attacks.artifacts import entries, tiny

GOLDEN = (  # of build(tiny(), {"name": "tiny"}), format 1
    "e1c8295fa461fa7e4f4b7527b5551827747fcd6bf5027f4ac25c7af567152e14"
)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def holding(**named: Tensor) -> Graph:
    return Graph((InputSpec("x", (8,)),), named, (), tuple(named))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_point_weights_keep_every_bit(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    signed = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-7, -1.0], dtype=dtype)
    graph = holding(
        dense=torch.randn(9, 7, 3, 3, generator=g).to(dtype),
        few=signed[torch.randint(6, (5, 13), generator=g)],
        short=signed,
        scalar=torch.tensor(-0.0, dtype=dtype),
        empty=torch.zeros(0, 4, dtype=dtype),
        transposed=torch.randn(8, 9, generator=g).to(dtype).t(),
    )
    loaded = load(build(graph, {}).data).graph
    assert set(loaded.tensors) == set(graph.tensors)
    for name, tensor in graph.tensors.items():
        assert loaded.tensors[name].dtype is dtype and loaded.tensors[name].shape == tensor.shape
        assert raw(loaded.tensors[name]) == raw(tensor), name


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_integers_and_booleans_round_trip(dtype: torch.dtype) -> None:
    tensor = torch.arange(-100, 100).to(dtype).view(4, 50)
    loaded = load(build(holding(t=tensor), {}).data).graph.tensors["t"]
    assert loaded.dtype is dtype and torch.equal(loaded, tensor)


def test_nodes_with_every_kind_of_argument_round_trip() -> None:
    constants = (
        None,
        True,
        False,
        0,
        -1,
        1 << 40,
        0.1,
        -0.0,
        1e300,
        math.inf,
        -math.inf,
        "zeros",
        "ref",
        torch.float16,
        torch.contiguous_format,
        torch.channels_last,
        torch.channels_last_3d,
        [1, [2.5, None], []],
    )
    keywords = {"dtype": torch.int64, "t": Ref("w"), "k": [3]}
    nodes = (
        Node("a", "aten.cat.default", ([Ref("x"), Ref("x")], *constants), keywords),
        Node("b", "py.mul", (Ref("a"), math.nan)),
    )
    inputs = (InputSpec("x", (3, 4)), InputSpec("ids", (), "int64"))
    graph = Graph(inputs, {"w": torch.ones(2), "odd:name": torch.ones(1)}, nodes, ("b", "x", "w"))
    loaded = load(build(graph, {}).data).graph
    assert loaded.inputs == inputs and loaded.outputs == graph.outputs
    assert loaded.nodes[0] == nodes[0] and math.copysign(1, loaded.nodes[0].args[8]) == -1
    assert [type(a) for a in loaded.nodes[0].args] == [type(a) for a in nodes[0].args]
    assert math.isnan(loaded.nodes[1].args[1]) and loaded.nodes[1].args[0] == Ref("a")
    assert set(loaded.tensors) == {"w", "odd:name"}


def test_what_has_no_form_in_the_file_is_not_written() -> None:
    for constant in (torch.device("cpu"), 1j, {"a": 1}, slice(3), torch.ones(1)):
        graph = Graph((InputSpec("x", (8,)),), {}, (Node("y", "aten.relu.default", (constant,)),), ("y",))
        with pytest.raises(TypeError, match="no place in an artifact"):
            build(graph, {})


def test_description_comes_back_with_the_stored_bytes() -> None:
    loaded = load(build(tiny(), {"name": "ä", "nested": {"k": [1, 2.5, None]}}).data)
    assert loaded.description == {"name": "ä", "nested": {"k": [1, 2.5, None]}, "bytes": 4 * 4 + 32 + 16 * 4}


def test_ranges_of_integers_come_back_and_are_not_written_where_they_are_unknown() -> None:
    specs = (InputSpec("x", (2,), "int64", ((0, 9), (-3, 4)), ((-(2**63), 2**63 - 1),)), InputSpec("y", (3,), "int32"))
    graph = Graph(specs, {}, (), ("x",))
    assert load(build(graph, {}).data).graph.inputs == specs
    assert calls_document(graph)["inputs"][1] == {"name": "y", "shape": [3], "dtype": "int32"}


def test_loading_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "model.redpp"
    write_atomically(path, build(tiny(), {}).data)
    x = torch.randn(3, 8)
    assert torch.equal(Program(load(path).graph)(x)[0], Program(tiny())(x)[0])


def test_golden_bytes() -> None:
    """A change of these bytes changes the format: raise FORMAT, or undo it."""
    assert hashlib.sha256(build(tiny(), {"name": "tiny"}).data).hexdigest() == GOLDEN


def test_bytes_do_not_depend_on_the_order_of_tensors_or_their_memory() -> None:
    graph, reordered = tiny(), tiny()
    reordered.tensors.clear()
    reordered.tensors.update(b=graph.tensors["b"].clone(), w=graph.tensors["w"].t().contiguous().t().requires_grad_())
    assert build(graph, {"a": 1, "b": 2}).data == build(reordered, {"b": 2, "a": 1}).data
    assert build(load(build(graph, {}).data).graph, {}).data == build(graph, {}).data


BUILD = """
import hashlib, sys, torch
from torch import nn
torch.set_num_threads(int(sys.argv[1]))
from redpp_serve.capture.export import capture
from redpp_serve.graph.artifact import build
from redpp_serve.graph.graph import InputSpec
torch.manual_seed(0)
layers = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(1152, 70)
network = nn.Sequential(*layers)
network[0].weight.data = (network[0].weight.data * 8).round() / 8  # few values: a codebook
network[4].weight.data = (network[4].weight.data * 2000).round() / 2000
data = build(capture(network.eval(), [InputSpec("input_0", (3, 8, 8))], []), {"names": sorted({"p", "q", "r", "s"})})
data = data.data
print(hashlib.sha256(data).hexdigest(), len(data))
"""


@pytest.mark.exhaustive
def test_two_processes_write_the_same_bytes() -> None:
    """With other hash seeds and thread counts, from the module on."""
    running = []
    for seed, threads in (("1", "1"), ("77", "3")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", BUILD, threads]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    first, second = (process.communicate(timeout=120)[0] for process in running)
    assert len(first.split()) == 2 and first == second


def test_the_zip_holds_no_time_and_no_compression() -> None:
    with zipfile.ZipFile(io.BytesIO(build(tiny(), {}).data)) as archive:
        infos = archive.infolist()
    assert [i.filename for i in infos] == list(ENTRIES)
    assert {(i.date_time, i.compress_type, i.external_attr, i.create_system) for i in infos} == {
        ((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED, 0o644 << 16, 3)
    }


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "model.redpp"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new, and longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.redpp"]


def test_a_write_interrupted_by_the_user_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "model.redpp", b"new")
    assert os.listdir(tmp_path) == []


def test_writing_makes_folders_replaces_and_is_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "model.redpp"
    for content in (b"first, and longer", b"second"):
        write_atomically(path, content)
        assert path.read_bytes() == content and path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["model.redpp"]


def test_deterministic_zip_keeps_the_given_order() -> None:
    data = deterministic_zip({"b": b"1", "a": b"2"})
    assert list(entries(data).items()) == [("b", b"1"), ("a", b"2")]
    assert data == deterministic_zip({"b": b"1", "a": b"2"}) != deterministic_zip({"a": b"2", "b": b"1"})
