"""Requests from a package's or the user's inputs, and a comparison without Java: a stand-in serves the archives."""

import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import redpp_serve.comparison.folder as module
from redpp_serve.comparison.folder import compare, sweep
from redpp_serve.errors import RedppError
from redpp_serve.options import Axis, ComparisonOptions, ServerOptions
from redpp_serve.serving.running import package_key
from tests.support.small import SHAPE, outputs

pytestmark = pytest.mark.usefixtures("trials_here")

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
                    rows = [outputs(standin.folder / f"{variant}.mar", one) for one in (x if x.dim() > 3 else x[None])]
                    answer = list(zip(*rows)) if x.dim() > 3 else rows[0]  # noqa: B905
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


def test_a_package_has_one_comparison_at_a_time(packaged: Path, standin: list[Standin], tmp_path: Path) -> None:
    other, load = tmp_path / "other", ComparisonOptions(duration=0.2, concurrency=1)
    shutil.copytree(packaged, other)
    refusals: list[str] = []
    notes: list[str] = []

    def again(line: str) -> None:
        if line == "stand-in" and len(standin) == 0:
            for run in (compare, partial(sweep, axes=[Axis("batch", (1,))])):
                with pytest.raises(RedppError) as refused:
                    run(Path(os.path.relpath(packaged)), options=load)
                refusals.append(str(refused.value))
            compare(other, load, note=notes.append)

    compare(packaged, load, note=again)
    who = rf"process {os.getpid()} has been comparing .*since {datetime.now(timezone.utc):%Y-%m-%d}.* UTC"
    assert len(refusals) == 2 and all(re.match(rf"{who}.*kill {os.getpid()}", text) for text in refusals)
    assert re.match(f"note: {who}: both slow down", notes[0]) and str(packaged.resolve()) in notes[0]
    notes.clear()
    compare(packaged, load, note=notes.append)
    assert notes[0] == "stand-in"


def test_a_killed_comparison_is_no_obstacle(
    packaged: Path, standin: list[Standin], state_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ComparisonOptions(duration=0.2, concurrency=1)
    path = state_home / "redpp-serve" / f"compare-{package_key(packaged)}.json"
    with subprocess.Popen(["sleep", "60"]) as process:  # a process that has the killed one's number
        path.write_text(json.dumps({"folder": "x", "pid": process.pid, "created": 1.0, "since": "then"}))
        compare(packaged, load)
        monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(37, "No locks available")))
        for text in ("{", '{"pid": "x"}', "[]"):
            path.write_text(text)
            compare(packaged, load)
        process.kill()
    assert len(standin) == 4 and not path.exists()


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
