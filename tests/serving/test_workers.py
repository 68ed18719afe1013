"""The versions of a server that have no worker left, by what it tells and by the processes themselves."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest

from redpp_serve.serving.workers import Workers, torchserve_workers


class Server:
    """What TorchServe tells of its workers, which are processes that wait; ``told`` None is no answer."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.told: dict[str, list[tuple[int, str]]] | None = {}
        self.asked = 0

    def listed(self) -> tuple[int, bytes]:
        self.asked += 1
        if self.told is None:
            raise ConnectionRefusedError
        workers = {v: [{"pid": pid, "status": status} for pid, status in rows] for v, rows in self.told.items()}
        return 200, json.dumps([{"modelVersion": v, "workers": rows} for v, rows in workers.items()]).encode()

    def workers(self, *versions: str) -> Workers:
        return Workers(partial(torchserve_workers, self.listed, versions))

    def begin(self) -> int:
        self.processes.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return self.processes[-1].pid

    def kill(self, pid: int) -> None:
        process = next(p for p in self.processes if p.pid == pid)
        process.kill()
        process.communicate()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


def test_a_version_is_dead_from_its_last_workers_end_until_a_new_one_is_ready(server: Server) -> None:
    one, two = server.begin(), server.begin()
    server.told = {"1.0": [(one, "READY")], "2.0": [(two, "READY")], "3.0": []}
    workers = server.workers("1.0", "2.0")
    assert workers.ready() == {"1.0": [one], "2.0": [two]}
    assert workers.dead(0) == set()
    asked = server.asked
    assert workers.dead(0) == set() and server.asked == asked, "they live, so nobody has to be asked"
    server.kill(two)
    assert workers.dead(60) == {"2.0"} and server.asked == asked, "at once"
    server.told = None
    assert workers.dead(0) == {"2.0"}, "nobody knows better"
    new = server.begin()
    server.told = {"1.0": [(one, "READY")], "2.0": [(new, "LOADING")]}
    assert workers.ready() == {"1.0": [one], "2.0": []} and workers.dead(0) == {"2.0"}
    server.told["2.0"] = [(new, "READY")]
    assert workers.dead(0) == set()


def test_a_version_lives_while_a_worker_that_came_later_does(server: Server) -> None:
    first, second, other = server.begin(), server.begin(), server.begin()
    server.told = {"1.0": [(first, "READY"), (second, "READY")], "2.0": [(other, "READY")]}
    workers = server.workers("1.0", "2.0")
    assert workers.dead(0) == set()
    server.kill(first)
    later = server.begin()
    server.told["1.0"] = [(later, "READY"), (second, "READY")]
    assert workers.dead(60) == set()
    server.kill(second)
    assert workers.dead(60) == set()
    server.kill(later)
    assert workers.dead(60) == {"1.0"}


def test_a_server_without_an_answer_has_no_workers_and_no_dead_ones(server: Server) -> None:
    server.told = None
    workers = server.workers("1.0")
    assert workers.ready() == {} and workers.dead(0) == set()
    assert torchserve_workers(lambda: (403, b"{}"), ("1.0",)) == {}
