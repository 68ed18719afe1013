"""The probe of the images against a stand-in for either server: what it sends, and what it notices."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest

from redpp_serve.handlers.wire import PROBE_ID
from tests.support.manifests import DEPLOY
from tests.support.served import SHAPE, npy

X = numpy.random.default_rng(0).standard_normal(SHAPE, dtype=numpy.float32)


def run_probe(*words: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """The probe with these variables alone, in a Python that sees no packages."""
    command = [sys.executable, "-I", "-S", DEPLOY / "docker/probe.py", *words]
    environment = {"PATH": os.environ["PATH"], **{key: str(value) for key, value in variables.items()}}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)


class Server(BaseHTTPRequestHandler):
    """Stands in for either server: Triton's metadata and inference, TorchServe's predictions; remembers requests."""

    inputs: ClassVar[list[dict[str, Any]]] = []
    status, delay_s, answer = 200, 0.0, b'{"outputs": [{"name": "output_0"}]}'
    seen: ClassVar[list[tuple[str, dict[str, str], bytes]]] = []

    def do_GET(self) -> None:
        self._reply(200, json.dumps({"name": "tiny", "versions": ["1", "2"], "inputs": self.inputs}).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).seen.append((self.path, {key.lower(): value for key, value in self.headers.items()}, body))
        time.sleep(self.delay_s)
        self._reply(self.status, self.answer + b"\x00\x01binary" if "v2" in self.path else self.answer)

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Inference-Header-Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def fake() -> Iterator[tuple[type[Server], str]]:
    """A fresh `Server` class to set up, and its URL."""
    handler = type("Handler", (Server,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def _sent(body: bytes, length: str) -> dict[str, tuple[str, list[int], bytes]]:
    """Input name to (datatype, shape, bytes) of a binary request."""
    header, rest, found = json.loads(body[: int(length)]), body[int(length) :], {}
    for spec in header["inputs"]:
        size = spec["parameters"]["binary_data_size"]
        found[spec["name"]], rest = (spec["datatype"], spec["shape"], rest[:size]), rest[size:]
    assert header["id"] == PROBE_ID
    assert rest == b"" and header["parameters"] == {"binary_data_output": True}
    return found


def test_the_probe_sends_triton_the_sample(fake: tuple[type[Server], str], tmp_path: Path) -> None:
    handler, url = fake
    handler.inputs = [{"name": "image", "datatype": "FP32", "shape": [-1, *SHAPE]}]
    numpy.save(tmp_path / "sample.npy", X)
    probed = run_probe(SERVER="triton", MODEL_NAME="tiny", MODELS=tmp_path, URL=url)
    assert (probed.returncode, probed.stderr) == (0, "")
    assert [path for path, *_ in handler.seen] == [f"/v2/models/tiny/versions/{version}/infer" for version in "12"]
    for _, headers, body in handler.seen:
        assert _sent(body, headers["inference-header-content-length"]) == {"image": ("FP32", [1, *SHAPE], X.tobytes())}


def test_the_probe_sends_triton_several_inputs_by_name(fake: tuple[type[Server], str], tmp_path: Path) -> None:
    handler, url = fake
    words, scale = numpy.arange(5, dtype=numpy.int64), numpy.array([1.5, -2], dtype=numpy.float16)
    handler.inputs = [
        {"name": "scale", "datatype": "FP16", "shape": [-1, 2]},
        {"name": "words", "datatype": "INT64", "shape": [-1, 5]},
    ]
    numpy.savez(tmp_path / "sample.npz", words=words, scale=scale)
    assert run_probe(SERVER="triton", MODEL_NAME="tiny", MODELS=tmp_path, URL=url).returncode == 0
    _, headers, body = handler.seen[0]
    assert _sent(body, headers["inference-header-content-length"]) == {
        "scale": ("FP16", [1, 2], scale.tobytes()),
        "words": ("INT64", [1, 5], words.tobytes()),
    }


@pytest.mark.parametrize("token", [None, "abc"])
def test_the_probe_sends_torchserve_the_sample_and_its_token(
    fake: tuple[type[Server], str], tmp_path: Path, token: str | None
) -> None:
    handler, url = fake
    (tmp_path / "sample.npy").write_bytes(npy(X))
    if token:
        (tmp_path / "redpp").mkdir()
        (tmp_path / "redpp/key_file.json").write_text(json.dumps({"inference": {"key": token}}))
    for variant, paths in (("both", ["/1.0", "/2.0"]), ("pruned", [""])):
        handler.seen.clear()
        probed = run_probe(
            SERVER="torchserve", MODEL_NAME="tiny", MODELS=tmp_path, URL=url, TMPDIR=tmp_path, VARIANT=variant
        )
        assert probed.returncode == 0
        assert [(path, body) for path, _, body in handler.seen] == [
            (f"/predictions/tiny{path}", npy(X)) for path in paths
        ]
        assert {headers["x-request-id"] for _, headers, _ in handler.seen} == {PROBE_ID}
        assert {headers.get("authorization") for _, headers, _ in handler.seen} == {token and f"Bearer {token}"}


@pytest.mark.parametrize("server", ["triton", "torchserve"])
@pytest.mark.parametrize(
    "change,message",
    [
        ({"status": 500, "answer": b"Stub process is not healthy."}, "answered 500"),
        ({"status": 503}, "answered 503"),
        ({"delay_s": 1.5}, "timed out"),
        ({"answer": b"{}"}, "answered without outputs"),
        ({"answer": b"<html>"}, "Expecting value"),
    ],
)
def test_the_probe_notices_a_server_that_does_not_serve(
    fake: tuple[type[Server], str], tmp_path: Path, server: str, change: dict[str, Any], message: str
) -> None:
    handler, url = fake
    handler.inputs = [{"name": "image", "datatype": "FP32", "shape": [-1, *SHAPE]}]
    for key, value in change.items():
        setattr(handler, key, value)
    (tmp_path / "sample.npy").write_bytes(npy(X))
    patience = 0.5 if "delay_s" in change else 20
    probed = run_probe(SERVER=server, MODEL_NAME="tiny", MODELS=tmp_path, URL=url, PROBE_TIMEOUT_S=patience)
    assert probed.returncode == 1 and message in probed.stderr and "Traceback" not in probed.stderr


def test_the_probe_of_a_server_that_is_down(tmp_path: Path) -> None:
    (tmp_path / "sample.npy").write_bytes(npy(X))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        probed = run_probe(SERVER="triton", MODEL_NAME="tiny", MODELS=tmp_path, URL=url)
    assert probed.returncode == 1 and "refused" in probed.stderr and "Traceback" not in probed.stderr


@pytest.mark.parametrize(
    "variables,message",
    [
        ({}, "SERVER is not set"),
        ({"SERVER": "triton"}, "MODEL_NAME is not set"),
        ({"SERVER": "tgi", "MODEL_NAME": "m", "MODELS": "/"}, "expected torchserve or triton"),
        ({"SERVER": "triton", "MODEL_NAME": "m", "MODELS": "/nonexistent"}, "expected a package"),
    ],
)
def test_the_probe_says_what_its_environment_lacks(variables: dict[str, str], message: str) -> None:
    probed = run_probe(**variables)
    assert probed.returncode == 1 and message in probed.stderr and "Traceback" not in probed.stderr


def test_a_sample_that_is_no_plain_array_is_refused(fake: tuple[type[Server], str], tmp_path: Path) -> None:
    handler, url = fake
    handler.inputs = [{"name": "image", "datatype": "FP32", "shape": [-1, 2]}]
    for content in (
        npy(numpy.asfortranarray(numpy.zeros((3, 2), numpy.float32))),
        npy(numpy.zeros(2, ">f4")),
        b"garbage",
        b"",
    ):
        (tmp_path / "sample.npy").write_bytes(content)
        probed = run_probe(SERVER="triton", MODEL_NAME="tiny", MODELS=tmp_path, URL=url)
        assert probed.returncode == 1 and "the sample " in probed.stderr and "Traceback" not in probed.stderr
    assert handler.seen == []


def test_whether_a_server_is_alive_is_no_question_of_load(fake: tuple[type[Server], str], tmp_path: Path) -> None:
    handler, url = fake
    handler.status, handler.delay_s = 503, 9.0
    assert run_probe("alive", SERVER="torchserve", MODEL_NAME="tiny", MODELS=tmp_path, URL=url).returncode == 0
    assert handler.seen == []
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        probed = run_probe("alive", SERVER="torchserve", MODEL_NAME="tiny", MODELS=tmp_path, URL=url)
    assert probed.returncode == 1 and "refused" in probed.stderr and "Traceback" not in probed.stderr


@pytest.mark.parametrize("variant,dead", [("both", 4), ("pruned", 2)])
def test_on_triton_every_process_of_the_model_has_to_be_there(
    fake: tuple[type[Server], str], tmp_path: Path, variant: str, dead: int
) -> None:
    """A sleeping shell stands in for each, under the name of the back end's program."""
    (tmp_path / "triton/tiny").mkdir(parents=True)
    config = "model_warmup { count: 9 }\ninstance_group {\n  count: 2\n  kind: KIND_CPU\n}\n"
    (tmp_path / "triton/tiny/config.pbtxt").write_text(config)
    command = ["/backends/python/triton_python_backend_stub", "60"]
    stubs = [subprocess.Popen(command, executable=shutil.which("sleep")) for _ in range(dead)]
    variables = {"SERVER": "triton", "MODEL_NAME": "tiny", "MODELS": tmp_path, "URL": fake[1], "VARIANT": variant}
    try:
        assert run_probe("alive", **variables).returncode == 0
        stubs[0].kill()
        stubs[0].wait()
        probed = run_probe("alive", **variables)
        assert (probed.returncode, probed.stderr) == (1, f"{dead - 1} of {dead} processes of the model run\n")
    finally:
        for stub in stubs:
            stub.kill()
            stub.wait()
