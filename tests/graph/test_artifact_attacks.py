"""Damaged and hostile artifacts: each is refused in words, and nothing in a file ever runs."""

import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph import operators as ops
from redpp_serve.graph.artifact import ENTRIES, build, load
from redpp_serve.graph.executor import Program
from tests.attacks.artifacts import entries, forged, tensors, tiny


def zipped(content: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in content:
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            archive.writestr(info, data)
    return buffer.getvalue()


WHOLE = list(entries(build(tiny(), {"name": "tiny"}).data).items())
BOMB = zipped([(name, bytes(1 << 22)) for name in ENTRIES], zipfile.ZIP_DEFLATED)
FILES = {
    "empty": (b"", "not a zip"),
    "text": (b"<html>not found</html>", "not a zip"),
    "truncated": (build(tiny(), {}).data[:-40], "not a zip"),
    "head of the file": (build(tiny(), {}).data[:100], "not a zip"),
    "compressed": (zipped(WHOLE, zipfile.ZIP_DEFLATED), "compressed entries"),
    "bomb": (BOMB, "compressed entries"),
    "bzip2": (zipped(WHOLE, zipfile.ZIP_BZIP2), "compressed entries"),
    "entry missing": (zipped(WHOLE[:2]), "entries"),
    "entry added": (zipped([*WHOLE, ("handler.py", b"import os")]), "entries"),
    "traversal": (zipped([("../manifest.json", WHOLE[0][1]), *WHOLE[1:]]), "entries"),
    "absolute": (zipped([("/manifest.json", WHOLE[0][1]), *WHOLE[1:]]), "entries"),
    "damaged weights": (zipped([*WHOLE[:2], (ENTRIES[2], WHOLE[2][1][:-1] + b"?")]), "does not match its SHA-256"),
    "damaged graph": (zipped([WHOLE[0], (ENTRIES[1], WHOLE[1][1] + b" "), WHOLE[2]]), "does not match its SHA-256"),
    "flipped byte": (build(tiny(), {}).data.replace(b"aten.relu", b"aten.selu"), "CRC"),
    "manifest no json": (zipped([(ENTRIES[0], b"{"), *WHOLE[1:]]), ""),
    "manifest a list": (zipped([(ENTRIES[0], b"[]"), *WHOLE[1:]]), ""),
    "manifest nested deep": (zipped([(ENTRIES[0], b"[" * 100_000), *WHOLE[1:]]), "recursion"),
}


def refused(data: bytes, says: str = "") -> RedppError:
    with pytest.raises(RedppError, match="cannot be read") as caught:
        load(data)
    assert says in str(caught.value)
    return caught.value


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_whole_artifact(case: str) -> None:
    data, says = FILES[case]
    refused(data, says)


def test_an_entry_given_twice() -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        data = zipped([*WHOLE, WHOLE[0]])
    refused(data, "entries")


def test_an_encrypted_entry() -> None:
    data = bytearray(zipped(WHOLE))
    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + flags] |= 1
    refused(bytes(data), "encrypted")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RedppError, match="absent.redpp cannot be read"):
        load(tmp_path / "absent.redpp")
    with pytest.raises(RedppError, match="cannot be read"):
        load(tmp_path)


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "other format": lambda m: m.update(format=2),
    "no format": lambda m: m.pop("format"),
    "no description": lambda m: m.pop("description"),
    "description a text": lambda m: m.update(description="tiny"),
    "no checksum": lambda m: m["sha256"].pop("graph.json"),
    "checksum of nothing": lambda m: m["sha256"].update({"graph.json": hashlib.sha256().hexdigest()}),
    "checksum a number": lambda m: m["sha256"].update({"graph.json": 0}),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(case: str) -> None:
    refused(forged(manifest=MANIFESTS[case]))


def first(**changed: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda d: d["nodes"][0].update(changed)


def argument(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda d: d["nodes"][0]["args"].append(value)


GRAPHS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{f"operator {op!r}": (first(op=op), "") for op in (1, None, ["aten.relu.default"], {"a": 1}, "")},
    **{
        f"operator {op}": (first(op=op), "not on the allow-list")
        for op in (
            "aten.from_file.default",
            "py.exec",
            "__class__",
            "os.system",
            "aten.add_.Tensor",
            "aten.relu",
            "py.add.__call__",
            "aten.save.default",
            "fused.conv2d",
            "x" * 10_000,
        )
    },
    "value read before it is defined": (first(args=[{"ref": "y"}]), "nothing defines"),
    "value that nothing defines": (first(kwargs={"k": [{"ref": "__class__"}]}), "nothing defines"),
    "node that reads itself": (first(args=[{"ref": "h"}]), "nothing defines"),
    "node given twice": (lambda d: d["nodes"].append(d["nodes"][1]), "defined twice"),
    "node named as a tensor": (first(name="w"), "defined twice"),
    "node named as an input": (first(name="x"), "defined twice"),
    "node without a name": (first(name=None), "not a text"),
    "node named by a number": (lambda d: d["nodes"].append({**d["nodes"][1], "name": 3}), "not a text"),
    "input given twice": (lambda d: d["inputs"].append(d["inputs"][0]), "defined twice"),
    "input named as a tensor": (lambda d: d["inputs"][0].update(name="b"), "defined twice"),
    "no inputs": (lambda d: (d.update(inputs=[]), first(args=[{"ref": "w"}])(d)), "without inputs"),
    "input of negative size": (lambda d: d["inputs"][0].update(shape=[-8]), "of other than sizes"),
    "input of size zero": (lambda d: d["inputs"][0].update(shape=[0]), "of other than sizes"),
    "input of size true": (lambda d: d["inputs"][0].update(shape=[True]), "of other than sizes"),
    "input of shape text": (lambda d: d["inputs"][0].update(shape="8"), "of other than sizes"),
    "input of unknown dtype": (lambda d: d["inputs"][0].update(dtype="float33"), "unknown dtype"),
    "dtype that is a function": (lambda d: d["inputs"][0].update(dtype="load"), "unknown dtype"),
    "dtype a number": (lambda d: d["inputs"][0].update(dtype=7), "unknown dtype"),
    "dtype a list": (lambda d: d["inputs"][0].update(dtype=["float32"]), "unknown dtype"),
    "unknown constant": (argument({"device": "cuda"}), "unknown constant"),
    "constant of two kinds": (argument({"ref": "x", "float": "inf"}), ""),
    "constant of no kind": (argument({}), ""),
    "float as a text": (argument({"float": "1e400"}), "unknown constant"),
    "float as a list": (argument({"float": [1]}), "unknown constant"),
    "constant dtype unknown": (argument({"dtype": "Tensor"}), "unknown dtype"),
    "constant dtype no text": (argument({"dtype": {"a": 1}}), "unknown dtype"),
    "memory format unknown": (argument({"memory_format": "nn"}), "unknown constant"),
    "reference to a list": (argument({"ref": ["x"]}), "nothing defines"),
    "arguments a number": (first(args=3), ""),
    "keywords a list": (first(kwargs=[1]), ""),
    "outputs that nothing defines": (lambda d: d.update(outputs=["z"]), "nothing defines"),
    "no outputs": (lambda d: d.update(outputs=[]), "without"),
    "outputs a text": (lambda d: d.update(outputs="y"), "without"),
    "outputs of lists": (lambda d: d.update(outputs=[["y"]]), ""),
    "encoding of nothing": (lambda d: d["encodings"].update(v={"bits": 1, "shape": [8]}), "v:codebook"),
    "encoding left out": (lambda d: d["encodings"].pop("w"), "nothing defines"),
    "encoding of other bits": (lambda d: d["encodings"]["w"].update(bits=4), "index bytes"),
    "encoding of bits a text": (lambda d: d["encodings"]["w"].update(bits="2"), ""),
    "encoding of another size": (lambda d: d["encodings"]["w"].update(shape=[16, 9]), "index bytes"),
    "encoding of negative sizes": (lambda d: d["encodings"]["w"].update(shape=[-16, -8]), ""),
    "encoding of huge sizes": (lambda d: d["encodings"]["w"].update(shape=[1 << 40, 1 << 40]), "index bytes"),
    "encodings a list": (lambda d: d.update(encodings=["w"]), ""),
    "buffers that are not stored": (lambda d: d.update(buffers=["b", "z"]), "not stored"),
    "buffers a text": (lambda d: d.update(buffers="b"), "not stored"),
    "buffers of lists": (lambda d: d.update(buffers=[["b"]]), ""),
    "ranges of texts": (lambda d: d["inputs"][0].update(ranges=[["0", "1"]]), "ascending whole numbers"),
    "ranges that descend": (lambda d: d["inputs"][0].update(limits=[[1, 0]]), "ascending whole numbers"),
    "ranges beyond int64": (lambda d: d["inputs"][0].update(ranges=[[0, 1 << 64]]), "ascending whole numbers"),
    "ranges of floats": (lambda d: d["inputs"][0].update(ranges=[[0.0, 1.0]]), "ascending whole numbers"),
    "more ranges than entries": (lambda d: d["inputs"][0].update(ranges=[[0, 1]] * 99), "ascending whole numbers"),
    "ranges of one number": (lambda d: d["inputs"][0].update(ranges=[[0]]), ""),
    "ranges a number": (lambda d: d["inputs"][0].update(ranges=5), ""),
    "no nodes": (lambda d: d.pop("nodes"), "nodes"),
    "nodes a mapping": (lambda d: d.update(nodes={"h": 1}), ""),
    "node a text": (lambda d: d["nodes"].append("aten.relu.default"), ""),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_graphs(case: str) -> None:
    edit, says = GRAPHS[case]
    error = refused(forged(edit), says)
    assert len(str(error)) < 600  # hostile names are cut short


@pytest.mark.parametrize("text", [b"[" * 200_000, b'{"nodes":' * 50_000, b"", b"\xff", b"NaN", b"[]", b"null", b"{}"])
def test_graph_documents_of_other_form(text: bytes) -> None:
    refused(forged(text))


def test_an_argument_nested_deep() -> None:
    document = entries(build(tiny(), {}).data)["graph.json"].replace(b'[{"ref":"h"}]', b"[" * 5000 + b"]" * 5000)
    assert b"[[[[" in document
    refused(forged(document), "recursion")


PAST = torch.full((32,), 0xFF, dtype=torch.uint8)
WEIGHTS = {
    "index past the codebook": (tensors(w__codebook=torch.zeros(3), w__indices=PAST), "past the end"),
    "codebook of two dimensions": (tensors(w__codebook=torch.zeros(4, 1)), "codebook"),
    "no codebook": (tensors(w__codebook=None), "w:codebook"),
    "no indices": (tensors(w__indices=None), "w:indices"),
    "indices too short": (tensors(w__indices=PAST[:31]), "index bytes"),
    "indices of another dtype": (tensors(w__indices=PAST.long()), "index bytes"),
    "tensor beside its encoding": (tensors(w=torch.zeros(16, 8)), "stored twice"),
    "tensor missing": (tensors(b=None), "nothing defines"),
    "header too long": ((1 << 40).to_bytes(8, "little") + bytes(8), "longer than the file"),
    "no weights": (b"", "longer than the file"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case: str) -> None:
    data, says = WEIGHTS[case]
    refused(forged(weights=data), says)


def test_the_forger_changes_nothing_by_itself() -> None:
    """Else the refusals above would prove nothing."""
    x = torch.randn(2, 8)
    for data in (forged(), forged(weights=tensors())):
        loaded = load(data)
        assert loaded.description["name"] == "tiny"
        assert torch.equal(Program(loaded.graph)(x)[0], Program(tiny())(x)[0])


def test_an_operator_that_this_torch_lacks_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redpp_serve.graph.artifact.ALLOWED", ops.ALLOWED | {"aten.relu.later"})
    monkeypatch.setattr(ops, "ALLOWED", ops.ALLOWED | {"aten.relu.later"})
    with pytest.raises(RedppError, match="has no operator aten.relu.later"):
        load(forged(first(op="aten.relu.later")))


AUDIT = """
import sys, torch
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import load
load(open(sys.argv[1], "rb").read())  # what torch imports late is there now
events = []
watched = ("exec", "compile", "import", "open", "os.", "subprocess", "socket", "ctypes", "pickle", "marshal")
sys.addaudithook(lambda event, args: events.append((event, str(args)[:200])) if event.startswith(watched) else None)
for path in sys.argv[2:]:
    with open(path, "rb") as file:
        data = file.read()
    events.clear()
    try:
        load(data)
    except RedppError:
        pass
    assert not events, (path, events)
print("inert")
"""


def test_loading_runs_opens_and_imports_nothing(tmp_path: Path) -> None:
    """Watched by an audit hook, for the whole artifact and for hostile ones."""
    cases = [forged(), *(forged(edit) for edit, _ in GRAPHS.values()), *(d for d, _ in FILES.values())]
    paths = []
    for k, data in enumerate(cases):
        paths.append(tmp_path / f"{k}.redpp")
        paths[-1].write_bytes(data)
    run = subprocess.run([sys.executable, "-c", AUDIT, paths[0], *paths], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "inert", run.stderr[-2000:]
