"""The reply of a prediction, written by the real handlers and read by the real clients of `comparison`.

Only the servers between them are replaced: HTTP and gRPC servers of this process that do to requests and replies what
TorchServe and Triton do.
"""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from redpp_serve.comparison.client import Decoder, Endpoint, Payload, Reply
from redpp_serve.comparison.triton_client import TritonEndpoint, as_input
from redpp_serve.handlers.torchserve import RedppHandler
from redpp_serve.handlers.triton_server import RedppModel
from redpp_serve.handlers.wire import VARIANT_HEADER, read_seconds, write_seconds
from redpp_serve.packaging.trials import triton_python_backend_utils as triton_stub
from tests.support.served import PREPROCESS, SHAPE, Context, artifact, expected, npy, picture, triton_arguments

SLOW_S = 0.02  # the network takes this long, so that the handler's time is not a rounding error
BINARY = "application/octet-stream"
X = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
PICTURE = picture()
INPUTS = (npy(X), PICTURE)
TENSORS = (torch.from_numpy(X), PREPROCESS.image(PICTURE))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "")
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_stub)
    monkeypatch.setattr(triton_stub.MetricFamily, "samples", {})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def slow(served: RedppHandler | RedppModel) -> None:
    network = served.model

    class Slow:
        def __call__(self, *inputs: torch.Tensor) -> Any:
            time.sleep(SLOW_S)
            return network(*inputs)

        def __getattr__(self, name: str) -> Any:
            return getattr(network, name)

    served.model = Slow()  # type: ignore[assignment]


@contextmanager
def torchserve(handler: RedppHandler, context: Context) -> Iterator[str]:
    """Yield the URL of a server that answers as TorchServe does with this handler: a batch of one for each request."""

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            context.statuses, context.headers = {}, {}
            (body,) = handler.handle([{"body": self.rfile.read(int(self.headers["Content-Length"]))}], context)
            self.send_response(*context.statuses.get(0, (200, "OK")))
            for name, value in {**context.headers[0], "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/predictions/tiny/1.0"
        finally:
            server.shutdown()
            thread.join()


class TritonService(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Does to requests and responses of the Python back end what Triton's core does."""

    def __init__(self, model: RedppModel) -> None:
        self._model = model

    def ModelInfer(self, request: Any, context: Any) -> Any:
        inputs = {
            spec.name: torch.from_numpy(
                np.frombuffer(raw, triton_to_np_dtype(spec.datatype)).reshape(tuple(spec.shape)).copy()
            )
            for spec, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        (response,) = self._model.execute([triton_stub.InferenceRequest(inputs)])
        if response.has_error():
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, response.error().message())
        reply = service_pb2.ModelInferResponse(model_name=request.model_name, model_version=request.model_version)
        for name, value in getattr(response, "parameters", {}).items():
            field = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]  # all that it takes
            setattr(reply.parameters[name], field, value)
        for tensor in response.output_tensors():
            array = tensor.held.numpy()
            reply.outputs.add(name=tensor.name(), datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
            reply.raw_output_contents.append(array.tobytes())
        return reply


@contextmanager
def triton(model: RedppModel) -> Iterator[TritonEndpoint]:
    """Yield an endpoint of a gRPC server that answers with this model."""
    server = grpc.server(ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(TritonService(model), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield TritonEndpoint("original", f"127.0.0.1:{port}", {}, "tiny", "1", model.model.inputs, PREPROCESS)
    finally:
        server.stop(None).wait(10)


class ResponseWithParameters(triton_stub.InferenceResponse):
    """What back ends newer than 24.10 offer."""

    def __init__(
        self, output_tensors: Any = (), error: Any = None, parameters: dict[str, str | int | bool] | None = None
    ) -> None:
        super().__init__(output_tensors, error)
        self.parameters = parameters or {}


def triton_model(folder: Path) -> RedppModel:
    (folder / "model.redpp").write_bytes(artifact())
    model = type("TritonPythonModel", (RedppModel,), {"artifact": folder / "model.redpp"})()
    model.initialize(triton_arguments())
    return model


def replies(endpoint: Endpoint, *payloads: bytes) -> list[Reply]:
    wire, decoder = endpoint.connect(), Decoder(time.perf_counter())
    try:
        return [decoder.reply("original", k, wire.send(Payload(p, BINARY))) for k, p in enumerate(payloads)]
    finally:
        wire.close()


def check(got: list[Reply], timed: bool = True) -> None:
    for reply, x in zip(got, TENSORS, strict=True):
        assert reply.ok and reply.outputs is not None, reply.error
        assert reply.outputs[0].tolist() == pytest.approx(expected("1.0", x), rel=1e-4, abs=1e-5)
        if timed:
            assert reply.handler_s is not None and SLOW_S <= reply.handler_s < reply.latency_s
        else:
            assert reply.handler_s is None


def test_torchserves_reply_arrives_with_outputs_and_handler_time(tmp_path: Path) -> None:
    (tmp_path / "model.redpp").write_bytes(artifact())
    handler, context = RedppHandler(), Context(tmp_path)
    handler.initialize(context)
    slow(handler)
    with torchserve(handler, context) as url:
        check(replies(Endpoint("original", url, {}), *INPUTS))
        assert context.headers[0][VARIANT_HEADER] == "original"
        (refused,) = replies(Endpoint("original", url, {}), b"garbage")
        assert (refused.ok, refused.status) == (False, 400) and "no known kind" in refused.error


def test_tritons_reply_arrives_with_outputs_and_handler_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_stub, "InferenceResponse", ResponseWithParameters)
    model = triton_model(tmp_path)
    slow(model)
    with triton(model) as endpoint:
        check(replies(endpoint, *INPUTS))
        wire = endpoint.connect()
        refused = wire.infer([as_input("x", np.full((1, *SHAPE), np.nan, np.float32))])
        wire.close()
        assert (refused.status, refused.handler_s) == (400, None) and "NaN" in refused.error
    model.finalize()


def test_a_back_end_without_parameters_gives_outputs_alone(tmp_path: Path) -> None:
    model = triton_model(tmp_path)
    with triton(model) as endpoint:
        check(replies(endpoint, *INPUTS), timed=False)
    model.finalize()


def test_durations_survive_the_wire_and_nonsense_is_no_duration() -> None:
    for seconds in (0.000_002, 0.0125, 3.5, 59.0):
        assert read_seconds(write_seconds(seconds)) == pytest.approx(seconds, abs=5e-7)
    for text in (None, "", "0.000", "-1", "nan", "inf", "soon"):
        assert read_seconds(text) is None, text
