"""Run the command line on every case of `hostile`, each in a process of its own, and say how each ended.

``python -m tests.attacks.run --out FILE.json`` takes about half an hour on two cores. A case fails when a process runs
code of the file, prints a traceback or a control character, ends with another exit code than 0, 2 or 3, takes more
than 60 s, or holds more than 6 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch

import redpp_serve
from redpp_serve import cli
from redpp_serve.errors import RedppError
from tests.attacks import files
from tests.attacks.hostile import Case, cases, marker, write_sound

SECONDS, BYTES = 60.0, 6 << 30
_ADDRESSES = 16 << 30  # more than this no process gets, so that the machine survives a finding
_ARCH = ["--arch", f"{files.__file__}:Net", "--input", "1x12x12"]
_QUICK = ["--dry-run", "--method", "red++", "--time-budget", "1", "--distil", "0", "--accept-unmeasured"]


_ASKED: dict[str, dict[str, list[str]]] = {
    "file": {"inspect": ["inspect", "{}"], "package": ["package", "{}", *_ARCH, *_QUICK]},
    "network": {"inspect": ["inspect", "{}"], "package": ["package", "{}", *_QUICK]},
    "options": {"config": ["config", "{}"], "package": ["package", "{beside}", *_ARCH[:2], "--config", "{}", *_QUICK]},
    "labels": {"package": ["package", "{beside}", "--labels", "{}", *_ARCH, *_QUICK]},
    "package": {
        "plan": ["plan", "{}", "--time-budget", "0"],
        "compare": ["compare", "{}"],
        "compare with triton": ["compare", "{}", "--server", "triton"],
    },
}


def commands(case: Case, path: Path) -> dict[str, list[str]]:
    """Return what is asked about a case, by name."""
    named = {"{}": str(path), "{beside}": str(path.parent / "model.pt")}
    return {what: [named.get(word, word) for word in words] for what, words in _ASKED[case.asks].items()}


def _would_start(*_: Any, **__: Any) -> NoReturn:
    raise RedppError("everything was checked, and a server would start", "a package for a test", "nothing")


@contextlib.contextmanager
def no_server() -> Iterator[None]:
    """Stop `compare` where it would start a server."""
    with mock.patch("redpp_serve.comparison.folder.open_server", _would_start):
        yield


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Make a case below a new folder, ask about it, and return how each command ended."""
    path = case.make(folder)
    return {
        "name": case.name,
        "commands": {what: _apart(words, folder / "output") for what, words in commands(case, path).items()},
    }


def _apart(words: list[str], output: Path) -> dict[str, Any]:
    """Run a command in a child of this process, which has imported everything and run nothing."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(words, output)
    timed_out = False
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - start > SECONDS and not timed_out:
            timed_out = True
            os.kill(child, 9)
        time.sleep(0.005)
    text = output.read_text(errors="replace") if output.exists() else ""
    found = {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": round(time.monotonic() - start, 2),
        "bytes": usage.ru_maxrss * 1024,
        "said": text[-300:],
    }
    return found | {"faults": _faults(found, text, timed_out)}


def _faults(found: dict[str, Any], text: str, timed_out: bool) -> list[str]:
    tests = {
        "hang": timed_out,
        "memory": found["bytes"] > BYTES,
        "traceback": "Traceback (most recent call last)" in text,
        "control character": any(not (c.isprintable() or c == "\n") for c in text),
        "executed": marker().exists(),
        "exit code": not timed_out and found["code"] not in (0, 2, 3),
    }
    return [name for name, failed in tests.items() if failed]


def _child(words: list[str], output: Path) -> NoReturn:
    """Run one command, and end; its output goes to a file."""
    code = 99
    try:
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(output.parent)
        with no_server():
            code = cli.main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # what the command line lets through is a finding
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def warm_up(sound: Path) -> None:
    """Import what the commands import, so that a child need not."""
    import redpp_serve.comparison.folder
    import redpp_serve.exporting.formats
    import redpp_serve.packaging.package
    import redpp_serve.planning  # noqa: F401
    from redpp_serve.packaging.trust import check_package

    for server in ("torchserve", "triton"):
        check_package(sound / "package", server, name="small")


def main(arguments: list[str] | None = None) -> int:
    """Run all cases, or every nth; print a table, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--package", type=Path, help="a package of the network 'small' (default: make one)")
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--changes", type=int, default=24, help="random changes of each kind of file (default: 24)")
    parser.add_argument("--share", default="0/1", metavar="K/N", help="run every Nth case from the Kth on")
    parser.add_argument("--only", default="", metavar="WORD", help="run the cases whose names hold a word")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="redpp-hostile-") as scratch:
        base = Path(scratch)
        os.environ.update(REDPP_MARKER=str(base / "marker"), XDG_CACHE_HOME=str(base / "cache"))
        (base / "sound").mkdir()
        write_sound(base / "sound", options.package or _packaged(base))
        warm_up(base / "sound")
        first, step = map(int, options.share.split("/"))
        results = []
        for number, case in enumerate(cases(base / "sound", options.seed, options.changes)[first::step]):
            if options.only not in case.name:
                continue
            with tempfile.TemporaryDirectory(dir=base) as folder:
                results.append(run_case(case, Path(folder)))
            for what, found in results[-1]["commands"].items():
                if found["faults"]:
                    print(
                        f"{number} {case.name}: {what}: {', '.join(found['faults'])}: {found['said'][-200:]!r}",
                        flush=True,
                    )
            marker().unlink(missing_ok=True)
    return _report(results, options)


def _packaged(base: Path) -> Path:
    """Make the package in a process of its own: nothing may have run here when the children are made."""
    import subprocess

    code = "import sys, pathlib; from tests.conftest import _package_small; _package_small(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(base / "made" / "small")], check=True, stdout=subprocess.DEVNULL)
    return base / "made" / "small"


def _report(results: list[dict[str, Any]], options: argparse.Namespace) -> int:
    runs = [found for result in results for found in result["commands"].values()]
    faults = Counter(fault for found in runs for fault in found["faults"])
    summary = {
        "cases": len(results),
        "runs": len(runs),
        "exit codes": dict(Counter(str(found["code"]) for found in runs)),
        "faults": dict(faults),
        "slowest_seconds": max(found["seconds"] for found in runs),
        "most_bytes": max(found["bytes"] for found in runs),
        "seed": options.seed,
        "share": options.share,
        "versions": {
            "redpp-serve": redpp_serve.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    print(json.dumps(summary, indent=1))
    if options.out:
        slow = [r for r in results if any(f["faults"] or f["seconds"] > 5 for f in r["commands"].values())]
        options.out.write_text(json.dumps({**summary, "slow_or_faulty": slow}, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
