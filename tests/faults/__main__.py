"""Plant the faults of the tables one at a time and run the tests that should notice: ``python -m tests.faults``.

The repository is copied to a temporary folder, so that nothing here changes. The tests are run without faults first:
where they fail by themselves nothing is said of a fault. With ``--write`` outcomes go to ``results.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.util import cache_from_source
from pathlib import Path

from tests.faults.forked import SKIPPED
from tests.faults.table import ROOT, Fault, faults, rooms

RESULTS = Path(__file__).with_name("results.json")
LATE_S = 300.0  # tests that take longer hang
# By pytest's exit code, or `SKIPPED`; 2: the fault stops its collection.
OUTCOMES = {0: "survived", 1: "caught", 2: "caught", SKIPPED: "skipped"}
_UNJUDGED = {
    "caught": "not judged: its tests fail without it",
    "late": "not judged: its tests hang without it",
    "skipped": "not judged: its tests are skipped here",
}
_ARGUMENTS = ("-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-m", "not (browser or exhaustive or gpu)")
_LEFT_OUT = (".git", ".venv", "__pycache__", "results", ".*_cache", "*.egg-info", "build", "dist")
_LINKS = {"handlers": "handlers", "kernels": "kernels", "reference": "benchmarks/reference"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the faults that are asked for, print a line for each, and return 1 if one was not caught."""
    arguments = _arguments(argv)
    known = _known() if arguments.missing else {}
    named = [f for f in faults(arguments.room) if not arguments.only or f.name in arguments.only]
    chosen = [f for f in named if f.name not in known]
    if not chosen:
        sys.stderr.write("No fault is left of those asked for; the tables are tests/faults/*.toml.\n")
        return 2
    found, without = {}, dict[tuple[str, ...], str]()
    with copied() as root, closing(Runner(root)) as runner:
        for fault in chosen:
            if fault.tests not in without:
                without[fault.tests] = runner.outcome(fault.tests)
            start = time.monotonic()
            outcome = _UNJUDGED.get(without[fault.tests]) or runner.planted(fault)
            seconds = round(time.monotonic() - start, 1)
            found[fault.name] = {"outcome": outcome, "seconds": seconds, "commit": arguments.commit}
            sys.stdout.write(f"{fault.room:12} {fault.name:34} {outcome:9} {seconds:6.1f} s  {fault.what}\n")
            sys.stdout.flush()
            if arguments.write:
                _keep(found)
    caught = sum(row["outcome"] == "caught" for row in found.values())
    sys.stdout.write(f"{caught} of {len(found)} faults caught\n")
    return int(caught < len(found))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this fault alone; repeatable")
    parser.add_argument("--room", choices=rooms(), help="the faults of one table")
    parser.add_argument("--missing", action="store_true", help="the faults without an outcome in results.json")
    parser.add_argument("--write", action="store_true", help="keep the outcomes in results.json")
    arguments = parser.parse_args(argv)
    arguments.commit = _commit()
    return arguments


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _known() -> dict[str, dict[str, object]]:
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else {}


def _keep(found: dict[str, dict[str, object]]) -> None:
    """Put outcomes beside those of earlier runs; what no table names any more goes."""
    rows = {**_known(), **found}
    kept = {fault.name: rows[fault.name] for fault in faults() if fault.name in rows}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


@contextmanager
def copied() -> Iterator[Path]:
    """Yield a copy of the repository in which the packages are found as they are once installed."""
    with tempfile.TemporaryDirectory(prefix="redpp-faults-") as folder:
        root = Path(folder).resolve() / "copy"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        (root / "benchmarks" / "results").symlink_to(ROOT / "benchmarks" / "results")
        for name, target in _LINKS.items():
            (root / "redpp_serve" / name).symlink_to(root / target)
        yield root


class Runner:
    """Runs tests in a copy of the repository, each time in a process of its own.

    Args:
        root: the copy.
        slow: whether to import what most tests need before, which takes seconds once.
    """

    def __init__(self, root: Path, slow: bool = True) -> None:
        self.root, self._slow = root, slow
        self._server: subprocess.Popen[str] | None = None

    def planted(self, fault: Fault) -> str:
        """Return what the tests say with a fault in the copy, which is as it was afterwards."""
        path = self.root / fault.file
        before, text = path.read_text(encoding="utf-8"), fault.plant(self.root)
        try:
            _write(path, text)
            return self.outcome(fault.tests)
        finally:
            _write(path, before)

    def outcome(self, tests: Sequence[str]) -> str:
        """Run tests until one fails, and return how they ended.

        It is ``caught`` where one fails, ``survived`` where none does, ``skipped`` where none was run, and ``late``
        where they hang.

        Raises:
            RuntimeError: pytest found no test to run.
        """
        server = self._server = self._server or self._started()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps([*_ARGUMENTS, *tests]) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], LATE_S)[0]:
            self.close()
            return "late"
        code = int(server.stdout.readline() or -1)
        if code not in OUTCOMES:
            raise RuntimeError(f"pytest ended with code {code} for {', '.join(tests)}, expected 0, 1 or 2")
        return OUTCOMES[code]

    def close(self) -> None:
        """End all processes."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
            self._server = None

    def _started(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("forked.py")), *(["slow"] if self._slow else [])]
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdin=pipe,
            stdout=pipe,
            stderr=nothing,
            text=True,
            start_new_session=True,
        )


def _write(path: Path, text: str) -> None:
    """Write a source whose bytecode goes: by time and length it might pass for that of another text."""
    path.write_text(text, encoding="utf-8")
    Path(cache_from_source(str(path))).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
