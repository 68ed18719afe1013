"""The split that compose.yaml starts: a real nginx divides users as redpp-serve ab does."""

import contextlib
import http.client
import json
import re
import socket
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

from redpp_serve.ab.gateway import Gateway, deployed_config, divide, gateway_config, set_split, worker_account
from redpp_serve.ab.spec import parse_split
from redpp_serve.loopback import GatewayPorts, free_ports
from redpp_serve.packaging.server_config import MAX_REQUEST_BYTES
from tests.ab.test_gateway import MALFORMED
from tests.support.composed import read_compose
from tests.support.manifests import DEPLOY
from tests.support.tools import tool

USERS = 3000


class Model(BaseHTTPRequestHandler):
    """Stands in for the model server: answers with the path it was asked at and the headers that came through."""

    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()}}).encode()
        self.send_response(503 if self.headers["X-Fails"] == self.path else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def rendered(document: dict[str, Any], folder: Path, listen: int, model: int, server: str = "torchserve") -> str:
    """The template with a service's environment, its addresses and folders replaced by those of this test."""
    values = {
        k: v for k, v in document["services"][f"{server}-gateway"]["environment"].items() if k.startswith("REDPP_")
    }
    values |= {
        "REDPP_LISTEN": f"127.0.0.1:{listen}",
        "REDPP_UPSTREAM": f"127.0.0.1:{model}",
        "REDPP_STATE": values["REDPP_STATE"].replace("/state", str(folder)),
        "REDPP_ACCESS_LOG": f"{folder}/access.log",
        "REDPP_RESOLVER": "127.0.0.1",
    }
    text = (DEPLOY / "nginx/split.conf.template").read_text()
    assert set(re.findall(r"\$\{(\w+)\}", text)) == values.keys()
    return re.sub(r"\$\{(REDPP_\w+)\}", lambda match: values[match[1]], text)


def main_config(folder: Path, account: tuple[str, str] | None) -> str:
    """What the image has around the template."""
    user = f"user {' '.join(account)};" if account else ""
    temporary = "".join(f"{n}_temp_path {folder}/{n};\n" for n in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    return (
        f"{user}\ndaemon off;\npid {folder}/pid;\nerror_log {folder}/error.log warn;\n"
        f"events {{ worker_connections 256; }}\nhttp {{\n{temporary}include {folder}/default.conf;\n}}\n"
    )


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
            with (
                contextlib.suppress(OSError),
                contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as probe,
            ):
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
def gateway(model: int) -> Iterator[tuple[int, Path]]:
    """The deployed split on a port, and its folder."""
    port = free_ports(GatewayPorts).gateway
    with open_folder() as folder:
        (folder / "default.conf").write_text(rendered(read_compose(), folder, port, model))
        (folder / "nginx.conf").write_text(main_config(folder, worker_account()))
        (folder / "redpp").mkdir()
        (folder / "redpp" / "split").touch()
        with running(folder / "nginx.conf", port):
            yield port, folder


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder where nginx's worker, another account under root, sees files; pytest's are closed to it."""
    with tempfile.TemporaryDirectory(prefix="redpp-gateway-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


def ask(
    connection: http.client.HTTPConnection, headers: dict[str, str], path: str = "/predictions/tiny", body: bytes = b"x"
) -> Any:
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


@pytest.mark.server
def test_users_keep_their_arm_which_is_the_one_that_the_local_gateway_gives_them(
    gateway: tuple[int, Path], model: int
) -> None:
    port, _ = gateway
    users = [f"user-{k}" for k in range(USERS)]
    divided = arms(port, users)
    assert abs(Counter(divided.values())["pruned"] / USERS - 0.10) < 0.02
    assert arms(port, users[::-5]) == {user: divided[user] for user in users[::-5]}
    local = free_ports(GatewayPorts).gateway
    with open_folder() as folder:
        experiment = Gateway(
            folder=folder,
            port=local,
            server=model,
            public="/predictions/tiny",
            paths=("/predictions/tiny/1.0", "/predictions/tiny/2.0"),
            split=parse_split("90:10"),
            sticky="X-User-Id",
            salt="redpp",
            account=worker_account(),
            connections=256,
        )
        (folder / "tmp").mkdir()
        divide(folder)
        set_split(folder, experiment.split)
        (folder / "nginx.conf").write_text(gateway_config(experiment))
        with running(folder / "nginx.conf", local):
            assert arms(local, users[::3]) == {user: divided[user] for user in users[::3]}


@pytest.fixture
def connection(gateway: tuple[int, Path]) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", gateway[0], timeout=10)) as opened:
        yield opened


@pytest.mark.parametrize("arm,path", [("original", "/predictions/tiny/1.0"), ("pruned", "/predictions/tiny/2.0")])
@pytest.mark.server
def test_the_header_asks_for_an_arm(connection: http.client.HTTPConnection, arm: str, path: str) -> None:
    for user in range(20):
        status, answered, answer = ask(
            connection, {"X-Redpp-Arm": arm, "X-User-Id": str(user), "Authorization": "Bearer t"}
        )
        assert (status, answered, answer["path"]) == (200, arm, path)
        assert answer["headers"]["authorization"] == "Bearer t" and "x-redpp-arm" not in answer["headers"]


@pytest.mark.server
def test_requests_without_a_user_are_divided_one_by_one(connection: http.client.HTTPConnection) -> None:
    assert {ask(connection, {})[1] for _ in range(200)} == {"original", "pruned"}


@pytest.mark.parametrize(
    "path,headers,size,status",
    [
        ("/predictions/tiny", {"X-Redpp-Arm": "both"}, 1, 400),
        ("/predictions/tiny/2.0", {}, 1, 404),
        ("/models", {}, 1, 404),
        ("/predictions/tiny", {}, MAX_REQUEST_BYTES + 1, 413),
    ],
)
@pytest.mark.server
def test_other_requests_are_refused_with_a_reason(
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


@pytest.mark.server
def test_malformed_requests_are_refused_as_the_local_gateway_does(gateway: tuple[int, Path]) -> None:
    for sent, code in MALFORMED:
        with socket.create_connection(("127.0.0.1", gateway[0]), timeout=5) as wire:
            wire.sendall(sent)
            head, _, body = b"".join(iter(lambda: wire.recv(1 << 16), b"")).partition(b"\r\n\r\n")
        assert int(head.split()[1]) in (code, 400 if code == 405 else code), (sent[:40], head)
        assert json.loads(body)["error"] and b"application/json" in head, (sent[:40], body)


@pytest.mark.server
def test_files_divide_and_promote_without_a_reload_and_without_them_all_get_the_original(
    gateway: tuple[int, Path], connection: http.client.HTTPConnection
) -> None:
    """Also where the volume is lost, and where it holds the files of a test with another salt."""
    state = gateway[1] / "redpp"

    def seen() -> set[str]:
        return {ask(connection, {"X-User-Id": str(user)})[1] for user in range(50)}

    assert seen() == {"original", "pruned"}
    (state / "promoted").touch()
    assert seen() == {"pruned"}
    state.rename(other := state.with_name("of-another-test"))
    assert seen() == {"original"}
    other.rename(state)
    (state / "split").unlink()
    assert seen() == {"pruned"}
    (state / "promoted").unlink()
    assert seen() == {"original"}
    (state / "split").touch()
    assert seen() == {"original", "pruned"}


@pytest.mark.server
def test_an_arm_that_does_not_answer_leaves_its_users_to_the_other(
    gateway: tuple[int, Path], connection: http.client.HTTPConnection
) -> None:
    for user in range(50):
        status, arm, answer = ask(connection, {"X-User-Id": str(user), "X-Fails": "/predictions/tiny/2.0"})
        assert (status, arm, answer["path"]) == (200, "original", "/predictions/tiny/1.0")
    assert ask(connection, {"X-Redpp-Arm": "pruned", "X-Fails": "/predictions/tiny/2.0"})[:2] == (503, "pruned")


@pytest.mark.server
def test_the_access_log_names_arm_and_times(gateway: tuple[int, Path], connection: http.client.HTTPConnection) -> None:
    ask(connection, {"X-Redpp-Arm": "pruned", "X-User-Id": "someone"})
    for _ in range(50):
        lines = [json.loads(line) for line in (gateway[1] / "access.log").read_text().splitlines()]
        if lines and lines[-1]["chosen_by"] == "header":
            break
        time.sleep(0.02)
    last = lines[-1]
    assert (last["arm"], last["status"], last["chosen_by"]) == ("pruned", 200, "header")
    assert last["request_time"] >= 0 and last["upstream_time"] >= 0 and len(last["request_id"]) == 32
    assert "someone" not in json.dumps(last)


def test_the_deployed_split_is_made_from_the_template_of_the_local_gateway() -> None:
    committed = (DEPLOY / "nginx/split.conf.template").read_text()
    assert committed == deployed_config(), "run: python -m redpp_serve.ab.gateway > deploy/nginx/split.conf.template"


@pytest.mark.parametrize("server", ["torchserve", "triton"])
@pytest.mark.parametrize("split", ["10% pruned; * original;", "* pruned;", "* original;", "0.5% pruned; * original;"])
def test_nginx_accepts_every_documented_split(tmp_path: Path, server: str, split: str) -> None:
    changed = read_compose()
    changed["services"][f"{server}-gateway"]["environment"]["REDPP_SPLIT"] = split
    (tmp_path / "default.conf").write_text(rendered(changed, tmp_path, 8080, 8000, server))
    (tmp_path / "nginx.conf").write_text(main_config(tmp_path, worker_account()))
    done = subprocess.run(
        [tool("nginx"), "-t", "-c", tmp_path / "nginx.conf", "-e", tmp_path / "log"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
