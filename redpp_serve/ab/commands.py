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

from redpp_serve.ab.attached import find_served
from redpp_serve.ab.evidence import known_agreement
from redpp_serve.ab.gateway import ARM_HEADER, worker_account
from redpp_serve.ab.journal import Journal, begin_journal, read_journal, states
from redpp_serve.ab.moves import move_all, move_to_split
from redpp_serve.ab.results import REPORT, results_folder, write_results
from redpp_serve.ab.spec import STEPS, Spec, Started, TrafficSplit
from redpp_serve.ab.state import (
    HEARTBEAT,
    PACKAGE,
    SPEC,
    Heartbeat,
    already_runs,
    clean,
    left_behind,
    supervised,
    write_json,
)
from redpp_serve.ab.status import Status, read_status
from redpp_serve.ab.supervisor import supervise
from redpp_serve.errors import RedppError
from redpp_serve.logs import SUPERVISOR, logs_beside, open_logs, reopen_logs, unstamped
from redpp_serve.processes import find_program, start_session
from redpp_serve.serving.health import curl
from redpp_serve.serving.running import Running, find_all
from redpp_serve.serving.serve import model_name
from redpp_serve.state_folders import private_folder, state_folder, sweep
from redpp_serve.variants import ORIGINAL, PRUNED

if TYPE_CHECKING:
    from redpp_serve.graph.graph import InputSpec

_OBSERVING_COSTS = "note     observing takes time from the original's workers alone: judge speed without --observe"
_KILLED = (
    "the supervisor was killed; users are served as they were, but nothing is counted or mended until the same "
    "redpp-serve ab start is run again"
)
_PREFIX = "redpp-ab-"
_START_S, _STOP_S, _POLL_S = 300.0, 60.0, 0.1
Note = Callable[[str], None]


def start(spec: Spec, *, foreground: bool, say: Note, note: Note) -> None:
    """Start an A/B test, and return when it takes requests; with ``foreground`` stay until a signal ends it.

    A test of the same spec whose supervisor was killed is taken over, with its users, counts and verdict.

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
    find_program("nginx")
    left = _to_take_over(spec)
    sweep(_PREFIX, states())
    journal = left or _begun(Started(spec, name, time.time()))
    try:
        if left:
            note("the A/B test was left by a supervisor that was killed; it goes on")
            _make_ready(left)
        if foreground:
            os.umask(0o077)  # counts and logs are nobody else's
            supervise(journal, note, lambda: _tell_started(journal, "Ctrl-C ends the A/B test.", say))
        else:
            _start_apart(journal, note)
    except BaseException:
        if not left:  # what was taken over stays, with all that it has counted
            clean(spec.folder)
        raise
    if not foreground:
        _tell_started(journal, f"next     {_NEXT.format(_quoted(spec.folder))}", say)


def _begun(test: Started) -> Journal:
    """Make the folder of a test that begins, and write the test down.

    Raises:
        RedppError: it cannot be made, or the candidate does not suit.
    """
    for_others = worker_account() is not None
    held = private_folder(_PREFIX, for_others=for_others)
    logs = None
    try:
        write_json(held.path / SPEC, test.to_json(secrets=False))
        _link_candidate(test.spec, held.path)
        parent, form = logs_beside(held.path), test.spec.log_format
        logs = open_logs(f"{test.name}-ab-{test.spec.kind}", form, parent=parent, for_others=for_others)
        return begin_journal(test, held.path, logs.folder)
    except BaseException as error:
        shutil.rmtree(held.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritable(held.path, error) from error
        raise
    finally:
        held.release()  # from now on the journal keeps it
        if logs:
            logs.release()


def _make_ready(left: Journal) -> None:
    """Prepare a test's folder for its next supervisor, also where it was lost."""
    try:
        left.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        (left.state / HEARTBEAT).unlink(missing_ok=True)
        if not (left.state / PACKAGE).exists():
            _link_candidate(left.test.spec, left.state)
    except OSError as error:
        raise _unwritable(left.state, error) from error


def _link_candidate(spec: Spec, state: Path) -> None:
    if spec.candidate:
        mixed_folder(spec.folder, spec.candidate, state / PACKAGE)


def _unwritable(state: Path, error: OSError) -> RedppError:
    return RedppError(
        f"{state} cannot be written to: {error}", "room on its disk", "free some, or point XDG_STATE_HOME elsewhere"
    )


def _tell_started(journal: Journal, last: str, say: Note) -> None:
    """Say how to ask the gateway, and what is known before the first user comes."""
    spec = journal.test.spec
    told = [*spec.observe.lines(), _OBSERVING_COSTS] if spec.observe else []
    if spec.auto:
        told.append(_auto_line(spec))
    if not spec.shadow and not (known := known_agreement(spec)).ok:
        told.append(f"outputs  {known.text}")
    for line in (*told, *_how_to_ask(_find(spec.folder), journal.state, journal.logs), last):
        say(line)


def _auto_line(spec: Spec) -> str:
    climbs = ", ".join(f"{share} %" for share in spec.ramp)
    ramp = f"{climbs} of users for pruned, each for at least {spec.hold:g} s; " if spec.ramp else ""
    return f"auto     {ramp}a verdict or a broken limit moves all users; ab promote, rollback or split takes over"


def _to_take_over(spec: Spec) -> Journal | None:
    """Return what a killed supervisor has left of the same test; None where nothing runs for the folder.

    Raises:
        RedppError: another A/B test or server runs, or was left.
    """
    if supervised(spec.folder):
        raise already_runs(spec.folder)
    if journal := left_behind(spec.folder):
        if journal.test.spec == spec:
            return journal
        raise RedppError(
            f"the supervisor of another A/B test for {spec.folder} was killed, and what it counted is still there",
            "the options that the test was started with, to go on with it",
            f"start it with those, or end it with redpp-serve ab stop {_quoted(spec.folder)} [--keep FOLDER]",
        )
    if spec.attach:
        find_served(spec)
        return None
    for running in find_all(spec.folder, spec.kind):
        raise RedppError(
            f"a server already runs for {spec.folder}, started by process {running.pid}",
            "none, since an A/B test starts its own",
            "stop it with Ctrl-C where it was started, or use it with --attach",
        )
    return None


def status(folder: Path) -> Status:
    """Return the state of the A/B test that runs for a folder.

    Raises:
        RedppError: none runs.
    """
    running = _find(folder)
    urls = {"gateway": running.extra["gateway"], "metrics": running.extra["ab_metrics"]}
    journal = read_journal(folder)
    if journal is None:
        raise _notes_gone(folder)
    killed = [] if supervised(folder) else [_KILLED]
    return read_status(journal.state, journal.test, urls, killed)


def send_all(folder: Path, arm: str) -> str:
    """Send all users to ``pruned`` (promote) or ``original`` (rollback); return what was done, see `moves.move_all`.

    Raises:
        RedppError: no A/B test runs, or users have not moved.
    """
    return move_all(_find(folder), folder, arm)


def change_split(folder: Path, split: TrafficSplit) -> str:
    """Divide users by another split, also after a promotion or a roll-back; return what was done.

    What was counted stays, and errors and tails are compared split by split.

    Raises:
        RedppError: no A/B test runs, users have no part that ends at this share, or they are divided otherwise still.
    """
    running, journal = _find(folder), read_journal(folder)
    if journal is None:
        raise _notes_gone(folder)
    spec = journal.test.spec
    if split.pruned not in {0, *STEPS, spec.split.pruned, *spec.ramp}:
        raise RedppError(
            f"{split.pruned} % of users",
            "whole per cent, tenths below 1, or a share that the test was started with",
            f"write for example redpp-serve ab split {_quoted(folder)} {max(1, round(split.pruned))}",
        )
    return move_to_split(running, folder, split)


def stop(folder: Path, keep: Path | None = None) -> str:
    """End an A/B test with all its processes, also one whose supervisor was killed; return what was done.

    Args:
        folder: the packaged folder.
        keep: a new folder to copy the records and logs to.

    Raises:
        RedppError: none runs, or ``keep`` cannot be written.
    """
    journal = read_journal(folder)
    if journal is None or (supervised(folder) and not journal.supervisor):
        _find(folder)  # says what there is instead
        raise _notes_gone(folder)
    kept = ""
    if keep is not None:
        _copy(journal, keep)
        _write_results(journal, keep)
        kept = f"; what it recorded is in {keep}"
    report = results_folder(journal.test) / REPORT
    if not journal.supervised() and supervised(folder) is False:
        _write_results(journal, report.parent)
    if not journal.supervised() and clean(folder):
        return f"cleaned up after an A/B test for {folder} that was killed{_told(report)}{kept}"
    pid, deadline = int(journal.supervisor[0]), time.monotonic() + _STOP_S
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    while journal.supervised() or supervised(folder):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            while journal.supervised():
                time.sleep(_POLL_S)
            break
        time.sleep(_POLL_S)
    clean(folder)  # nothing is left unless the supervisor was killed, by this command or by somebody else
    return f"stopped the A/B test for {folder}{_told(report)}{kept}"


def _write_results(journal: Journal, into: Path) -> None:
    """Write the report of a test, where there is anything to report and room for it."""
    if journal.running and journal.state.is_dir():
        urls = {"gateway": journal.running.extra["gateway"], "metrics": journal.running.extra["ab_metrics"]}
        with suppress(OSError):
            write_results(read_status(journal.state, journal.test, urls, []), into)


def _told(report: Path) -> str:
    return f"; its report is {report}" if report.exists() else ""


def _notes_gone(folder: Path) -> RedppError:
    return RedppError(
        f"the notes of the A/B test for {folder} are gone", "its supervisor to write them", "try again in a second"
    )


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
    from redpp_serve.graph.artifact import load  # noqa: PLC0415
    from redpp_serve.packaging.mar import artifact_bytes  # noqa: PLC0415 (torch; the other actions start fast without)

    return load(artifact_bytes(archive)).graph.inputs


def _words(inputs: tuple[InputSpec, ...]) -> str:
    return ", ".join(f"{i.name} {'x'.join(map(str, i.shape)) or 'of one number'} {i.dtype}" for i in inputs)


def _find(folder: Path) -> Running:
    """Return the A/B test that serves users for a folder, with its supervisor or without.

    Raises:
        RedppError: none does; the message says what there is instead.
    """
    running = find_all(folder)
    quoted = _quoted(folder)
    for each in running:
        if "state" in each.extra:
            return each
    journal = read_journal(folder)
    if supervised(folder) and not (journal and journal.running and journal.living()):
        raise RedppError(
            f"the A/B test for {folder} is still starting, or ending",
            "one that takes requests",
            "wait for redpp-serve ab start to return",
        )
    if journal and journal.running and journal.living():
        return journal.running
    if journal:
        raise RedppError(
            f"the A/B test for {folder} was killed",
            "one that runs",
            f"go on with it by the redpp-serve ab start that began it, or clean up with redpp-serve ab stop {quoted}",
        )
    if running:
        raise RedppError(
            f"a server runs for {folder}, but no A/B test",
            "an A/B test",
            f"stop the server, and start one with redpp-serve ab start {quoted}",
        )
    raise RedppError(
        f"no A/B test runs for {folder}",
        f"one that this user has started for this folder, in {state_folder()}",
        f"start one with redpp-serve ab start {quoted}",
    )


def _start_apart(journal: Journal, note: Note) -> None:
    """Start a supervisor in a session of its own, and return when it is ready."""
    for_others = worker_account() is not None
    logs = reopen_logs(journal.logs, journal.test.spec.log_format, for_others=for_others)
    log = logs.file(SUPERVISOR)
    before = len(log.read_text(errors="replace").splitlines())  # of the supervisor that was killed
    process = start_session([sys.executable, "-m", "redpp_serve.ab.supervisor", str(journal.test.spec.folder)], log)
    try:
        _wait(process, journal.state, log, note, before)
    except BaseException:
        if process.poll() is None:
            process.terminate()
            process.wait()
        raise
    finally:
        logs.release()


def _wait(process: subprocess.Popen[bytes], state: Path, log: Path, note: Note, before: int) -> None:
    deadline, shown = time.monotonic() + _START_S, before
    while True:
        ended = process.poll() is not None  # before its last words are read
        lines = [unstamped(line) for line in log.read_text(errors="replace").splitlines()]
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
                f"read the log above; it names the cause; all of it is in {log.parent}",
            )
        time.sleep(_POLL_S)


_NEXT = "redpp-serve ab status {}   then promote, rollback or stop"


def _how_to_ask(running: Running, state: Path, logs: Path) -> list[str]:
    gateway = running.extra["gateway"]
    lines = {
        "gateway": gateway,
        "metrics": " ".join(running.metrics_urls),
        "try": curl(running, state, gateway, "-i "),
        "arms": f"-H '{ARM_HEADER}: pruned' or original asks for one"
        + ("" if "gateway_grpc" in running.extra else "; gRPC goes past the gateway and is not split"),
        "grpc": running.extra.get("gateway_grpc", ""),
        "logs": str(logs),
    }
    return [f"{key:<8} {value}" for key, value in lines.items() if value]


def _copy(journal: Journal, keep: Path) -> None:
    """Copy what was recorded and logged, without sockets and scratch files."""
    if keep.exists():
        raise RedppError(f"--keep {keep} exists", "a folder that is not there yet", "choose another name")
    state = journal.state
    if not state.is_dir():
        raise RedppError(f"the A/B test's folder {state} is gone", "something to keep", "end it without --keep")
    try:
        keep.mkdir(parents=True)
        for path in (*state.glob("*.json*"), *journal.logs.glob("[!.]*.*")):
            with suppress(FileNotFoundError):  # a scratch file that has just taken its place
                shutil.copy(path, keep)
    except OSError as error:
        raise RedppError(
            f"--keep {keep}: {error}", "a folder that can be written", "choose another, or end without it"
        ) from error


def _quoted(folder: Path) -> str:
    return shlex.quote(str(folder))
