"""The workers of a server, and the versions that have none left."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from redpp_serve.loopback import NO_ANSWER
from redpp_serve.processes import started, wait_for_an_end

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

        A server keeps the requests of such a version waiting until it has started a new worker, which takes seconds.
        While the workers' processes live, or when the last of a version has just died, it is not asked.

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
