"""deploy/compose.yaml and what it mounts: valid, closed, and a split that divides users as redpp-serve ab does."""

import contextlib
import copy
import http.client
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import DEPLOY
from tools import tool

from redpp_serve.experiment.gateway import worker_account
from redpp_serve.experiment.nginx import Gateway, gateway_config
from redpp_serve.experiment.split import parse_split
from redpp_serve.packaging.server_config import MAX_REQUEST_BYTES
from redpp_serve.serving.ports import GatewayPorts, free_ports

SET = {"MODEL_NAME": "tiny", "PACKAGE": "/srv/dist/tiny", "GRAFANA_PASSWORD": "chosen by the test"}
SERVICES = {
    "torchserve": {"torchserve", "torchserve-exporter", "torchserve-gateway", "prometheus", "grafana"},
    "triton": {"triton", "triton-gateway", "prometheus", "grafana"},
}
USERS = 3000


def compose(profile: str, variables: dict[str, str] = SET) -> subprocess.CompletedProcess[str]:
    """Compose's own check of the file; needs no container engine."""
    own = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")}
    command = [tool("docker-compose"), "-f", DEPLOY / "compose.yaml", "--profile", profile, "config"]
    return subprocess.run(command, env={**own, **variables}, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The file with `SET` filled in. What Compose prints differs from version to version, so it is read here."""
    def fill(match: re.Match[str]) -> str:
        return SET[match[1]] if match[1] in SET else match[2]

    return yaml.safe_load(re.sub(r"\$\{([A-Z_]+)(?::[-?]([^}]*))?\}", fill, (DEPLOY / "compose.yaml").read_text()))


def problems(document: dict[str, Any]) -> list[str]:
    """Rules for services of one machine in production, as sentences about what breaks them."""
    found = []
    for name, service in document["services"].items():
        if not re.fullmatch(r"[a-z0-9./-]+:v?\d[\w.-]+", service["image"]):
            found.append(f"{name}: the image {service['image']} has no fixed version")
        found += [f"{name}: {port} is open to other machines" for port in service.get("ports", [])
                  if not str(port).startswith("127.0.0.1:")]  # fmt: skip
        if service.get("cap_drop") != ["ALL"] or service.get("security_opt") != ["no-new-privileges:true"]:
            found.append(f"{name}: has privileges")
        if service.get("privileged") or service.get("network_mode") or "/var/run/docker.sock" in str(service.get("volumes")):
            found.append(f"{name}: reaches the host")
        if not service.get("read_only"):
            found.append(f"{name}: can write to its image")
        if not {"cpus", "memory"} <= service.get("deploy", {}).get("resources", {}).get("limits", {}).keys():
            found.append(f"{name}: has no limits")
        if str(service.get("user", "1000")).split(":")[0] in ("0", "root"):
            found.append(f"{name}: runs as root")
        found += [f"{name}: writes to {mount}" for mount in service.get("volumes", [])
                  if mount.startswith(("/", ".")) and not mount.endswith(":ro")]  # fmt: skip
        found += [f"{name}: depends on {other}" for other in service.get("depends_on", {})
                  if not set(service["profiles"]) <= set(document["services"].get(other, {}).get("profiles", []))]  # fmt: skip
    return found


def test_the_file_is_valid_and_breaks_no_rule(document: dict[str, Any]) -> None:
    assert problems(document) == []
    for profile, services in SERVICES.items():
        assert {n for n, s in document["services"].items() if profile in s["profiles"]} == services
        done = compose(profile)
        assert done.returncode == 0, done.stderr
        assert "chosen by the test" in done.stdout  # the check saw the whole file


@pytest.mark.parametrize("key,value,message", [
    ("image", "redpp-serve/triton:latest", "no fixed version"), ("ports", ["8000:8000"], "open to other machines"),
    ("ports", ["0.0.0.0:8000:8000"], "open to other machines"), ("cap_drop", [], "has privileges"), ("read_only", False, "can write"),
    ("deploy", {}, "no limits"), ("user", "0:0", "runs as root"), ("network_mode", "host", "reaches the host"),
    ("volumes", ["/srv/dist/tiny:/models:rw"], "writes to"), ("depends_on", {"torchserve": {}}, "depends on"),
])  # fmt: skip
def test_a_broken_service_is_noticed(document: dict[str, Any], key: str, value: object, message: str) -> None:
    changed = copy.deepcopy(document)
    changed["services"]["triton"][key] = value
    assert any(message in problem for problem in problems(changed))


@pytest.mark.parametrize("missing", SET)
def test_a_variable_that_nobody_set_is_named(missing: str) -> None:
    done = compose("torchserve", {k: v for k, v in SET.items() if k != missing})
    assert done.returncode != 0 and missing in done.stderr


def test_the_example_names_every_variable() -> None:
    example = set(re.findall(r"^#? ?([A-Z_]+)=", (DEPLOY / "compose.env.example").read_text(), re.MULTILINE))
    assert example == set(re.findall(r"\$\{([A-Z_]+)", (DEPLOY / "compose.yaml").read_text()))


def test_what_is_mounted_exists(document: dict[str, Any]) -> None:
    for service in document["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in document["volumes"] or source == SET["PACKAGE"]


def test_the_servers_are_reached_through_the_gateway_alone(document: dict[str, Any]) -> None:
    services = document["services"]
    assert document["networks"]["serving"]["internal"] is True
    for server in ("torchserve", "triton", "torchserve-exporter"):
        assert "ports" not in services[server] and set(services[server]["networks"]) == {"serving"}
    for server in ("torchserve", "triton"):
        upstream = services[f"{server}-gateway"]["environment"]["REDPP_UPSTREAM"].split()[0]
        exposed = re.search(r"EXPOSE (\d+)", (DEPLOY / f"docker/{server}.Dockerfile").read_text())[1]
        assert upstream == f"{server}:{exposed}"


def test_prometheus_scrapes_services_that_exist(document: dict[str, Any], tmp_path: Path) -> None:
    path = DEPLOY / "docker/prometheus.yml"
    config = yaml.safe_load(path.read_text())
    targets = [t.split(":")[0] for job in config["scrape_configs"] for entry in job["static_configs"] for t in entry["targets"]]
    assert set(targets) <= document["services"].keys()
    (tmp_path / "rules").symlink_to(DEPLOY / "prometheus")  # where the service mounts them
    (tmp_path / "prometheus.yml").write_text(path.read_text())
    done = subprocess.run([tool("promtool"), "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    local = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert {Path(rules).name for rules in config["rule_files"]} == {Path(rules).name for rules in local["rule_files"]}


# ---- the split

class Model(BaseHTTPRequestHandler):
    """Stands in for the model server: answers with the path it was asked at and the headers that came through."""

    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def rendered(document: dict[str, Any], folder: Path, listen: int, model: int, server: str = "torchserve") -> str:
    """The template with a service's environment, its addresses and folders replaced by those of this test."""
    values = {k: v for k, v in document["services"][f"{server}-gateway"]["environment"].items() if k.startswith("REDPP_")}
    values |= {"REDPP_LISTEN": f"127.0.0.1:{listen}", "REDPP_UPSTREAM": f"127.0.0.1:{model}", "REDPP_STATE": str(folder),
               "REDPP_ACCESS_LOG": f"{folder}/access.log", "REDPP_RESOLVER": "127.0.0.1"}  # fmt: skip
    text = (DEPLOY / "nginx/split.conf.template").read_text()
    names = set(re.findall(r"\$\{(\w+)\}", text))
    assert names - {"REDPP_"} == values.keys()
    return re.sub(r"\$\{(REDPP_\w+)\}", lambda match: values[match[1]], text)


def main_config(folder: Path, account: tuple[str, str] | None) -> str:
    """What the image has around the template."""
    user = f"user {' '.join(account)};" if account else ""
    temporary = "".join(f"{n}_temp_path {folder}/{n};\n" for n in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    return (f"{user}\ndaemon off;\npid {folder}/pid;\nerror_log {folder}/error.log warn;\nevents {{ worker_connections 256; }}\n"
            f"http {{\n{temporary}include {folder}/default.conf;\n}}\n")  # fmt: skip


@contextlib.contextmanager
def running(config: Path, port: int) -> Iterator[None]:
    """nginx with this configuration, checked first."""
    command = [tool("nginx"), "-p", config.parent, "-c", config, "-e", config.parent / "error.log"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as probe:
                probe.connect()
                break
            assert process.poll() is None and time.monotonic() < deadline, (config.parent / "error.log").read_text()
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def model() -> Iterator[int]:
    """The port of a `Model`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def gateway(document: dict[str, Any], model: int) -> Iterator[tuple[int, Path]]:
    """The deployed split on a port, and its folder."""
    port = free_ports(GatewayPorts).gateway
    with open_folder() as folder:
        (folder / "default.conf").write_text(rendered(document, folder, port, model))
        (folder / "nginx.conf").write_text(main_config(folder, worker_account()))
        with running(folder / "nginx.conf", port):
            yield port, folder


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder in which nginx's worker, another account where root starts it, sees files; pytest's folders are closed."""
    with tempfile.TemporaryDirectory(prefix="redpp-gateway-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


def ask(connection: http.client.HTTPConnection, headers: dict[str, str], path: str = "/predictions/tiny", body: bytes = b"x") -> Any:
    """(status, arm in the response's header, document) of one request."""
    connection.request("POST", path, body, {"Content-Type": "application/octet-stream", **headers})
    response = connection.getresponse()
    return response.status, response.headers["X-Redpp-Arm"], json.loads(response.read())


def arms(port: int, users: list[str]) -> dict[str, str]:
    """The arm of each user, asked for over a few connections; the path at the model must say the same."""
    def of(part: list[str]) -> dict[str, str]:
        connection, found = http.client.HTTPConnection("127.0.0.1", port, timeout=10), {}
        for user in part:
            status, arm, answer = ask(connection, {"X-User-Id": user})
            assert status == 200 and answer["path"] == f"/predictions/tiny/{'1.0' if arm == 'original' else '2.0'}"
            found[user] = arm
        connection.close()
        return found

    with ThreadPoolExecutor(4) as pool:
        return {user: arm for part in pool.map(of, [users[k::4] for k in range(4)]) for user, arm in part.items()}


def test_users_are_divided_stickily_and_as_the_local_experiment_divides_them(gateway: tuple[int, Path], model: int) -> None:
    port, _ = gateway
    users = [f"user-{k}" for k in range(USERS)]
    divided = arms(port, users)
    assert abs(Counter(divided.values())["redpp"] / USERS - 0.10) < 0.02
    assert arms(port, users[::-5]) == {user: divided[user] for user in users[::-5]}
    local = free_ports(GatewayPorts).gateway
    with open_folder() as folder:
        experiment = Gateway(folder=folder, port=local, server=model, public="/predictions/tiny",
                             paths=("/predictions/tiny/1.0", "/predictions/tiny/2.0"), split=parse_split("90:10"),
                             sticky="X-User-Id", salt="redpp", account=worker_account(), connections=256)  # fmt: skip
        (folder / "tmp").mkdir()
        (folder / "nginx.conf").write_text(gateway_config(experiment))
        with running(folder / "nginx.conf", local):
            assert arms(local, users[::3]) == {user: divided[user] for user in users[::3]}


@pytest.fixture
def connection(gateway: tuple[int, Path]) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", gateway[0], timeout=10)) as opened:
        yield opened


@pytest.mark.parametrize("arm,path", [("original", "/predictions/tiny/1.0"), ("redpp", "/predictions/tiny/2.0")])
def test_the_header_asks_for_an_arm(connection: http.client.HTTPConnection, arm: str, path: str) -> None:
    for user in range(20):
        status, answered, answer = ask(connection, {"X-Redpp-Arm": arm, "X-User-Id": str(user), "Authorization": "Bearer t"})
        assert (status, answered, answer["path"]) == (200, arm, path)
        assert answer["headers"]["authorization"] == "Bearer t" and "x-redpp-arm" not in answer["headers"]


def test_requests_without_a_user_are_divided_one_by_one(connection: http.client.HTTPConnection) -> None:
    assert {ask(connection, {})[1] for _ in range(200)} == {"original", "redpp"}


@pytest.mark.parametrize("path,headers,size,status", [
    ("/predictions/tiny", {"X-Redpp-Arm": "both"}, 1, 400), ("/predictions/tiny/2.0", {}, 1, 404), ("/models", {}, 1, 404),
    ("/predictions/tiny", {}, MAX_REQUEST_BYTES + 1, 413),
])  # fmt: skip
def test_other_requests_are_refused_in_words(
    gateway: tuple[int, Path], path: str, headers: dict[str, str], size: int, status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway[0], timeout=10)
    connection.putrequest("POST", path)
    for name, value in {**headers, "Content-Length": str(size)}.items():
        connection.putheader(name, value)
    connection.endheaders(b"x" if size == 1 else None)  # of a body that is too large nothing is read
    response = connection.getresponse()
    assert response.status == status and "expected" in json.loads(response.read())["error"]
    connection.close()


def test_a_file_promotes_and_rolls_back_without_a_reload(gateway: tuple[int, Path], connection: http.client.HTTPConnection) -> None:
    _, folder = gateway
    try:
        for file, arm in (("promoted", "redpp"), ("rolled_back", "original")):  # the roll-back wins over a promotion
            (folder / file).touch()
            assert {ask(connection, {"X-User-Id": str(user)})[1] for user in range(50)} == {arm}
    finally:
        for file in ("promoted", "rolled_back"):
            (folder / file).unlink(missing_ok=True)
    assert len({ask(connection, {"X-User-Id": str(user)})[1] for user in range(50)}) == 2


def test_the_access_log_names_arm_and_times(gateway: tuple[int, Path], connection: http.client.HTTPConnection) -> None:
    ask(connection, {"X-Redpp-Arm": "redpp", "X-User-Id": "someone"})
    for _ in range(50):
        lines = [json.loads(line) for line in (gateway[1] / "access.log").read_text().splitlines()]
        if lines and lines[-1]["chosen_by"] == "header":
            break
        time.sleep(0.02)
    last = lines[-1]
    assert (last["arm"], last["status"], last["chosen_by"]) == ("redpp", 200, "header")
    assert last["request_time"] >= 0 and last["upstream_time"] >= 0 and len(last["request_id"]) == 32
    assert "someone" not in json.dumps(last)


@pytest.mark.parametrize("server", ["torchserve", "triton"])
@pytest.mark.parametrize("split", ["10% redpp; * original;", "* redpp;", "* original;", "0.5% redpp; * original;"])
def test_every_documented_split_is_one_for_nginx(
    document: dict[str, Any], tmp_path: Path, server: str, split: str
) -> None:
    changed = copy.deepcopy(document)
    changed["services"][f"{server}-gateway"]["environment"]["REDPP_SPLIT"] = split
    (tmp_path / "default.conf").write_text(rendered(changed, tmp_path, 8080, 8000, server))
    (tmp_path / "nginx.conf").write_text(main_config(tmp_path, worker_account()))
    done = subprocess.run([tool("nginx"), "-t", "-c", tmp_path / "nginx.conf", "-e", tmp_path / "log"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
