"""The workers of a server, and the versions that have none left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from redpp_serve.errors import RedppError
from redpp_serve.loopback import NO_ANSWER
from redpp_serve.processes import command_line, started, wait_for_an_end
from redpp_serve.serving.running import Running
from redpp_serve.serving.switching import loaded_triton_versions

if TYPE_CHECKING:
    from psutil import Process

_LOOK_S = 5.0  # for Triton to say what it has loaded
Pids = dict[str, list[int]]
"""A version's number -> the process ids of its workers."""


def torchserve_workers(listed: Callable[[], tuple[int, bytes]], versions: Sequence[str]) -> Pids:
    """Return the ready workers of some versions on TorchServe; nothing while it does not answer.

    Args:
        listed: asks TorchServe for all versions of the model; returns the status and the JSON.
        versions: the versions to look at.
    """
    try:
        status, body = listed()
        models = [m for m in (json.loads(body) if status == 200 else []) if m["modelVersion"] in versions]
        return {m["modelVersion"]: [int(w["pid"]) for w in m["workers"] if w["status"] == "READY"] for m in models}
    except (*NO_ANSWER, ValueError, KeyError, TypeError):  # port or token file not there yet
        return {}


def triton_workers(processes: Iterable[Process], name: str, versions: Iterable[str]) -> Pids:
    """Return the workers of some versions on Triton: each has the path of its version's model.py on its command line.

    Args:
        processes: Triton's, and maybe others.
        name: the model's name.
        versions: the versions to look for.
    """
    ends = {f"/{name}/{version}/model.py": version for version in versions}
    found: Pids = {version: [] for version in ends.values()}
    for process in processes:
        for word in command_line(process):
            for end, version in ends.items():
                if word.endswith(end):
                    found[version].append(process.pid)
    return found


def ready_triton_versions(running: Running) -> set[str]:
    """Return the versions that Triton calls ready; none while it does not answer."""
    try:
        return loaded_triton_versions(running, _LOOK_S)
    except RedppError:
        return set()


def ready_triton_workers(running: Running, processes: Callable[[], Iterable[Process]]) -> Pids:
    """Return the workers of both versions where Triton calls them ready; nothing while it does not answer.

    Args:
        running: describes it.
        processes: lists its processes, and maybe others.
    """
    if not (loaded := ready_triton_versions(running)):
        return {}
    living = triton_workers(processes(), running.name, running.versions)
    return {version: pids if version in loaded else [] for version, pids in living.items()}


class Workers:
    """The workers of each version, by what the server tells of them and by their processes.

    Args:
        ready: asks the server for each version's ready workers; it returns nothing while the server does not answer.
    """

    def __init__(self, ready: Callable[[], Pids]) -> None:
        self.ready = ready
        self._pids: Pids = {}  # where all were ready at the last look
        self._dead: set[str] = set()

    def dead(self, patience_s: float) -> set[str]:
        """Return the versions all of whose workers have died and are not ready again.

        A server keeps the requests of such a version waiting: TorchServe until it has started a new worker, which takes
        seconds, and Triton a second for each batch that it tries. While the workers' processes live, or when the last
        of a version has just died, it is not asked.

        Args:
            patience_s: how long to wait, seconds, for a worker to die; when one does, return at once.
        """
        wait_for_an_end((pid for pids in self._pids.values() for pid in pids), patience_s)
        living = _living(self._pids)
        if self._pids and living == self._pids:
            return set()
        if all(living.values()):
            living = _living(self.ready())
        self._pids = living if all(living.values()) else {}
        if living:  # else it does not answer
            self._dead = {version for version, pids in living.items() if not pids}
        return self._dead


def _living(workers: Mapping[str, Sequence[int]]) -> Pids:
    """Return those of each version's workers that run."""
    return {version: [pid for pid in pids if started(pid) is not None] for version, pids in workers.items()}
