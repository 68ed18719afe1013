"""The journal of an A/B test: what was decided, when and on which numbers; one JSON object a line."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpp_serve.ab.state import DECISIONS, Lines
from redpp_serve.errors import without_controls

START, RAMP, PROMOTE, ROLLBACK, SETTLE, STAND_BACK = "start", "ramp", "promote", "rollback", "settle", "stand back"


@dataclass(frozen=True)
class Decision:
    """One line of the journal.

    Attributes:
        time: seconds since 1970.
        action: ``start``, ``ramp``, ``promote``, ``rollback``, ``settle`` (equally fast: a person decides) or
            ``stand back`` (somebody else has moved users).
        users: the arm that all users get from now on, or the split.
        text: the reason, in words.
        numbers: what it rests on: the verdict, the limits, and the counts.
    """

    time: float
    action: str
    users: str
    text: str
    numbers: dict[str, Any]

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(self.time))
        return without_controls(f"{when} UTC  {self.action}: users {self.users}. {self.text}")


def decisions(state: Path) -> list[Decision]:
    """Read the journal of a test's state folder; empty where there is none."""
    return [Decision(**line) for line in Lines(state / DECISIONS).new()]
