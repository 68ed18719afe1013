"""The process that an A/B test is: it starts server, gateway and recorder, keeps them running, and counts.

``python -m redpp_serve.ab.supervisor FOLDER`` runs the test of a packaged folder, as its journal says, until SIGTERM.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from redpp_serve.ab import shadow
from redpp_serve.ab.attached import AttachedServer
from redpp_serve.ab.counts import Counting, scrape
from redpp_serve.ab.decisions import PROMOTE, RAMP, ROLLBACK, Decision
from redpp_serve.ab.evidence import Evidence
from redpp_serve.ab.exporter import serve_metrics
from redpp_serve.ab.gateway import ACCESS_LOG, DEAD, division, set_split, stop_mirroring, switch, worker_account
from redpp_serve.ab.journal import Journal, read_journal
from redpp_serve.ab.moves import move_all, see_divided
from redpp_serve.ab.parts import Parts, failing_over, start_parts
from redpp_serve.ab.pilot import Pilot
from redpp_serve.ab.results import headline, results_folder, write_results
from redpp_serve.ab.spec import parse_split
from redpp_serve.ab.state import GATEWAY, RECORDER, SPEC, Heartbeat, read_json, supervising, write_json
from redpp_serve.ab.status import Status, make_status
from redpp_serve.ab.webhook import Webhook
from redpp_serve.errors import RedppError
from redpp_serve.logs import Logs, reopen_logs
from redpp_serve.loopback import ADDRESS
from redpp_serve.processes import Guard, started
from redpp_serve.serving.running import Running, register, write_note
from redpp_serve.serving.server import LocalServer
from redpp_serve.signals import Stopped, stopped_by_signal
from redpp_serve.state_folders import hold
from redpp_serve.variants import ORIGINAL

_POLL_S = 1.0
_LOST = (
    "the A/B test's folder was lost, emptied or closed to nginx, so all users got the original; "
    "redpp-serve ab promote moves them again, and ab stop with a new ab start divides them"
)


def supervise(journal: Journal, note: Callable[[str], None], ready: Callable[[], None]) -> None:
    """Start everything, call ``ready``, and watch until an exception (of a signal) ends it; then end everything.

    What a supervisor that was killed has left is taken over: its users are served all the while.

    Args:
        journal: names the test to run, and what there is of it.
        note: called with lines about the start, and later about a restart of the server.
        ready: called when users are served.

    Raises:
        RedppError: something does not start, or another A/B test runs for the folder.
    """
    state = journal.state
    with ExitStack() as stack:
        stack.enter_context(supervising(journal.test.spec.folder))
        journal.supervisor = [os.getpid(), started(os.getpid()) or 0.0]
        journal.write()
        stack.callback(hold(state).release)
        logs = reopen_logs(journal.logs, journal.test.spec.log_format, for_others=worker_account() is not None)
        stack.callback(lambda: logs.close((ACCESS_LOG,)))
        served = False
        # A test that never served leaves its folder, which says why, to the command that waits.
        stack.callback(lambda: journal.end() if served else journal.end_processes())

        def tell(line: str) -> None:
            logs.say(line)
            with suppress(OSError):  # a full disk must not keep a server from being started again
                note(line)
                if served:
                    tell_others(state, [f"the server is being started again: {line}"])

        guard = Guard()  # only a living supervisor tells the gateway which arms are dead
        stack.callback(guard.dismiss)
        guard.watch_folder(state / GATEWAY / DEAD)
        ports, parts = start_parts(journal, logs, stack, tell)
        urls = {
            "gateway": f"http://{ADDRESS}:{ports.gateway}{parts.nginx.gateway.public}",
            "metrics": f"http://{ADDRESS}:{ports.metrics}/metrics",
        }
        begins = journal.running is None
        if begins:
            journal.test = replace(journal.test, started=time.time())
            write_json(state / SPEC, journal.test.to_json(secrets=False))
        counting = Counting(state, parts.nginx.access_log, partial(scrape, parts.server.metrics_url, parts.server.name))
        watch = Watch(journal, urls, counting, parts, logs)
        stack.callback(lambda: watch.end() if served else None)
        stack.callback(serve_metrics(lambda: watch.latest, ports.metrics)[1])
        journal.running = _running(journal, parts.server, urls)
        if begins:
            see_divided(journal.running)
        journal.write()
        stack.enter_context(register(journal.running))
        stack.enter_context(failing_over(parts))
        tell_others(state, [])
        served = True
        ready()
        while True:
            begun = time.monotonic()
            watch.look()
            time.sleep(max(0.05, _POLL_S - (time.monotonic() - begun)))


def _running(journal: Journal, server: LocalServer | AttachedServer, urls: Mapping[str, str]) -> Running:
    """Return the note for other commands, which look under the folder that the user named, not one of links."""
    spec = journal.test.spec
    extra = {
        "gateway": urls["gateway"],
        "ab_metrics": urls["metrics"],
        "state": str(journal.state),
        "split": str(spec.split),
        "probe": journal.probe,
        **({"gateway_grpc": f"{ADDRESS}:{port}"} if (port := journal.parts.get("grpc_port")) else {}),
    }
    running = server.running(extra)
    return replace(running, folder=str(spec.folder), metrics_urls=[*running.metrics_urls, urls["metrics"]])


def tell_others(state: Path, problems: Sequence[str]) -> None:
    """Write down that the supervisor lives, and what it could not mend.

    Raises:
        OSError: it cannot be written.
    """
    Heartbeat(ready=True, problems=tuple(problems), looked=time.monotonic()).write(state)


class Watch:
    """Looks after a running test: mends, counts, and writes down what other processes read.

    Attributes:
        latest: the status as of the last look; None before the first.
    """

    def __init__(self, journal: Journal, urls: Mapping[str, str], counting: Counting, parts: Parts, logs: Logs) -> None:
        self._journal, self._urls, self._counting, self._parts, self._logs = journal, urls, counting, parts, logs
        self._state = journal.state
        self._evidence = Evidence(self._state, journal.test.spec, counting)
        self._gateway = hold(parts.nginx.gateway.folder)
        self._problems: list[str] = []
        self._lost = [_LOST] if parts.lost else []
        self._complaints: set[str] = set()
        self._pilot, self._told = Pilot(self._state, journal.test.spec), ""
        self._webhook = Webhook(url, logs.say) if (url := journal.test.spec.webhook) else None
        self.latest: Status | None = None

    def look(self) -> None:
        """Mend, count and write down once. Whatever goes wrong is told, since users' requests must not end with it."""
        try:
            self.find_folder()
            if not self._logs.look((ACCESS_LOG,)) or not self._parts.nginx.access_log.exists():
                self._parts.nginx.reopen()
            tell_others(self._state, self._problems)
            self._problems = [*self._lost, *self.mend()]
            self._problems += self._counting.count()
            tell_others(self._state, self._problems)
            self.latest = self.status()
            if self.act(self.latest):
                self.latest = self.status()
            if self._parts.nginx.rotate():
                self._counting.put_aside()
        except Exception as error:  # such as a full disk, or a folder that is gone
            self._problems = [*self._lost, f"the A/B test was not looked after: {type(error).__name__}: {error}"]
            self._complain()
        self.write_down()

    def find_folder(self) -> None:
        """Make the test's folder again where it was lost, emptied, replaced or closed. All users get the original then.

        What it said of users is not restored: nobody knows whether that was the last word.

        Raises:
            OSError: it cannot be made.
        """
        nginx = self._parts.nginx
        if self._gateway.in_place() and nginx.reaches_folder() and division(nginx.gateway.folder) is not None:
            return
        self._lost = [_LOST]
        nginx.make_folder()
        switch(nginx.gateway.folder, ORIGINAL.name)
        self._gateway.release()
        self._gateway = hold(nginx.gateway.folder)
        nginx.reopen()
        write_json(self._state / SPEC, self._journal.test.to_json(secrets=False))

    def status(self) -> Status:
        """Return the status now."""
        return make_status(self._state, self._journal.test, self._evidence, self._urls, self._problems)

    def act(self, status: Status) -> bool:
        """Do what the pilot decides, write it down, tell the webhook, and return True if there was anything.

        Without ``--auto`` the webhook is told of the advice.
        """
        decision = self._pilot.decide(status, time.time())
        if decision:
            try:
                self._move(decision)
            except (RedppError, OSError) as error:  # it is tried again at the next look
                found = error.found if isinstance(error, RedppError) else str(error)
                self._problems.append(f"{decision.action} could not be done: {found}")
                return False
            self._tell(str(decision))
            self._pilot.write(decision)
        elif not self._journal.test.spec.auto and status.advice.kind not in ("wait", self._told):
            self._told = status.advice.kind
            self._tell(status.advice.text)
        return decision is not None

    def _move(self, decision: Decision) -> None:
        spec, running = self._journal.test.spec, self._journal.running
        if decision.action == RAMP:
            set_split(self._parts.nginx.gateway.folder, parse_split(decision.users))
        elif decision.action in (PROMOTE, ROLLBACK) and running:
            move_all(running, spec.folder, decision.users)

    def _tell(self, text: str) -> None:
        if self._webhook:
            self._webhook.tell(f"A/B test of {self._journal.test.name}: {text}")

    def end(self) -> None:
        """Write the report of the test that ends beside its package, and tell the webhook."""
        with suppress(Exception):  # a full disk keeps no test from ending; the last look is a second old then
            self._counting.count()
            self.latest = self.status()
        if self.latest is None:
            return
        try:
            write_results(self.latest, results_folder(self._journal.test))
        except OSError as error:
            self._logs.say(f"the report could not be written: {error}")
        self._tell(headline(self.latest))
        if self._webhook:
            self._webhook.close()

    def write_down(self) -> None:
        """Write down what other commands find the test by, where it has changed or is gone."""
        self._journal.parts |= self._parts.handover()
        self._journal.write()
        if self._journal.running:
            with suppress(RedppError):
                write_note(self._journal.running)

    def mend(self) -> list[str]:
        """Start again what has ended, as far as possible; return sentences about the rest."""
        parts = self._parts
        with ThreadPoolExecutor(1) as pool:  # a version takes seconds to load; users need the gateway meanwhile
            looked = pool.submit(parts.server.check_alive)
            try:
                problems = self._mend_gateway()
                while not wait({looked}, _POLL_S)[0]:
                    problems = self._mend_gateway()
            except Stopped:
                if not wait({looked}, _POLL_S)[0]:
                    parts.server.stop()
                raise
        try:
            looked.result()
        except (RedppError, OSError) as error:
            found = error.found.strip() if isinstance(error, RedppError) else str(error)
            problems.insert(0, f"{found}\nEnd the A/B test with redpp-serve ab stop, and start it again.")
        if (read_json(self._state / RECORDER) or {}).get("pairs", 0) >= shadow.MAX_PAIRS:
            stop_mirroring(parts.nginx.gateway.folder)
            problems.append(f"the recorder has its {shadow.MAX_PAIRS} pairs; start a new A/B test to record more")
        return problems

    def _mend_gateway(self) -> list[str]:
        problems, parts = [], self._parts
        try:
            if not parts.nginx.alive():
                parts.nginx.start()
            for relay in parts.relays.values():
                if not relay.reachable():
                    relay.start(wait=False)
            for other in (parts.recorder, parts.grpc):
                if other and not other.alive():
                    other.start(wait=False)
        except RedppError as error:
            problems.append(error.found)
        except OSError as error:  # a full disk, or a folder that is gone
            problems.append(f"gateway or recorder cannot be started again: {error}")
        return problems

    def _complain(self) -> None:
        """Print the traceback to the log, once for each kind of failure."""
        text = traceback.format_exc()
        if text not in self._complaints:
            self._complaints.add(text)
            with suppress(OSError):
                print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal. A failed start is written to the state folder for the command that waits."""
    folder = Path((sys.argv[1:] if arguments is None else arguments)[0])
    os.umask(0o077)  # counts and logs are nobody else's
    journal = read_journal(folder)
    if journal is None:
        print(f"no journal of an A/B test for {folder}", file=sys.stderr)
        return RedppError.exit_code
    with stopped_by_signal():
        try:
            supervise(journal, lambda line: None, lambda: None)
        except RedppError as error:
            with suppress(OSError):
                Heartbeat(refusal=(error.found, error.expected, error.do)).write(journal.state)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
