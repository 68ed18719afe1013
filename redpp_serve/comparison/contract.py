"""What a pipeline requires of a comparison, and the files that it reads of it: JUnit's XML and CSV."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from redpp_serve.comparison.compare import Comparison
from redpp_serve.comparison.figures import figures, to_csv
from redpp_serve.comparison.sweep import Sweep
from redpp_serve.errors import RedppError
from redpp_serve.options import ContractOptions
from redpp_serve.requirements import Outcome, judge, junit

Result = TypeVar("Result", bound=Comparison | Sweep)


class Contract:
    """Requirements, their outcomes, and the files.

    Args:
        options: what is required, and where files go.
        suite: the name of JUnit's suite.

    Raises:
        RedppError: a file cannot be written.
    """

    def __init__(self, options: ContractOptions, suite: str) -> None:
        self.requirements = [each for some in options.require for each in some]
        self.outcomes = list[Outcome]()
        self._junit, self._csv, self._suite = options.junit, options.csv, suite
        for flag, path in (("--junit", self._junit), ("--csv", self._csv)):
            if path is not None:
                _make_room(flag, path)

    @property
    def names(self) -> list[str]:
        """The figures that are required."""
        return [each.name for each in self.requirements]

    def judged(self, measure: Callable[[], Result]) -> Result:
        """Return what is measured, and write its figures and outcomes; a failure becomes an error in JUnit's file.

        Raises:
            RedppError: that of ``measure``; or a figure that is required was not measured, or a file was not written.
        """
        begun, start = datetime.now(timezone.utc), time.monotonic()
        try:
            result = measure()
            places, several = (result.places(), result.comparisons) if isinstance(result, Sweep) else ([""], (result,))
            for where, each in zip(places, several, strict=True):
                self.outcomes += judge(self.requirements, figures(each), where)
        except RedppError as error:
            _write(self._junit, junit(self._suite, (), time.monotonic() - start, begun, problem=str(error)))
            raise
        _write(self._junit, junit(self._suite, self.outcomes, time.monotonic() - start, begun))
        _write(self._csv, to_csv(several))
        return result


def _write(path: Path | None, text: str) -> None:
    if path is None:
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(str(path), error) from error


def _make_room(flag: str, path: Path) -> None:
    """Remove what an earlier run has written, so that nobody takes it for this one's, and see that there is room."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        if stat.S_ISREG(path.lstat().st_mode):  # neither a device nor a link to one
            path.unlink()
    except OSError as error:
        raise _unwritable(f"{flag} {path}", error) from error


def _unwritable(what: str, error: OSError) -> RedppError:
    return RedppError(f"{what} cannot be written: {error.strerror}", "a file with room for it", "choose another place")
