"""The Open Inference Protocol, written and read by Triton's own client, answered by TorchServe's handler."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult

from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref, Size
from redpp_serve.handlers.torchserve import RedppHandler
from tests.support.served import PREPROCESS, SHAPE, Context, artifact, expected, npy, picture

X = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
LENGTH = "Inference-Header-Content-Length"


class Served:
    """A handler that is asked as TorchServe asks it."""

    def __init__(self, folder: Path, data: bytes | None = None) -> None:
        (folder / "model.redpp").write_bytes(artifact() if data is None else data)
        self.handler, self.context = RedppHandler(), Context(folder)
        self.handler.initialize(self.context)

    def ask(self, body: Any, headers: dict[str, str] | None = None) -> tuple[int, bytes, dict[str, str]]:
        self.context.statuses.clear()
        self.context.headers.clear()
        self.context.asked = {0: headers or {}}
        (reply,) = self.handler.handle([{"body": bytearray(body)}], self.context)
        return self.context.statuses.get(0, (200, ""))[0], reply, self.context.headers[0]

    def refused(self, body: Any, headers: dict[str, str] | None = None) -> str:
        status, reply, _ = self.ask(body, headers)
        assert status == 400
        error = str(json.loads(reply)["error"])
        assert error.startswith("Found ") and "expected" in error, error
        return error

    def infer(self, inputs: list[InferInput], outputs: Any = None, **options: Any) -> InferResult:
        body, length = InferenceServerClient.generate_request_body(inputs, outputs=outputs, **options)
        status, reply, headers = self.ask(body, {LENGTH: str(length)} if length else {})
        assert status == 200, reply
        found = headers.get(LENGTH)
        return InferResult.from_response_body(reply, header_length=int(found) if found else None)


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


def given(array: np.ndarray, kind: str = "FP32", name: str = "x", binary: bool = True) -> InferInput:
    return InferInput(name, array.shape, kind).set_data_from_numpy(array, binary_data=binary)


WANTED = [expected("1.0", torch.from_numpy(x)) for x in X]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_tensors_as_bytes_and_as_json(served: Served, binary_in: bool, binary_out: bool) -> None:
    outputs = [InferRequestedOutput("output_0", binary_data=binary_out)]
    result = served.infer([given(X, binary=binary_in)], outputs, request_id="seven")
    assert result.as_numpy("output_0") == pytest.approx(np.array(WANTED), rel=1e-4, abs=1e-5)
    reply = result.get_response()
    assert (reply["id"], reply["model_name"], reply["model_version"]) == ("seven", "tiny", "1.0")
    assert reply["outputs"][0]["datatype"] == "FP32" and reply["outputs"][0]["shape"] == [3, 5]


def test_all_outputs_as_bytes_where_none_is_named(served: Served) -> None:
    result = served.infer([given(X[:1])])
    assert result.as_numpy("output_0") == pytest.approx(np.array(WANTED[:1]), rel=1e-4, abs=1e-5)


def test_nested_data_and_a_request_without_options(served: Served) -> None:
    tensor = {"name": "x", "shape": [1, *SHAPE], "datatype": "FP32", "data": X[:1].tolist()}
    status, reply, headers = served.ask(json.dumps({"inputs": [tensor]}).encode())
    assert status == 200 and headers["content-type"] == "application/json" and LENGTH not in headers
    assert json.loads(reply)["outputs"][0]["data"] == pytest.approx(WANTED[0], rel=1e-4, abs=1e-5)


def test_more_rows_than_the_largest_batch_run_in_parts(served: Served) -> None:
    many = np.concatenate([X] * 7)
    result = served.infer([given(many)]).as_numpy("output_0")
    assert result == pytest.approx(np.array(WANTED * 7), rel=1e-4, abs=1e-5)


def test_requests_of_all_kinds_share_a_batch(served: Served) -> None:
    body, length = InferenceServerClient.generate_request_body([given(X[:2])])
    items = [{"body": npy(X[2])}, {"body": body}, {"body": b"?"}, {"body": npy(X)}]
    served.context.asked = {1: {LENGTH.lower(): str(length)}, 3: {"Accept": "application/x-npy"}}
    one, binary, wrong, several = served.handler.handle(items, served.context)
    assert json.loads(one)["outputs"][0] == pytest.approx(WANTED[2], rel=1e-4, abs=1e-5)
    found = int(served.context.headers[1][LENGTH])
    values = InferResult.from_response_body(binary, header_length=found).as_numpy("output_0")
    assert values == pytest.approx(np.array(WANTED[:2]), rel=1e-4, abs=1e-5)
    assert "error" in json.loads(wrong) and list(served.context.statuses) == [2]
    assert several.startswith(b"\x93NUMPY")


def test_classes_in_tritons_form(tmp_path: Path) -> None:
    served = Served(tmp_path)
    outputs = [InferRequestedOutput("output_0", class_count=2)]
    rows = served.infer([given(X)], outputs).as_numpy("output_0")
    assert rows.shape == (3, 2)
    for row, wanted in zip(rows, WANTED, strict=True):
        order = np.argsort(wanted)[::-1][:2]
        values, places = zip(*(one.decode().split(":") for one in row), strict=True)
        assert [int(place) for place in places] == order.tolist()
        assert [float(value) for value in values] == pytest.approx([wanted[k] for k in order], abs=1e-3)


def test_pixels_and_files_go_through_the_preprocessing(served: Served) -> None:
    images = [picture(seed=1), picture(size=(20, 12), seed=2)]
    wanted = [expected("1.0", PREPROCESS.image(image)) for image in images]
    files = np.array(images, dtype=np.object_)
    assert served.infer([given(files, "BYTES")]).as_numpy("output_0") == pytest.approx(np.array(wanted), rel=1e-4)
    pixels = np.random.default_rng(3).integers(0, 256, (2, *SHAPE), dtype=np.uint8)
    shown = [expected("1.0", torch.from_numpy(PREPROCESS.values(x))) for x in pixels]
    assert served.infer([given(pixels, "UINT8")]).as_numpy("output_0") == pytest.approx(np.array(shown), rel=1e-4)


def test_a_compressed_request(served: Served) -> None:
    body, length = InferenceServerClient.generate_request_body([given(X)])
    headers = {LENGTH: str(length), "Content-Encoding": "gzip"}
    assert served.ask(gzip.compress(body), headers)[0] == 200
    assert "gzip" in served.refused(body, headers)
    assert "gzip" in served.refused(gzip.compress(body)[:-9], headers)


def test_metadata_names_types_and_sizes(tmp_path: Path) -> None:
    spec = InputSpec("ids", (4,), "int64", varying=((0, Size("L", 2, 6, 2)),))
    nodes = (Node("f", "aten.to.dtype", (Ref("ids"), torch.float64)), Node("m", "aten.mean.dim", (Ref("f"), [1])))
    graph = Graph((spec,), {}, nodes, ("f", "m"), output_names=("each", "mean"))
    (tmp_path / "a").mkdir()
    status, reply, _ = Served(tmp_path / "a", artifact("2.0", graph, None)).ask(b"", {"describe": "True"})
    assert status == 200 and json.loads(reply) == {
        "name": "tiny",
        "versions": ["2.0"],
        "platform": "pytorch",
        "inputs": [{"name": "ids", "datatype": "INT64", "shape": [-1, -1]}],
        "outputs": [
            {"name": "each", "datatype": "FP64", "shape": [-1, -1]},
            {"name": "mean", "datatype": "FP64", "shape": [-1, 1]},
        ],
    }


def request(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, *SHAPE], "datatype": "FP32", "data": X[0].flatten().tolist(), **changes}


WRONG = [
    ("shape", {"shape": list(SHAPE), "data": X[0].flatten().tolist()}),
    ("shape", {"shape": [0, *SHAPE], "data": []}),
    ("shape", {"shape": [1, 3, 8, -8]}),
    ("shape", {"shape": "1"}),
    ("numbers", {"data": X.flatten().tolist()}),
    ("without data", {"data": None}),
    ("FP32", {"datatype": "FP8"}),
    ("INT8", {"datatype": "INT8"}),
    ("not FP32", {"data": ["a"] * X[0].size}),
    ("NaN", {"data": [float("nan")] * X[0].size}),
    ("inputs y", {"name": "y"}),
    ("shared memory", {"parameters": {"shared_memory_region": "r"}, "data": None}),
    ("binary_data_size", {"parameters": {"binary_data_size": 768}, "data": None}),
    ("binary_data_size", {"parameters": {"binary_data_size": -1}, "data": None}),
    ("no object", {"parameters": 3}),
    ("Base64", {"datatype": "BYTES", "shape": [1], "data": ["?"]}),
    ("files", {"datatype": "BYTES", "shape": [2], "data": ["AAAA"]}),
]


@pytest.mark.parametrize(("word", "changes"), WRONG)
def test_a_wrong_tensor_is_refused(served: Served, word: str, changes: dict[str, Any]) -> None:
    assert word in served.refused(json.dumps({"inputs": [request(**changes)]}).encode())


def test_wrong_outputs_and_headers_are_refused(served: Served) -> None:
    def ask(**document: Any) -> bytes:
        return json.dumps({"inputs": [request()], **document}).encode()

    assert "'nothing'" in served.refused(ask(outputs=[{"name": "nothing"}]))
    classes = [{"name": "output_0", "parameters": {"classification": -1}}]
    assert "classification" in served.refused(ask(outputs=classes))
    for length in ("0", "x", "-1", "99999999", "3"):
        served.refused(ask(), {LENGTH: length})
    assert "as many" in served.refused(ask() + b"tail", {LENGTH: str(len(ask()))})
    twice = json.dumps({"inputs": [request(), request()]}).encode()
    served.refused(twice)


def test_damaged_binary_requests_never_cost_a_server_error(served: Served) -> None:
    files = np.array([picture()], dtype=np.object_)
    bodies = [InferenceServerClient.generate_request_body([x]) for x in (given(X[:1]), given(files, "BYTES"))]
    random = np.random.default_rng(1)
    for body, length in bodies * 100:
        damaged = bytearray(body)
        place = random.integers(length + 8 if random.random() < 0.5 else length)
        damaged[place] ^= 1 << random.integers(8)
        assert served.ask(damaged[: random.integers(length, len(body) + 1)], {LENGTH: str(length)})[0] in (200, 400)
