"""A live A/B test under load while parts of it are killed or taken away: ``python -m benchmarks.serving --faults``.

Users ask the gateway, one request in ten is bad, and every good answer is held against the outputs of the arm that
the gateway names. Each fault has its own stretch of the load; a request belongs to the fault that met it in flight, or
else to its stretch.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from benchmarks.serving_load import Cases
from redpp_serve.ab.gateway import ARM_HEADER
from redpp_serve.ab.journal import Journal, read_journal
from redpp_serve.handlers.payload import parse
from redpp_serve.loopback import ADDRESS, ask
from redpp_serve.processes import command_line, session
from redpp_serve.serving.health import Request, triton_request
from redpp_serve.serving.running import Running
from redpp_serve.variants import NAMES

DISK_BYTES, USER_HEADER, BAD_SHARE = 256 << 20, "X-User-Id", 0.1
STRETCH_S, RECOVERY_S, TIMEOUT_S = 8.0, 60.0, 60.0
_SHORT_S = 0.5


@dataclass(frozen=True)
class Asked:
    """One user's request; times in seconds since the load began.

    Attributes:
        good: whether it could be served.
        start_s: when it was sent.
        end_s: when the answer was there, or the connection had failed.
        status: HTTP's; 0 without an answer.
        arm: the arm that answered.
        right: whether the outputs are those of that arm.
    """

    good: bool
    start_s: float
    end_s: float
    status: int
    arm: str
    right: bool

    @property
    def lost(self) -> bool:
        """A good request without the right answer, or a bad one without a refusal of its own."""
        return not self.right if self.good else not 400 <= self.status < 500


class Users:
    """Closed loops of users, each request from another one."""

    def __init__(self, running: Running, cases: Cases) -> None:
        self._running, self._cases = running, cases
        self._url = urlsplit(running.extra["gateway"])
        inputs = [parse({"body": payload.body}, cases.inputs, None) for payload in cases.good]
        if running.kind == "torchserve":
            self._good, self._bad = (
                [Request(payload.body, {"Content-Type": payload.content_type}) for payload in payloads]
                for payloads in (cases.good, cases.bad)
            )
        else:
            _, reply = ask(f"{running.management_url}/v2/models/{running.name}")
            metadata = json.loads(reply)
            self._good = [triton_request(metadata, [x.numpy() for x in tensors]) for tensors in inputs]
            self._bad = [triton_request(metadata, [array]) for array in cases.bad_arrays]
        self.asked: list[Asked] = []
        self._ended, self._lock = threading.Event(), threading.Lock()

    @contextmanager
    def asking(self, clients: int) -> Iterator[float]:
        """Ask while the body runs; yield when that began, on the clock of ``time.perf_counter``."""
        began = time.perf_counter()
        threads = [threading.Thread(target=self._loop, args=(began, seed)) for seed in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield began
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()

    def _loop(self, began: float, seed: int) -> None:
        chance = random.Random(seed)
        connection = http.client.HTTPConnection(ADDRESS, self._url.port, timeout=TIMEOUT_S)
        mine = []
        while not self._ended.is_set():
            good, index = chance.random() >= BAD_SHARE, chance.randrange(len(self._good))
            request = self._good[index] if good else chance.choice(self._bad)
            user = {USER_HEADER: f"{seed}-{chance.random()}"}
            headers = {**self._running.headers["inference"], **request.headers, **user}
            if connection.sock and select.select([connection.sock], [], [], 0)[0]:
                connection.close()  # the gateway has closed it, as any client library sees
            start, status, arm, body = time.perf_counter(), 0, "", b""
            try:
                connection.request("POST", self._url.path, request.body, headers)
                response = connection.getresponse()
                body, status, arm = response.read(), response.status, response.getheader(ARM_HEADER, "")
            except (OSError, http.client.HTTPException):
                connection.close()
            end = time.perf_counter()
            right = good and status == 200 and arm in self._cases.answered_by(index, self._outputs(body))
            mine.append(Asked(good, start - began, end - began, status, arm, right))
        connection.close()
        with self._lock:
            self.asked += mine

    def _outputs(self, body: bytes) -> np.ndarray:
        (first, *_) = json.loads(body)["outputs"]
        return np.asarray(first if self._running.kind == "torchserve" else first["data"], np.float64).ravel()


def kill(pid: int) -> None:
    """End a process as the system does where memory runs out."""
    os.kill(pid, signal.SIGKILL)


def workers(journal: Journal, arm: str) -> list[int]:
    """Return the processes that run an arm's handler."""
    running = journal.running
    assert running is not None
    number = running.versions[NAMES.index(arm)]
    if running.kind == "torchserve":
        _, body = ask(f"{running.management_url}/models/{running.name}/{number}", running.headers["management"])
        return [int(worker["pid"]) for worker in json.loads(body)[0]["workers"] if worker["status"] == "READY"]
    leaders = [pid for pid, _ in journal.parts["server"]["leaders"].values()]
    stubs = [process for pid in leaders for process in session(int(pid))]
    return [p.pid for p in stubs if any(f"/{number}/model.py" in word for word in command_line(p))]


def ports(journal: Journal) -> list[int]:
    """Return the ports that the test holds."""
    return sorted({*journal.parts["ports"].values(), *journal.parts["server"]["ports"].values()})


def taken(numbers: Sequence[int]) -> list[int]:
    """Return those ports that something listens on."""
    found = []
    for number in numbers:
        with socket.socket() as probe:
            if probe.connect_ex((ADDRESS, number)) == 0:
                found.append(number)
    return found


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Put a small disk at a folder; yield False where only root may."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0711", "redpp-benchmark", str(folder)]
    mounted = (
        shutil.which("mount") is not None and not subprocess.run(command, capture_output=True, check=False).returncode
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave no byte free."""
    for size in (1 << 20, 1):
        with suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(size))


def faults(folder: Path, disk: Path, mounted: bool, command: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Return name -> what to do to the test of a packaged folder, in the order of the load's stretches."""

    def journal() -> Journal:
        found = read_journal(folder)
        assert found is not None and found.running is not None
        return found

    def gateway(master: bool) -> None:
        for _ in range(100):  # the journal may still name the one that the last harm has ended
            leader = int(journal().parts["nginx"][0])
            with suppress(psutil.NoSuchProcess, IndexError):
                return kill(leader if master else psutil.Process(leader).children()[0].pid)
            time.sleep(0.1)
        raise RuntimeError("nginx has not been started again")

    return {
        "nothing": lambda: None,
        **({"disk filled": lambda: fill(disk), "disk freed": (disk / "filler").unlink} if mounted else {}),
        "supervisor killed": lambda: kill(int(journal().supervisor[0])),
        "supervisor started again": lambda: subprocess.run(command, check=True, stdout=sys.stderr),
        "worker of pruned killed": lambda: [kill(pid) for pid in workers(journal(), "pruned")],
        "worker of original killed": lambda: [kill(pid) for pid in workers(journal(), "original")],
        "nginx killed": lambda: gateway(True),
        "nginx's worker killed": lambda: gateway(False),
        "state folder removed": lambda: shutil.rmtree(journal().state),
    }


def faults_part(
    folder: Path, kind: str, clients: int, *, stretch_s: float, note: Callable[[str], None]
) -> dict[str, Any]:
    """Start an A/B test, put it under load, do it every harm in turn, and stop it.

    Args:
        folder: the packaged folder, both of whose versions are served in fp32.
        kind: the server.
        clients: how many ask at a time.
        stretch_s: seconds of load after each harm, at least.
        note: takes the name of each harm.
    """
    program = [sys.executable, "-m", "redpp_serve.cli", "ab"]
    command = [*program, "start", str(folder), "--server", kind, "--split", "50:50", "--sticky-header", USER_HEADER]
    with ExitStack() as stack:
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="redpp-benchmark-")))
        disk.chmod(0o711)
        mounted = stack.enter_context(small_disk(disk))
        former = os.environ.get("XDG_STATE_HOME")
        stack.callback(
            lambda: os.environ.pop("XDG_STATE_HOME") if former is None else os.environ.update(XDG_STATE_HOME=former)
        )
        os.environ["XDG_STATE_HOME"] = str(disk)
        subprocess.run(command, check=True, stdout=sys.stderr)
        try:
            journal = read_journal(folder)
            assert journal is not None and journal.running is not None
            users, held = Users(journal.running, Cases(folder)), ports(journal)
            done: dict[str, tuple[float, float]] = {}
            with users.asking(clients) as began:
                for name, act in faults(folder, disk, mounted, command).items():
                    note(f"{kind}: {name}")
                    at = time.perf_counter()
                    act()
                    done[name] = (at - began, time.perf_counter() - began)
                    time.sleep(stretch_s)
                    while not all(workers(journal, arm) for arm in NAMES) and time.perf_counter() - at < RECOVERY_S:
                        time.sleep(0.5)
        finally:
            stopped = subprocess.run([*program, "stop", str(folder)], check=False, stdout=sys.stderr)
        result = {"clients": clients, "stop": stopped.returncode, "ports_taken": taken(held)}
        if not mounted:
            result["skipped"] = "the full disk: only root may mount a small one"
        return {**result, "stretches": stretches(users.asked, done)}


def stretches(asked: Sequence[Asked], done: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Return for each fault what became of the requests between it and the next, and of those it met in flight.

    A fault strikes some time between its beginning and its end: what was under way in a short one may have met it.
    """
    ends = [*(at for at, _ in list(done.values())[1:]), float("inf")]
    found = {}
    for (name, (at, acted)), end in zip(done.items(), ends, strict=True):
        struck = acted if acted - at < _SHORT_S else at
        met = [x for x in asked if x.start_s < struck and x.end_s > at]
        began = [x for x in asked if struck <= x.start_s < end and x.end_s <= end]
        found[name] = {
            "requests": len(began),
            "good": sum(x.good for x in began),
            "good_lost": sum(x.lost for x in began if x.good),
            "bad_misjudged": sum(x.lost for x in began if not x.good),
            "in_flight": len(met),
            "in_flight_lost": sum(x.lost for x in met),
            "lost_with": dict(Counter(str(x.status) for x in (*began, *met) if x.lost)),
            "longest_wait_s": round(max((x.end_s - x.start_s for x in (*began, *met)), default=0.0), 2),
            "arms_before": sorted({x.arm for x in asked if x.good and x.end_s < at and x.arm}),
            "arms_after": sorted({x.arm for x in began if x.good and x.arm and x.start_s > acted + 1.0}),
        }
    return found


def fault_targets(results: dict[str, Any]) -> list[str]:
    """Each target with what was measured, as met or missed."""
    lines = []
    for kind, part in results.items():
        for name, x in part["stretches"].items():
            arms = set(x["arms_after"]) <= {*NAMES} and (x["arms_after"] != ["pruned"])
            met = not x["good_lost"] and not x["bad_misjudged"] and arms
            lines.append(
                f"{'met' if met else 'missed'}: {kind}: {name}: {x['good_lost']} of {x['good']} good requests lost, "
                f"{x['bad_misjudged']} bad ones misjudged, {x['in_flight_lost']} of {x['in_flight']} in flight lost, "
                f"longest wait {x['longest_wait_s']:g} s, then {' and '.join(x['arms_after'])}"
            )
        free = not part["ports_taken"] and part["stop"] == 0
        lines.append(
            f"{'met' if free else 'missed'}: {kind}: after stop ports still taken: {part['ports_taken'] or 'none'}"
        )
    return lines
