"""The package on a Triton Inference Server that knows nothing of this project: the repository carries all it needs."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from prometheus_client.parser import text_string_to_metric_families

from redpp_serve.loopback import TritonPorts, free_ports
from redpp_serve.processes import kill_session
from redpp_serve.serving.triton_binary import link_backend
from redpp_serve.variants import VARIANTS
from tests.support.small import outputs
from tests.support.tools import triton

pytestmark = pytest.mark.server

START_S = 120
INSTANCES = 2
VERSIONS = {variant.name: variant.triton_version for variant in VARIANTS}
ARTIFACTS = {variant.name: variant.version for variant in VARIANTS}
RANDOM = np.random.default_rng(4)


@pytest.fixture(scope="module")
def package(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, with two instances of each version that wait for whole batches of 4."""
    folder = tmp_path_factory.mktemp("triton") / "package"
    shutil.copytree(packaged, folder)
    config = folder / "triton" / "small" / "config.pbtxt"
    text = config.read_text()
    for old, new in (("count: 1", f"count: {INSTANCES}"), ("delay_microseconds: 1000", "delay_microseconds: 200000")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    config.write_text(text)
    return folder


@pytest.fixture(scope="module")
def server(stock_python: Path, package: Path) -> Iterator[TritonPorts]:
    """Started as the package's README says, with ports of its own."""
    binary, ports, home = triton(), free_ports(TritonPorts), package.parent
    path = os.pathsep.join([str(stock_python.parent), "/usr/bin", "/bin"])  # as in an activated environment
    environment = {"PATH": path, "LD_LIBRARY_PATH": os.pathsep.join(map(str, binary.libraries))}
    readme = (package / "README.md").read_text()
    words = readme[readme.index("tritonserver --model-repository") :].split("```")[0].replace("\\\n", " ").split()
    command = [
        str(binary.program),
        *words[1:],
        f"--backend-directory={link_backend(binary, home / 'backends')}",
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
        "--allow-gpu-metrics=false",
        "--exit-timeout-secs=5",
    ]
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=package, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while not _ready(ports):
            assert process.poll() is None and time.monotonic() < deadline, (home / "server.log").read_text()[-4000:]
            time.sleep(0.3)
        yield ports
        stubs = psutil.Process(process.pid).children(recursive=True)
        assert len([p for p in stubs if "triton_python_backend_stub" in p.cmdline()[0]]) == INSTANCES * len(VERSIONS)
        process.terminate()
        process.wait(30)
        text = (home / "server.log").read_text()
        assert "Traceback" not in text and "could not be" not in text, text[-4000:]
    finally:
        kill_session(process)


def _ready(ports: TritonPorts) -> bool:
    try:
        with over_http.InferenceServerClient(f"127.0.0.1:{ports.http}") as client:
            return all(client.is_model_ready("small", version) for version in VERSIONS.values())
    except OSError:
        return False


def given(module: Any, x: np.ndarray) -> Any:
    made = module.InferInput("x", x.shape, "FP32")
    made.set_data_from_numpy(x)
    return made


def images(rows: int) -> np.ndarray:
    return RANDOM.standard_normal((rows, 1, 12, 12), dtype=np.float32)


def right(package: Path, variant: str, x: np.ndarray) -> Any:
    expected = [outputs(package / f"{variant}.mar", torch.from_numpy(row))[0] for row in x]
    return pytest.approx(np.array(expected), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("variant", VERSIONS)
def test_both_versions_answer_over_both_protocols_as_their_graphs_do(
    server: TritonPorts, package: Path, variant: str
) -> None:
    x = images(3)
    for module, port in ((over_http, server.http), (over_grpc, server.grpc)):
        with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
            answer = client.infer("small", [given(module, x)], model_version=VERSIONS[variant]).as_numpy("output_0")
        assert answer.shape == (3, 5) and answer == right(package, variant, x)


def test_a_bad_request_in_a_batch_costs_its_sender_alone(server: TritonPorts, package: Path) -> None:
    inputs = [images(1) for _ in range(4)]
    inputs[2][0, 0, 5, 5] = np.nan
    before = settled(server)
    with over_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        answers = ThreadPoolExecutor(4).map(lambda x: _ask(client, x, "2"), inputs)
        for k, (x, answer) in enumerate(zip(inputs, answers, strict=True)):
            if k == 2:
                assert answer.status() == "StatusCode.INVALID_ARGUMENT"
                assert (
                    answer.message()
                    == "Found input 'x' with NaN, infinity or values beyond float32, expected finite ones"
                )
            else:
                assert answer == right(package, "pruned", x)
    gained = wait_for(
        server,
        before,
        lambda gain: (
            gain("redpp_batches_total", "pruned", batch="4") == 1
            and gain("redpp_requests_total", "pruned", outcome="ok") == 3
        ),
    )
    assert gained("redpp_requests_total", "pruned", outcome="bad_request") == 1
    with over_http.InferenceServerClient(f"127.0.0.1:{server.http}") as client:
        for x, message in (
            (images(5), "batch-size must be <= 4"),
            (images(1)[:, :, :11], "unexpected shape"),
            (inputs[2], "NaN, infinity"),
        ):
            with pytest.raises(over_http.InferenceServerException, match=re.escape(message)) as refused:
                client.infer("small", [given(over_http, x)], model_version="1")
            assert refused.value.status() == "400"


def test_the_metrics_of_all_instances_add_up_under_the_names_and_labels_of_torchserve(server: TritonPorts) -> None:
    before = settled(server)
    counts = {"original": 40, "pruned": 23}
    with over_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(_ask, client, images(1), VERSIONS[v]) for v, n in counts.items() for _ in range(n)]
        assert all(isinstance(a.result(), np.ndarray) for a in asked)
    for variant, count in counts.items():
        gain = wait_for(server, before, lambda gain: gain("redpp_requests_total", variant, outcome="ok") == count)  # noqa: B023
        batches = gain("redpp_handler_seconds_count", variant)
        assert gain("redpp_batch_size_sum", variant) == count and batches == gain(
            "redpp_inference_seconds_count", variant
        )
        exact = {n: gain("redpp_batches_total", variant, batch=str(n)) for n in range(1, 5)}
        assert sum(exact.values()) == batches and sum(n * k for n, k in exact.items()) == count
        seconds = sum(gain("redpp_batch_seconds_total", variant, batch=str(n)) for n in range(1, 5))
        assert 0 < seconds == pytest.approx(gain("redpp_handler_seconds_sum", variant))
        assert gain("redpp_handler_seconds_bucket", variant, le="0.001") <= batches
        assert gain("redpp_requests_total", variant, outcome="bad_request") == 0
    now = samples(server)
    for variant in VERSIONS:
        resident = now["redpp_worker_resident_bytes", labels(variant)]
        assert INSTANCES * 100e6 < resident < INSTANCES * 1e9  # torch in each
        assert now["redpp_device_memory_bytes", labels(variant, device="cpu")] == pytest.approx(resident, rel=0.2)
        assert now["redpp_worker_cpu_seconds_total", labels(variant)] > INSTANCES
    parameters = [now["redpp_model_parameters", labels(variant)] for variant in VERSIONS]
    assert parameters[0] > parameters[1] > 0
    plans = [(name, dict(found)) for name, found in now if name.startswith("redpp_plan_")]
    assert {found["variant"] for name, found in plans if name == "redpp_plan_info"} == set(VERSIONS)
    assert {found["batch"] for name, found in plans if name == "redpp_plan_layers"} == {"1", "2", "4"}
    assert {
        frozenset(dict(found).keys() - {"le", "outcome", "batch", "device", "engine", "precision", "digest", "kernel"})
        for name, found in now
        if name.startswith("redpp_")
    } == {frozenset(("model", "version", "variant"))}


def test_the_readme_asks_as_its_code_says(server: TritonPorts, package: Path) -> None:
    code = (package / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert code.count(":8000") == 1
    result = subprocess.run(
        [sys.executable, "-c", code.replace(":8000", f":{server.http}")],
        cwd=package,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    numbers = [float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", result.stdout)]
    assert numbers == pytest.approx(
        outputs(package / "pruned.mar", torch.from_numpy(np.load(package / "sample.npy")))[0], rel=1e-3, abs=1e-4
    )


def test_the_server_left_the_repository_as_it_was(server: TritonPorts, package: Path, packaged: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    extra = files(package / "triton") - files(packaged / "triton")
    assert all(re.fullmatch(r"small/[12]/__pycache__/model\..*\.pyc", name) for name in extra), extra


def _ask(client: Any, x: np.ndarray, version: str) -> Any:
    """The first output, or the error."""
    try:
        return client.infer("small", [given(over_grpc, x)], model_version=version).as_numpy("output_0")
    except over_grpc.InferenceServerException as error:
        return error


def labels(variant: str, **more: str) -> frozenset[tuple[str, str]]:
    return frozenset({"model": "small", "version": ARTIFACTS[variant], "variant": variant, **more}.items())


def samples(ports: TritonPorts) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{ports.metrics}/metrics", timeout=30) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def settled(ports: TritonPorts) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The samples once what earlier tests have sent is counted: metrics follow the answers by a moment."""
    last: dict[Any, float] | None = None
    while True:
        now = samples(ports)
        counted = {key: value for key, value in now.items() if key[0] == "redpp_requests_total"}
        if counted == last:
            return now
        last = counted
        time.sleep(0.3)


def wait_for(ports: TritonPorts, before: dict[Any, float], done: Callable[[Any], bool]) -> Callable[..., float]:
    """The gains since ``before``, as soon as they are as expected: metrics follow the answers by a moment."""
    deadline = time.monotonic() + 10
    while True:
        now = samples(ports)

        def gain(name: str, variant: str, **more: str) -> float:
            key = name, labels(variant, **more)
            return now.get(key, 0.0) - before.get(key, 0.0)  # noqa: B023

        if done(gain):
            return gain
        assert time.monotonic() < deadline, {key: value - before.get(key, 0.0) for key, value in now.items()}
        time.sleep(0.05)
