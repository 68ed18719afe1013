"""Triton's client against a gRPC service in this process that speaks its protocol, with known answers and refusals."""

import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from redpp_serve.comparison import Payload, compare_endpoints
from redpp_serve.comparison.client import Decoder
from redpp_serve.comparison.load import Load, run_paired
from redpp_serve.comparison.triton_client import TritonEndpoint, as_input
from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.handlers.wire import HANDLER_PARAMETER, write_seconds
from redpp_serve.options import ComparisonOptions

INPUT = InputSpec("image", (1, 2, 2))
BINARY = "application/octet-stream"


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with the sum and the maximum of the input; version 2 takes less time; 99 in an input is refused."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, tuple[int, ...], str | None]] = []
        self.peers: set[str] = set()
        self.delay_s = {"1": 0.006, "2": 0.003}

    def ModelInfer(self, request: Any, context: Any) -> Any:
        token = dict(context.invocation_metadata()).get("token")
        (tensor,) = request.inputs
        x = np.frombuffer(request.raw_input_contents[0], np.float32)
        self.seen.append((request.model_name, request.model_version, tuple(tensor.shape), token))
        self.peers.add(context.peer())
        if 99 in x:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no 99 please")
        if 98 in x:
            context.abort(grpc.StatusCode.INTERNAL, "the stub is dead")
        time.sleep(self.delay_s.get(request.model_version, 0))
        reply = service_pb2.ModelInferResponse(model_name="m", model_version=request.model_version)
        reply.parameters[HANDLER_PARAMETER].string_param = write_seconds(self.delay_s.get(request.model_version, 0))
        rows = x.reshape(tensor.shape[0], -1)
        reply.outputs.add(name="output_0", datatype="FP32", shape=[len(rows), 2])
        reply.raw_output_contents.append(np.stack([rows.sum(1), rows.max(1)], 1).astype(np.float32).tobytes())
        return reply


@pytest.fixture
def service() -> Iterator[tuple[Service, TritonEndpoint]]:
    server, service = grpc.server(ThreadPoolExecutor(8)), Service()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, TritonEndpoint("original", f"127.0.0.1:{port}", {"token": "t"}, "m", "1", (INPUT,), None)
    server.stop(None).wait(10)


def npy(*values: float) -> Payload:
    stream = io.BytesIO()
    np.save(stream, np.array(values, np.float32).reshape(INPUT.shape))
    return Payload(stream.getvalue(), BINARY)


def test_an_input_is_sent_as_a_batch_of_one_and_its_reply_decoded(service: tuple[Service, TritonEndpoint]) -> None:
    served, endpoint = service
    wire = endpoint.connect()
    reply = Decoder(time.perf_counter()).reply("original", 0, wire.send(npy(1, 2, 3, 4)))
    wire.close()
    assert reply.ok and reply.outputs is not None and reply.outputs[0].tolist() == [10, 4]
    assert reply.handler_s == pytest.approx(0.006) and reply.latency_s >= 0.006
    assert served.seen == [("m", "1", (1, *INPUT.shape), "t")]


def test_several_inputs_go_as_one_batch(service: tuple[Service, TritonEndpoint]) -> None:
    served, endpoint = service
    stream = io.BytesIO()
    np.save(stream, np.arange(12, dtype=np.float32).reshape(3, *INPUT.shape))
    wire = endpoint.connect()
    reply = Decoder(0.0).reply("original", 0, wire.send(Payload(stream.getvalue(), BINARY, items=3)))
    alone = Decoder(0.0).reply("original", 0, wire.send(Payload(stream.getvalue(), BINARY)))
    wire.close()
    assert reply.outputs is not None and reply.outputs[0].tolist() == [[6, 3], [22, 7], [38, 11]]
    assert served.seen == [("m", "1", (3, *INPUT.shape), "t")]
    assert (alone.status, alone.error) == (400, "found 3 items, expected 1")


@pytest.mark.parametrize(
    ("payload", "status", "words", "sent"),
    [
        (npy(1, 2, 3, 99), 400, "no 99 please", 1),
        (npy(1, 2, 3, 98), 500, "the stub is dead", 1),
        (Payload(b"garbage", BINARY), 400, "no known kind", 0),
        (npy(1, 2, 3, np.nan), 400, "NaN", 0),
    ],
)
def test_refusals_have_a_status_and_the_servers_words(
    service: tuple[Service, TritonEndpoint], payload: Payload, status: int, words: str, sent: int
) -> None:
    served, endpoint = service
    wire = endpoint.connect()
    reply = Decoder(time.perf_counter()).reply("original", 0, wire.send(payload))
    wire.close()
    assert (reply.ok, reply.status, reply.outputs, len(served.seen)) == (False, status, None, sent)
    assert words in reply.error


def test_nobody_there_is_a_failed_request_not_an_exception() -> None:
    wire = TritonEndpoint("original", "127.0.0.1:1", {}, "m", "1", (INPUT,), None).connect()
    exchange = wire.send(npy(1, 2, 3, 4))
    wire.close()
    assert exchange.status == 503 and exchange.error


def test_what_the_client_does_not_convert_reaches_the_server(service: tuple[Service, TritonEndpoint]) -> None:
    served, endpoint = service
    wire = endpoint.connect()
    assert wire.infer([as_input("image", np.full((1, *INPUT.shape), np.nan, np.float32))]).ok
    wire.close()
    assert len(served.seen) == 1


def test_images_are_preprocessed_as_the_handler_does(service: tuple[Service, TritonEndpoint], tmp_path: Path) -> None:
    from PIL import Image

    _, endpoint = service
    Image.fromarray(np.full((2, 2), 255, np.uint8)).save(tmp_path / "white.png")
    white = replace(endpoint, preprocess=Preprocess("L", 2, 2, (0.5,), (0.25,)))
    wire = white.connect()
    reply = Decoder(0.0).reply("original", 0, wire.send(Payload((tmp_path / "white.png").read_bytes(), BINARY)))
    wire.close()
    assert reply.outputs is not None and reply.outputs[0].tolist() == [8, 2]


def test_connections_have_sockets_of_their_own(service: tuple[Service, TritonEndpoint]) -> None:
    """Else all clients would share one connection's flow control, and the comparison its queue."""
    served, endpoint = service
    run_paired(Load(endpoint, replace(endpoint, label="pruned", version="2"), [npy(1, 2, 3, 4)], 3), 6, None)
    assert len(served.peers) == 6


def test_the_comparison_reads_as_on_torchserve(service: tuple[Service, TritonEndpoint]) -> None:
    _, endpoint = service
    result = compare_endpoints(
        endpoint,
        replace(endpoint, label="pruned", version="2"),
        [npy(1, 2, 3, k) for k in range(4)],
        ComparisonOptions(concurrency=2, duration=0.8),
        progress=False,
    )
    assert result.to_json()["speedup"]["handler_p50"]["ratio"] == pytest.approx(2.0)
    assert result.agreement.top1 == 1.0 and result.agreement.max_abs_difference == 0 and result.original.errors == 0
    assert "in the handler" in result.to_text() and "end to end" in result.to_text()
