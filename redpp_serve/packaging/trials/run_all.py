"""Run several trials side by side, each in a process forked from this one, so that torch is imported once for all.

Usage: python run_all.py TRIALS, where TRIALS is JSON: {"modules": what to import first, "trials": [{"folder",
"program", "arguments"}]}. Each trial works in its folder, prints into ``printed`` and ``errors`` there, and leaves
``ended`` behind.
"""

import importlib
import json
import os
import runpy
import sys
from pathlib import Path


def main(trials: str) -> None:
    """Start all and wait."""
    asked = json.loads(trials)
    for name in asked["modules"]:
        importlib.import_module(name)
    folders = {}
    for trial in asked["trials"]:
        pid = os.fork()
        if not pid:
            run(**trial)
            return
        folders[pid] = Path(trial["folder"])
    while folders:
        pid, _ = os.wait()
        (folders.pop(pid) / "ended").touch()


def run(folder: str, program: str, arguments: list[str]) -> None:
    """Become ``python program arguments``, in the folder."""
    os.chdir(folder)
    for name, stream in (("printed", sys.stdout), ("errors", sys.stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
