"""Requirements of a pipeline, such as ``speedup>=1.2``: their grammar, how they are judged, and JUnit's XML of it.

A figure that was measured with an interval keeps a requirement only where the whole interval does: a pipeline that
passed by luck would fail on the next run. One without an interval is judged by its value.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NamedTuple
from xml.etree import ElementTree

from redpp_serve.errors import GateFailed, RedppError, printable
from redpp_serve.variants import NAMES

_FORM = re.compile(r"\s*([A-Za-z]\w*)\s*(>=|<=)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")
_FORMS = "NAME>=NUMBER or NAME<=NUMBER, joined by commas"
_SHARES = ("agreement", "accuracy", "failed")


def _of_versions(meaning: str, *names: str) -> dict[str, str]:
    """Return the figures that both versions have; a name alone means the pruned version's."""
    return {
        f"{prefix}{name}": meaning.format(version)
        for name in names
        for prefix, version in (("", "pruned"), ("original_", "original"))
    }


COMPARED = {
    "speedup": "time of the original over that of the pruned version, medians end to end",
    "handler_speedup": "the same in the handler",
    "throughput_gain": "throughput of the pruned version over that of the original",
    **_of_versions("milliseconds end to end of the {} version", "p50_ms", "p95_ms", "p99_ms"),
    **_of_versions("milliseconds in the handler of the {} version", "handler_p50_ms", "handler_p99_ms"),
    **_of_versions("milliseconds at --rate of the {} version", "rate_p50_ms", "rate_p95_ms", "rate_p99_ms"),
    **_of_versions("requests a second that the {} version answers", "throughput"),
    **_of_versions("share of the requests to the {} version that failed", "failed"),
    **_of_versions("the same at --rate of the {} version", "rate_failed"),
    "agreement": "share of the inputs that both versions give the same class",
    "difference": "mean relative difference of the outputs",
    **_of_versions("share of the labelled inputs that the {} version gets right", "accuracy"),
    "accuracy_drop": "points of accuracy that the pruned version loses",
}
"""What `compare` measures, by the name that ``--require`` and the CSV file use: its meaning."""

HEALTH = {f"{variant}_ms": f"milliseconds until the reply of {variant}" for variant in (*NAMES, "default")}
"""What `health` measures, likewise."""


class Figure(NamedTuple):
    """A measured number, with its 95 % interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        known = self.low is not None and self.high is not None
        return f"{self.value:.4g}" + (f" ({self.low:.4g} to {self.high:.4g})" if known else "")

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {"value": self.value} if self.low is None else self._asdict()


@dataclass(frozen=True)
class Requirement:
    """A limit that a figure must keep.

    Attributes:
        name: the figure's.
        least: the limit is the least that it may be, not the most.
        limit: in the figure's unit.
    """

    name: str
    least: bool
    limit: float

    def __str__(self) -> str:
        return f"{self.name}{'>=' if self.least else '<='}{self.limit:g}"

    def kept_by(self, value: float) -> bool:
        """Tell whether a number keeps the limit."""
        return value >= self.limit if self.least else value <= self.limit


def parse(text: str, names: Collection[str]) -> tuple[Requirement, ...]:
    """Read requirements joined by commas, for argparse.

    Args:
        text: such as ``speedup>=1.2,p99_ms<=20``.
        names: the figures that there are.

    Raises:
        argparse.ArgumentTypeError: another form, an unknown name, or a share that no measurement can have.
    """
    found = []
    for part in text.split(","):
        match = _FORM.fullmatch(part)
        try:
            limit = float(match[3]) if match else math.nan
        except ValueError:  # 1.2.3
            limit = math.nan
        if not match or not math.isfinite(limit):
            raise argparse.ArgumentTypeError(f"{printable(part)!r} is not {_FORMS}")
        name = match[1]
        if name not in names:
            raise argparse.ArgumentTypeError(f"{name!r} is no figure; there are {', '.join(names)}")
        if name.endswith(_SHARES) and not 0 <= limit <= 1:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} limits a share, which is from 0 to 1")
        found.append(Requirement(name, match[2] == ">=", limit))
    return tuple(found)


@dataclass(frozen=True)
class Outcome:
    """A requirement and what was measured.

    Attributes:
        requirement: the limit.
        figure: the number.
        where: what was measured, where there are several, such as ``concurrency 4``.
    """

    requirement: Requirement
    figure: Figure
    where: str = ""

    @property
    def met(self) -> bool:
        """Whether the number keeps the limit, with all of its interval."""
        return all(self.requirement.kept_by(x) for x in self.figure if x is not None)

    @property
    def why(self) -> str:
        """Why it is missed though the number itself keeps it; else empty."""
        near = not self.met and self.requirement.kept_by(self.figure.value)
        return "the value keeps it, its interval does not: measure longer" if near else ""

    def to_text(self) -> str:
        """Return a line for the terminal."""
        words = ("met   " if self.met else "missed", str(self.requirement).ljust(24), str(self.figure), self.where)
        return ("  ".join(filter(None, words)) + (f"; {self.why}" if self.why else "")).rstrip()

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        where = {"where": self.where} if self.where else {}
        return {"requirement": str(self.requirement), **where, **self.figure.to_json(), "met": self.met}


def judge(
    requirements: Iterable[Requirement], figures: Mapping[str, Figure], where: str = "", do: str = "require another one"
) -> list[Outcome]:
    """Judge each requirement.

    Args:
        requirements: in the order in which they are told.
        figures: what was measured.
        where: what was measured, where there are several.
        do: what to do where a figure was not.

    Raises:
        RedppError: a figure was not measured.
    """
    wanted = list(requirements)
    require_measured([each.name for each in wanted], figures, do)
    return [Outcome(each, figures[each.name], where) for each in wanted]


def require_measured(names: Iterable[str], measured: Collection[str], do: str) -> None:
    """Refuse requirements of figures that are not measured.

    Raises:
        RedppError: names those that are.
    """
    if missing := [name for name in dict.fromkeys(names) if name not in measured]:
        raise RedppError(
            f"--require asks for {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not measured",
            f"one of {', '.join(measured)}",
            do,
        )


def require_met(outcomes: Sequence[Outcome]) -> None:
    """Raise where a requirement is missed.

    Raises:
        GateFailed: names those that are.
    """
    if missed := [each for each in outcomes if not each.met]:
        told = "; ".join(f"{x.requirement.name} is {x.figure}{f' at {x.where}' if x.where else ''}" for x in missed)
        raise GateFailed(
            f"{len(missed)} of {len(outcomes)} requirements {'is' if len(missed) == 1 else 'are'} missed: {told}",
            ", ".join(dict.fromkeys(str(each.requirement) for each in missed)),
            next((each.why for each in missed if each.why), "keep the version that serves now, or require less"),
        )


def junit(suite: str, outcomes: Sequence[Outcome], seconds: float, begun: datetime, problem: str = "") -> str:
    """Return JUnit's XML: a suite with a test case for each requirement, failed where it is missed.

    Args:
        suite: its name.
        outcomes: of all requirements.
        seconds: that the measurement took.
        begun: when.
        problem: why nothing was measured: the only test case, in error.
    """
    name, missed = printable(suite), [each for each in outcomes if not each.met]
    counts = {
        "tests": str(len(outcomes) + bool(problem)),
        "failures": str(len(missed)),
        "errors": str(int(bool(problem))),
        "time": f"{seconds:.3f}",
    }
    root = ElementTree.Element("testsuites", {"name": name, **counts})
    when = begun.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    found = ElementTree.SubElement(root, "testsuite", {"name": name, **counts, "skipped": "0", "timestamp": when})
    if problem:
        case = _case(found, "measurement", name)
        ElementTree.SubElement(case, "error", {"message": printable(problem), "type": "error"})
    for each in outcomes:
        case = _case(found, str(each.requirement), ".".join(filter(None, (name, each.where))))
        if each.met:
            ElementTree.SubElement(case, "system-out").text = str(each.figure)
        else:
            message = f"{each.requirement.name} is {each.figure}"
            failure = ElementTree.SubElement(case, "failure", {"message": message, "type": "requirement"})
            failure.text = each.to_text()
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document.decode() + "\n"


def _case(suite: ElementTree.Element, name: str, place: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", {"name": name, "classname": place, "time": "0.000"})
