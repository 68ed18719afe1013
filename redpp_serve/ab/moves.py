"""Move all users to one arm, and see by requests through the gateway that they have moved."""

from __future__ import annotations

import http.client
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from redpp_serve.ab.gateway import ARM_HEADER, CHOSEN_HEADER, PROBE_HEADER, divide, set_split, switch
from redpp_serve.ab.journal import read_journal
from redpp_serve.ab.spec import TrafficSplit
from redpp_serve.ab.state import GATEWAY
from redpp_serve.ab.status import read_status
from redpp_serve.errors import RedppError
from redpp_serve.loopback import NO_ANSWER
from redpp_serve.serving.health import Request, sample_request
from redpp_serve.serving.running import Running
from redpp_serve.serving.switching import switch as switch_server
from redpp_serve.variants import NAMES, ORIGINAL, PRUNED

_ASKED, _PATIENCE_S, _POLL_S, _TIMEOUT_S = 5, 3.0, 0.05, 30.0
_CHOSEN_BY = {PRUNED.name: "promote", ORIGINAL.name: "rollback"}  # the words of the gateway's template


@dataclass(frozen=True)
class Probe:
    """The gateway's answer to one request for a prediction that names no arm.

    Attributes:
        status: HTTP's; 0 where there was no answer.
        arm: the arm that answered.
        chosen_by: what gave the user that arm: ``split``, ``promote`` or ``rollback``.
        problem: why the arm cannot answer; empty where it does, if only with a refusal.
    """

    status: int
    arm: str = ""
    chosen_by: str = ""
    problem: str = ""


def probe(running: Running) -> Probe:
    """Ask a test's gateway for a prediction of the package's sample; it is no user's request and is not counted."""
    url = urlsplit(running.extra["gateway"])
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=_TIMEOUT_S)
    try:
        request = _prediction(running)
        headers = {**running.headers["inference"], **request.headers, PROBE_HEADER: running.extra["probe"]}
        connection.request("POST", url.path, request.body, headers)
        response = connection.getresponse()
        body = response.read()
        problem = "" if response.status < 500 else f"{response.status} {body.decode(errors='replace').strip()[:300]}"
        arm, chosen_by = (response.getheader(name, "") for name in (ARM_HEADER, CHOSEN_HEADER))
        return Probe(response.status, arm, chosen_by, problem)
    except NO_ANSWER as error:
        return Probe(0, problem=f"no answer: {error or type(error).__name__}")
    finally:
        connection.close()


def move_all(running: Running, folder: Path, arm: str) -> str:
    """Send all users of a test to ``pruned`` (promote) or ``original`` (rollback); return what was done.

    No request is lost. Requests through the gateway name their version, so it alone decides over users; the server's
    own default moves with them.

    Args:
        running: the test.
        folder: the packaged folder that it runs for.
        arm: where users go.

    Raises:
        RedppError: the gateway still gives users another arm, or answers nobody.
    """
    state = Path(running.extra["state"])
    try:
        switch(state / GATEWAY, arm)
    except OSError as error:
        raise _unmovable(folder, error) from error
    problem = _see_moved(running, folder, arm)
    gateway = running.extra["gateway"]
    done = f"all users of {gateway} get {arm} from their next request on, except those who ask by {ARM_HEADER}{problem}"
    if arm == PRUNED.name and (journal := read_journal(folder)):
        now = read_status(state, journal.test, {}).advice
        done += "" if now.kind == "promote" else f"; the advice was another one: {now.text.rstrip('.')}"
    try:
        switch_server(running, arm)
    except RedppError as error:  # users go through the gateway, which has switched
        return f"{done}; the server's own default could not be moved: {error.found}"
    return f"{done}; requests to the server that name no version follow"


def move_to_split(running: Running, folder: Path, split: TrafficSplit) -> str:
    """Divide users of a test by a split, and see that the gateway does; return what was done.

    Args:
        running: the test.
        folder: the packaged folder that it runs for.
        split: how users are divided.

    Raises:
        RedppError: the split cannot be written, or users are not divided.
    """
    gateway = Path(running.extra["state"]) / GATEWAY
    try:
        set_split(gateway, split)
        divide(gateway)
    except OSError as error:
        raise _unmovable(folder, error) from error
    see_divided(running)
    return f"{split.pruned} % of users of {running.extra['gateway']} get pruned from their next request on"


def _unmovable(folder: Path, error: OSError) -> RedppError:
    return RedppError(
        f"users cannot be moved: {error}",
        "the A/B test's folder, and room on its disk",
        f"free some, or end it with redpp-serve ab stop {shlex.quote(str(folder))}",
    )


def see_divided(running: Running) -> None:
    """Refuse to serve through a gateway that does not divide users, since nginx cannot read the switches.

    Raises:
        RedppError: it does not.
    """
    seen = probe(running)
    if seen.chosen_by != "split":
        raise RedppError(
            f"the gateway does not divide users: {seen.problem or f'a request got {seen.arm}, by {seen.chosen_by}'}",
            f"nginx to read {running.extra['state']}",
            "point XDG_STATE_HOME at a folder that nginx's user may pass through",
        )


def _prediction(running: Running) -> Request:
    """Return a request for the sample, or an empty one that the gateway gives an arm all the same."""
    try:
        return sample_request(running)
    except (RedppError, *NO_ANSWER):
        return Request(b"", {"Content-Type": "application/octet-stream"})


def _see_moved(running: Running, folder: Path, arm: str) -> str:
    """Return once several requests in a row were moved; the text says where that arm itself does not answer.

    Raises:
        RedppError: they were not.
    """
    deadline, moved = time.monotonic() + _PATIENCE_S, 0
    while moved < _ASKED:
        seen = probe(running)
        moved = moved + 1 if seen.chosen_by == _CHOSEN_BY[arm] else 0
        if not moved and time.monotonic() > deadline:
            found = f"it answers {seen.problem}" if not seen.arm else f"a request got {seen.arm}, by {seen.chosen_by}"
            raise RedppError(
                f"users have not moved to {arm}: {found}",
                f"the gateway {running.extra['gateway']} to send every user there",
                "see redpp-serve ab status; to take every user off both versions, "
                f"end the test with redpp-serve ab stop {shlex.quote(str(folder))}",
            )
        if not moved:
            time.sleep(_POLL_S)
    if seen.arm != arm:
        return f"; {arm} is dead now, and {_other(arm)} answers for it"
    return f"; but it does not answer now: {seen.problem}" if seen.problem else ""


def _other(arm: str) -> str:
    return next(name for name in NAMES if name != arm)
