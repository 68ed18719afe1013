"""More than 500 hostile files and packages, each made from a description or by a seeded change of a sound one.

A case is a name, what is asked about it, and a maker that writes it. `run` has the commands: a file is asked about with
``inspect`` and ``package``, a package with ``plan`` and with ``compare`` for both servers, up to where a server would
start, and a document beside a network by the option that reads it.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from redpp_serve.files import deterministic_zip
from redpp_serve.graph.operators import ALLOWED
from tests.attacks import files
from tests.attacks.artifacts import entries, forged
from tests.attacks.bombs import HOSTILE, ODD
from tests.attacks.documents import ARCHIVES, CONFIGS, INDICES, LABELS, OPTIONS, write_beside
from tests.attacks.graphs import BOMBS, BROKEN, UNSEEN, bomb
from tests.attacks.onnx_models import MODELS, Build, write
from tests.attacks.pickles import HARMLESS, LONG, PICKLES

KINDS = ("state_dict", "old state_dict", "safetensors", "TorchScript", "exported", "ONNX", "index")
PARTS = ("original.mar", "pruned.mar", "report.json", "inputs.npz")
TRITON = ("config.pbtxt", "1/model.redpp", "2/model.py", "2/redpp_serve/errors.py")
Change = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Case:
    """One hostile file or package.

    Attributes:
        name: says what it is.
        asks: ``file``, ``network`` (a file that needs no architecture), ``package``, ``options`` or ``labels``.
        make: writes it below a folder, and returns its path.
    """

    name: str
    asks: str
    make: Callable[[Path], Path]


def cases(sound: Path, seed: int, changes: int = 24) -> list[Case]:
    """Return all cases.

    Args:
        sound: a folder that `write_sound` filled.
        seed: of the random changes.
        changes: random changes of each kind of file and each part of a package.
    """
    described = [*_described(), *_documents(sound)]
    named = [*described, *_other_kinds(sound), *_large_parts(sound), *_graphs(sound)]
    return [*named, *_changed_files(sound, seed, changes), *_changed_parts(sound, seed, changes)]


def write_sound(folder: Path, package: Path, *, slow: bool = True) -> None:
    """Write a sound file of each kind, and copy a package of the network ``small``.

    Args:
        folder: where.
        package: the package.
        slow: also files of the kinds that take seconds to make.
    """
    network = files.Net().eval()
    state = network.state_dict()
    torch.save(state, folder / "state_dict")
    torch.save(state, folder / "old state_dict", _use_new_zipfile_serialization=False)
    from safetensors.torch import save_file

    save_file(state, folder / "safetensors")
    if slow:
        files.torchscript(folder / "TorchScript", network)
        files.exported(folder / "exported")
        torch.onnx.export(network, (torch.zeros(1, 1, 8, 8),), folder / "ONNX", dynamo=False)
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "part.safetensors")}
    (folder / "index").write_text(json.dumps(index))
    save_file(state, folder / "part.safetensors")
    shutil.copytree(package, folder / "package")


def _described() -> Iterator[Case]:
    pickles = {f"pickle: {name}": make for name, make in {**PICKLES, **LONG, **HARMLESS}.items()}
    for name, make in {**HOSTILE, **ODD, **pickles}.items():
        yield Case(name, "file", lambda folder, make=make: _written(folder / "model.pt", make))  # type: ignore[misc]
    for legacy in (False, True):
        yield Case(
            f"pickle with code, legacy {legacy}",
            "file",
            lambda folder, legacy=legacy: files.poisoned_pickle(folder / "model.pt", marker(), legacy=legacy),  # type: ignore[misc]
        )
    yield Case("TorchScript with code", "file", lambda f: files.torchscript(f / "x", files.RunsOnLoad(marker())))
    yield Case("exported with code", "file", lambda f: files.poisoned_export(f / "x", marker()))
    for name, parts in files.SAFETENSORS.items():
        yield Case(f"safetensors: {name}", "file", lambda f, p=parts: files.safetensors(f / "x", *p))  # type: ignore[misc]


def _documents(sound: Path) -> Iterator[Case]:
    for title, asks, name, texts in (
        ("options", "options", "redpp.yaml", OPTIONS),
        ("labels", "labels", "labels.txt", LABELS),
        ("configuration", "file", "config.json", CONFIGS),
    ):
        for what, text in texts.items():

            def make(folder: Path, name: str = name, text: str = text) -> Path:
                write_beside(folder / "beside" / name, text, sound / "state_dict")
                return folder / "beside" / ("model.pt" if name == "config.json" else name)

            yield Case(f"{title}: {what}", asks, make)
    for title, name, makers in (("index", "model.index.json", INDICES), ("archive", "model.pt", ARCHIVES)):
        for what, put in makers.items():
            yield Case(f"{title}: {what}", "file", lambda f, name=name, put=put: _written(f / name, put))  # type: ignore[misc]
    for what, build in MODELS.items():

        def write_model(folder: Path, build: Build = build) -> Path:
            write(folder / "model.onnx", build)
            return folder / "model.onnx"

        yield Case(f"ONNX: {what}", "network", write_model)


def marker() -> Path:
    """Return the file that code of a hostile file would write."""
    return Path(os.environ["REDPP_MARKER"])


def _written(path: Path, make: Callable[[Path], Any]) -> Path:
    make(path)
    return path


def _copied(sound: Path, folder: Path) -> Path:
    return Path(shutil.copytree(sound / "package", folder / "package", symlinks=True))


def _parts() -> Iterator[tuple[str, str]]:
    yield from ((part, part) for part in PARTS)
    yield from ((f"triton/{part}", f"triton/small/{part}") for part in TRITON)


def _other_kinds(sound: Path) -> Iterator[Case]:
    """Put another kind of file in place of each part."""
    deep = b"[" * 200_000
    replacements: dict[str, Callable[[Path], Any]] = {
        "a pipe": os.mkfifo,
        "an endless device": lambda path: path.symlink_to("/dev/zero"),
        "a terminal": lambda path: path.symlink_to("/dev/full"),
        "a link out": lambda path: path.symlink_to("/etc/passwd"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to nothing": lambda path: path.symlink_to("nothing"),
        "a link to the folder": lambda path: path.symlink_to("."),
        "a folder": Path.mkdir,
        "an empty file": Path.touch,
        "zeros": lambda path: path.write_bytes(bytes(1 << 20)),
        "nested lists": lambda path: path.write_bytes(deep),
        "a sparse TB": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
        "nothing": lambda path: None,
    }
    for title, part in _parts():
        for what, put in replacements.items():

            def make(folder: Path, part: str = part, put: Callable[[Path], Any] = put) -> Path:
                path = _copied(sound, folder) / part
                path.unlink()
                put(path)
                return folder / "package"

            yield Case(f"{what} as {title}", "package", make)


def _zip(content: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _mar(sound: Path, **changed: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(sound / "package" / "pruned.mar") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    return {**content, **{name.replace("__", "/"): data for name, data in changed.items()}}


def _large_parts(sound: Path) -> Iterator[Case]:
    """Archives and arrays that claim gigabytes, or that carry code."""

    def huge() -> bytes:
        return bytes(1 << 28)

    nested = b'{"a":' * 100_000
    code = f"open({str(marker())!r}, 'w')\n".encode()
    npy = b"\x93NUMPY\x01\x00"

    def array(shape: str, dtype: str = "'<f4'") -> bytes:
        text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        return npy + struct.pack("<H", len(text)) + text

    mars: dict[str, Callable[[], bytes]] = {
        "artifact of zeros": lambda: _zip(_mar(sound) | {"model.redpp": huge()}),
        "manifest of zeros": lambda: _zip(_mar(sound) | {"MAR-INF/MANIFEST.json": huge()}),
        "manifest of nested objects": lambda: _zip(_mar(sound) | {"MAR-INF/MANIFEST.json": nested}),
        "manifest a list": lambda: _zip(_mar(sound) | {"MAR-INF/MANIFEST.json": b"[]"}),
        "settings of zeros": lambda: _zip(_mar(sound) | {"model-config.yaml": huge()}),
        "settings of aliases": lambda: _zip(_mar(sound) | {"model-config.yaml": b"a: &a [x]\nb: &b [*a, *a]\n" * 99}),
        "handler of zeros": lambda: _zip(_mar(sound) | {"handler.py": huge()}),
        "handler with code": lambda: deterministic_zip(_mar(sound) | {"handler.py": code}),
        "package with code": lambda: deterministic_zip(_mar(sound) | {"redpp_serve/__init__.py": code}),
        "module torch": lambda: deterministic_zip(_mar(sound) | {"torch.py": code}),
        "batch of 10**9": lambda: deterministic_zip(_mar(sound) | {"model-config.yaml": b"batchSize: 1000000000\n"}),
        "entry that leads out": lambda: _zip(_mar(sound) | {"../../x": b""}),
        "absolute entry": lambda: _zip(_mar(sound) | {"/tmp/x": b""}),
        "many entries": lambda: _zip({f"e{k}": b"" for k in range(250_000)}, zipfile.ZIP_STORED),
        "no entries": lambda: _zip({}),
        "an unknown method": lambda: _zip(_mar(sound)).replace(
            b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x08\x00", b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x63\x00"
        ),
        "names that steer a terminal": lambda: _zip(_mar(sound) | {"\x1b]0;owned\x07\x1b[2J\u202e": b""}),
        "artifact with tensor names that steer": lambda: _zip(
            _mar(sound) | {"model.redpp": forged(lambda d: d["nodes"][0].update(op="\x1b]0;x\x07\n\u202e"))}
        ),
    }
    for name, data in mars.items():
        yield _part(sound, f"archive: {name}", "pruned.mar", data)
    arrays: dict[str, Callable[[], bytes]] = {
        "of zeros": lambda: _zip({"x.npy": array("(4, 16777216)") + huge()}),
        "of 2**60 numbers": lambda: _zip({"x.npy": array(f"({1 << 60},)")}),
        "of no numbers": lambda: _zip({"x.npy": array(f"({1 << 60}, 0)")}),
        "of objects": lambda: _zip({"x.npy": array("(1,)", "'|O'") + b"\x80\x04."}),
        "of negative size": lambda: _zip({"x.npy": array("(-1, 4)")}),
        "of a nested type": lambda: _zip({"x.npy": array("(1,)", "[" * 50 + "]" * 50)}),
        "of void": lambda: _zip({"x.npy": array("(4, 4)", "'|V0'")}),
        "of text": lambda: _zip({"x.npy": array("(2,)", "'<U1000000000'")}),
        "without arrays": lambda: _zip({}),
        "of a single array": lambda: array("(2, 2)") + bytes(16),
        "of expressions": lambda: _zip({"x.npy": array("(2, ) * 10**9")}),
    }
    for name, data in arrays.items():
        yield _part(sound, f"inputs {name}", "inputs.npz", data)
    report = json.loads((sound / "package" / "report.json").read_text())
    for key, value in (
        ("threads", 10**9), ("threads", -1), ("batch_size", 10**9), ("batch_size", 4096.5), ("precision", "\x1b[31m"),
        ("engine", "../../x"), ("engine", ["redpp"]), ("precision", {"a": 1}),
    ):  # fmt: skip
        text = json.dumps({**report, "options": {**report["options"], key: value}}).encode()
        yield _part(sound, f"report: {key} {value!r}"[:60], "report.json", text)
    for name, value in (("path", "../../x"), ("steering", "\x1b]0;x\x07"), ("long", "x" * 100_000), ("none", None)):
        yield _part(sound, f"report: name {name}", "report.json", json.dumps({**report, "name": value}).encode())
    yield _part(sound, "report: many digits", "report.json", b'{"name": ' + b"9" * 1_000_000 + b"}")
    yield _part(sound, "report: 7 MB of lists", "report.json", lambda: b"[" + b"[]," * (5 << 19) + b"[]]")
    for part, text in (
        ("config.pbtxt", 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/x.tar.gz" } }\n'),
        ("config.pbtxt", "a {" * 100_000),
        ("config.pbtxt", "max_batch_size: 1000000000\n"),
        ("2/model.py", code.decode()),
        ("2/redpp_serve/sitecustomize.py", code.decode()),
        ("2/torch.py", code.decode()),
    ):
        yield _part(sound, f"triton/{part}: {text[:30]!r}", f"triton/small/{part}", text.encode())


def _part(sound: Path, name: str, part: str, data: bytes | Callable[[], bytes]) -> Case:
    def make(folder: Path) -> Path:
        (_copied(sound, folder) / part).write_bytes(data if isinstance(data, bytes) else data())
        return folder / "package"

    return Case(name, "package", make)


def _with_artifact(sound: Path, data: bytes) -> bytes:
    return deterministic_zip(_mar(sound) | {"model.redpp": data})


def _graphs(sound: Path) -> Iterator[Case]:
    for name in (*BOMBS, *BROKEN):
        yield _part(sound, f"graph: {name}", "pruned.mar", lambda name=name: _with_artifact(sound, bomb(name)))
    yield _part(sound, "graph: no such dimension", "pruned.mar", _with_artifact(sound, forged(UNSEEN)))
    for k in range(100):
        edit = _edit(random.Random(k))
        yield _part(sound, f"graph: edited {k}", "pruned.mar", lambda e=edit: _with_artifact(sound, forged(e)))  # type: ignore[misc]
    samples = {"samples.safetensors": b"\xff" * 64}
    yield _part(
        sound, "samples of nothing", "pruned.mar", _with_artifact(sound, deterministic_zip(entries(forged()) | samples))
    )


def _edit(rng: random.Random) -> Callable[[dict[str, Any]], Any]:
    """Change a few places of a graph document: operators, numbers, references, whole branches."""
    numbers = (0, -1, 1, 7, 1 << 31, 1 << 62, 1 << 63, -(1 << 63), 1e300, {"float": "nan"}, None, True, "x", [], [[]])
    operators = sorted(ALLOWED)

    def edit(document: dict[str, Any]) -> None:
        for _ in range(rng.randint(1, 4)):
            node = rng.choice(document["nodes"])
            what = rng.randrange(6)
            if what == 0:
                node["op"] = rng.choice(operators)
            elif what == 1:
                node["args"].append(rng.choice(numbers))
            elif what == 2 and node["args"]:
                node["args"][rng.randrange(len(node["args"]))] = rng.choice(numbers)
            elif what == 3:
                name = f"m{len(document['nodes'])}"
                given = [
                    rng.choice(({"ref": "x"}, {"ref": "w"}, rng.choice(numbers))) for _ in range(rng.randint(0, 4))
                ]
                document["nodes"].append({"name": name, "op": rng.choice(operators), "args": given, "kwargs": {}})
                document["outputs"] = [name]
            elif what == 4:
                node["kwargs"][rng.choice(("dim", "dtype", "size", "out", "device"))] = rng.choice(numbers)
            else:
                document["inputs"][0]["shape"] = [
                    rng.choice((1, 8, 1 << 20, 1 << 40)) for _ in range(rng.randint(0, 5))
                ]

    return edit


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _moved(data: bytes, rng: random.Random) -> bytes:
    start, stop = sorted(rng.randrange(len(data)) for _ in range(2))
    part, place = data[start : min(stop, start + 4096)], rng.randrange(len(data))
    return data[:place] + part + data[place:]


def _length(data: bytes, rng: random.Random) -> bytes:
    """Write an extreme number over 1 to 8 bytes."""
    width = rng.choice((1, 2, 4, 8))
    value = rng.choice((0, 1, (1 << (8 * width - 1)) - 1, 1 << (8 * width - 1), (1 << 8 * width) - 1))
    place = rng.randrange(max(1, min(len(data), rng.choice((64, 1024, len(data)))) - width))
    return data[:place] + value.to_bytes(width, "little") + data[place + width :]


def _blank(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    count = min(len(data) - place, rng.choice((1, 16, 4096)))
    return data[:place] + rng.choice((b"\0", b"\xff", b"[", b"{")) * count + data[place + count :]


CHANGES: tuple[Change, ...] = (_flip, _cut, _moved, _length, _blank)


def _changed_files(sound: Path, seed: int, changes: int) -> Iterator[Case]:
    for kind in filter(lambda kind: (sound / kind).exists(), KINDS):
        for k in range(changes):

            def make(folder: Path, kind: str = kind, k: int = k) -> Path:
                rng = random.Random(f"{seed} {kind} {k}")
                path = folder / (kind + ".index.json" if kind == "index" else "model")
                path.write_bytes(rng.choice(CHANGES)((sound / kind).read_bytes(), rng))
                shutil.copy(sound / "part.safetensors", folder)
                return path

            yield Case(f"{kind} changed {k}", "file", make)


def _changed_parts(sound: Path, seed: int, changes: int) -> Iterator[Case]:
    for title, part in _parts():
        for k in range(changes // 2):

            def make(folder: Path, part: str = part, k: int = k) -> Path:
                rng = random.Random(f"{seed} {part} {k}")
                path = _copied(sound, folder) / part
                path.write_bytes(rng.choice(CHANGES)(path.read_bytes(), rng))
                return folder / "package"

            yield Case(f"{title} changed {k}", "package", make)
