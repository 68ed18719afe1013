"""Watch a deployment from outside, by what Prometheus has of it, and with ``--auto`` act on the verdict.

The verdict, the limits and the decisions are those of `ab start`; only counts and split come from elsewhere. What a
watcher cannot see it does not act on: while Prometheus is away, has nothing of the model or is behind, and while the
split cannot be read, weights stay as they are, and the watcher says so.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from redpp_serve.ab.decisions import Decision
from redpp_serve.ab.evidence import Evidence, known_agreement
from redpp_serve.ab.exporter import serve_metrics
from redpp_serve.ab.pilot import Pilot
from redpp_serve.ab.prometheus import Prometheus, PrometheusCounts
from redpp_serve.ab.spec import Spec, Started, Users, parse_split, split_at
from redpp_serve.ab.splits import Found, Split
from redpp_serve.ab.status import Status, status_of
from redpp_serve.ab.webhook import Webhook
from redpp_serve.errors import RedppError, without_controls
from redpp_serve.metrics_reader import Unreadable
from redpp_serve.statistics.guardrails import Guardrail
from redpp_serve.variants import NAMES, ORIGINAL, PRUNED

Say = Callable[[str], None]
_LOOK_S = 15.0  # from one look to the next, at most
_NOT_DIVIDED = "all users get {}, so nothing is compared until the split gives each arm some"
_SILENT = "metrics: {} has had none for a while, though the other version has"


@dataclass(frozen=True)
class Watched:
    """What is watched.

    Attributes:
        spec: the test; its folder is the package, whose report tells the agreement.
        name: the name that the model is served under.
        test: a name for this test: a journal of another one is not gone on with.
        matchers: more label matchers of PromQL.
        window_s: seconds of a window, at least the time between two scrapes.
        since: when the test began (seconds since 1970), where no journal says so; None for now.
    """

    spec: Spec
    name: str
    test: str
    matchers: str = ""
    window_s: float = 30.0
    since: float | None = None


class Watch:
    """Looks again and again; each look reads, counts, decides and moves users.

    Args:
        watched: what.
        prometheus: where the counters are.
        split: where the split is.
        folder: a new folder, for the journal of this process.
        say: takes lines about what has changed.
        urls: shown in the status.

    Attributes:
        latest: the status as of the last look; None before the first that could read the split.
    """

    def __init__(
        self, watched: Watched, prometheus: Prometheus, split: Split, folder: Path, say: Say, urls: Mapping[str, str]
    ) -> None:
        self._watched, self._prometheus, self._split, self._folder = watched, prometheus, split, folder
        self._say, self._urls = say, urls
        self._running: _Running | None = None
        self._told, self._problems = "", frozenset[str]()
        self._webhook = Webhook(watched.spec.webhook, say) if watched.spec.webhook else None
        self.latest: Status | None = None

    def look(self) -> None:
        """Look once. Whatever cannot be read or changed is told, and tried again at the next look."""
        problems: list[str] = []
        try:
            now = self._time()
            found = self._split.read()
            running = self._go_on(found, now)
            status = self._status(running, found.users, now, problems)
        except Unreadable as error:
            problems = [str(error)]
        except RedppError as error:
            problems = [error.found]
        else:
            self.latest = status if problems else self._act(running, status, found, now)
            problems = self.latest.problems
        if self.latest:
            self.latest = replace(self.latest, problems=problems)
        self._tell_problems(problems)

    def _time(self) -> float:
        """Return the time on Prometheus' clock, which the counters have."""
        found = self._prometheus.now("vector(time())")
        if not found:
            raise Unreadable(f"{self._prometheus.url} does not tell the time")
        return found[0][1]

    def _go_on(self, found: Found, now: float) -> _Running:
        """Return the test that runs, which begins where the journal beside the split says so, or now.

        A journal that is another one than this process knows, since somebody has removed it or another watcher has
        written it, takes its place.

        Raises:
            RedppError: it is none.
        """
        if self._running is None or self._running.journal != found.journal:
            self._running = self._begin(found, now)
        moves = self._running.moves
        if moves[-1][1] != str(found.users):
            moves.append((now, str(found.users)))
        return self._running

    def _begin(self, found: Found, now: float) -> _Running:
        watched, own = self._watched, found.journal.get("test") == self._watched.test
        journal = found.journal if own else {}
        try:
            since = float(journal.get("started", now if watched.since is None else watched.since))
            made = [Decision(**row, numbers={}) for row in journal.get("decisions", ())]
        except (TypeError, ValueError) as error:
            raise RedppError(
                f"the journal of {self._split} cannot be read", "what a watcher wrote", "remove it"
            ) from error
        folder = Path(mkdtemp(dir=self._folder))
        pilot = Pilot(folder, watched.spec)
        for decision in made:
            pilot.write(decision)
        counts = PrometheusCounts(self._prometheus, watched.name, watched.matchers, since, watched.window_s)
        self._say(f"watches {watched.name} on {self._split} by {self._prometheus.url}, from {_clock(since)} on")
        if made:
            self._say(f"goes on after {made[-1]}")
        return _Running(
            test=Started(watched.spec, watched.name, since),
            pilot=pilot,
            counts=counts,
            evidence=Evidence(folder, watched.spec, counts),
            moves=[(decision.time, decision.users) for decision in made] or [(-math.inf, str(found.users))],
            journal=found.journal,
        )

    def _status(self, running: _Running, users: Users, now: float, problems: list[str]) -> Status:
        """Count, and return the status."""
        counts, evidence = running.counts, running.evidence
        try:
            counts.count(partial(split_in, running.moves, self._watched.window_s))
        except Unreadable as error:
            problems.append(str(error))
        status = status_of(running.test, evidence, users, running.pilot.made, self._urls, ())
        if PRUNED.name in counts.silent and not problems and users.all_to != ORIGINAL.name:
            rail = Guardrail("metrics", False, _SILENT.format(PRUNED.name), None, 0.0, 1.0, 1.0)
            rails = [*status.guardrails, rail]
            status = replace(status, guardrails=rails, advice=evidence.advice(status.findings, rails))
        elif not problems:
            problems += [_SILENT.format(arm) for arm in sorted(counts.silent) if users.all_to in (None, arm)]
        return replace(status, seconds=now - running.test.started, problems=list(problems))

    def _act(self, running: _Running, status: Status, found: Found, now: float) -> Status:
        """Do what the pilot decides, and write it down beside the split; return the status after it."""
        spec, pilot, begins = self._watched.spec, running.pilot, running.pilot.last is None
        decision = pilot.decide(status, now)
        if decision and begins and status.all_to:
            if not spec.ramp or status.all_to == PRUNED.name:
                return replace(status, problems=[_NOT_DIVIDED.format(status.all_to)])
            decision = replace(decision, users=str(split_at(spec.ramp[0])), text="The test begins with its ramp.")
        if decision is None:
            self._advise(status)
            return status
        if spec.auto:
            journal = self._journal(running, decision)
            try:
                self._split.write(found, decision.users, journal)
            except RedppError as error:  # it is tried again at the next look
                return replace(status, problems=[f"{decision.action} could not be done: {error.found}"])
            running.journal = journal
        pilot.write(decision)
        if begins:
            running.moves[:] = [(now, decision.users)]
        elif decision.users != str(found.users):
            running.moves.append((now, decision.users))
        self._tell(str(decision))
        all_to = decision.users if decision.users in NAMES else None
        split = status.split if all_to else parse_split(decision.users)
        return replace(status, all_to=all_to, split=split, decisions=pilot.made)

    def _journal(self, running: _Running, decision: Decision) -> dict[str, Any]:
        made = [asdict(row) for row in (*running.pilot.made, decision)]
        rows = [{key: value for key, value in row.items() if key != "numbers"} for row in made]
        return {"test": self._watched.test, "started": running.test.started, "decisions": rows}

    def _advise(self, status: Status) -> None:
        """Tell the advice where it is another one than the last time."""
        if status.advice.kind in ("wait", self._told):
            return
        self._told = status.advice.kind
        self._say(status.to_text())
        if not self._watched.spec.auto:
            self._tell(status.advice.text)

    def _tell(self, text: str) -> None:
        self._say(without_controls(text))
        if self._webhook:
            self._webhook.tell(f"A/B test of {self._watched.name}: {text}")

    def _tell_problems(self, problems: Sequence[str]) -> None:
        """Tell each problem once, whatever the numbers in it, and that all are over."""
        plain = {re.sub(r"\d+", "", text): text for text in problems}
        for text in (plain[key] for key in plain if key not in self._problems):
            self._say(without_controls(f"PROBLEM: {text}; users stay where they are"))
        if self._problems and not problems:
            self._say("no problem any more")
        self._problems = frozenset(plain)

    def close(self) -> None:
        """Send what the webhook still has to tell."""
        if self._webhook:
            self._webhook.close()


@dataclass
class _Running:
    """The test that runs.

    Attributes:
        test: when it began.
        pilot: what was decided.
        counts: by Prometheus.
        evidence: of the counts.
        moves: when users were moved, and where to; also by somebody else.
        journal: what lies beside the split.
    """

    test: Started
    pilot: Pilot
    counts: PrometheusCounts
    evidence: Evidence
    moves: list[tuple[float, str]]
    journal: dict[str, Any]


def split_in(moves: Sequence[tuple[float, str]], near_s: float, start: float, end: float) -> str | None:
    """Return the split in force from one time to another; None next to a change, or where all users got one arm.

    A change takes a while to reach the gateways, and one by somebody else is seen at the next look only: windows that
    are nearer to one than ``near_s`` belong to no split.
    """
    split = None
    for at, users in moves:
        if at - near_s >= end:
            break
        split = users if at + near_s <= start else None
    return None if split in NAMES else split


def watch(watched: Watched, prometheus: Prometheus, split: Split, exporting: tuple[int, str], say: Say) -> None:
    """Watch until an exception (of a signal) ends it, and serve the verdict's metrics.

    Args:
        watched: what.
        prometheus: where the counters are.
        split: where the split is.
        exporting: port (0 for a free one) and address of the verdict's metrics.
        say: takes lines about what has changed.

    Raises:
        RedppError: the port is in use.
    """
    port, address = exporting
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="redpp-watch-")))
        urls = {"gateway": prometheus.url, "metrics": ""}
        watcher = Watch(watched, prometheus, split, folder, say, urls)
        stack.callback(watcher.close)
        try:
            port, end = serve_metrics(lambda: watcher.latest, port, address)
        except OSError as error:
            raise RedppError(f"port {port} of {address}: {error.strerror}", "a free one", "choose another") from error
        stack.callback(end)
        urls["metrics"] = f"http://{address}:{port}/metrics"
        say(f"metrics of the verdict: {urls['metrics']}")
        if not (known := known_agreement(watched.spec)).ok:
            say(known.text)
        while True:
            begun = time.monotonic()
            watcher.look()
            time.sleep(max(0.1, min(_LOOK_S, watched.window_s) - (time.monotonic() - begun)))


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
