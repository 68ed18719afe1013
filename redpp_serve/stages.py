"""The named steps of a run, each with a status, a reason and its time; printed as they end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm


@dataclass
class Stage:
    """One step.

    Attributes:
        name: name of the step.
        status: done, skipped or failed.
        reason: what happened, in words.
        seconds: time that it took.
    """

    name: str
    status: str = "done"
    reason: str = ""
    seconds: float = 0.0
    _bar: Any = None

    def skip(self, reason: str) -> None:
        """Mark the step as skipped."""
        self.status, self.reason = "skipped", reason

    def progress(self, done: int, total: int) -> None:
        """Show how far a long step has come: a bar on a terminal, nothing elsewhere."""
        if self._bar is None:
            self._bar = tqdm(total=total, desc=f"  {self.name}", leave=False, disable=None, file=sys.stderr)
        self._bar.update(done - self._bar.n)

    def to_json(self) -> dict[str, Any]:
        """Return what the report keeps of the step."""
        return {"name": self.name, "status": self.status, "reason": self.reason, "seconds": round(self.seconds, 2)}


@dataclass
class Stages:
    """All steps so far; with ``quiet`` nothing is printed (the Python API's default)."""

    quiet: bool = False
    stages: list[Stage] = field(default_factory=list)

    @contextmanager
    def run(self, name: str) -> Iterator[Stage]:
        """Time a step; an exception marks it as failed and propagates."""
        stage, start = Stage(name), time.perf_counter()
        self.stages.append(stage)
        try:
            yield stage
        except BaseException as error:
            stage.status, stage.reason = "failed", str(error) or type(error).__name__
            raise
        finally:
            stage.seconds = time.perf_counter() - start
            if stage._bar is not None:
                stage._bar.close()
            if not self.quiet and stage.status != "failed":
                print(
                    f"{stage.name:<12} {stage.status:<8} {stage.seconds:7.1f} s  {stage.reason}",
                    file=sys.stderr,
                    flush=True,
                )

    def say(self, text: str) -> None:
        """Print a text between the lines of the steps, unless quiet."""
        if text and not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def named(self, name: str) -> Stage:
        """Return the last step of that name."""
        return next(stage for stage in reversed(self.stages) if stage.name == name)

    def to_json(self) -> list[dict[str, Any]]:
        """Return what the report keeps of each step."""
        return [stage.to_json() for stage in self.stages]
