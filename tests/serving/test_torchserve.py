"""A real TorchServe with both versions: replies, batches, metrics, tokens, and an end that leaves nothing behind."""

import http.client
import json
import socket
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.http import InferenceServerClient, InferInput

from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.handlers.prometheus import WRITE_EVERY_S
from redpp_serve.loopback import Ports, free_ports
from redpp_serve.options import Serving
from redpp_serve.packaging.mar import build_mar
from redpp_serve.packaging.server_config import config_properties, limits_for, model_config
from redpp_serve.serving.torchserve import TorchServe
from tests.support.served import INFO, PREPROCESS, SHAPE, VARIANTS, built, expected, npy, picture, write_archives

pytestmark = pytest.mark.server

X = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
IMAGE = picture(size=(20, 12))
BINARY = "application/octet-stream"
GOOD = [(npy(X), BINARY), (IMAGE, BINARY), (json.dumps(X.tolist()).encode(), "application/json")]
BAD = [
    (npy(X[:1]), BINARY),
    (b"garbage", BINARY),
    (b"[1, 2", "application/json"),
    (IMAGE[:40], "image/png"),
    (b"", BINARY),
    (b"\xff\xfe", "text/plain"),
    (npy(X * np.nan), BINARY),
]


def post(server: TorchServe, version: str, body: bytes, kind: str, headers: dict[str, str] | None = None) -> Any:
    """(status, headers, document) of one prediction."""
    connection = http.client.HTTPConnection("127.0.0.1", server.ports.inference, timeout=60)
    sent = {"Content-Type": kind, **(server.headers() if headers is None else headers)}
    connection.request("POST", f"/predictions/{server.name}/{version}", body, sent)
    response = connection.getresponse()
    document = json.loads(response.read())
    connection.close()
    return response.status, response.headers, document


def get(url: str, headers: dict[str, str]) -> tuple[int, bytes]:
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request("GET", f"/{path}", headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def samples(server: TorchServe) -> dict[str, dict[tuple[str, str, str], float]]:
    """Name of a sample (with its outcome, if any) to (model, version, variant) to value."""
    time.sleep(3 * WRITE_EVERY_S)  # what workers did just now is written by then
    found: dict[str, dict[tuple[str, str, str], float]] = {}
    for family in text_string_to_metric_families(get(server.metrics_url, {})[1].decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            key = tuple(labels.pop(k) for k in ("model", "version", "variant"))
            found.setdefault(" ".join([sample.name, *labels.values()]), {})[key] = sample.value
    return found


def mine() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives in a folder whose name needs quoting."""
    return write_archives(tmp_path_factory.mktemp("dist") / "a model, (1) ü")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[TorchServe]:
    lines: list[str] = []
    before = set(folder.iterdir())
    with TorchServe(folder, name="tiny", workers=2, note=lines.append) as running:
        assert lines[-1] == "4 of 4 workers ready"
        yield running
        processes = mine()
        assert sum("model_service_worker" in " ".join(p.cmdline()) for p in processes) == 4
    assert not psutil.wait_procs(processes, timeout=10)[1]
    assert set(folder.iterdir()) == before


def test_good_and_bad_requests_share_batches_and_metrics_count_them(server: TorchServe) -> None:
    requests = [
        (v, body, kind, good)
        for v in VARIANTS
        for good, bodies in ((True, GOOD * 8), (False, BAD * 3))
        for body, kind in bodies
    ]
    order = np.random.default_rng(1).permutation(len(requests))
    requests = [requests[i] for i in order]
    before = samples(server)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda r: post(server, *r[:3]), requests))
    image = PREPROCESS.image(IMAGE)
    for (version, body, _, good), (status, headers, document) in zip(requests, replies, strict=True):
        assert status == (200 if good else 400), document
        assert headers["X-Redpp-Variant"] == VARIANTS[version] and float(headers["X-Redpp-Handler-Ms"]) > 0
        if good:
            x = image if body == IMAGE else torch.from_numpy(X)
            assert document["outputs"][0] == pytest.approx(expected(version, x), rel=1e-4, abs=1e-5)
        else:
            assert "expected" in document["error"]

    after = samples(server)
    for version, variant in VARIANTS.items():
        key = ("tiny", version, variant)

        def grown(name: str, key: tuple[str, str, str] = key) -> float:
            return after[name][key] - before[name][key]

        good, bad = 8 * len(GOOD), 3 * len(BAD)
        assert grown("redpp_requests_total ok") == good and grown("redpp_requests_total bad_request") == bad
        assert grown("redpp_requests_total error") == 0
        assert grown("redpp_batch_size_sum") == good + bad
        batches = grown("redpp_batch_size_count")
        assert batches == grown("redpp_handler_seconds_count") < good + bad  # batches did mix requests
        assert 0 < grown("redpp_inference_seconds_sum") < grown("redpp_handler_seconds_sum") < 60
        assert after["redpp_model_parameters"][key] == INFO["parameters"]
        assert after["redpp_model_macs"][key] == INFO["macs"] and after["redpp_model_bytes"][key] > 0
    assert set(after["redpp_requests_total ok"]) == {("tiny", v, name) for v, name in VARIANTS.items()}


def test_the_original_is_the_default_version(server: TorchServe) -> None:
    status, headers, _ = post(server, "", *GOOD[0])
    assert status == 200 and headers["X-Redpp-Variant"] == "original"


def test_a_token_is_needed_for_predictions_and_management(server: TorchServe) -> None:
    assert post(server, "1.0", *GOOD[0], headers={})[0] == 400
    assert post(server, "1.0", *GOOD[0], headers={"Authorization": "Bearer wrong"})[0] == 400
    assert post(server, "1.0", *GOOD[0], headers=server.headers("management"))[0] == 400
    assert post(server, "1.0", *GOOD[0])[0] == 200
    models = f"{server.management_url}/models"
    assert get(models, {})[0] == 400 and get(models, server.headers("management"))[0] == 200


def test_models_cannot_be_loaded_over_the_api(server: TorchServe) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports.management, timeout=30)
    connection.request("POST", "/models?url=original.mar&model_name=other", headers=server.headers("management"))
    assert connection.getresponse().status == 405


def test_nothing_listens_beyond_loopback(server: TorchServe) -> None:
    found = {c.laddr.ip for p in mine() for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert found <= {"127.0.0.1", "::ffff:127.0.0.1"} and found


def test_bad_requests_leave_no_traceback_in_the_log(server: TorchServe) -> None:
    for body, kind in BAD:
        post(server, "2.0", body, kind)
    assert "Traceback" not in server.log_tail(10_000) and "Backend received" not in server.log_tail(10_000)


def test_a_second_server_runs_beside_and_an_exception_ends_it_whole(server: TorchServe, folder: Path) -> None:
    before = set(mine())
    with pytest.raises(ZeroDivisionError), TorchServe(folder, name="other", auth=False) as second:
        started = set(mine()) - before
        home = second.home
        assert home and home.is_dir() and home.stat().st_mode & 0o077 == 0
        assert second.headers() == {} and len(started) >= 5  # launcher, Java, two workers, exporter
        assert post(second, "2.0", *GOOD[0])[0] == post(server, "2.0", *GOOD[0])[0] == 200
        assert {key[0] for key in samples(second)["redpp_model_bytes"]} == {"other"}
        raise ZeroDivisionError
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started)
    assert set(mine()) <= before and not home.exists() and second.home is None
    second.stop()  # once more does nothing
    assert post(server, "2.0", *GOOD[0])[0] == 200


def test_an_interrupt_while_starting_leaves_nothing(folder: Path) -> None:
    before, homes = set(mine()), []

    def interrupt(line: str) -> None:
        homes.append(starting.home)
        raise KeyboardInterrupt

    starting = TorchServe(folder, name="tiny", note=interrupt)
    with pytest.raises(KeyboardInterrupt):
        starting.start()
    assert set(mine()) <= before and homes[0] and not homes[0].exists()


def test_workers_that_die_end_the_start_with_their_log(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / path.name, "w") as target:
            for name in source.namelist():
                target.writestr(name, source.read(name) if name != "model.redpp" else b"damaged")
    before = set(mine())
    with pytest.raises(RedppError, match="(?s)workers die.*package the model again"):
        TorchServe(tmp_path, name="tiny").start()
    assert set(mine()) <= before


def test_an_archive_that_java_cannot_unpack_ends_the_start(folder: Path, tmp_path: Path) -> None:
    """One bit of the network is flipped; TorchServe itself would wait for five minutes."""
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo("model.redpp")
        data[info.header_offset + 30 + len(info.filename) + info.file_size // 2] ^= 1
        (tmp_path / path.name).write_bytes(data)
    before, start = set(mine()), time.monotonic()
    with pytest.raises(RedppError, match="TorchServe cannot load an archive"):
        TorchServe(tmp_path, name="tiny").start()
    assert set(mine()) <= before and time.monotonic() - start < 100


def test_a_port_in_use_is_found_beforehand(folder: Path) -> None:
    ports, before = free_ports(Ports), set(mine())
    refusal = pytest.raises(RedppError, match=f"port {ports.metrics} for metrics")
    with socket.create_server(("127.0.0.1", ports.metrics)), refusal:
        TorchServe(folder, name="tiny", ports=ports).start()
    assert set(mine()) <= before


def test_the_largest_request_and_answer_pass_the_servers_limits(tmp_path: Path) -> None:
    """An input of 3x1280x1280 as .npy and as JSON, and an answer of 8x256x256 as JSON, through server and front."""
    shape, generator = (3, 1280, 1280), torch.Generator().manual_seed(0)
    w = torch.randn(8, 3, 5, 5, generator=generator)
    graph = Graph(
        (InputSpec("x", shape),),
        {"w": w},
        (Node("y", "aten.conv2d.default", (Ref("x"), Ref("w"), None, [5, 5])),),
        ("y",),
    )
    for version, variant in VARIANTS.items():
        data = build_mar(built(version, graph, None), name="large", model_config=model_config(Serving(1, 0, 1)))
        (tmp_path / f"{variant}.mar").write_bytes(data)
    limits = limits_for([(shape, "float32")], [((8, 256, 256), "float32")])
    (tmp_path / "config.properties").write_text(config_properties(limits=limits))
    x = torch.randn(shape, generator=generator)
    wanted = torch.nn.functional.conv2d(x[None], w, stride=5).numpy()
    with TorchServe(tmp_path, name="large") as server:
        for body, kind in ((npy(x.numpy()), BINARY), (json.dumps(x.tolist()).encode(), "application/json")):
            status, _, document = post(server, "1.0", body, kind)
            assert status == 200, document
            assert np.array(document["outputs"][0]) == pytest.approx(wanted[0], rel=1e-3, abs=1e-3)
        with InferenceServerClient(server.front_url.removeprefix("http://")) as client:
            given = InferInput("x", (1, *shape), "FP32").set_data_from_numpy(x[None].numpy())
            found = client.infer("large", [given], headers=server.headers()).as_numpy("output_0")
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-3)
