"""Read this project's metrics: fetch Prometheus text, parse one model's samples, and tell what was added since.

Names and labels come from the tables of those who write them, such as `handlers.metrics.FAMILIES`.
"""

from __future__ import annotations

import math
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from itertools import pairwise
from typing import NamedTuple

from redpp_serve.handlers.metrics import FAMILIES, Family
from redpp_serve.variants import NAMES, canonical_name

_PREFIX = "redpp_"
_ABSURD = 1e200  # no count of anything; sums of such numbers would become infinite one day, and stay so
_ROUNDING = 1e-6  # seconds are sums over the workers' files, in any order


class Unreadable(Exception):
    """A metrics URL did not answer with metrics; the text says why."""


@dataclass(frozen=True)
class Limits:
    """Bounds on one answer, which may come from a foreign or broken program.

    Attributes:
        seconds: time from the request to the last byte.
        bytes: size of the text.
        series: number of this project's samples in it.
    """

    seconds: float = 5.0
    bytes: int = 4_000_000
    series: int = 4096


class Key(NamedTuple):
    """The subject of a number, whichever worker or server it comes from.

    Attributes:
        name: of the sample, such as ``redpp_handler_seconds_bucket``.
        variant: ``original`` or ``pruned``; empty for metrics that are not about one version.
        detail: values of the family's own labels, joined by spaces; for a bucket its upper edge.
    """

    name: str
    variant: str
    detail: str = ""


@dataclass(frozen=True)
class Sample:
    """One line of the text; its name and all of its labels, in order, identify its series."""

    key: Key
    family: Family
    labels: tuple[tuple[str, str], ...]
    value: float

    @property
    def adds_up(self) -> bool:
        """Whether the values of several workers or servers are summed, or else are the same in all of them."""
        return self.family.kind != "gauge" or self.family.per_worker

    @property
    def series(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """The name and all labels."""
        return self.key.name, self.labels

    @property
    def group(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """The series that begin again together: those of one histogram, else the series alone."""
        return self.family.name, tuple(pair for pair in self.labels if pair[0] != "le")


@dataclass(frozen=True)
class Reading:
    """All samples of one model at one moment.

    Attributes:
        samples: in the order of the text.
        others: names of the other models in the text.
    """

    samples: tuple[Sample, ...] = ()
    others: frozenset[str] = field(default_factory=frozenset)

    @property
    def values(self) -> dict[Key, float]:
        """The latest values, several workers' or servers' as one."""
        return merged([self])

    def since(self, before: Reading) -> Gains:
        """Return what the counters have gained since an earlier reading of the same URL, summed over workers.

        A counter that has fallen began again from zero, as in Prometheus; a histogram does so with all its series.
        """
        last = {sample.series: sample.value for sample in before._counters}
        restarted = not last.keys() <= {sample.series for sample in self._counters}
        groups: dict[object, list[Sample]] = {}
        for sample in self._counters:
            groups.setdefault(sample.group, []).append(sample)
        gained: dict[Key, float] = {}
        for samples in groups.values():
            rises = [sample.value - last.get(sample.series, 0.0) for sample in samples]
            if _fell(samples, rises):
                restarted, rises = True, [sample.value for sample in samples]
            for sample, rise in zip(samples, rises, strict=True):
                gained[sample.key] = gained.get(sample.key, 0.0) + max(rise, 0.0)
        return Gains(gained, restarted)

    @property
    def _counters(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.family.kind != "gauge"]


class Gains(NamedTuple):
    """What counters gained between two readings; ``restarted`` if any of them fell or is gone."""

    gained: dict[Key, float]
    restarted: bool


def _fell(samples: Sequence[Sample], rises: Sequence[float]) -> bool:
    """Tell whether a series has fallen, or the observations between two edges of a histogram have."""
    buckets = sorted(
        (float(sample.key.detail), rise)
        for sample, rise in zip(samples, rises, strict=True)
        if sample.key.name.endswith("_bucket")
    )
    ranges = [above - below for (_, below), (_, above) in pairwise(buckets)]
    return min([*rises, *ranges]) < -_ROUNDING


def merged(readings: Iterable[Reading]) -> dict[Key, float]:
    """Return the values of several servers as one: sums, but for what is the same in all of them."""
    found: dict[Key, float] = {}
    for sample in (sample for reading in readings for sample in reading.samples):
        found[sample.key] = sample.value + (found.get(sample.key, 0.0) if sample.adds_up else 0.0)
    return found


def read(url: str, model: str, families: Mapping[str, Family] = FAMILIES, limits: Limits = Limits()) -> Reading:
    """Return the samples of one model at a metrics URL now.

    Raises:
        Unreadable: see `fetch` and `parse`.
    """
    return parse(fetch(url, limits), model, families, limits)


def fetch(url: str, limits: Limits = Limits()) -> str:
    """Return the text behind a metrics URL, without any proxy.

    Raises:
        Unreadable: there is no answer within the limits, with success and in UTF-8.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=limits.seconds) as reply:
            data = _body(reply, limits.bytes, time.monotonic() + limits.seconds)
    except urllib.error.HTTPError as error:
        raise Unreadable(f"HTTP status {error.code}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise Unreadable(getattr(reason, "strerror", None) or str(reason) or type(error).__name__) from error
    if len(data) > limits.bytes:
        raise Unreadable(f"more than {limits.bytes} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Unreadable("not text") from error


def _body(reply: HTTPResponse, most: int, deadline: float) -> bytes:
    """Read up to one byte more than ``most``. The opener's limit is for each piece, so that drops would go on."""
    data = bytearray()
    while len(data) <= most and (piece := reply.read1(most + 1 - len(data))):
        data += piece
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return bytes(data)


def parse(text: str, model: str, families: Mapping[str, Family] = FAMILIES, limits: Limits = Limits()) -> Reading:
    """Return one model's samples; numbers that are not finite and labels that are unknown are left out.

    Raises:
        Unreadable: the text is not in Prometheus' format, or holds too many series.
    """
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415  (an optional package)

    ours = "\n".join(line for line in text.splitlines() if line.startswith(_PREFIX))  # Triton has many more, of its own
    samples, others = [], set()
    names = by_sample_name(families)
    try:
        for family in text_string_to_metric_families(f"{ours}\n" if ours else text):
            for name, labels, value, *_ in family.samples:
                if labels.get("model", model) != model and name.startswith(_PREFIX):
                    others.add(labels["model"])
                elif name in names and (sample := to_sample(name, names[name], labels, float(value))):
                    samples.append(sample)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise Unreadable("the answer is not in Prometheus' text format") from error
    if len(samples) > limits.series:
        raise Unreadable(f"more than {limits.series} series of this project")
    return Reading(tuple(samples), frozenset(others))


def by_sample_name(families: Mapping[str, Family]) -> dict[str, Family]:
    """Return name of a sample, such as ``redpp_handler_seconds_bucket`` -> its family."""
    return {name: family for family in families.values() for name in _sample_names(family)}


def _sample_names(family: Family) -> list[str]:
    parts = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
    return [family.name + part for part in parts]


def to_sample(name: str, family: Family, labels: Mapping[str, str], value: float) -> Sample | None:
    """Return a sample, or None where its number is not finite or a label is unknown."""
    key = _key(name, family, labels) if abs(value) < _ABSURD else None
    return Sample(key, family, tuple(sorted(labels.items())), value) if key else None


def _key(name: str, family: Family, labels: Mapping[str, str]) -> Key | None:
    variant = canonical_name(labels.get("variant", ""))
    own = ("le",) if name.endswith("_bucket") else family.labels
    if variant not in (*NAMES, "") or not all(_valid(label, labels.get(label, "")) for label in own):
        return None
    return Key(name, variant, " ".join(labels.get(label, "") for label in own))


def _valid(label: str, text: str) -> bool:
    if label == "batch":
        return text.isascii() and text.isdigit()
    try:
        return label != "le" or not math.isnan(float(text))
    except ValueError:
        return False
