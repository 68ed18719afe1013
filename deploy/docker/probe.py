"""Check health by inference: ask every version of the server to predict the package's sample. Exit code 0 or 1.

A server whose worker is dead may call itself ready for ever; a prediction cannot lie. The probe needs only Python and
the package's folder, so it serves as a container's health check and as a probe in Kubernetes.

``probe.py alive`` asks for no prediction, so that no load can fail it: the server has to answer at all, and on Triton
every model's process has to be there, which the server does not start again. TorchServe does so with its workers.

Environment: SERVER (``torchserve`` or ``triton``), MODEL_NAME, MODELS (the package's folder), VARIANT (``original``,
``pruned`` or ``both``); optional URL (base of inference) and PROBE_TIMEOUT_S (for each request).
On a TorchServe with tokens the token is read from ``key_file.json`` in TMPDIR/redpp.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import socket
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

DEFAULT_URLS = {"torchserve": "http://127.0.0.1:8080", "triton": "http://127.0.0.1:8000"}
_STUB = "triton_python_backend_stub"
_HEADER = "Inference-Header-Content-Length"
PROBE_ID = "redpp-probe"  # the handlers count no request of this id


class Unhealthy(Exception):
    """The server does not serve; the text says how it failed."""


def main(words: Sequence[str] = ()) -> int:
    """Probe once, as the environment and the word ``alive`` say."""
    try:
        (alive if "alive" in words else probe)(os.environ)
    except KeyError as error:
        print(f"the variable {error.args[0]} is not set", file=sys.stderr)
    except (Unhealthy, OSError, ValueError) as error:
        print(error, file=sys.stderr)
    else:
        return 0
    return 1


def probe(environment: Mapping[str, str]) -> None:
    """Ask for one prediction of each version.

    Raises:
        KeyError: a variable is missing.
        Unhealthy, OSError, ValueError: a prediction did not come.
    """
    kind, name, models = (environment[key] for key in ("SERVER", "MODEL_NAME", "MODELS"))
    if kind not in DEFAULT_URLS:
        raise ValueError(f"SERVER is {kind!r}, expected torchserve or triton")
    samples = [path for path in (Path(models) / "sample.npy", Path(models) / "sample.npz") if path.exists()]
    if not samples:
        raise ValueError(f"{models} holds neither sample.npy nor sample.npz, expected a package of redpp-serve")
    url, timeout_s = environment.get("URL", DEFAULT_URLS[kind]), float(environment.get("PROBE_TIMEOUT_S", "4"))
    if kind == "triton":
        _triton(f"{url}/v2/models/{name}", samples[0], timeout_s)
    else:
        key_file = Path(environment.get("TMPDIR", "/tmp")) / "redpp" / "key_file.json"
        for version in ("/1.0", "/2.0") if environment.get("VARIANT", "both") == "both" else ("",):
            _torchserve(f"{url}/predictions/{name}{version}", samples[0], key_file, timeout_s)


def alive(environment: Mapping[str, str], processes: Path = Path("/proc")) -> None:
    """See that the server answers, and that no model's process is missing.

    Raises:
        KeyError: a variable is missing.
        Unhealthy, OSError, ValueError: it does not, or one is.
    """
    kind, name, models = (environment[key] for key in ("SERVER", "MODEL_NAME", "MODELS"))
    url = urllib.parse.urlsplit(environment.get("URL", DEFAULT_URLS[kind]))
    socket.create_connection((url.hostname or "", url.port or 80), timeout=20).close()
    if kind != "triton":
        return
    versions = 2 if environment.get("VARIANT", "both") == "both" else 1
    text = (Path(models) / "triton" / name / "config.pbtxt").read_text()
    groups = re.findall(r"instance_group\s*{[^}]*?\bcount\s*:\s*(\d+)", text)
    expected = versions * max(sum(map(int, groups)), 1)
    found = sum(_program(folder).endswith(_STUB) for folder in processes.glob("[0-9]*"))
    if found < expected:
        raise Unhealthy(f"{found} of {expected} processes of the model run")


def _program(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:  # it has just ended
        return ""


def _torchserve(url: str, sample: Path, key_file: Path, timeout_s: float) -> None:
    headers = {"Content-Type": "application/octet-stream", "X-Request-Id": PROBE_ID}
    if key_file.exists():
        headers["Authorization"] = "Bearer " + json.loads(key_file.read_text())["inference"]["key"]
    if "outputs" not in json.loads(_ask(url, sample.read_bytes(), headers, timeout_s)[0]):
        raise Unhealthy(f"{url} answered without outputs")


def _triton(url: str, sample: Path, timeout_s: float) -> None:
    body, headers = binary_request(url, sample, timeout_s, PROBE_ID)
    for version in json.loads(_ask(url, None, {}, timeout_s)[0])["versions"]:
        versioned = f"{url}/versions/{version}/infer"
        answer, length = _ask(versioned, body, headers, timeout_s)
        if not json.loads(answer[: int(length or len(answer))]).get("outputs"):
            raise Unhealthy(f"{versioned} answered without outputs")


def binary_request(url: str, sample: Path, timeout_s: float, name: str = "") -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a request in the binary form of the inference protocol, for the model at ``url``.

    ``name`` is the request's id. The body is a JSON header, then the inputs' bytes.
    """
    model = json.loads(_ask(url, None, {}, timeout_s)[0])
    tensors = _arrays(sample, model["inputs"][0]["name"])
    header, body = [], b""
    for spec in model["inputs"]:
        shape, content = tensors[spec["name"]]
        header.append(
            {
                "name": spec["name"],
                "datatype": spec["datatype"],
                "shape": [1, *shape],
                "parameters": {"binary_data_size": len(content)},
            }
        )
        body += content
    # Outputs come in binary too: the server cannot write numbers of half precision as JSON.
    described = json.dumps({"id": name, "inputs": header, "parameters": {"binary_data_output": True}}).encode()
    return described + body, {"Content-Type": "application/octet-stream", _HEADER: str(len(described))}


def _arrays(sample: Path, first: str) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shape and bytes of each input: of an .npz by its names, of an .npy for the one input."""
    if sample.suffix == ".npy":
        return {first: _read_npy(sample.read_bytes())}
    with zipfile.ZipFile(sample) as file:
        return {entry.removesuffix(".npy"): _read_npy(file.read(entry)) for entry in file.namelist()}


def _read_npy(content: bytes) -> tuple[tuple[int, ...], bytes]:
    """Shape and data of an .npy file; samples are written in C order on little-endian machines."""
    stream = io.BytesIO(content)
    magic, major = stream.read(6), stream.read(1)
    if magic != b"\x93NUMPY":
        raise ValueError("the sample is not an .npy file")
    stream.read(1)
    described = ast.literal_eval(
        stream.read(int.from_bytes(stream.read(2 if major == b"\x01" else 4), "little")).decode("latin1")
    )
    if described["fortran_order"] or described["descr"].startswith(">"):
        raise ValueError(f"the sample is stored as {described}, expected C order and little-endian numbers")
    return tuple(described["shape"]), stream.read()


def _ask(url: str, body: bytes | None, headers: dict[str, str], timeout_s: float) -> tuple[bytes, str | None]:
    """Return the body of the answer, and the length of its JSON header where the body has a binary part."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=timeout_s) as answer:
            return answer.read(), answer.headers.get(_HEADER)
    except urllib.error.HTTPError as error:
        raise Unhealthy(f"{url} answered {error.code}: {error.read(200).decode(errors='replace')}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
