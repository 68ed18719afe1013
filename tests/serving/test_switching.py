"""What is asked of the servers' management APIs to move the default version, and what their replies mean."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from redpp_serve.errors import RedppError
from redpp_serve.serving.running import Running
from redpp_serve.serving.switching import load_triton_versions, loaded_triton_versions, switch, triton_versions
from tests.support.rollout import default_variant
from tests.support.stubs import StubServer, stub

CONFIG = {"name": "a", "max_batch_size": 8, "version_policy": {"all": {}}}


class Api:
    """Answers as told, and keeps what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.status, self.reply = 200, None

    def __call__(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        assert headers["token"] == "m"
        self.asked.append((path, json.loads(body) if body else None))
        return self.status, self.reply


@pytest.fixture
def api() -> Iterator[tuple[Api, StubServer]]:
    answers = Api()
    with stub(answers) as server:
        yield answers, server


def running(server: StubServer, kind: str) -> Running:
    versions = ("1.0", "2.0") if kind == "torchserve" else ("1", "2")
    headers = {"inference": {"token": "i"}, "management": {"token": "m"}}
    url = f"http://127.0.0.1:{server.port}"
    return Running("/dist/a", "a", kind, 1, 0.0, versions, {}, url, [], headers, CONFIG)


def test_torchserves_default_is_set_by_version(api: tuple[Api, StubServer]) -> None:
    answers, server = api
    told = running(server, "torchserve")
    for variant, version in (("original", "1.0"), ("pruned", "2.0")):
        switch(told, variant)
        assert answers.asked[-1] == (f"/models/a/{version}/set-default", None)


def test_tritons_default_is_the_highest_version_that_is_loaded(api: tuple[Api, StubServer]) -> None:
    answers, server = api
    told = running(server, "triton")
    for variant, versions in (("original", ["1", "2", "3"]), ("pruned", ["1", "2"])):
        assert list(triton_versions(variant)) == versions
        switch(told, variant)
        path, document = answers.asked[-1]
        assert path == "/v2/repository/models/a/load"
        assert json.loads(document["parameters"]["config"]) == {
            **CONFIG,
            "version_policy": {"specific": {"versions": versions}},
        }
    load_triton_versions(told, {"4", "1"})
    assert '"versions": ["1", "4"]' in answers.asked[-1][1]["parameters"]["config"]
    ready = [{"name": "a", "version": str(number), "state": "READY"} for number in (1, 2)]
    for index, variant in (
        (ready, "pruned"),
        ([*ready, {"name": "a", "version": "3", "state": "READY"}], "original"),
        ([*ready, {"name": "a", "version": "4", "state": "READY"}], "original"),
        ([*ready, {"name": "a", "version": "3", "state": "UNAVAILABLE"}], "pruned"),
        ([*ready, {"name": "a", "version": "4"}], "pruned"),
        ([*ready, {"name": "b", "version": "3", "state": "READY"}], "pruned"),
    ):
        answers.reply = index
        assert default_variant(told) == variant, index
        assert {"1", "2"} <= loaded_triton_versions(told)
        assert answers.asked[-1] == ("/v2/repository/index", {})


class Repository(grpc.GenericRpcHandler):
    """Triton's gRPC: loads and lists, or refuses."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.index: list[tuple[str, str, str]] = []  # name, version and state
        self.refuses = False

    def service(self, details: Any) -> Any:
        methods = {"RepositoryModelLoad": self._load, "RepositoryIndex": self._list}
        found = methods.get(details.method.removeprefix("/inference.GRPCInferenceService/"))
        return found and grpc.unary_unary_rpc_method_handler(found)

    def _list(self, data: bytes, context: Any) -> bytes:
        assert dict(context.invocation_metadata())["token"] == "m"
        if self.refuses:
            context.abort(grpc.StatusCode.INTERNAL, "no list")
        reply = service_pb2.RepositoryIndexResponse()
        for name, version, state in self.index:
            reply.models.add(name=name, version=version, state=state)
        return reply.SerializeToString()

    def _load(self, data: bytes, context: Any) -> bytes:
        request = service_pb2.RepositoryModelLoadRequest.FromString(data)
        token = dict(context.invocation_metadata())["token"]
        self.asked.append((request.model_name, token, request.parameters["config"].string_param))
        if self.refuses:
            context.abort(grpc.StatusCode.INTERNAL, "no room")
        return b""


def test_triton_is_told_to_load_and_asked_over_grpc_so_that_no_user_of_http_waits(api: tuple[Api, StubServer]) -> None:
    answers, server = api
    repository, loader = Repository(), grpc.server(ThreadPoolExecutor(2))
    loader.add_generic_rpc_handlers((repository,))
    port = loader.add_insecure_port("127.0.0.1:0")
    loader.start()
    try:
        told = replace(running(server, "triton"), grpc=f"127.0.0.1:{port}")
        switch(told, "pruned")
        ((name, token, config),) = repository.asked
        policy = {"specific": {"versions": ["1", "2"]}}
        assert (name, token, json.loads(config)) == ("a", "m", {**CONFIG, "version_policy": policy})
        assert not answers.asked
        repository.index = [("a", "1", "READY"), ("a", "2", "READY"), ("a", "3", "LOADING"), ("b", "4", "READY")]
        assert loaded_triton_versions(told) == {"1", "2"}
        repository.refuses = True
        with pytest.raises(RedppError, match="the server for /dist/a does not answer: .*no list"):
            loaded_triton_versions(told)
        with pytest.raises(RedppError, match="the server for /dist/a does not load a: .*no room"):
            switch(told, "original")
    finally:
        loader.stop(0)
    with pytest.raises(RedppError, match="the server for /dist/a does not load a"):
        switch(told, "pruned")
    with pytest.raises(RedppError, match="the server for /dist/a does not answer"):
        loaded_triton_versions(told, 1.0)


def test_a_refusal_and_silence_are_errors_that_name_the_folder(api: tuple[Api, StubServer]) -> None:
    answers, server = api
    answers.status = 500
    for kind in ("torchserve", "triton"):
        with pytest.raises(RedppError, match="the server for /dist/a answers 500: .*start it again"):
            switch(running(server, kind), "pruned")
    nobody = Running("/dist/a", "a", "triton", 1, 0.0, ("1", "2"), {}, "http://127.0.0.1:9", [], {"management": {}})
    with pytest.raises(RedppError, match="the server for /dist/a does not answer: .*refused"):
        loaded_triton_versions(nobody)
