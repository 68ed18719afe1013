"""gRPC through the gateway: Triton's client, nginx, the relay that names the version, and a stand-in for Triton."""

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput, service_pb2
from tritonclient.utils import InferenceServerException

from redpp_serve.ab.counts import Traffic
from redpp_serve.ab.gateway import DEAD, ListeningProcess, NginxProcess, grpc_socket, mark_dead, switch
from redpp_serve.ab.grpc_relay import command, of_version
from redpp_serve.ab.state import Lines
from redpp_serve.loopback import GatewayPorts, free_ports
from redpp_serve.variants import NAMES
from tests.ab.test_gateway import folder, gateway, upstream  # noqa: F401 (fixtures)
from tests.support.stubs import StubServer

INFER = "/inference.GRPCInferenceService/ModelInfer"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
MOST = 1 << 20
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_the_version_behind_a_message_is_the_one_that_counts() -> None:
    for given in ("", "7", "1"):
        request = service_pb2.ModelInferRequest(
            model_name="m", model_version=given, id="a", raw_input_contents=[b"x" * 300]
        )
        read = service_pb2.ModelInferRequest.FromString(of_version(request.SerializeToString(), "2"))
        request.model_version = "2"
        assert read == request


@dataclass
class Triton(grpc.GenericRpcHandler):
    """Answers with the version that it is asked for, or refuses."""

    refuses: grpc.StatusCode | None = None
    only: str = ""  # the version that it refuses or holds, where it is not all
    held: threading.Event | None = None  # what it waits for
    metadata: list[dict[str, str]] = field(default_factory=list)

    def service(self, details: Any) -> Any:
        if details.method == "/inference.GRPCInferenceService/ServerLive":
            return grpc.unary_unary_rpc_method_handler(
                lambda *_: service_pb2.ServerLiveResponse(live=True).SerializeToString()
            )
        return grpc.unary_unary_rpc_method_handler(self._infer) if details.method == INFER else None

    def _infer(self, data: bytes, context: Any) -> bytes:
        request = service_pb2.ModelInferRequest.FromString(data)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.held and request.model_version == self.only:
            self.held.wait(20)
        if self.refuses and request.model_version.startswith(self.only):
            context.abort(self.refuses, "as told")
        reply = service_pb2.ModelInferResponse(model_name=request.model_name, model_version=request.model_version)
        reply.raw_output_contents.append(request.raw_input_contents[0])
        reply.outputs.add(name="y", datatype="FP32", shape=request.inputs[0].shape)
        return reply.SerializeToString()


@pytest.fixture
def triton() -> Iterator[tuple[Triton, int]]:
    made = Triton()
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((made,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield made, port
    server.stop(0)


@pytest.fixture
def live(folder: Path, upstream: StubServer, triton: tuple[Triton, int]) -> Iterator[NginxProcess]:  # noqa: F811
    """nginx and the relay."""
    address, port = f"127.0.0.1:{triton[1]}", free_ports(GatewayPorts).gateway
    nginx = NginxProcess(replace(gateway(folder, upstream.port), grpc=(port, address)))
    nginx.make_folder()
    original, pruned = (grpc_socket(folder, arm) for arm in NAMES)
    relay = ListeningProcess(
        "relay", command(address, original, pruned, ("1", "2"), folder / DEAD, MOST), pruned, folder / "grpc.log"
    )
    try:
        relay.start()
        nginx.start()
        yield nginx
    finally:
        nginx.stop()
        relay.stop()


def ask(nginx: NginxProcess, **metadata: str) -> str:
    """The version that answers."""
    assert nginx.gateway.grpc
    given = InferInput("x", X.shape, "FP32").set_data_from_numpy(X)
    with InferenceServerClient(f"127.0.0.1:{nginx.gateway.grpc[0]}") as client:
        headers = {key.replace("_", "-"): value for key, value in metadata.items()}
        answer = client.infer("m", [given], model_version="9", headers=headers, client_timeout=20)
    assert (answer.as_numpy("y") == X).all()
    return str(answer.get_response().model_version)


@pytest.mark.server
def test_users_of_grpc_are_divided_as_those_of_http_and_keep_their_arm(
    live: NginxProcess,
    triton: tuple[Triton, int],
    upstream: StubServer,  # noqa: F811
) -> None:
    from tests.ab.test_gateway import PUBLIC, arm
    from tests.support.stubs import ask as ask_http

    users = [f"user-{k}" for k in range(60)]
    versions = [ask(live, x_user_id=user) for user in users]
    arms = [arm(ask_http(live.gateway.port, PUBLIC, headers={"X-User-Id": user})) for user in users]
    assert [NAMES[int(version) - 1] for version in versions] == arms
    assert abs(arms.count("pruned") / 60 - 0.2) < 4 * math.sqrt(0.16 / 60)
    for number, wanted in enumerate(NAMES, 1):
        assert ask(live, x_user_id="user-1", x_redpp_arm=wanted, traceparent=TRACE, token="t") == str(number)
    seen = triton[0].metadata[-1]
    assert (seen["traceparent"], seen["token"]) == (TRACE, "t") and len(seen["x-request-id"]) == 32
    assert "x-redpp-arm" not in seen
    for move, version in (("pruned", "2"), ("original", "1")):
        switch(live.gateway.folder, move)
        assert {ask(live, x_user_id=user) for user in users[:8]} == {version}


@pytest.mark.server
def test_errors_of_grpc_are_counted_by_arm(live: NginxProcess, triton: tuple[Triton, int]) -> None:
    assert ask(live, x_user_id="a")
    for code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL):
        triton[0].refuses = code
        with pytest.raises(InferenceServerException, match="as told"):
            ask(live, x_user_id="a")
    triton[0].refuses = None
    assert live.gateway.grpc
    with InferenceServerClient(f"127.0.0.1:{live.gateway.grpc[0]}") as client:
        assert client.is_server_live()
    with (
        grpc.insecure_channel(f"127.0.0.1:{live.gateway.grpc[0]}") as channel,
        pytest.raises(grpc.RpcError, match="a larger message"),
    ):
        channel.unary_unary(INFER.replace("ModelInfer", "ServerLive"))(bytes(5000))  # it may be packed
    with (
        InferenceServerClient(f"127.0.0.1:{live.gateway.grpc[0]}") as client,
        pytest.raises(InferenceServerException, match="expected ModelInfer"),
    ):
        client.get_model_repository_index()
    with pytest.raises(InferenceServerException, match="names no arm"):
        ask(live, x_redpp_arm="candidate")
    live.stop()
    lines = [json.loads(line) for line in live.access_log.read_text().splitlines()]
    assert [line["status"] for line in lines[:3]] == [200, 400, 500]
    traffic = Traffic()
    traffic.take(Lines(live.access_log).new())
    assert traffic.requests.total() == 3 and traffic.errors.total() == traffic.refused.total() == 1


@pytest.mark.server
@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN])
def test_an_arm_that_fails_leaves_its_users_to_the_other(
    live: NginxProcess, triton: tuple[Triton, int], code: grpc.StatusCode
) -> None:
    switch(live.gateway.folder, "pruned")
    triton[0].refuses, triton[0].only = code, "2"
    assert ask(live, x_user_id="a", token="t") == "1"
    assert triton[0].metadata[-1]["token"] == "t" and not [k for k in triton[0].metadata[-1] if "change" in k]
    with pytest.raises(InferenceServerException, match="as told"):
        ask(live, x_redpp_arm="pruned")  # who asks for an arm gets its answer
    with pytest.raises(InferenceServerException, match="as told"):
        ask(live, x_redpp_arm="pruned", x_redpp_may_change="1")
    triton[0].only = ""
    with pytest.raises(InferenceServerException, match="as told"):
        ask(live, x_user_id="a")  # both fail
    triton[0].refuses = grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(InferenceServerException, match="as told"):
        ask(live, x_user_id="a")  # the request is at fault
    live.stop()
    lines = [json.loads(line) for line in live.access_log.read_text().splitlines()]
    seen = [(line["arm"], line["answered_by"], line["status"]) for line in lines]
    status = 503 if code == grpc.StatusCode.UNAVAILABLE else 500
    assert seen == [
        ("pruned", "original", 200),
        ("pruned", "pruned", status),
        ("pruned", "pruned", status),
        ("pruned", "original", status),
        ("pruned", "pruned", 400),
    ]
    traffic = Traffic()
    traffic.take(Lines(live.access_log).new())
    assert traffic.failed_over == {"pruned": 1}, "the one that was answered"


@pytest.mark.server
def test_a_dead_arm_leaves_its_users_to_the_other_and_a_dead_server_is_told(
    live: NginxProcess, triton: tuple[Triton, int]
) -> None:
    mark_dead(live.gateway.folder, {"original"})
    assert {ask(live, x_user_id=f"user-{k}") for k in range(8)} == {"2"}
    mark_dead(live.gateway.folder, ())
    grpc_socket(live.gateway.folder, "original").unlink()
    with pytest.raises(InferenceServerException, match="does not answer"):
        ask(live, x_redpp_arm="original")
    assert ask(live, x_redpp_arm="pruned") == "2"


@pytest.mark.server
def test_requests_that_wait_for_a_dead_arm_are_answered_by_the_other_at_once(
    live: NginxProcess, triton: tuple[Triton, int]
) -> None:
    switch(live.gateway.folder, "pruned")
    triton[0].only, triton[0].held = "2", threading.Event()
    with ThreadPoolExecutor(2) as users:
        waiting, chosen = users.submit(ask, live), users.submit(ask, live, x_redpp_arm="pruned")
        time.sleep(0.5)
        assert not waiting.done(), "a slow arm is no dead one"
        mark_dead(live.gateway.folder, NAMES)
        time.sleep(0.5)
        assert not waiting.done(), "nobody else could answer"
        mark_dead(live.gateway.folder, ["pruned"])
        assert waiting.result(1) == "1"
        assert not chosen.done(), "who asks for an arm waits for it"
        triton[0].held.set()
        assert chosen.result(5) == "2"
    live.stop()
    traffic = Traffic()
    traffic.take(Lines(live.access_log).new())
    assert traffic.failed_over == {"pruned": 1}


@pytest.mark.parametrize(
    "request_",
    [
        service_pb2.ModelInferRequest(model_name="m", model_version="2").SerializeToString() + b"\x3a\x06abc",
        b"",
        b"\xff" * 3,
        b"\x0b",  # a group begins
        b"\x3a\x00" * 10_001,
    ],
)
def test_what_would_swallow_the_version_is_no_request(request_: bytes) -> None:
    with pytest.raises(ValueError):
        of_version(request_, "1")


def infer_raw(nginx: NginxProcess, message: bytes, **given: Any) -> grpc.StatusCode:
    """The status of a message of bytes."""
    assert nginx.gateway.grpc
    with grpc.insecure_channel(f"127.0.0.1:{nginx.gateway.grpc[0]}") as channel:
        try:
            channel.unary_unary(INFER)(message, metadata=[("x-user-id", "a")], **{"timeout": 20, **given})
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined,no-any-return]
    return grpc.StatusCode.OK


def send_frame(nginx: NginxProcess, body: bytes, encoding: str) -> None:
    """Send a body as no library would frame it, over HTTP/2 by hand, and wait for an answer."""
    assert nginx.gateway.grpc
    port = nginx.gateway.grpc[0]
    headers = {":method": "POST", ":scheme": "http", ":path": INFER, ":authority": "m", "te": "trailers",
               "content-type": "application/grpc", "grpc-encoding": encoding, "x-user-id": "a"}  # fmt: skip
    block = b"".join(
        b"\0" + bytes([len(key)]) + key.encode() + bytes([len(value)]) + value.encode()
        for key, value in headers.items()
    )

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        frames = frame(4, 0, 0, b"") + frame(1, 4, 1, block) + frame(0, 1, 1, body)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frames)
        while head := connection.recv(9, socket.MSG_WAITALL):
            connection.recv(int.from_bytes(head[:3], "big"), socket.MSG_WAITALL)
            if (head[3] == 1 and head[4] & 1) or head[3] in (3, 7) or (head[3] == 0 and head[4] & 1):
                return


@pytest.mark.server
def test_what_a_user_can_make_fail_says_nothing_of_an_arm(live: NginxProcess, triton: tuple[Triton, int]) -> None:
    switch(live.gateway.folder, "pruned")
    code = grpc.StatusCode
    good = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[b"abcd"])
    good.inputs.add(name="x", shape=[1])
    plain = good.SerializeToString()
    good.raw_input_contents[0] = bytes(64 * MOST)
    bomb = good.SerializeToString()
    assert infer_raw(live, plain) == code.OK
    assert infer_raw(live, plain, compression=grpc.Compression.Gzip) == code.OK
    assert infer_raw(live, bomb, compression=grpc.Compression.Gzip) == code.RESOURCE_EXHAUSTED
    assert infer_raw(live, plain + bytes(live.gateway.most_bytes)) == code.RESOURCE_EXHAUSTED
    assert infer_raw(live, plain[:-1]) == code.INVALID_ARGUMENT
    triton[0].only, triton[0].held = "2", threading.Event()
    assert infer_raw(live, plain, timeout=0.3) == code.DEADLINE_EXCEEDED
    triton[0].held.set()
    for body, encoding in ((b"\1\0\0\0\4abcd", "gzip"), (b"\1\0\0\0\4abcd", "identity"), (b"\0\0\0\0\4ab", "identity"),
                           (b"\1\0\0\0\4abcd", "snappy"), (b"", "identity")):  # fmt: skip
        send_frame(live, body, encoding)
    assert len(triton[0].metadata) == 3, "an arm was asked for what is no request"
    live.stop()
    lines = [json.loads(line) for line in live.access_log.read_text().splitlines()]
    assert [line["status"] for line in lines[:6]] == [200, 200, 413, 413, 400, 499]
    assert len(lines) == 11 and all(400 <= line["status"] < 500 for line in lines[6:]), lines[6:]
    traffic = Traffic()
    traffic.take(Lines(live.access_log).new())
    assert not traffic.faults.total() and not traffic.errors.total()
