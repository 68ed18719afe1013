"""Coverage-guided fuzzing of what reads bytes of strangers: ``python -m tests.attacks.fuzz loader --seconds 600``.

Needs atheris (``pip install atheris``), which is no dependency of the project. Anything but a refusal is a finding:
another exception, a run of more than 60 s, or more than 6 GB; libFuzzer keeps the input beside the corpus.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.attacks import files
from tests.attacks.artifacts import entries, forged
from tests.attacks.bombs import HOSTILE
from tests.attacks.graphs import BOMBS, BROKEN, bomb

Target = Callable[[bytes], None]
INSTRUMENTED = {
    "loader": ["redpp_serve.archives", "redpp_serve.capture", "redpp_serve.files"],
    "artifact": ["redpp_serve.graph.artifact", "redpp_serve.graph.tensor_file", "redpp_serve.graph.weights"],
    "payload": ["redpp_serve.handlers.payload", "redpp_serve.handlers.preprocess", "redpp_serve.handlers.image_files"],
}
INSTRUMENTED["artifact"].append("redpp_serve.packaging.bounds")


def loader(scratch: Path) -> tuple[Target, Iterable[bytes]]:
    """Tell what a file is, and load it without trust."""
    from redpp_serve.capture.load import load_file
    from redpp_serve.capture.sniff import sniff
    from redpp_serve.errors import RedppError

    path = scratch / "model.pt"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            sniff(path)
            load_file(path, trust=False)
        except RedppError as error:
            check_text(error)

    return target, _model_files(scratch)


def artifact(scratch: Path) -> tuple[Target, Iterable[bytes]]:
    """Load an artifact and bound its network.

    The first byte of an input chooses what the rest is: a whole artifact, a graph document or weights; the sums of
    what surrounds them are made to match.
    """
    from redpp_serve.errors import RedppError
    from redpp_serve.graph.artifact import load
    from redpp_serve.packaging.bounds import check_runs

    def target(data: bytes) -> None:
        kind, rest = data[:1], data[1:]
        whole = forged(graph=rest) if kind == b"g" else forged(weights=rest) if kind == b"w" else rest
        try:
            check_runs(load(whole).graph, 2)
        except RedppError as error:
            check_text(error)

    documents = [entries(bomb(name)) for name in (*BOMBS, *BROKEN)]
    seeds = [b"a" + forged(), b"w" + entries(forged())["weights.safetensors"]]
    return target, [*seeds, *(b"g" + content["graph.json"] for content in documents)]


def payload(scratch: Path) -> tuple[Target, Iterable[bytes]]:
    """Read a request for networks of one input, of several, and of images."""
    from redpp_serve.graph.graph import InputSpec, Size
    from redpp_serve.handlers.payload import BadRequest, parse, parse_items
    from redpp_serve.handlers.preprocess import Preprocess

    size = ((1, Size("H", 8, 16)), (2, Size("W", 8, 16)))
    images = Preprocess("RGB", 8, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    networks = [
        ((InputSpec("x", (3, 8, 8)),), images),
        ((InputSpec("x", (3, 8, 8), varying=size),), images),
        ((InputSpec("a", (4,)), InputSpec("ids", (2,), "int64", limits=((0, 9),)), InputSpec("m", (), "bool")), None),
    ]

    def target(data: bytes) -> None:
        for inputs, preprocess in networks:
            try:
                parse_items({"body": data}, inputs, preprocess)
                tensors = parse({"body": data}, inputs, preprocess)
                assert [x.dtype for x in tensors] == [getattr(torch, spec.dtype) for spec in inputs]
            except BadRequest as error:
                assert " at 0x" not in str(error), error

    return target, _requests()


TARGETS = {"loader": loader, "artifact": artifact, "payload": payload}


def check_text(error: Exception) -> None:
    """Raise where a refusal could steer a terminal."""
    assert all(character.isprintable() or character in "\n\t" for character in str(error)), ascii(str(error))


def _model_files(scratch: Path) -> Iterable[bytes]:
    state = files.Net().state_dict()
    for legacy in (False, True):
        torch.save(state, scratch / "seed", _use_new_zipfile_serialization=not legacy)
        yield (scratch / "seed").read_bytes()
    from safetensors.torch import save

    yield save(state)
    yield json.dumps({"weight_map": {"a": "b.safetensors"}}).encode()
    torch.onnx.export(files.Net().eval(), (torch.zeros(1, 1, 8, 8),), scratch / "seed", dynamo=False)
    yield (scratch / "seed").read_bytes()
    for number, make in enumerate(HOSTILE.values()):
        path = scratch / f"seed{number}"
        make(path)
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 16:
            yield path.read_bytes()


def _requests() -> Iterable[bytes]:
    def npy(array: np.ndarray) -> bytes:
        stream = io.BytesIO()
        np.save(stream, array)
        return stream.getvalue()

    yield npy(np.zeros((3, 8, 8), np.float32))
    yield npy(np.asfortranarray(np.zeros((3, 8, 8), np.uint8)))
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(4), ids=np.zeros(2, np.int64), m=np.zeros((), bool))
    yield stream.getvalue()
    yield json.dumps({"inputs": {"a": [0, 0, 0, 0], "ids": [1, 2], "m": True}}).encode()
    yield json.dumps({"inputs": np.zeros((3, 8, 8)).tolist()}).encode()
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        stream = io.BytesIO()
        Image.new("RGB", (9, 12)).save(stream, kind)
        yield stream.getvalue()
    with zipfile.ZipFile(stream := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(np.zeros((3, 8, 8), np.float32)))
    yield stream.getvalue()


def main() -> None:
    """Fuzz one target until the time is over or something is found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, help="folder that is kept (default: a new one for the run)")
    options = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED[options.target]), tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        target, seeds = TARGETS[options.target](Path(scratch))
        corpus = options.corpus or Path(scratch) / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds):
            (corpus / f"seed{number}").write_bytes(seed)
        limits = ["-timeout=60", "-rss_limit_mb=6144", "-max_len=65536", f"-artifact_prefix={corpus.parent}/"]
        atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={options.seconds}", *limits], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
