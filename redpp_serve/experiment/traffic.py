"""What users got, arm by arm, counted from the gateway's access log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from .split import ARMS


class Traffic:
    """Counts of users' requests; memory is bounded whatever their number.

    Attributes:
        requests: arm -> how many.
        errors: arm -> those answered with a status of 500 or above, also where the server did not answer at all.
        refused: arm -> those answered with 400 to 499: the user's mistake.
        by_header: arm -> those whose sender asked for the arm, and which no split has chosen.
    """

    def __init__(self, document: dict[str, Any] | None = None) -> None:
        given = document or {}
        names = ("requests", "errors", "refused", "by_header")
        self.requests, self.errors, self.refused, self.by_header = (Counter(given.get(name, {})) for name in names)
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
            self.refused[arm] += 400 <= status < 500
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
        return {"requests": self.requests, "errors": self.errors, "refused": self.refused, "by_header": self.by_header,
                "milliseconds": self._milliseconds}  # fmt: skip


def _rounded(milliseconds: int) -> int:
    """Three digits: no more different values than 900 a power of ten."""
    step = max(1, 10 ** (len(str(milliseconds)) - 3))
    return milliseconds // step * step
