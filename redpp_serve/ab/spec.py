"""An A/B test as the user asks for it: the packaged folder, how users are divided, and the limits of its verdict."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

from redpp_serve.ab.webhook import check_webhook, host_of
from redpp_serve.errors import RedppError
from redpp_serve.options import Limits
from redpp_serve.serving.observing import Observing

TOLERANCE = 0.1  # relative difference up to which outputs agree that are not classes, unless the user sets one
_PERCENT = r"\d{1,3}(?:\.\d{1,2})?"
_FORM = re.compile(rf"({_PERCENT})[:/]({_PERCENT})")
_SHARE = re.compile(_PERCENT)
# Shares of users, in per cent, that a running test can be split at, besides those that it was started with.
STEPS = tuple(map(Decimal, [*(f"0.{tenth}" for tenth in range(1, 10)), *range(1, 101)]))
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


@dataclass(frozen=True)
class Users:
    """Where users go: all of them to one arm, or divided. ``str()`` gives the form that the journal has.

    Attributes:
        all_to: the arm that all users are sent to; None while they are divided.
        split: the split in force while they are.
    """

    all_to: str | None
    split: TrafficSplit

    def __str__(self) -> str:
        return self.all_to or str(self.split)


def split_at(pruned: Decimal) -> TrafficSplit:
    """Return the split that gives the pruned version this many per cent of users."""
    return TrafficSplit(100 - pruned, pruned)


def parse_share_or_split(text: str) -> TrafficSplit:
    """Read the pruned version's per cent alone, or what `parse_split` reads.

    Raises:
        RedppError: the text has another form, or says more than 100.
    """
    alone = _SHARE.fullmatch(text.strip())
    return split_at(Decimal(alone[0])) if alone and Decimal(alone[0]) <= 100 else parse_split(text)


def parse_ramp(text: str) -> tuple[Decimal, ...]:
    """Read the pruned version's shares one after the other, such as ``1,5,25,50,100``: per cent, increasing.

    Raises:
        RedppError: the text has another form, or the numbers do not increase.
    """
    words = [word.strip() for word in text.split(",")]
    shares = tuple(Decimal(word) for word in words if _SHARE.fullmatch(word))
    rising = all(a < b for a, b in pairwise((Decimal(0), *shares, Decimal("100.01"))))
    if len(shares) < len(words) or not rising:
        raise RedppError(
            f"--ramp {text!r}",
            "increasing per cent of users for the pruned version, above 0 and at most 100, with up to two decimals",
            "write for example --ramp 1,5,25,50,100",
        )
    return shares


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
        auto: act on the verdict.
        ramp: shares of the pruned version, in per cent, one after the other; empty for a split that stays.
        hold: seconds that each of them lasts at least.
        webhook: where decisions are told; None for nowhere.
        attach: use the server that `serve` runs for the folder.
        log_format: ``text`` or ``json``, see `logs.Logs`.
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
    auto: bool = False
    ramp: tuple[Decimal, ...] = ()
    hold: float = 300.0
    webhook: str | None = None
    attach: bool = False
    log_format: str = "text"

    def __post_init__(self) -> None:
        if self.sticky is not None and not _HEADER.fullmatch(self.sticky):
            raise RedppError(
                f"--sticky-header {self.sticky!r}",
                "the name of a request header: letters, digits and '-'",
                "write for example --sticky-header X-User-Id",
            )
        if self.ramp and not self.auto:
            raise RedppError("--ramp without --auto", "what climbs the ramp", "add --auto")
        if self.attach and (self.candidate or self.observe or self.workers != 1 or not self.auth):
            raise RedppError(
                "--attach with --candidate, --observe, --workers or --demo-auth-off",
                "none of them, since the server runs as it was started",
                "give them to redpp-serve serve, or leave --attach out",
            )
        if self.webhook is not None:
            check_webhook(self.webhook)

    def to_json(self, *, secrets: bool = True) -> dict[str, Any]:
        """Return the form that `from_json` reads; without ``secrets`` a webhook's path is left out."""
        candidate = None if self.candidate is None else str(self.candidate)
        observe = self.observe and {"every": self.observe.every, "file": str(self.observe.file)}
        ramp = [str(share) for share in self.ramp]
        plain = {"folder": str(self.folder), "candidate": candidate, "split": str(self.split), "observe": observe}
        shown = self.webhook if secrets or self.webhook is None else host_of(self.webhook)
        return {**asdict(self), **plain, "ramp": ramp, "webhook": shown}

    @property
    def compared_shares(self) -> set[Decimal]:
        """The shares that are planned and at which both versions have users."""
        return {share for share in self.ramp or (self.split.pruned,) if 0 < share < 100}

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
            "ramp": tuple(map(Decimal, document.get("ramp", ()))),
        }
        return cls(**{**document, **changed})


@dataclass(frozen=True)
class Started:
    """A running A/B test: its spec, the name that the model is served under, and when it began (seconds since 1970)."""

    spec: Spec
    name: str
    started: float

    def to_json(self, *, secrets: bool = True) -> dict[str, Any]:
        """Return the form that `from_json` reads, see `Spec.to_json`."""
        return {"spec": self.spec.to_json(secrets=secrets), "name": self.name, "started": self.started}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Started:
        """Read what `to_json` returned."""
        return cls(Spec.from_json(document["spec"]), document["name"], document["started"])
