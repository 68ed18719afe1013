"""A tiny network, its artifacts and archives, and a stand-in for the server's context."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from redpp_serve.graph.artifact import Artifact, build
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.options import Serving
from redpp_serve.packaging.mar import build_mar
from redpp_serve.packaging.server_config import model_config

SHAPE = (3, 8, 8)
PREPROCESS = Preprocess("RGB", 8, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
INFO = {"parameters": 135, "macs": 6932}
VARIANTS = {"1.0": "original", "2.0": "pruned"}


def network(seed: int = 0) -> Graph:
    """conv2d, relu, mean over the image, linear: (N, 3, 8, 8) to (N, 5)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "w": torch.randn(4, 3, 3, 3, generator=generator),
        "b": torch.randn(4, generator=generator),
        "lw": torch.randn(5, 4, generator=generator),
    }
    nodes = (
        Node("c", "aten.conv2d.default", (Ref("x"), Ref("w"), Ref("b"), [1, 1], [1, 1])),
        Node("r", "aten.relu.default", (Ref("c"),)),
        Node("m", "aten.mean.dim", (Ref("r"), [2, 3])),
        Node("y", "aten.linear.default", (Ref("m"), Ref("lw"))),
    )
    return Graph((InputSpec("x", SHAPE),), tensors, nodes, ("y",))


def expected(version: str, x: torch.Tensor) -> list[float]:
    """The output of ``artifact(version)`` for one input (3, 8, 8), computed without the project's runtime."""
    tensors = network(list(VARIANTS).index(version)).tensors
    hidden = torch.relu(torch.nn.functional.conv2d(x[None], tensors["w"], tensors["b"], padding=1)).mean((2, 3))
    return (hidden @ tensors["lw"].T)[0].tolist()


def built(version: str = "1.0", graph: Graph | None = None, preprocess: Preprocess | None = PREPROCESS) -> Artifact:
    """An artifact of `network`, another one for each version, with all that the handler reads."""
    description = {
        "name": "tiny",
        "variant": VARIANTS[version],
        "version": version,
        "preprocess": preprocess.to_json() if preprocess else None,
        "info": INFO,
    }
    return build(graph or network(list(VARIANTS).index(version)), description)


def artifact(version: str = "1.0", graph: Graph | None = None, preprocess: Preprocess | None = PREPROCESS) -> bytes:
    """The bytes of `built`."""
    return built(version, graph, preprocess).data


def archive(version: str = "1.0") -> bytes:
    """The archive of `artifact`; batches of up to 4 requests that arrive within 20 ms."""
    return build_mar(built(version), name="tiny", model_config=model_config(Serving(4, 20, 1)))


def write_archives(folder: Path) -> Path:
    """The folder, with both archives."""
    folder.mkdir(parents=True, exist_ok=True)
    for version, variant in VARIANTS.items():
        (folder / f"{variant}.mar").write_bytes(archive(version))
    return folder


def npy(array: np.ndarray) -> bytes:
    """What ``np.save`` writes."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 8), kind: str = "PNG", seed: int = 0) -> bytes:
    """A random image file."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


class Context:
    """What TorchServe's context offers a handler; the signatures are those of ts/context.py."""

    def __init__(self, folder: Path, batch_size: int = 4, config: dict[str, Any] | None = None) -> None:
        self.model_name = "tiny"
        self.manifest = {"model": {"serializedFile": "model.redpp", "modelVersion": "1.0"}}
        self.system_properties = {"model_dir": str(folder), "gpu_id": None, "batch_size": batch_size}
        self.model_yaml_config = {"handler": {"threads": 1}} if config is None else config
        self.statuses: dict[int, tuple[int, str]] = {}
        self.headers: dict[int, dict[str, str]] = {}
        self.asked: dict[int, dict[str, str]] = {}

    def get_all_request_header(self, idx: int) -> dict[str, str]:
        return self.asked.get(idx, {})

    def get_request_id(self, idx: int = 0) -> str | None:
        return f"{idx:08x}-server"

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        self.statuses[idx] = (code, phrase)

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        self.headers.setdefault(idx, {})[key] = value

    def set_response_content_type(self, idx: int, value: str) -> None:
        self.set_response_header(idx, "content-type", value)


def triton_arguments(**config: Any) -> dict[str, str]:
    """Return what Triton hands to ``initialize``; ``config`` overrides entries of the model's configuration."""
    given = {"name": "tiny", "max_batch_size": 8, "parameters": {"threads": {"string_value": "1"}}, **config}
    return {
        "model_config": json.dumps(given),
        "model_name": "tiny",
        "model_version": "1",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    }
