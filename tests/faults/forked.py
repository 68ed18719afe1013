"""Run pytest for each line of standard input, a list of its arguments, in a fork of this process; print its exit code.

Where every test was skipped the code is `SKIPPED`: pytest's own is that of success, or that of no test at all. This
process has imported what takes long to import, but nothing of the project, and runs in the folder of the copy.
"""

import json
import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

NONE, SKIPPED = 5, 6  # pytest's own for no test, and the next free one
_SLOW = ("pytest", "hypothesis", "numpy", "scipy.stats", "PIL.Image", "onnx", "prometheus_client", "torch.export")


def main() -> None:
    sys.path[0] = os.getcwd()  # instead of the folder of this file
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in _SLOW if sys.argv[1:] else ("pytest",):
        with suppress(ImportError):
            import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


class _Counts:
    """Counts the tests that pass, and those and the files that are skipped; pytest calls its methods."""

    passed = skipped = 0

    def pytest_runtest_logreport(self, report: "pytest.TestReport") -> None:
        self.passed += report.when == "call" and report.passed
        self.skipped += report.skipped

    def pytest_collectreport(self, report: "pytest.CollectReport") -> None:
        self.skipped += report.skipped


def _run(arguments: list[str]) -> None:
    """Run pytest, and end the process."""
    import pytest

    with open(os.devnull, "r+b") as nothing:
        for stream in (0, 1):
            os.dup2(nothing.fileno(), stream)
    code, counts = 3, _Counts()  # pytest's own of an internal error
    try:
        code = int(pytest.main(arguments, [counts]))
        if code in (0, NONE) and counts.skipped and not counts.passed:
            code = SKIPPED
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
