"""Requests from a package's or the user's inputs, and a comparison without Java: a stand-in serves the archives."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import redpp_serve.comparison.folder as module
from redpp_serve.comparison.folder import compare, folder_payloads, read_payloads
from redpp_serve.errors import RedppError
from redpp_serve.options import ComparisonOptions, ServerOptions
from redpp_serve.report.data import Report
from tests.support.small import SHAPE, outputs

BINARY = "application/octet-stream"


class Standin:
    """TorchServe's interface over a thread of this process; answers with the archives' own graphs."""

    made: ClassVar[list["Standin"]] = []
    versions = ("1.0", "2.0")

    def __init__(self, folder: Path, options: ServerOptions, *, name: str, note: Any) -> None:
        self.kind = options.server
        self.folder, self.name, self.auth, self.entered = folder, name, not options.demo_auth_off, 0
        self.options = (options.workers, options.port)
        self.seen: list[tuple[str, str | None]] = []
        note("stand-in")
        Standin.made.append(self)

    def __enter__(self) -> "Standin":
        standin, replies = self, {}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                standin.seen.append((self.path, self.headers["Authorization"]))
                variant = "original" if self.path.endswith("/1.0") else "pruned"
                if (variant, body) not in replies:
                    x = torch.from_numpy(np.load(io.BytesIO(body)))
                    answer = outputs(standin.folder / f"{variant}.mar", x)
                    replies[variant, body] = json.dumps({"outputs": answer}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(replies[variant, body])))
                self.send_header("X-Redpp-Handler-Ms", "1.5" if variant == "original" else "1.0")
                self.end_headers()
                self.wfile.write(replies[variant, body])

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, daemon=True).start()
        self.entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.entered -= 1

    def url(self, version: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/predictions/{self.name}/{version}"

    def headers(self, api: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {api}"} if self.auth else {}


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Standin]]:
    monkeypatch.setattr(module, "open_server", Standin)
    Standin.made.clear()
    yield Standin.made
    assert all(server.entered == 0 for server in Standin.made)


def test_both_versions_are_measured_and_the_server_is_left(packaged: Path, standin: list[Standin]) -> None:
    notes: list[str] = []
    result = compare(
        packaged, ComparisonOptions(duration=0.5, concurrency=2), ServerOptions(workers=3), note=notes.append
    )
    (server,) = standin
    assert (server.name, server.options, notes) == (
        "small",
        (3, None),
        ["stand-in", "measuring what engine, precision and pruning gain"],
    )
    assert [(g["batch"], g["step"]) for g in result.to_json()["gains"]][:2] == [(1, "engine"), (1, "precision")]
    assert "Gains at batch 4: engine " in result.to_text()
    paths = {path for path, _ in server.seen}
    assert paths == {"/predictions/small/1.0", "/predictions/small/2.0"}
    assert {token for _, token in server.seen} == {"Bearer inference"}
    document = result.to_json()
    assert document["original"]["errors"] == document["pruned"]["errors"] == 0
    assert 1.4 <= document["speedup"]["handler_p50"]["ratio"] <= 1.6
    assert 0 < document["agreement"]["mean_relative_difference"] < 0.2
    assert (result.original.label, result.pruned.label) == ("original", "pruned")


def test_without_auth_no_token_is_sent(packaged: Path, standin: list[Standin]) -> None:
    compare(packaged, ComparisonOptions(duration=0.2, concurrency=1), ServerOptions(demo_auth_off=True, port=20100))
    assert {token for _, token in standin[0].seen} == {None}
    assert standin[0].options == (1, 20100)


def test_labels_give_accuracy(packaged: Path, standin: list[Standin], tmp_path: Path) -> None:
    x = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    labels = [int(np.argmax(outputs(packaged / "original.mar", each)[0])) for each in x]
    labels[0] = (labels[0] + 1) % 5
    np.savez(tmp_path / "data.npz", inputs=x.numpy(), labels=labels)
    result = compare(packaged, ComparisonOptions(tmp_path / "data.npz", duration=0.5, concurrency=2))
    assert result.original.accuracy == pytest.approx(5 / 6)


def test_the_packages_own_inputs_are_requests(packaged: Path) -> None:
    payloads = folder_payloads(packaged)
    with np.load(packaged / "inputs.npz") as file:
        kept = file["x"]
    assert len(payloads) == len(kept) == 16 and {p.content_type for p in payloads} == {BINARY}
    assert (np.load(io.BytesIO(payloads[3].body)) == kept[3]).all()


def test_several_inputs_travel_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", image=np.zeros((2, 1, 4, 4), "float32"), vector=np.arange(6.0).reshape(2, 3))
    _, second = folder_payloads(tmp_path)
    with np.load(io.BytesIO(second.body)) as file:
        assert set(file.files) == {"image", "vector"} and file["vector"].tolist() == [3, 4, 5]


def test_bytes_of_images_travel_as_images(tmp_path: Path) -> None:
    for shape, mode in (((2, 1, 4, 6), "L"), ((2, 3, 4, 6), "RGB")):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        np.savez(tmp_path / "data.npz", inputs=pixels, labels=[4, 2])
        payloads = read_payloads(tmp_path / "data.npz")
        image = Image.open(io.BytesIO(payloads[1].body))
        assert (image.format, image.mode, image.size, payloads[1].label) == ("PNG", mode, (6, 4), 2)
        assert (np.asarray(image).reshape(4, 6, -1).transpose(2, 0, 1) == pixels[1]).all(), mode


def test_bytes_that_are_no_images_travel_as_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", inputs=np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert np.load(io.BytesIO(read_payloads(tmp_path / "data.npz")[1].body)).tolist() == [3, 4, 5]


def test_a_folder_of_files_is_sent_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "b.PNG").write_bytes(b"png")
    (tmp_path / "a.JSON").write_bytes(b"[1]")
    (tmp_path / "notes.txt").write_text("no input")
    (tmp_path / "sub.png").mkdir()
    assert [(p.body, p.content_type) for p in read_payloads(tmp_path)] == [
        (b"[1]", "application/json"),
        (b"png", BINARY),
    ]


def test_inputs_that_cannot_be_sent_are_refused(tmp_path: Path) -> None:
    writers: list[Callable[[Path], object]] = [
        lambda path: None,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 cut"),
        lambda path: path.write_text("text"),
        lambda path: np.savez(path, x=np.zeros(3), y=np.zeros(3)),
        lambda path: np.savez(path, inputs=np.array([{}], dtype=object)),
        lambda path: np.savez(path, inputs=np.float32(1)),
        lambda path: np.savez(path, inputs=np.zeros((0, 3), "float32")),
        lambda path: path.mkdir(),
        lambda path: np.savez(path, inputs=np.zeros((3, 2), "float32"), labels=[1]),
        lambda path: np.savez(path, inputs=np.zeros((1, 2), "float32"), labels=[1.5]),
    ]
    for index, write in enumerate(writers):
        (tmp_path / str(index)).mkdir()
        path = tmp_path / str(index) / "data.npz"
        write(path)
        with pytest.raises(RedppError, match=r"data\.npz"):
            read_payloads(path)


def test_a_damaged_package_is_refused_before_a_server_starts(
    packaged: Path, tmp_path: Path, standin: list[Standin]
) -> None:
    with pytest.raises(RedppError, match="is not a packaged model.*redpp-serve package"):
        compare(tmp_path / "absent")
    broken = tmp_path / "broken"
    shutil.copytree(packaged, broken)
    (broken / "inputs.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(RedppError, match="inputs.npz cannot be read.*--inputs"):
        compare(broken)
    (broken / "inputs.npz").unlink()
    with pytest.raises(RedppError, match="inputs.npz cannot be read.*--inputs"):
        compare(broken)
    assert standin == []


def test_counts_and_served_numbers_stand_side_by_side() -> None:
    report = {
        "name": "x",
        "accuracy_of": "verification data",
        "original": {"macs": 2, "accuracy": 0.9},
        "pruned": {"macs": 1, "accuracy": 0.8},
    }
    measured = {
        "original": {"throughput_rps": 5.0, "accuracy": 1.0},
        "pruned": {"throughput_rps": 6.0},
        "verdict": "faster",
    }
    found = module.with_comparison(Report.from_json(report), measured)
    assert found.verdict == "faster" and found.accuracy_of == "verification data"
    # the accuracy is that on all data, not on what was sent
    assert [(x.macs, x.accuracy, x.throughput_rps) for x in found.versions] == [(2, 0.9, 5.0), (1, 0.8, 6.0)]
    del report["accuracy_of"]  # then it is of an earlier comparison
    found = module.with_comparison(Report.from_json(report), measured)
    assert found.original.accuracy == 1.0
    again = {"original": {"throughput_rps": 7.0}, "pruned": {"throughput_rps": 8.0}, "verdict": "slower"}
    assert module.with_comparison(found, again).pruned.throughput_rps == 8.0
