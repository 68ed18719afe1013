"""The way from the gateway to one arm, which can be cut: requests that a dead arm keeps waiting are taken back.

A server may keep a request for a version without a worker until there is a new one, which takes seconds. No time limit
tells such a wait from the honest one for a slow network, and no nginx gives up a request that it has passed on, unless
the other side closes the connection. Therefore users' requests pass through another nginx for each arm. When the arm's
last worker has died, that nginx's own worker is ended too: its connections close, and the gateway asks the other arm at
once. Where a relay is missing, the gateway asks the server itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress

from redpp_serve.ab.gateway import DEAD, Gateway, ListeningProcess, relay_socket, template, write_config
from redpp_serve.loopback import ADDRESS
from redpp_serve.processes import Leader, find_program, session


class Relay(ListeningProcess):
    """One arm's nginx, with its files in the gateway's folder, which exists.

    Args:
        gateway: the gateway in front of it.
        arm: the arm.
        watch, inherited: as for `ListeningProcess`.
    """

    def __init__(
        self,
        gateway: Gateway,
        arm: str,
        watch: Callable[[Leader], None] = lambda process: None,
        inherited: Sequence[int] = (),
    ) -> None:
        name, self._socket = f"relay-{arm}", relay_socket(gateway.folder, arm)
        self._config, log = gateway.folder / f"{name}.conf", gateway.log(f"{name}.log")
        command = [str(find_program("nginx")), "-e", str(log), "-p", str(gateway.folder), "-c", str(self._config)]
        title, folder = f"nginx for {arm}", gateway.folder
        super().__init__(title, command, self._socket, log, watch, folder=folder, inherited=inherited)
        self._text = template("relay.conf.j2").render(
            account=" ".join(gateway.account or ()),
            connections=gateway.connections,
            folder=gateway.folder,
            name=name,
            log=log,
            socket=self._socket,
            dead=gateway.folder / DEAD / arm,
            upstream=f"{ADDRESS}:{gateway.server}",
        )

    def start(self, wait: bool = True) -> None:
        """Write the configuration, and start; what a killed one has left is ended.

        Raises:
            RedppError: nginx does not come up; the message holds its words.
            OSError: its files cannot be written.
        """
        write_config(self._config, self._text)
        self._socket.unlink(missing_ok=True)
        super().start(wait)

    def reachable(self) -> bool:
        """Return True while it runs and has its socket, which is lost with the folder."""
        return self.alive() and self._socket.exists()

    def cut(self) -> None:
        """Close all connections at once; the next ones are taken again."""
        if self._process is None:
            return
        for worker in session(self._process.pid):
            if worker.pid != self._process.pid:
                with suppress(OSError):
                    os.kill(worker.pid, signal.SIGTERM)
