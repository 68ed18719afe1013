"""One metrics URL: read, reduced to this project's samples, differenced so that a server's restart does not show."""

from __future__ import annotations

import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from importlib.util import find_spec
from typing import NamedTuple

from redpp_serve.errors import RedppError

TIMEOUT_S = 2.0
MAX_BYTES = 4_000_000
MAX_SERIES = 4096
_ABSURD = 1e200  # no count of anything; its running total would be infinite one day, and stay so
VARIANTS = ("original", "pruned")
_HISTOGRAMS = ("redpp_handler_seconds", "redpp_inference_seconds", "redpp_batch_size")
_PARTS = {"_bucket": "le", "_sum": "", "_count": ""}
# Sample name -> the label that tells its series apart besides the version.
COUNTERS = {
    **{f"{name}{part}": label for name in _HISTOGRAMS for part, label in _PARTS.items()},
    "redpp_requests_total": "outcome",
    "redpp_batches_total": "batch",
    "redpp_batch_seconds_total": "batch",
    "redpp_worker_cpu_seconds_total": "",
    "redpp_ab_requests_total": "arm",
}
GAUGES = {
    "redpp_model_parameters": "",
    "redpp_model_macs": "",
    "redpp_model_bytes": "",
    "redpp_worker_resident_bytes": "",
    "redpp_device_memory_bytes": "device",
    "redpp_ab_traffic_ratio": "arm",
    "redpp_ab_pairs_total": "",
    "redpp_ab_dropped_total": "",
    "redpp_ab_agreement_ratio": "",
    "redpp_ab_speedup_ratio": "",
    "redpp_ab_verdict": "kind",
    "redpp_ab_advice": "kind",
}
_SAME_IN_ALL_WORKERS = {"redpp_model_parameters", "redpp_model_macs", "redpp_model_bytes"}


class Key(NamedTuple):
    """What a number is about: the sample's name, the version ('' in an A/B test), and its telling label's value."""

    name: str
    variant: str
    detail: str = ""


class Unreadable(Exception):
    """A metrics URL did not answer with metrics; the text says why."""


class Sample(NamedTuple):
    """One line of a scrape: all of its labels, in order, tell its series apart."""

    key: Key
    series: tuple[str, tuple[tuple[str, str], ...]]
    value: float


def fetch(url: str) -> str:
    """The text behind a metrics URL, without any proxy.

    Raises:
        Unreadable: it does not answer in time, with success, in UTF-8, within `MAX_BYTES`.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as reply:
            data = _read(reply, time.monotonic() + TIMEOUT_S)
    except urllib.error.HTTPError as error:
        raise Unreadable(f"HTTP status {error.code}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise Unreadable(getattr(reason, "strerror", None) or str(reason) or type(error).__name__) from error
    if len(data) > MAX_BYTES:
        raise Unreadable(f"more than {MAX_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Unreadable("not text") from error


def _read(reply: HTTPResponse, deadline: float) -> bytes:
    """The body up to one byte more than `MAX_BYTES`. The opener's limit is for each piece, so that drops would go on."""
    data = bytearray()
    while len(data) <= MAX_BYTES and (piece := reply.read1(MAX_BYTES + 1 - len(data))):
        data += piece
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return bytes(data)


def parse(text: str, model: str) -> tuple[list[Sample], set[str]]:
    """This project's samples of one model, and the names of the other models in the text.

    Raises:
        Unreadable: not Prometheus' text format, or more than `MAX_SERIES` series.
    """
    from prometheus_client.parser import text_string_to_metric_families

    samples, others = [], set()
    try:
        for family in text_string_to_metric_families(text):
            for name, labels, value, *_ in family.samples:
                if not name.startswith("redpp_") or not abs(value) < _ABSURD:
                    continue
                if labels.get("model", model) != model:
                    others.add(labels["model"])
                elif key := _key(name, labels):
                    samples.append(Sample(key, (name, tuple(sorted(labels.items()))), float(value)))
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise Unreadable("the answer is not in Prometheus' text format") from error
    if len(samples) > MAX_SERIES:
        raise Unreadable(f"more than {MAX_SERIES} series of this project")
    return samples, others


def _key(name: str, labels: Mapping[str, str]) -> Key | None:
    label = COUNTERS.get(name, GAUGES.get(name))
    if label is None:
        return None
    if name == "redpp_ab_speedup_ratio":
        return Key(name, "", f"{labels.get('source')} {labels.get('bound')}")
    if name.startswith("redpp_ab_"):
        return Key(name, "", labels.get(label, ""))
    variant, detail = labels.get("variant", ""), labels.get(label, "")
    if variant not in VARIANTS or (label in ("le", "batch") and not _is_number(detail)):
        return None
    return Key(name, variant, detail)


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


class Target:
    """What a metrics URL said last, to tell what each further scrape adds.

    A counter that has fallen began again from zero, as Prometheus has it; a histogram does so with all its series.
    The first scrape adds nothing: what it counts happened before.

    Attributes:
        gauges: values of the last scrape; empty while the URL does not answer.
        others: models besides ours in the last scrape.
        serves: whether a scrape has shown one of the model's versions.
        problem: why the last scrape failed, else ''.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.gauges: dict[Key, float] = {}
        self.others: set[str] = set()
        self.serves = False
        self.problem = "not asked yet"
        self._last: dict[object, float] | None = None

    def scrape(self, model: str) -> dict[Key, float]:
        """Ask the URL; what its counters gained since the last answer, summed over workers."""
        try:
            samples, self.others = parse(fetch(self.url), model)
        except Unreadable as error:
            self.gauges, self.problem = {}, str(error)
            return {}
        self.problem, self.gauges = "", _gauges(samples)
        self.serves = self.serves or any(sample.key.variant for sample in samples)
        counters = [sample for sample in samples if sample.key.name in COUNTERS]
        last, self._last = self._last, {sample.series: sample.value for sample in counters}
        if last is None:
            return {}
        again = {_group(sample) for sample in counters if sample.value < last.get(sample.series, 0.0)}
        gained: dict[Key, float] = {}
        for sample in counters:
            before = 0.0 if _group(sample) in again else last.get(sample.series, 0.0)
            gained[sample.key] = gained.get(sample.key, 0.0) + sample.value - before
        return gained


def _group(sample: Sample) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The series that restart together: those of one histogram, else the series alone."""
    name, labels = sample.series
    for histogram in _HISTOGRAMS:
        if name.startswith(histogram):
            return histogram, tuple(pair for pair in labels if pair[0] != "le")
    return name, labels


def _gauges(samples: list[Sample]) -> dict[Key, float]:
    return merged([{sample.key: sample.value} for sample in samples if sample.key.name in GAUGES])


def merged(gauges: Iterable[Mapping[Key, float]]) -> dict[Key, float]:
    """Gauges of several workers or servers as one: their sum, but what describes the network is the same in all."""
    found: dict[Key, float] = {}
    for key, value in (pair for each in gauges for pair in each.items()):
        found[key] = value if key.name in _SAME_IN_ALL_WORKERS else found.get(key, 0.0) + value
    return found


def check_parser() -> None:
    """Raise a RedppError where the package that reads metrics is missing."""
    if find_spec("prometheus_client") is None:
        raise RedppError(
            "the package prometheus-client is not installed", "it, to read metrics", "pip install 'redpp-serve[serve]'"
        )


def check_urls(urls: Iterable[str]) -> Iterator[str]:
    """The URLs, each once.

    Raises:
        RedppError: one that cannot be a metrics URL.
    """
    for url in dict.fromkeys(urls):
        if not _is_web_address(url):
            raise RedppError(
                f"--metrics-url {url!r} is no web address",
                "such as http://127.0.0.1:9400/metrics",
                "correct it, or leave it out to find the server that runs for the folder",
            )
        yield url


def _is_web_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        return bool(good) and url.isprintable() and " " not in url
    except ValueError:  # a port out of range, half an IPv6 address
        return False
