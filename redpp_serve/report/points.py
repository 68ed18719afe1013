"""The frontier and the stages' shares as a report holds them, read and put into words.

    frontier: {axes: {macs_ratio, error, latency_ratio: words on the axes}, latency_on: device, threads, batch, points: [
        {macs, macs_ratio, error, predicted_error, latency_ratio, latency_low, latency_high, chosen, flag}]}
    stages_share: [{stage, error, agreement, macs, accuracy, seconds}]

Ratios are to the original network, errors relative; every number may be missing or None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redpp_serve.report.formats import DASH, count, dig, error, number, percent, printable, seconds


class Point(NamedTuple):
    """One network that could be had: its cost, what it loses, and the flag that gives it. Unknown numbers are None."""

    macs: float | None
    macs_ratio: float | None
    error: float | None
    predicted: float | None
    latency: float | None
    low: float | None
    high: float | None
    chosen: bool
    flag: str

    @property
    def cost(self) -> str:
        """MACs, and their share of the original's: 1.20 G (52.0 %)."""
        share = "" if self.macs_ratio is None else f" ({ratio(self.macs_ratio)})"
        return f"{count(self.macs)}{share}"

    @property
    def time(self) -> str:
        """Latency as a share of the original's, with its interval: 61.0 % [59.2, 62.7]."""
        if self.latency is None or self.low is None or self.high is None:
            return ratio(self.latency)
        return f"{ratio(self.latency)} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    @property
    def label(self) -> str:
        """The flag, marked on the point that was taken."""
        return (self.flag or DASH) + (" (chosen)" if self.chosen else "")


def ratio(value: float | None) -> str:
    """A share of the original's cost: 52.0 %."""
    return DASH if value is None else f"{100 * value:.1f} %"


def frontier_points(report: Mapping[str, Any]) -> list[Point]:
    """The points of ``report["frontier"]``, the most expensive first; those of unknown cost last."""
    raw = dig(report, "frontier", "points")
    keys = ("macs", "macs_ratio", "error", "predicted_error", "latency_ratio", "latency_low", "latency_high")
    found = [
        Point(*(number(item.get(key)) for key in keys), item.get("chosen") is True, printable(item.get("flag") or ""))
        for item in (raw if isinstance(raw, (list, tuple)) else ())
        if isinstance(item, Mapping)
    ]
    return sorted(found, key=lambda point: -(point.macs_ratio if point.macs_ratio is not None else -1.0))


def thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` (2 or more) points in their order: both ends, the chosen one, and others spread evenly."""
    if len(points) <= limit:
        return list(points)
    last = len(points) - 1
    kept = {round(k * last / (limit - 1)) for k in range(limit)}
    for index in (i for i, point in enumerate(points) if point.chosen):
        if index not in kept:  # in the place of the nearest that is no end
            inner = [k for k in kept if k not in (0, last)] or [last]
            kept.remove(min(inner, key=lambda k: abs(k - index)))
            kept.add(index)
            break
    return [points[index] for index in sorted(kept)]


def share_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of what each stage changed; without columns that no stage filled.

    The change of the error is to the stage before it, for the first to the original, whose error is 0.
    """
    raw = dig(report, "stages_share")
    stages = [row for row in (raw if isinstance(raw, (list, tuple)) else ()) if isinstance(row, Mapping)]
    before: float | None = 0.0
    rows = []
    for stage in stages:
        now = number(stage.get("error"))
        change = DASH if now is None or before is None else f"{100 * (now - before):+.2f} points"
        before = now
        rows.append([printable(stage.get("stage") or DASH), error(now), change, percent(stage.get("agreement")),
                     count(stage.get("macs")), percent(stage.get("accuracy")),
                     seconds(stage.get("seconds"))])  # fmt: skip
    head = ["stage", "error after it", "change", "same top-1 class", "MACs", "accuracy", "time"]
    used = [i for i in range(len(head)) if i == 0 or any(row[i] != DASH for row in rows)]
    return [head[i] for i in used], [[row[i] for i in used] for row in rows]
