"""Ask a running server for predictions: servers whose workers are dead still call themselves ready."""

from __future__ import annotations

import http.client
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from redpp_serve.archives import ZIP_ERRORS, check_arrays
from redpp_serve.errors import RedppError
from redpp_serve.files import read_bounded
from redpp_serve.handlers.wire import VARIANT_HEADER
from redpp_serve.loopback import ADDRESS, NO_ANSWER, ask
from redpp_serve.requirements import Figure
from redpp_serve.serving.running import Running, find_some
from redpp_serve.variants import ORIGINAL, PRUNED

if TYPE_CHECKING:
    import numpy as np

TIMEOUT_S = 30.0
_MOST_SAMPLE = 1 << 30  # bytes
_BINARY = {"Content-Type": "application/octet-stream"}


class Unhealthy(RedppError):
    """A server is down, or a version does not answer. Exit code 1."""

    exit_code = 1


@dataclass(frozen=True)
class Request:
    """A prediction to ask for.

    Attributes:
        body: the bytes to POST.
        headers: the headers that describe the body.
        path: the file in the package that holds the body; None where the body was made.
    """

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None


@dataclass(frozen=True)
class Health:
    """The outcome of a probe.

    Attributes:
        variant: ``original``, ``pruned`` or ``default``.
        seconds: time until the reply.
        problem: why there was no prediction; empty where there was one.
    """

    variant: str
    seconds: float
    problem: str = ""

    def to_text(self) -> str:
        """Render as one line."""
        return f"{self.variant:<9} {self.problem or f'ok, {1000 * self.seconds:.1f} ms'}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"ok": not self.problem, "ms": round(1000 * self.seconds, 3), "problem": self.problem or None}


@dataclass(frozen=True)
class ServerHealth:
    """A server that runs for a folder, and the outcome of every probe.

    Attributes:
        folder: the packaged folder.
        kind: ``torchserve`` or ``triton``.
        pid: of the process that supervises it.
        probes: of both versions and of the default.
    """

    folder: str
    kind: str
    pid: int
    probes: tuple[Health, ...]

    @property
    def problem(self) -> str:
        """What does not answer, in words; empty where all do."""
        return "; ".join(f"{probe.variant} {probe.problem}" for probe in self.probes if probe.problem)

    def to_text(self) -> str:
        """Return a line for each probe."""
        return "\n".join(probe.to_text() for probe in self.probes)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        arms = {probe.variant: probe.to_json() for probe in self.probes}
        return {
            "folder": self.folder,
            "server": self.kind,
            "pid": self.pid,
            "ok": not self.problem,
            "arms": arms,
            "problem": self.problem or None,
        }

    def figures(self) -> dict[str, Figure]:
        """Return the milliseconds that probes took which were answered, by the names of `requirements.HEALTH`."""
        return {f"{x.variant}_ms": Figure(1000 * x.seconds) for x in self.probes if not x.problem}


def probe(running: Running, variant: str = "default", timeout_s: float = TIMEOUT_S) -> Health:
    """Ask one version, or the default, to predict the package's sample. A server that is down is not an error here.

    Raises:
        RedppError: the package's sample is missing or damaged.
    """
    begun = time.monotonic()
    try:
        request = sample_request(running)
        headers = {**running.headers["inference"], **request.headers}
        url = running.urls[variant]
        status, reply = ask(url, headers, method="POST", body=request.body, timeout_s=timeout_s)
        problem = "" if status == 200 else f"answers {status}: {reply.decode(errors='replace').strip()[:300]}"
    except NO_ANSWER as error:
        problem = f"does not answer: {error or type(error).__name__}"
    return Health(variant, time.monotonic() - begun, problem)


def answering(running: Running, timeout_s: float = TIMEOUT_S) -> tuple[str, str]:
    """Ask for a prediction without naming a version; return the one that answers, or else "" and the problem.

    Raises:
        RedppError: the package's sample is missing or damaged.
    """
    url = urlsplit(running.urls["default"])
    connection = http.client.HTTPConnection(url.hostname or ADDRESS, url.port, timeout=timeout_s)
    try:
        request = sample_request(running)
        connection.request("POST", url.path, request.body, {**running.headers["inference"], **request.headers})
        response = connection.getresponse()
        reply = response.read()
        if response.status != 200:
            return "", f"answers {response.status}: {reply.decode(errors='replace').strip()[:300]}"
        if running.kind == "torchserve":
            return response.getheader(VARIANT_HEADER, ""), ""
        version = json.loads(reply)["model_version"]
        return PRUNED.name if version == PRUNED.triton_version else ORIGINAL.name, ""  # or a stand-in for it
    except NO_ANSWER as error:
        return "", f"does not answer: {error or type(error).__name__}"
    finally:
        connection.close()


def check(folder: Path, kind: str | None = None) -> list[ServerHealth]:
    """Probe both versions and the default of every server that runs for a folder.

    Raises:
        Unhealthy: none runs.
    """
    try:
        found = find_some(folder, kind)
    except RedppError as error:
        raise Unhealthy(error.found, error.expected, error.do) from error
    return [
        ServerHealth(each.folder, each.kind, each.pid, tuple(probe(each, variant) for variant in each.urls))
        for each in found
    ]


def require_healthy(servers: Sequence[ServerHealth]) -> None:
    """Raise where a server does not answer.

    Raises:
        Unhealthy: names the versions.
    """
    if problems := [server.problem for server in servers if server.problem]:
        raise Unhealthy(
            "; ".join(problems),
            "a prediction from both versions",
            "see what redpp-serve serve printed; start it again where it has ended",
        )


def sample_request(running: Running) -> Request:
    """Return a request to predict the package's sample, in the form that this kind of server takes.

    Raises:
        RedppError: the sample is missing or damaged.
        OSError, http.client.HTTPException: Triton was asked for the inputs' names and does not answer.
    """
    path = next(iter(sorted(Path(running.folder).glob("sample.np[yz]"))), None)
    if path is None:
        raise _no_sample(f"{running.folder} holds no sample.npy or sample.npz")
    if running.kind == "torchserve":
        try:
            return Request(read_bounded(path, _MOST_SAMPLE), _BINARY, path)
        except (OSError, ValueError) as error:
            raise _no_sample(f"{path} cannot be read: {error}") from error
    status, reply = ask(f"{running.management_url}/v2/models/{running.name}")
    if status != 200:
        raise http.client.HTTPException(f"the model's metadata: {status} {reply.decode(errors='replace')[:300]}")
    metadata = json.loads(reply)
    return triton_request(metadata, _arrays(path, [spec["name"] for spec in metadata["inputs"]]))


def triton_request(metadata: Mapping[str, Any], arrays: list[np.ndarray[Any, Any]]) -> Request:
    """Return a request for one row with binary inputs and JSON outputs, over Triton's HTTP.

    Args:
        metadata: the model's metadata: its inputs and outputs.
        arrays: one for each input, without batch dimension.
    """
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput  # noqa: PLC0415

    inputs = []
    for spec, array in zip(metadata["inputs"], arrays, strict=True):
        shape = [1, *(array.shape or spec["shape"][1:])]  # of a number Triton wants one dimension
        inputs.append(InferInput(spec["name"], shape, spec["datatype"]).set_data_from_numpy(array.reshape(shape)))
    outputs = [InferRequestedOutput(spec["name"], binary_data=False) for spec in metadata["outputs"]]
    body, header = InferenceServerClient.generate_request_body(inputs, outputs)
    return Request(body, {**_BINARY, "Inference-Header-Content-Length": str(header)})


def curl(running: Running, scratch: Path, url: str, flags: str = "") -> str:
    """Return the command that asks a URL for the sample; a body that no file of the package holds goes to ``scratch``.

    Raises:
        RedppError, OSError, http.client.HTTPException: see `sample_request`.
    """
    request = sample_request(running)
    path = request.path
    if path is None:
        path = scratch / "sample.request"
        path.write_bytes(request.body)
    headers = {**running.headers["inference"], **request.headers}
    given = "".join(f"-H {shlex.quote(f'{key}: {value}')} " for key, value in headers.items())
    return f"curl {flags}{given}--data-binary @{shlex.quote(str(path))} {url}"


def _arrays(path: Path, names: list[str]) -> list[np.ndarray[Any, Any]]:
    import numpy as np  # noqa: PLC0415

    try:
        check_arrays(path)
        if path.suffix == ".npy":
            return [np.load(path, allow_pickle=False)]
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except (*ZIP_ERRORS, KeyError, TypeError, AttributeError) as error:
        raise _no_sample(f"{path} cannot be read: {error}") from error


def _no_sample(found: str) -> RedppError:
    return RedppError(found, "the sample that redpp-serve package writes", "package the model again")
