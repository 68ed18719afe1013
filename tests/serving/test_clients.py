"""What clients can send, on both real servers and through the gateway: every cell of the table in serving/README.md."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from PIL import Image

from redpp_serve.ab.gateway import Gateway, NginxProcess, connection_limit, worker_account
from redpp_serve.ab.spec import parse_split
from redpp_serve.loopback import GatewayPorts, free_ports
from redpp_serve.serving.server import LocalServer
from redpp_serve.serving.torchserve import TorchServe
from redpp_serve.serving.triton_server import TritonServer
from redpp_serve.state_folders import private_folder
from tests.support.served import npy
from tests.support.small import LABELS, SHIFT, outputs
from tests.support.stubs import ask
from tests.support.tools import tool

README = Path(__file__).parents[2] / "redpp_serve/serving/README.md"
COLUMNS = ("TorchServe", "Triton", "gateway")
X = np.random.default_rng(2).standard_normal((3, 1, 12, 12), dtype=np.float32)
PIXELS = np.random.default_rng(3).integers(0, 256, (1, 12, 12), dtype=np.uint8)


@dataclass(frozen=True)
class Target:
    """Where a client sends its questions: the address of the protocol, the URL of other bodies, and gRPC."""

    v2: str
    url: str
    grpc: str
    headers: dict[str, str]
    version: str

    def post(self, body: bytes, kind: str = "application/octet-stream", **more: str) -> tuple[dict[str, str], bytes]:
        parts = urlsplit(self.url)
        assert parts.port is not None
        headers = {**self.headers, "Content-Type": kind, **more}
        status, told, reply = ask(parts.port, parts.path, body, headers)
        assert status == 200, reply
        return told, reply

    def document(self, body: bytes, kind: str = "application/octet-stream", **more: str) -> Any:
        return json.loads(self.post(body, kind, **more)[1])

    def outputs(self, body: bytes, kind: str = "application/octet-stream") -> Any:
        return self.document(body, kind)["outputs"][0]


class Collector(ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP."""

    daemon_threads = True

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        super().__init__(("127.0.0.1", 0), _Taking)

    def spans(self) -> list[Any]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        taken = map(ExportTraceServiceRequest.FromString, self.bodies)
        return [s for each in taken for r in each.resource_spans for scope in r.scope_spans for s in scope.spans]


class _Taking(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def servers(packaged: Path, collector: Collector) -> Iterator[dict[str, LocalServer]]:
    """Both servers, which send their spans to the collector."""
    with ExitStack() as stack:
        made: dict[str, LocalServer] = {
            "TorchServe": TorchServe(packaged, name="small"),
            "Triton": TritonServer(packaged, name="small"),
        }
        for server in made.values():
            server.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{collector.server_port}"
            server.environment["OTEL_BSP_SCHEDULE_DELAY"] = "100"
            stack.enter_context(server)
        yield made


@pytest.fixture(scope="module")
def nginx() -> Path:
    """The gateway's program; looked for before any server is started."""
    return tool("nginx")


@pytest.fixture(scope="module")
def targets(nginx: Path, servers: dict[str, LocalServer]) -> Iterator[dict[str, Target]]:
    """Both servers with the original, and a gateway in front of TorchServe."""
    torchserve, triton = servers.values()
    with ExitStack() as stack:
        paths = tuple(f"/predictions/small/{version}" for version in torchserve.versions)
        held = private_folder("redpp-test-")
        stack.callback(held.release)
        made = Gateway(
            folder=held.path / "gateway",
            port=free_ports(GatewayPorts).gateway,
            server=torchserve.ports.inference,
            public="/predictions/small",
            paths=paths,
            split=parse_split("50:50"),
            sticky=None,
            salt="salt",
            account=worker_account(),
            connections=connection_limit(),
            front=torchserve.ports.front,
            name="small",
        )
        nginx = NginxProcess(made)
        nginx.start()
        stack.callback(nginx.stop)
        asked = {"X-Redpp-Arm": "original"}
        yield {
            "TorchServe": _target(torchserve, "1"),
            "Triton": _target(triton, "1"),
            "gateway": Target(
                f"127.0.0.1:{made.port}",
                f"http://127.0.0.1:{made.port}/predictions/small",
                f"127.0.0.1:{made.port}",
                {**torchserve.headers(), **asked},
                "",
            ),
        }


def _target(server: LocalServer, version: str) -> Target:
    front = server.front_url.removeprefix("http://")
    return Target(front, server.url(server.versions[0]), server.grpc_address, server.headers(), version)


def triton(kind: str = "FP32", array: np.ndarray = X, **options: Any) -> Callable[[Target], Any]:
    """Ask with Triton's client, which is the same program whatever serves."""

    def infer(target: Target) -> Any:
        given = tritonclient.http.InferInput("x", array.shape, kind)
        given.set_data_from_numpy(array, binary_data=options.get("binary", True))
        wanted = tritonclient.http.InferRequestedOutput(
            "output_0", binary_data=options.get("binary", True), class_count=options.get("classes", 0)
        )
        with tritonclient.http.InferenceServerClient(target.v2) as client:
            headers = dict(target.headers)
            answer = client.infer("small", [given], model_version=target.version, outputs=[wanted], headers=headers)
        return answer.as_numpy("output_0")

    return infer


def best_classes(target: Target) -> Any:
    rows = triton(classes=5)(target)
    found = np.zeros((3, 5))
    for row, texts in zip(found, rows, strict=True):
        for text in texts:
            value, index, label = text.decode().split(":")
            assert label == LABELS[int(index)]
            row[int(index)] = float(value)
    return found


def metadata(target: Target) -> Any:
    with tritonclient.http.InferenceServerClient(target.v2) as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("small") and not client.is_model_ready("other")
        found = client.get_model_metadata("small")
    assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 1, 12, 12]}]
    assert found["outputs"] == [{"name": "output_0", "datatype": "FP32", "shape": [-1, 5]}]


def health(target: Target) -> Any:
    status, _, reply = ask(int(target.v2.rpartition(":")[2]), "/healthz", b"", method="GET")
    assert (status, json.loads(reply)) == (200, {"status": "ready"})


def triton_grpc(target: Target) -> Any:
    given = tritonclient.grpc.InferInput("x", X.shape, "FP32").set_data_from_numpy(X)
    with tritonclient.grpc.InferenceServerClient(target.grpc) as client:
        answer = client.infer("small", [given], model_version="1", headers=target.headers, client_timeout=20)
    return answer.as_numpy("output_0")


def _field(number: int, data: bytes) -> bytes:
    size, length = len(data), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def torchserve_grpc(target: Target) -> Any:
    entry = _field(1, b"data") + _field(2, npy(X))
    body = _field(1, b"small") + _field(2, b"1.0") + _field(3, entry)
    path = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
    token = [("authorization", target.headers.get("Authorization", "")), ("protocol", "gRPC")]
    with grpc.insecure_channel(target.grpc) as channel:
        reply = channel.unary_unary(path)(body, timeout=20, metadata=token)
    return json.loads(reply[reply.index(b"{") :])["outputs"][0]


def instances(target: Target) -> Any:
    items = [X[0].tolist(), {"b64": base64.b64encode(npy(X[1])).decode()}, {"x": X[2].tolist()}]
    found = target.document(json.dumps({"instances": items}).encode(), "application/json")
    return [row[0] for row in found["predictions"]]


def file_answer(target: Target) -> Any:
    told, reply = target.post(npy(X), Accept="application/x-npy")
    assert told["content-type"] == "application/x-npy"
    return np.load(io.BytesIO(reply))


def named_classes(target: Target) -> Any:
    found = np.zeros((3, 5))
    for row, classes in zip(found, target.document(npy(X), **{"X-Redpp-Top-K": "5"})["classes"], strict=True):
        for one in classes:
            row[one["index"]] = one["value"]
            assert one["label"] == LABELS[one["index"]]
    return found


def form(target: Target) -> Any:
    head = b'--edge\r\nContent-Disposition: form-data; name="x"; filename="x.npy"\r\n\r\n'
    return target.outputs(head + npy(X) + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge")


def npz(target: Target) -> Any:
    stream = io.BytesIO()
    np.savez(stream, x=X)
    return target.outputs(stream.getvalue())


def image(target: Target) -> Any:
    stream = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(stream, "PNG")
    return target.outputs(stream.getvalue())


def images_as_bytes(target: Target) -> Any:
    stream = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(stream, "PNG")
    return triton("BYTES", np.array([stream.getvalue()], dtype=np.object_))(target)[0]


JSON = "application/json"
ROWS: dict[str, tuple[Callable[[Target], Any], str]] = {
    "`.npy`": (lambda t: t.outputs(npy(X)), "arrays"),
    "`.npz`": (npz, "arrays"),
    'JSON, `{"inputs": ...}`': (lambda t: t.outputs(json.dumps({"inputs": X.tolist()}).encode(), JSON), "arrays"),
    'JSON, `{"instances": [...]}`, Base64 in it': (instances, "arrays"),
    "a form with one file for each input": (form, "arrays"),
    "an image file": (image, "pixels"),
    "bytes of pixels as `.npy`": (lambda t: t.outputs(npy(PIXELS)), "pixels"),
    "answers as `.npy` (`Accept: application/x-npy`)": (file_answer, "arrays"),
    "the best classes (`X-Redpp-Top-K: 5`)": (named_classes, "arrays"),
    "Open Inference Protocol, JSON": (triton(binary=False), "arrays"),
    "Open Inference Protocol, binary": (triton(), "arrays"),
    "the same with classes (`class_count`)": (best_classes, "arrays"),
    "the same with image files (BYTES)": (images_as_bytes, "pixels"),
    "the same with pixels (UINT8)": (lambda t: triton("UINT8", PIXELS[None])(t)[0], "pixels"),
    "its metadata, liveness and readiness": (metadata, ""),
    "`/healthz` without a token": (health, ""),
    "gRPC of the Open Inference Protocol": (triton_grpc, "arrays"),
    "gRPC of TorchServe": (torchserve_grpc, "arrays"),
}


def table() -> dict[str, dict[str, str]]:
    """The README's table: row to column to ``yes`` or ``no``."""
    lines = README.read_text().split("## What clients can send")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert tuple(cells[0][1:]) == COLUMNS
    return {row: dict(zip(COLUMNS, found, strict=True)) for row, *found in cells[2:]}


def test_the_table_has_the_rows_that_are_tried() -> None:
    found = table()
    assert list(found) == list(ROWS)
    assert {cell for row in found.values() for cell in row.values()} == {"yes", "no"}


@pytest.mark.server
@pytest.mark.parametrize("column", COLUMNS)
def test_every_cell(targets: dict[str, Target], packaged: Path, column: str) -> None:
    scaled = (PIXELS.astype(np.float32) / 255 - SHIFT) / 0.25
    archive = packaged / "original.mar"
    wanted = {
        "arrays": np.array([outputs(archive, torch.from_numpy(x))[0] for x in X]),
        "pixels": np.array(outputs(archive, torch.from_numpy(scaled))[0]),
    }
    wrong = []
    for row, (tried, kind) in ROWS.items():
        try:
            found = tried(targets[column])
            answered = True
        except Exception as error:  # each client has its own kinds of refusal
            answered, found = False, error
        if answered and kind:
            assert np.array(found) == pytest.approx(wanted[kind], rel=1e-3, abs=1e-3), row
        if answered != (table()[row][column] == "yes"):
            wrong.append(f"{row}: {' '.join(str(found).split())[:300]}")
    assert not wrong, "\n".join(wrong)


TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def infer(target: Target, x: np.ndarray, **headers: str) -> tuple[int, dict[str, str]]:
    """Status and headers of a question of the protocol in JSON."""
    version = f"/versions/{target.version}" if target.version else ""
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    given = {**target.headers, "Content-Type": JSON, **headers}
    body = json.dumps({"inputs": [tensor]}).encode()
    return ask(int(target.v2.rpartition(":")[2]), f"/v2/models/small{version}/infer", body, given)[:2]


def until(look: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


@pytest.mark.server
@pytest.mark.parametrize("column", COLUMNS)
def test_a_request_that_fails_is_named_in_the_servers_log(
    targets: dict[str, Target], servers: dict[str, LocalServer], column: str
) -> None:
    server = servers.get(column, servers["TorchServe"])
    huge = np.full_like(X[:1], 3e38)
    status, headers = infer(targets[column], huge, **{"X-Request-Id": f"from-{column}"})
    assert status == 500
    name = headers["x-request-id"]
    assert name == f"from-{column}" if column != "gateway" else len(name) == 32
    until(lambda: f"request {name}: the network's output is not finite" in server.log_tail(200))
    port, url = server.url(server.versions[0]).removeprefix("http://127.0.0.1:").split("/", 1)
    if column == "TorchServe":  # asked itself, it answers with an id of its own
        for sent in ({"X-Request-Id": "direct"}, {"X-Request-Id": "two words"}, {}):
            told = ask(int(port), f"/{url}", npy(huge), {**server.headers(), "Content-Type": "a/b", **sent})[1]
            name = "direct" if "direct" in sent.values() else told["x-request-id"]
            until(lambda name=name: f"request {name}: the network's output" in server.log_tail(200))


@pytest.mark.server
@pytest.mark.parametrize("column", COLUMNS)
def test_spans_of_the_handler_are_in_the_users_trace(
    targets: dict[str, Target], collector: Collector, column: str
) -> None:
    trace = f"{COLUMNS.index(column)}{TRACE[1:]}"
    status, headers = infer(targets[column], X[:1], traceparent=f"00-{trace}-{SPAN}-01", tracestate="a=1")
    assert status == 200 and "traceparent" not in headers

    def mine() -> dict[str, Any]:
        return {span.name: span for span in collector.spans() if span.trace_id.hex() == trace}

    fronted = column != "gateway"  # which asks the server behind its front
    until(lambda: len(mine()) == 4 + fronted)
    whole = mine()["handle"]
    outer = mine()["front"] if fronted else whole
    assert outer.parent_span_id.hex() == SPAN and whole.trace_state == "a=1"
    assert not fronted or whole.parent_span_id == outer.span_id
    about = {each.key: each.value.string_value for each in whole.attributes}
    assert about["redpp.request_id"] == headers["x-request-id"] and about["redpp.variant"] == "original"
    for name in ("preprocess", "inference", "postprocess"):
        assert mine()[name].parent_span_id == whole.span_id
        assert whole.start_time_unix_nano <= mine()[name].start_time_unix_nano <= whole.end_time_unix_nano
