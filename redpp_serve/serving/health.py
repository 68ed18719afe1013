"""Whether a running server answers: by asking it for a prediction, since servers call themselves ready whose workers are
dead.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from redpp_serve.errors import RedppError
from redpp_serve.loopback import ask
from redpp_serve.serving.running import Running, find

if TYPE_CHECKING:
    import numpy as np

TIMEOUT_S = 30.0


class Unhealthy(RedppError):
    """A server is down, or a version does not answer. Exit code 1."""

    exit_code = 1


@dataclass(frozen=True)
class Request:
    """A prediction to ask for.

    Attributes:
        body: what to POST.
        headers: what the body is.
        path: the file in the package that holds the body; None where it was made.
    """

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None


@dataclass(frozen=True)
class Health:
    """What came of a probe.

    Attributes:
        variant: ``original``, ``pruned`` or ``default``.
        seconds: until the reply.
        problem: why there was none; empty where there was one.
    """

    variant: str
    seconds: float
    problem: str = ""

    def to_text(self) -> str:
        """One line."""
        return f"{self.variant:<9} {self.problem or f'ok, {1000 * self.seconds:.1f} ms'}"


def probe(running: Running, variant: str = "default", timeout_s: float = TIMEOUT_S) -> Health:
    """Ask one version, or the default, for a prediction of the package's sample. Never raises for a server that is down.

    Raises:
        RedppError: the package's sample is missing or damaged.
    """
    begun = time.monotonic()
    try:
        request = sample_request(running)
        url = urlsplit(running.urls[variant])
        assert url.port is not None
        headers = {**running.headers["inference"], **request.headers}
        status, reply = ask(url.port, url.path, headers, "POST", request.body, timeout_s)
        problem = "" if status == 200 else f"answers {status}: {reply.decode(errors='replace').strip()[:300]}"
    except (OSError, http.client.HTTPException) as error:
        problem = f"does not answer: {error or type(error).__name__}"
    return Health(variant, time.monotonic() - begun, problem)


def check(folder: Path, kind: str | None = None) -> list[Health]:
    """Probe both versions and the default of the server that runs for a folder.

    Raises:
        Unhealthy: none runs, or something does not answer.
    """
    try:
        running = find(folder, kind)
    except RedppError as error:
        raise Unhealthy(error.found, error.expected, error.do) from error
    results = [probe(running, variant) for variant in running.urls]
    problems = [f"{result.variant} {result.problem}" for result in results if result.problem]
    if problems:
        raise Unhealthy(
            "; ".join(problems),
            "a prediction from both versions",
            "see what redpp-serve serve printed; start it again where it has ended",
        )
    return results


def sample_request(running: Running) -> Request:
    """A prediction of the package's sample, as that kind of server takes it.

    Raises:
        RedppError: the sample is missing or damaged.
        OSError, http.client.HTTPException: Triton was asked for the inputs' names and does not answer.
    """
    path = next(iter(sorted(Path(running.folder).glob("sample.np[yz]"))), None)
    if path is None:
        raise _no_sample(f"{running.folder} holds no sample.npy or sample.npz")
    if running.kind == "torchserve":
        return Request(path.read_bytes(), {"Content-Type": "application/octet-stream"}, path)
    port = urlsplit(running.management_url).port
    assert port is not None
    status, reply = ask(port, f"/v2/models/{running.name}", {})
    if status != 200:
        raise http.client.HTTPException(f"the model's metadata: {status} {reply.decode(errors='replace')[:300]}")
    inputs = json.loads(reply)["inputs"]
    body, header = triton_body(inputs, _arrays(path, [spec["name"] for spec in inputs]))
    return Request(body, {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(header)})


def triton_body(inputs: Sequence[Mapping[str, Any]], arrays: Sequence[np.ndarray]) -> tuple[bytes, int]:
    """One row as Triton's HTTP takes it: JSON that says what is there, then the arrays' bytes.

    Args:
        inputs: from the model's metadata: name, datatype and shape with batch.
        arrays: one for each input, without batch.

    Returns:
        The body, and how many bytes of it are JSON.
    """
    data = [array.tobytes() for array in arrays]
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": spec["name"],
                    "datatype": spec["datatype"],
                    "shape": [1, *spec["shape"][1:]],
                    "parameters": {"binary_data_size": len(content)},
                }
                for spec, content in zip(inputs, data, strict=True)
            ]
        }
    ).encode()
    return b"".join([header, *data]), len(header)


def _arrays(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    import numpy as np

    try:
        if path.suffix == ".npy":
            return [np.load(path, allow_pickle=False)]
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise _no_sample(f"{path} cannot be read: {error}") from error


def _no_sample(found: str) -> RedppError:
    return RedppError(found, "the sample that redpp-serve package writes", "package the model again")
