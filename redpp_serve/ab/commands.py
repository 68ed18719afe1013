"""The actions of ``redpp-serve ab``: start, status, promote, rollback, stop."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from redpp_serve.ab.gateway import ACCESS_LOG, ARM_HEADER, switch
from redpp_serve.ab.spec import Spec, Started
from redpp_serve.ab.state import (
    GATEWAY,
    PACKAGE,
    SPEC,
    SUPERVISOR_LOG,
    Heartbeat,
    abandoned,
    already_runs,
    clean,
    supervised,
    write_json,
)
from redpp_serve.ab.status import Status, read_status
from redpp_serve.ab.supervisor import supervise
from redpp_serve.errors import RedppError
from redpp_serve.files import private_folder
from redpp_serve.processes import find_program, start_session, started
from redpp_serve.serving.health import curl
from redpp_serve.serving.running import Running, find_all
from redpp_serve.serving.serve import model_name
from redpp_serve.serving.switching import switch as switch_server
from redpp_serve.variants import ORIGINAL, PRUNED

if TYPE_CHECKING:
    from redpp_serve.graph.graph import InputSpec

_OBSERVING_COSTS = "note     observing takes time from the original's workers alone: judge speed without --observe"
_START_S, _STOP_S, _DYING_S, _POLL_S = 300.0, 60.0, 2.0, 0.1
Note = Callable[[str], None]


def start(spec: Spec, *, foreground: bool, say: Note, note: Note) -> None:
    """Start an A/B test, and return when it takes requests; with ``foreground`` stay until a signal ends it.

    Args:
        spec: the test.
        foreground: run it in this process.
        say: takes lines of the result.
        note: takes lines about progress.

    Raises:
        RedppError: something is missing, a port is in use, or another A/B test or server runs for the folder.
    """
    name = model_name(spec.folder)
    if spec.split.pruned == 0 and not spec.shadow:
        raise RedppError(
            "no user for the pruned version and no shadow mode",
            "something to compare",
            "give it a part of --split, or add --shadow",
        )
    _refuse_second(spec)
    find_program("nginx")
    state = private_folder("redpp-ab-")
    test = Started(spec, name, time.time())

    def ready() -> None:
        last = "Ctrl-C ends the A/B test." if foreground else f"next     {_NEXT.format(_quoted(spec.folder))}"
        told = [*spec.observe.lines(), _OBSERVING_COSTS] if spec.observe else []
        for line in (*told, *_how_to_ask(_find(spec.folder), state), last):
            say(line)

    try:
        write_json(state / SPEC, test.to_json())
        if spec.candidate:
            mixed_folder(spec.folder, spec.candidate, state / PACKAGE)
        if foreground:
            os.umask(0o077)  # counts and logs are nobody else's
            supervise(test, state, note, ready)
        else:
            _start_apart(spec.folder, state, note)
    except BaseException:
        shutil.rmtree(state, ignore_errors=True)
        raise
    if not foreground:
        ready()


def status(folder: Path) -> Status:
    """Return the state of the A/B test that runs for a folder.

    Raises:
        RedppError: none runs.
    """
    running = _find(folder)
    return read_status(
        Path(running.extra["state"]), {"gateway": running.extra["gateway"], "metrics": running.extra["ab_metrics"]}
    )


def send_all(folder: Path, arm: str) -> str:
    """Send all users to ``pruned`` (promote) or ``original`` (rollback); return what was done. No request is lost.

    The gateway's requests name their version, so it alone decides over users; the server's own default moves with them.

    Raises:
        RedppError: no A/B test runs, or its folder is gone.
    """
    running = _find(folder)
    state = Path(running.extra["state"])
    try:
        switch(state / GATEWAY, arm)
    except OSError as error:
        raise RedppError(
            f"users cannot be moved: {error}",
            "the A/B test's folder, and room on its disk",
            f"free some, or end it with redpp-serve ab stop {_quoted(folder)}",
        ) from error
    gateway = running.extra["gateway"]
    done = f"all users of {gateway} get {arm} from their next request on, except those who ask by {ARM_HEADER}"
    if arm == PRUNED.name:
        with suppress(RedppError):  # a lost folder has lost the advice too; users are moved all the same
            now = read_status(state, {}).advice
            done += "" if now.kind == "promote" else f"; the advice was another one: {now.text.rstrip('.')}"
    try:
        switch_server(running, arm)
    except RedppError as error:  # users go through the gateway, which has switched
        return f"{done}; the server's own default could not be moved: {error.found}"
    return f"{done}; requests to the server that name no version follow"


def stop(folder: Path, keep: Path | None = None) -> str:
    """End an A/B test with all its processes, or clean up after one that was killed; return what was done.

    Args:
        folder: the packaged folder.
        keep: a new folder to copy the records and logs to.

    Raises:
        RedppError: none runs, or ``keep`` exists.
    """
    try:
        running = _find(folder)
    except RedppError:
        if _cleaned(folder):
            return f"cleaned up after an A/B test for {folder} that was killed"
        raise
    kept = ""
    if keep is not None:
        _copy(Path(running.extra["state"]), keep)
        kept = f"; what it recorded is in {keep}"
    with suppress(ProcessLookupError):
        os.kill(running.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while started(running.pid) == running.created or supervised(folder):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGKILL)
            while started(running.pid) == running.created:
                time.sleep(_POLL_S)
            break
        time.sleep(_POLL_S)
    clean(folder)  # nothing is left unless the supervisor was killed, by this command or by somebody else
    return f"stopped the A/B test for {folder}{kept}"


def _cleaned(folder: Path) -> bool:
    """Clean up after a killed A/B test, whose threads may hold its lock for a moment after its death."""
    deadline = time.monotonic() + _DYING_S
    while not (done := clean(folder)) and supervised(folder) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return done


def mixed_folder(original: Path, candidate: Path, into: Path) -> Path:
    """Make a packaged folder of links, with the original of one package and the pruned version of another.

    Args:
        original: the package that gives the original.
        candidate: the package that gives the pruned version.
        into: the new folder.

    Raises:
        RedppError: one is no package, or their networks take different inputs.
    """
    name, other = model_name(original), model_name(candidate)
    ours, theirs = _inputs(original / ORIGINAL.archive), _inputs(candidate / PRUNED.archive)
    if ours != theirs:
        raise RedppError(
            f"{original} takes {_words(ours)}, and {candidate} takes {_words(theirs)}",
            "two packages whose inputs have the same names, shapes and types, or no user's request suits both",
            "package the candidate from a network with the same inputs",
        )
    into.mkdir()
    for path in original.iterdir():
        if path.name not in (PRUNED.archive, "triton"):
            (into / path.name).symlink_to(path.resolve())
    (into / PRUNED.archive).symlink_to((candidate / PRUNED.archive).resolve())
    if (original / "triton").is_dir() and (candidate / "triton").is_dir():
        model = into / "triton" / name
        model.mkdir(parents=True)
        for source in (
            original / "triton" / name / "config.pbtxt",
            original / "triton" / name / ORIGINAL.triton_version,
        ):
            (model / source.name).symlink_to(source.resolve())
        (model / PRUNED.triton_version).symlink_to((candidate / "triton" / other / PRUNED.triton_version).resolve())
    return into


def _inputs(archive: Path) -> tuple[InputSpec, ...]:
    from redpp_serve.packaging.mar import read_artifact  # noqa: PLC0415 (torch; the other actions start fast without)

    return read_artifact(archive).graph.inputs


def _words(inputs: tuple[InputSpec, ...]) -> str:
    return ", ".join(f"{i.name} {'x'.join(map(str, i.shape)) or 'of one number'} {i.dtype}" for i in inputs)


def _find(folder: Path) -> Running:
    """Return the A/B test that runs for a folder.

    Raises:
        RedppError: none runs; the message says what there is instead.
    """
    running = find_all(folder)
    quoted = _quoted(folder)
    for each in running:
        if "state" in each.extra:
            return each
    if supervised(folder):
        raise RedppError(
            f"the A/B test for {folder} is still starting, or ending",
            "one that takes requests",
            "wait for redpp-serve ab start to return",
        )
    if abandoned(folder):
        raise RedppError(
            f"the A/B test for {folder} was killed", "one that runs", f"clean up with redpp-serve ab stop {quoted}"
        )
    if running:
        raise RedppError(
            f"a server runs for {folder}, but no A/B test",
            "an A/B test",
            f"stop the server, and start one with redpp-serve ab start {quoted}",
        )
    raise RedppError(
        f"no A/B test runs for {folder}",
        "one that this user has started for this folder",
        f"start one with redpp-serve ab start {quoted}",
    )


def _refuse_second(spec: Spec) -> None:
    """Refuse to start beside another A/B test or server, and clean up after an A/B test that was killed."""
    if supervised(spec.folder):
        raise already_runs(spec.folder)
    clean(spec.folder)
    for running in find_all(spec.folder, spec.kind):
        raise RedppError(
            f"a server already runs for {spec.folder}, started by process {running.pid}",
            "none, since an A/B test starts its own",
            "stop it with Ctrl-C where it was started",
        )


def _start_apart(folder: Path, state: Path, note: Note) -> None:
    """Start a supervisor in a session of its own, and return when it is ready."""
    (state / SUPERVISOR_LOG).touch(mode=0o600)
    process = start_session([sys.executable, "-m", "redpp_serve.ab.supervisor", str(state)], state / SUPERVISOR_LOG)
    try:
        _wait(process, state, note)
    except BaseException:
        if process.poll() is None:
            process.terminate()
            process.wait()
        clean(folder)
        raise


def _wait(process: subprocess.Popen[bytes], state: Path, note: Note) -> None:
    deadline, shown = time.monotonic() + _START_S, 0
    while True:
        ended = process.poll() is not None  # before its last words are read
        lines = (state / SUPERVISOR_LOG).read_text(errors="replace").splitlines()
        for line in lines[shown:]:
            note(line)
        shown, heartbeat = len(lines), Heartbeat.read(state)
        if heartbeat.ready:
            return
        if heartbeat.refusal:
            raise RedppError(*heartbeat.refusal)
        if ended or time.monotonic() > deadline:
            tail = "\n".join(lines[-10:])
            raise RedppError(
                f"the A/B test did not start. The end of its log:\n{tail}\n",
                "one that takes requests",
                "read the log above; it names the cause",
            )
        time.sleep(_POLL_S)


_NEXT = "redpp-serve ab status {}   then promote, rollback or stop"


def _how_to_ask(running: Running, state: Path) -> list[str]:
    gateway = running.extra["gateway"]
    lines = {
        "gateway": gateway,
        "metrics": " ".join(running.metrics_urls),
        "try": curl(running, state, gateway, "-i "),
        "arms": f"-H '{ARM_HEADER}: pruned' or original asks for one; gRPC goes past the gateway and is not split",
        "log": str(state / GATEWAY / ACCESS_LOG),
    }
    return [f"{key:<8} {value}" for key, value in lines.items()]


def _copy(state: Path, keep: Path) -> None:
    """Copy what was recorded and logged, without sockets and scratch files."""
    if keep.exists():
        raise RedppError(f"--keep {keep} exists", "a folder that is not there yet", "choose another name")
    if not state.is_dir():
        raise RedppError(f"the A/B test's folder {state} is gone", "something to keep", "end it without --keep")
    try:
        keep.mkdir(parents=True)
        for path in (*state.glob("*.json*"), *state.glob("*.log"), *(state / GATEWAY).glob("*.log*")):
            with suppress(FileNotFoundError):  # a scratch file that has just taken its place
                shutil.copy(path, keep)
    except OSError as error:
        raise RedppError(
            f"--keep {keep}: {error}", "a folder that can be written", "choose another, or end without it"
        ) from error


def _quoted(folder: Path) -> str:
    return shlex.quote(str(folder))
