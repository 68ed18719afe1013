"""An experiment's own Prometheus metrics: shares, requests, pairs, agreement, speed-up with bounds, verdict, advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from redpp_serve.ab.evidence import deciding
from redpp_serve.ab.status import Status
from redpp_serve.statistics.verdicts import ADVICE_KINDS, KINDS
from redpp_serve.variants import NAMES


class ExperimentCollector:
    """Turns the latest `Status` into samples when Prometheus asks; none before the first."""

    def __init__(self, latest: Callable[[], Status | None]) -> None:
        self._latest = latest

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client."""
        status = self._latest()
        return list(_families(status)) if status else []


def registry(latest: Callable[[], Status | None]) -> CollectorRegistry:
    """A registry with the experiment's metrics alone."""
    own = CollectorRegistry()
    own.register(ExperimentCollector(latest))
    return own


def _families(status: Status) -> Iterator[Metric]:
    def family(kind: Any, name: str, text: str, label: str | None, values: dict[str, float]) -> Metric:
        made = kind(name, text, labels=["model", *([label] if label else [])])
        for value_of, value in values.items():
            made.add_metric([status.name, *([value_of] if label else [])], value)
        return made

    shares = _shares(status)
    yield family(GaugeMetricFamily, "redpp_ab_traffic_ratio", "Share of users that the arm is to get.", "arm", shares)
    requests: dict[str, float] = {arm: status.arms[arm].requests for arm in NAMES}
    yield family(CounterMetricFamily, "redpp_ab_requests", "Users' requests by arm.", "arm", requests)
    shadow = status.shadow
    yield family(
        CounterMetricFamily,
        "redpp_ab_pairs",
        "Users' requests that were replayed on both versions.",
        None,
        {"": shadow.pairs if shadow else 0},
    )
    yield family(
        CounterMetricFamily,
        "redpp_ab_dropped",
        "Mirrored requests not replayed for want of time.",
        None,
        {"": shadow.dropped if shadow else 0},
    )
    if shadow and shadow.agreement is not None:
        text = "Share of pairs whose outputs agree."
        yield family(GaugeMetricFamily, "redpp_ab_agreement_ratio", text, None, {"": shadow.agreement})
    yield _speedup(status)
    kind = deciding_kind(status)
    yield family(
        GaugeMetricFamily,
        "redpp_ab_verdict",
        "1 for the verdict that holds now.",
        "kind",
        {name: float(name == kind) for name in KINDS},
    )
    yield family(
        GaugeMetricFamily,
        "redpp_ab_advice",
        "1 for what to do now.",
        "kind",
        {name: float(name == status.advice.kind) for name in ADVICE_KINDS},
    )


def _shares(status: Status) -> dict[str, float]:
    """As configured, or all to one arm after a promotion or rollback."""
    return {arm: float(arm == status.all_to) if status.all_to else status.arms[arm].configured for arm in NAMES}


def deciding_kind(status: Status) -> str:
    """The verdict that the advice rests on: ``slower`` before all others, else the first decided."""
    return deciding(status.findings).verdict.kind


def _speedup(status: Status) -> Metric:
    text = "Time of the original over time of the pruned version, with the bounds of its confidence sequence."
    family = GaugeMetricFamily("redpp_ab_speedup_ratio", text, labels=["model", "source", "bound"])
    seen = set()
    for finding in status.findings:
        verdict = finding.verdict
        if finding.source in seen or verdict.mean is None or math.isinf(verdict.high):
            continue
        seen.add(finding.source)
        for bound, value in (("low", verdict.low), ("mean", verdict.mean), ("high", verdict.high)):
            family.add_metric([status.name, finding.source, bound], value)
    return family
