"""What an experiment was asked to be, and the limits that its verdict is held against.

How users' requests are divided between the arms, as the user writes it: ``90:10``.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from redpp_serve.errors import RedppError
from redpp_serve.options import Limits

ARMS = ("original", "pruned")  # the words of header, log and metrics, the baseline first
_PERCENT = r"\d{1,3}(?:\.\d{1,2})?"
_FORM = re.compile(rf"({_PERCENT})[:/]({_PERCENT})")


@dataclass(frozen=True)
class Split:
    """Percentages of users for each arm; they add up to 100. ``str()`` gives the form that `parse_split` reads."""

    original: Decimal
    pruned: Decimal

    def __str__(self) -> str:
        return f"{self.original}:{self.pruned}"

    def ratio(self, arm: str) -> float:
        """The share of ``arm``, 0 to 1."""
        return float(getattr(self, arm)) / 100


def parse_split(text: str) -> Split:
    """``original:pruned`` in per cent, up to two decimals, with ``:`` or ``/`` between.

    Raises:
        RedppError: another form, or numbers that do not add up to 100.
    """
    match = _FORM.fullmatch(text.strip())
    if not match:
        raise RedppError(
            f"--split {text!r}",
            "per cent for the original and for the pruned version, up to two decimals",
            "write for example --split 90:10",
        )
    original, pruned = map(Decimal, match.groups())
    if original + pruned != 100:
        raise RedppError(
            f"--split {text} adds up to {original + pruned}",
            "two numbers that add up to 100",
            f"write for example --split {max(0, 100 - min(pruned, 100))}:{min(pruned, 100)}",
        )
    return Split(original, pruned)


TOLERANCE = 0.1  # of outputs that are no classes, where the user sets none
_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


@dataclass(frozen=True)
class Spec:
    """An experiment before it runs.

    Attributes:
        folder: the packaged folder, absolute.
        candidate: another packaged folder whose pruned version is tried against the first one's original; or None.
        kind: of the server, ``torchserve`` or ``triton``.
        split: how users are divided.
        sticky: request header that names the user; None to decide for every request anew.
        shadow: whether requests are replayed on both versions.
        limits: see `Limits`.
        workers: worker processes of each version.
        port: the first of consecutive ports; None for free ones.
        auth: require a token.
    """

    folder: Path
    candidate: Path | None
    kind: str
    split: Split
    sticky: str | None
    shadow: bool
    limits: Limits = Limits()
    workers: int = 1
    port: int | None = None
    auth: bool = True

    def __post_init__(self) -> None:
        if self.sticky is not None and not _HEADER.fullmatch(self.sticky):
            raise RedppError(
                f"--sticky-header {self.sticky!r}",
                "the name of a request header: letters, digits and '-'",
                "write for example --sticky-header X-User-Id",
            )

    def to_json(self) -> dict[str, Any]:
        """For `from_json`."""
        candidate = None if self.candidate is None else str(self.candidate)
        return {**asdict(self), "folder": str(self.folder), "candidate": candidate, "split": str(self.split)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Spec:
        """The inverse of `to_json`."""
        candidate = None if document["candidate"] is None else Path(document["candidate"])
        return cls(
            **{
                **document,
                "folder": Path(document["folder"]),
                "candidate": candidate,
                "split": parse_split(document["split"]),
                "limits": Limits(**document["limits"]),
            }
        )
