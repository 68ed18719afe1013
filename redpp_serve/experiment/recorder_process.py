"""A helper process of the supervisor that is started again when it dies."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

from redpp_serve.errors import RedppError

from .files import RECORDER_LOG
from .nginx import ADDRESS

_START_S, _STOP_S, _POLL_S = 30.0, 10.0, 0.05


class RecorderProcess:
    """The shadow recorder, see `recorder`.

    Args:
        state: the experiment's state folder.
        port: where nginx finds it.
        urls: of the original and the pruned version.
    """

    def __init__(self, state: Path, port: int, urls: tuple[str, str]) -> None:
        self._log, self._port = state / RECORDER_LOG, port
        self._command = [sys.executable, "-m", "redpp_serve.experiment.recorder", "--state", str(state),
                         "--port", str(port), "--original", urls[0], "--redpp", urls[1]]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> None:
        """Start; with ``wait`` return when it takes connections.

        Raises:
            RedppError: it does not come up.
        """
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _START_S
        while wait and not self._listens():
            if not self.alive() or time.monotonic() > deadline:
                self.stop()
                tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])
                raise RedppError(f"the shadow recorder did not start: {tail}", "a recorder that takes connections",
                                 "read what it says above; it names the cause")  # fmt: skip
            time.sleep(_POLL_S)

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End it."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((ADDRESS, self._port)) == 0
