"""A checkpoint gives back what was kept, and nothing of another run or of a damaged file."""

import math
from dataclasses import replace

import torch

from redpp_serve.pruning.checkpoint import Checkpoint, fingerprint
from tests.support.networks import network


def test_what_was_kept_comes_back(tmp_path):
    checkpoint = Checkpoint(tmp_path / "state", "key")
    assert checkpoint.restore() is None
    tensors = {"a": torch.randn(3, 4).T, "empty": torch.zeros(0, 2), "number": torch.tensor(3)}
    for step in (1, 2):
        checkpoint.keep(tensors, {"step": step, "error": 1 / 3, "worst": math.inf})
    found, values = Checkpoint(tmp_path / "state", "key").restore()
    assert values == {"step": 2, "error": 1 / 3, "worst": math.inf}
    assert found.keys() == tensors.keys() and all(found[name].equal(t) for name, t in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["state"], "a temporary file was left behind"


def test_without_a_path_nothing_is_kept():
    checkpoint = Checkpoint(None, "key")
    checkpoint.keep({"a": torch.zeros(1)}, {})
    assert checkpoint.restore() is None


def test_another_key_or_a_damaged_file_gives_nothing(tmp_path):
    path = tmp_path / "state"
    Checkpoint(path, "key").keep({"a": torch.zeros(100)}, {"step": 1})
    assert Checkpoint(path, "another").restore() is None
    data = path.read_bytes()
    for wrong in (b"", data[:-9], data[: len(data) // 2], b"not tensors at all", b"\xff" * 16 + data[16:]):
        path.write_bytes(wrong)
        assert Checkpoint(path, "key").restore() is None, wrong[:20]
    path.unlink()
    path.mkdir()
    assert Checkpoint(path, "key").restore() is None


def test_a_fingerprint_depends_on_everything():
    graph, x = network("chain"), torch.arange(6.0)
    stem = graph.node("stem")
    strided = graph.with_nodes({"stem": replace(stem, args=(*stem.args[:3], [2, 2], *stem.args[4:]))})
    heavier = graph.with_tensors({"stem.weight": 2 * graph.tensors["stem.weight"]})
    scalars = [graph.with_tensors({"count": torch.tensor(value)}) for value in (1, 2)]
    keys = [
        *(fingerprint([g], [x], 1, "a") for g in (graph, strided, heavier, *scalars)),
        fingerprint([graph, graph], [x], 1, "a"),
        fingerprint([graph], [x, x], 1, "a"),
        fingerprint([graph], [x.view(2, 3)], 1, "a"),
        fingerprint([graph], [x.view(torch.int32)], 1, "a"),
        fingerprint([graph], [x + 1], 1, "a"),
        fingerprint([graph], [x], 2, "a"),
        fingerprint([graph], [x], 1, "b"),
    ]
    assert len(set(keys)) == len(keys) and keys[0] == fingerprint([graph], [x.clone()], 1, "a")
