"""An A/B test as the user asks for it: the packaged folder, how users are divided, and the limits of its verdict."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from redpp_serve.errors import RedppError
from redpp_serve.options import Limits
from redpp_serve.serving.observing import Observing

TOLERANCE = 0.1  # relative difference up to which outputs agree that are not classes, unless the user sets one
_PERCENT = r"\d{1,3}(?:\.\d{1,2})?"
_FORM = re.compile(rf"({_PERCENT})[:/]({_PERCENT})")
_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


@dataclass(frozen=True)
class TrafficSplit:
    """Percentages of users for each arm, which add up to 100. ``str()`` gives the form that `parse_split` reads."""

    original: Decimal
    pruned: Decimal

    def __str__(self) -> str:
        return f"{self.original}:{self.pruned}"

    def ratio(self, arm: str) -> float:
        """Return the share of ``arm``, 0 to 1."""
        return float(getattr(self, arm)) / 100


def parse_split(text: str) -> TrafficSplit:
    """Read ``original:pruned``: per cent with up to two decimals, separated by ``:`` or ``/``.

    Raises:
        RedppError: the text has another form, or the numbers do not add up to 100.
    """
    match = _FORM.fullmatch(text.strip())
    if not match:
        raise RedppError(
            f"--split {text!r}",
            "per cent for the original and for the pruned version, up to two decimals",
            "write for example --split 90:10",
        )
    original, pruned = Decimal(match[1]), Decimal(match[2])
    if original + pruned != 100:
        raise RedppError(
            f"--split {text} adds up to {original + pruned}",
            "two numbers that add up to 100",
            f"write for example --split {100 - min(pruned, Decimal(100))}:{min(pruned, Decimal(100))}",
        )
    return TrafficSplit(original, pruned)


@dataclass(frozen=True)
class Spec:
    """What an A/B test is asked to be.

    Attributes:
        folder: the packaged folder, absolute.
        candidate: another packaged folder whose pruned version is tried against the first one's original; or None.
        kind: the model server, ``torchserve`` or ``triton``.
        split: how users are divided.
        sticky: request header that names the user; None to decide for every request anew.
        shadow: replay users' requests on both versions.
        limits: the limits that the pruned version must keep to.
        workers: worker processes of each version.
        port: the first of consecutive ports; None for free ones.
        auth: require a token.
        observe: how the original observes its requests; None for not at all.
    """

    folder: Path
    candidate: Path | None
    kind: str
    split: TrafficSplit
    sticky: str | None
    shadow: bool
    limits: Limits = Limits()  # noqa: RUF009 (it is frozen)
    workers: int = 1
    port: int | None = None
    auth: bool = True
    observe: Observing | None = None

    def __post_init__(self) -> None:
        if self.sticky is not None and not _HEADER.fullmatch(self.sticky):
            raise RedppError(
                f"--sticky-header {self.sticky!r}",
                "the name of a request header: letters, digits and '-'",
                "write for example --sticky-header X-User-Id",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the form that `from_json` reads."""
        candidate = None if self.candidate is None else str(self.candidate)
        observe = self.observe and {"every": self.observe.every, "file": str(self.observe.file)}
        plain = {"folder": str(self.folder), "candidate": candidate, "split": str(self.split), "observe": observe}
        return {**asdict(self), **plain}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Spec:
        """Read what `to_json` returned."""
        observe = document.get("observe")
        changed = {
            "folder": Path(document["folder"]),
            "candidate": None if document["candidate"] is None else Path(document["candidate"]),
            "split": parse_split(document["split"]),
            "limits": Limits(**document["limits"]),
            "observe": observe and Observing(observe["every"], Path(observe["file"])),
        }
        return cls(**{**document, **changed})


@dataclass(frozen=True)
class Started:
    """A running A/B test: its spec, the name that the model is served under, and when it began (seconds since 1970)."""

    spec: Spec
    name: str
    started: float

    def to_json(self) -> dict[str, Any]:
        """Return the form that `from_json` reads."""
        return {"spec": self.spec.to_json(), "name": self.name, "started": self.started}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Started:
        """Read what `to_json` returned."""
        return cls(Spec.from_json(document["spec"]), document["name"], document["started"])
