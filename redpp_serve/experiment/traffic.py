"""What users got, arm by arm, counted from the gateway's access log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from .split import ARMS

_COUNTERS = ("requests", "errors", "refused", "abandoned", "by_header")
_LEFT = 499


class Traffic:
    """Counts of users' requests; memory is bounded whatever their number.

    Attributes:
        requests: arm -> how many.
        errors: arm -> those answered with a status of 500 or above, also where the server did not answer at all.
        refused: arm -> those answered with 400 to 498: the user's mistake.
        abandoned: arm -> those whose sender left before there was an answer, nginx's 499: of a version that hangs,
            users with a shorter patience than the gateway's see nothing else.
        by_header: arm -> those whose sender asked for the arm, and which no split has chosen.
    """

    def __init__(self, document: dict[str, Any] | None = None) -> None:
        given = document or {}
        counters = (Counter(given.get(name, {})) for name in _COUNTERS)
        self.requests, self.errors, self.refused, self.abandoned, self.by_header = counters
        times = given.get("milliseconds", {})
        self._milliseconds = {arm: Counter({int(k): n for k, n in times.get(arm, {}).items()}) for arm in ARMS}

    def take(self, lines: Iterable[dict[str, Any]]) -> None:
        """Count lines of the access log; those that went to no arm are left out."""
        for line in lines:
            arm, status = line["arm"], line["status"]
            if arm not in ARMS:
                continue
            self.requests[arm] += 1
            self.errors[arm] += status >= 500
            self.refused[arm] += 400 <= status < _LEFT
            self.abandoned[arm] += status == _LEFT
            self.by_header[arm] += line["chosen_by"] == "header"
            if line["upstream_time"] is not None and status < 400:
                self._milliseconds[arm][_rounded(round(1000 * line["upstream_time"]))] += 1

    def percentile_ms(self, arm: str, q: float) -> float | None:
        """The ``q`` quantile (0..1) of the server's time for good requests as the gateway sees it, to 1 ms."""
        counts = self._milliseconds[arm]
        rank, seen = q * counts.total(), 0
        for milliseconds in sorted(counts):
            seen += counts[milliseconds]
            if seen >= rank:
                return float(milliseconds)
        return None

    def share(self, arm: str) -> float | None:
        """The arm's share of all requests; None before the first."""
        total = self.requests.total()
        return self.requests[arm] / total if total else None

    def to_json(self) -> dict[str, Any]:
        """For the constructor."""
        return {**{name: getattr(self, name) for name in _COUNTERS}, "milliseconds": self._milliseconds}


def _rounded(milliseconds: int) -> int:
    """Three digits: no more different values than 900 a power of ten."""
    step = max(1, 10 ** (len(str(milliseconds)) - 3))
    return milliseconds // step * step
