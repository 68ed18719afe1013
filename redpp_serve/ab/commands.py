"""What ``redpp-serve ab`` does: start, status, promote, rollback, stop.

The pruned version of one package against the original of another: a folder of links that a server takes for one.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from redpp_serve.ab import state as journal
from redpp_serve.ab.gateway import ARM_HEADER, private_folder, switch
from redpp_serve.ab.spec import Spec
from redpp_serve.ab.state import GATEWAY, SPEC, STATUS, SUPERVISOR_LOG, read_json, write_json
from redpp_serve.ab.status import Status, read_status
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import load
from redpp_serve.graph.graph import InputSpec
from redpp_serve.packaging.mar import ARTIFACT
from redpp_serve.processes import started
from redpp_serve.serving.health import sample_request
from redpp_serve.serving.running import Running, find_all
from redpp_serve.serving.serve import model_name
from redpp_serve.serving.switching import switch as switch_server
from redpp_serve.serving.tools import find_tool


def mixed_folder(original: Path, candidate: Path, into: Path) -> Path:
    """``into``, a new folder with the original of the first package and the pruned version of the second.

    Raises:
        RedppError: one is no package, or their networks take different inputs.
    """
    name, other = model_name(original), model_name(candidate)
    ours, theirs = _inputs(original / "original.mar"), _inputs(candidate / "pruned.mar")
    if ours != theirs:
        raise RedppError(
            f"{original} takes {_words(ours)}, and {candidate} takes {_words(theirs)}",
            "two packages whose inputs have the same names, shapes and types, or no user's request suits both",
            "package the candidate from a network with the same inputs",
        )
    into.mkdir()
    for path in original.iterdir():
        if path.name not in ("pruned.mar", "triton"):
            (into / path.name).symlink_to(path.resolve())
    (into / "pruned.mar").symlink_to((candidate / "pruned.mar").resolve())
    if (original / "triton").is_dir() and (candidate / "triton").is_dir():
        model = into / "triton" / name
        model.mkdir(parents=True)
        for part, source in (
            ("config.pbtxt", original / "triton" / name),
            ("1", original / "triton" / name),
            ("2", candidate / "triton" / other),
        ):
            (model / part).symlink_to((source / part).resolve())
    return into


def _inputs(archive: Path) -> tuple[InputSpec, ...]:
    try:
        with zipfile.ZipFile(archive) as file:
            return load(file.read(ARTIFACT)).graph.inputs
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise RedppError(
            f"{archive} cannot be read: {error}",
            "an archive that redpp-serve package wrote",
            "package the model again, or correct the path",
        ) from error


def _words(inputs: tuple[InputSpec, ...]) -> str:
    return ", ".join(f"{i.name} {'x'.join(map(str, i.shape)) or 'of one number'} {i.dtype}" for i in inputs)


_START_S, _STOP_S, _POLL_S = 300.0, 60.0, 0.1
Say = Callable[[str], None]


def start(spec: Spec, *, foreground: bool, say: Say, note: Say) -> None:
    """Start an experiment, and return when it takes requests; with ``foreground`` stay until a signal ends it.

    Args:
        spec: what is asked for.
        foreground: run in this process.
        say: called with lines of the result.
        note: called with lines about progress.

    Raises:
        RedppError: something is missing, a port in use, another experiment or server running for the folder.
    """
    model_name(spec.folder)
    if spec.split.pruned == 0 and not spec.shadow:
        raise RedppError(
            "no user for the pruned version and no shadow mode",
            "something to compare",
            "give it a part of --split, or add --shadow",
        )
    _refuse_second(spec)
    find_tool("nginx")
    state = private_folder("redpp-ab-")
    write_json(state / SPEC, {"spec": spec.to_json(), "started": time.time()})
    if foreground:
        _run_here(spec, state, say, note)
    else:
        _run_apart(spec, state, note)
        for line in _how_to_ask(spec, _find(spec.folder), state):
            say(line)


def status(folder: Path) -> Status:
    """The experiment that runs for a folder, as of now.

    Raises:
        RedppError: none runs.
    """
    running = _find(folder)
    state = Path(running.extra["state"])
    return read_status(state, {"gateway": running.extra["gateway"], "metrics": running.extra["ab_metrics"]})


def send_all(folder: Path, arm: str) -> str:
    """Send all users to ``pruned`` (promote) or ``original`` (rollback). No request is lost; returns what was done.

    The gateway's requests name their version, so it alone decides over users; the server's own default moves with them.

    Raises:
        RedppError: no experiment runs, or its folder is gone.
    """
    running = _find(folder)
    state = Path(running.extra["state"])
    try:
        switch(state / GATEWAY, arm)
    except OSError as error:
        raise RedppError(
            f"users cannot be moved: {error}",
            "the experiment's folder, and room on its disk",
            f"free some, or end it with redpp-serve ab stop {_quoted(folder)}",
        ) from error
    gateway = running.extra["gateway"]
    done = f"all users of {gateway} get {arm} from their next request on, except those who ask by {ARM_HEADER}"
    if arm == "pruned":
        with suppress(RedppError):  # a lost folder has lost the advice too; users are moved all the same
            now = read_status(state, {}).advice
            done += "" if now.kind == "promote" else f"; the advice was another one: {now.text.rstrip('.')}"
    try:
        switch_server(running, arm)
    except RedppError as error:  # users go through the gateway, which has switched
        return f"{done}; the server's own default could not be moved: {error.found}"
    return f"{done}; requests to the server that name no version follow"


def stop(folder: Path, keep: Path | None = None) -> str:
    """End an experiment with all its processes, also what a killed one has left; returns what was done.

    Args:
        folder: the packaged folder.
        keep: a new folder to copy what was recorded and logged to.

    Raises:
        RedppError: none runs, or ``keep`` exists.
    """
    try:
        running = _find(folder)
    except RedppError:
        if journal.clean(folder):
            return f"ended what an experiment for {folder} had left behind"
        raise
    kept = ""
    if keep is not None:
        _copy(Path(running.extra["state"]), keep)
        kept = f"; what it recorded is in {keep}"
    with suppress(ProcessLookupError):
        os.kill(running.pid, 15)
    deadline = time.monotonic() + _STOP_S
    while started(running.pid) == running.created or journal.supervised(folder):
        if time.monotonic() > deadline:
            os.kill(running.pid, 9)
            _wait_for_end(running)
            journal.clean(folder)
            break
        time.sleep(_POLL_S)
    return f"stopped the experiment for {folder}{kept}"


def _find(folder: Path) -> Running:
    running = find_all(folder)
    for each in running:
        if "state" in each.extra:
            return each
    if journal.supervised(folder):
        raise RedppError(
            f"the experiment for {folder} is still starting, or ending",
            "one that takes requests",
            "wait for redpp-serve ab start to return",
        )
    if journal.abandoned(folder):
        raise RedppError(
            f"the experiment for {folder} was killed and has left processes behind",
            "one that runs",
            f"end them with redpp-serve ab stop {_quoted(folder)}",
        )
    if running:
        raise RedppError(
            f"a server runs for {folder}, but no experiment",
            "an experiment",
            f"stop the server, and start one with redpp-serve ab start {_quoted(folder)}",
        )
    raise RedppError(
        f"no experiment runs for {folder}",
        "one that this user has started for this folder",
        f"start one with redpp-serve ab start {_quoted(folder)}",
    )


def _refuse_second(spec: Spec) -> None:
    """Before anything starts. What a killed experiment has left is ended on the way."""
    if journal.supervised(spec.folder):
        raise journal.already_runs(spec.folder)
    journal.clean(spec.folder)
    for running in find_all(spec.folder, spec.kind):
        raise RedppError(
            f"a server already runs for {spec.folder}, started by process {running.pid}",
            "none: an experiment starts its own",
            "stop it with Ctrl-C where it was started",
        )


def _run_here(spec: Spec, state: Path, say: Say, note: Say) -> None:
    from redpp_serve.ab.supervisor import Supervisor

    os.umask(0o077)

    def ready() -> None:
        for line in (*_how_to_ask(spec, _find(spec.folder), state), "Ctrl-C ends the experiment."):
            say(line)

    try:
        Supervisor(spec, state, note).run(ready)
    finally:
        shutil.rmtree(state, ignore_errors=True)


def _run_apart(spec: Spec, state: Path, note: Say) -> None:
    """A supervisor in a session of its own; returns when it is ready."""
    with os.fdopen(os.open(state / SUPERVISOR_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "redpp_serve.ab.supervisor", str(state)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(process, state, note)
    except BaseException:
        if process.poll() is None:
            process.terminate()
            process.wait()
        journal.clean(spec.folder)
        shutil.rmtree(state, ignore_errors=True)
        raise


def _wait(process: subprocess.Popen[bytes], state: Path, note: Say) -> None:
    deadline, shown = time.monotonic() + _START_S, 0
    while True:
        lines = _text(state / SUPERVISOR_LOG).splitlines()
        for line in lines[shown:]:
            note(line)
        shown = len(lines)
        document = read_json(state / STATUS) or {}
        if document.get("ready"):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            if refusal := (read_json(state / STATUS) or {}).get("refusal"):
                raise RedppError(*refusal)
            tail = "\n".join(_text(state / SUPERVISOR_LOG).splitlines()[-10:])
            raise RedppError(
                f"the experiment did not start. The end of its log:\n{tail}\n",
                "one that takes requests",
                "read the log above; it names the cause",
            )
        time.sleep(_POLL_S)


def _how_to_ask(spec: Spec, running: Running, state: Path) -> list[str]:
    gateway, folder = running.extra["gateway"], _quoted(spec.folder)
    request = sample_request(running)
    path = request.path
    if path is None:  # not a file of the folder's
        path = state / "sample.request"
        path.write_bytes(request.body)
    headers = {**running.headers["inference"], **request.headers}
    given = "".join(f"-H {shlex.quote(f'{key}: {value}')} " for key, value in headers.items())
    lines = {
        "gateway": gateway,
        "metrics": " ".join(running.metrics_urls),
        "try": f"curl -i {given}--data-binary @{shlex.quote(str(path))} {gateway}",
        "arms": f"-H '{ARM_HEADER}: pruned' or original asks for one; gRPC goes past the gateway and is not split",
        "log": str(state / GATEWAY / "access.log"),
        "next": f"redpp-serve ab status {folder}   then promote, rollback or stop",
    }
    return [f"{key:<8} {value}" for key, value in lines.items()]


def _copy(state: Path, keep: Path) -> None:
    """What was recorded and logged, without sockets and scratch files."""
    if keep.exists():
        raise RedppError(f"--keep {keep} exists", "a folder that is not there yet", "choose another name")
    if not state.is_dir():
        raise RedppError(f"the experiment's folder {state} is gone", "something to keep", "end it without --keep")
    try:
        keep.mkdir(parents=True)
        for path in (*state.glob("*.json*"), *state.glob("*.log"), *(state / GATEWAY).glob("*.log*")):
            with suppress(FileNotFoundError):  # a scratch file that has just taken its place
                shutil.copy(path, keep)
    except OSError as error:
        raise RedppError(
            f"--keep {keep}: {error}", "a folder that can be written", "choose another, or end without it"
        ) from error


def _wait_for_end(running: Running) -> None:
    while started(running.pid) == running.created:
        time.sleep(_POLL_S)


def _quoted(folder: Path) -> str:
    return shlex.quote(str(folder))


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
