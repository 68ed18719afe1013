"""An A/B test's own Prometheus metrics: shares, requests, pairs, agreement, speed-up with bounds, verdict, advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from redpp_serve.ab.evidence import deciding
from redpp_serve.ab.status import Status
from redpp_serve.handlers.metrics import Family
from redpp_serve.loopback import ADDRESS
from redpp_serve.statistics.verdicts import ADVICE_KINDS, KINDS
from redpp_serve.variants import NAMES

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

# Every sample has the label ``model`` as well.
AB_FAMILIES = {
    family.name: family
    for family in (
        Family("gauge", "redpp_ab_traffic_ratio", "Share of users that the version is to receive.", ("arm",)),
        Family(
            "gauge",
            "redpp_ab_settled",
            "1 for the version that all users were given: by promote, rollback or a split of 0 or 100.",
            ("arm",),
        ),
        Family("counter", "redpp_ab_requests_total", "Users' requests by version.", ("arm",)),
        Family(
            "counter",
            "redpp_ab_failed_over_total",
            "Requests of the version's users that the other one answered, since it was dead or failed.",
            ("arm",),
        ),
        Family("counter", "redpp_ab_pairs_total", "Users' requests that were replayed on both versions."),
        Family("counter", "redpp_ab_dropped_total", "Mirrored requests not replayed for want of time."),
        Family("gauge", "redpp_ab_agreement_ratio", "Share of pairs whose outputs agree."),
        Family(
            "gauge",
            "redpp_ab_speedup_ratio",
            "Time of the original over time of the pruned version, with the bounds of its confidence sequence.",
            ("source", "bound"),
        ),
        Family("gauge", "redpp_ab_verdict", "1 for the verdict that holds now.", ("kind",)),
        Family("gauge", "redpp_ab_advice", "1 for the advice that holds now.", ("kind",)),
        Family("gauge", "redpp_ab_advice_reason", "1 for what the advice rests on.", ("reason",)),
        Family("gauge", "redpp_ab_problems", "Number of things that cannot be read or mended now."),
    )
}
Samples = dict[tuple[str, ...], float]  # values of the family's own labels -> value


class AbTestCollector:
    """Turns the latest `Status` into samples when Prometheus asks; there are none before the first."""

    def __init__(self, latest: Callable[[], Status | None]) -> None:
        self._latest = latest

    def collect(self) -> Iterator[Metric]:
        """Yield the families for prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

        status = self._latest()
        if status is None:
            return
        for name, samples in _samples(status).items():
            kind = CounterMetricFamily if AB_FAMILIES[name].kind == "counter" else GaugeMetricFamily
            made = kind(name, AB_FAMILIES[name].help, labels=["model", *AB_FAMILIES[name].labels])
            for labels, value in samples.items():
                made.add_metric([status.name, *labels], value)
            yield made


def registry(latest: Callable[[], Status | None]) -> CollectorRegistry:
    """Return a registry with the A/B test's metrics alone."""
    from prometheus_client import CollectorRegistry  # noqa: PLC0415

    own = CollectorRegistry()
    own.register(AbTestCollector(latest))
    return own


def serve_metrics(
    latest: Callable[[], Status | None], port: int = 0, address: str = ADDRESS
) -> tuple[int, Callable[[], None]]:
    """Serve an A/B test's own metrics.

    Args:
        latest: returns the status; None before the first.
        port: 0 for a free one.
        address: who may ask.

    Returns:
        The port, and a function that ends it.

    Raises:
        OSError: the port is in use.
    """
    from prometheus_client import start_http_server  # noqa: PLC0415

    server, thread = start_http_server(port, address, registry(latest))

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, end


def _samples(status: Status) -> dict[str, Samples]:
    shadow = status.shadow
    agreement = shadow.agreement if shadow else None
    return {
        "redpp_ab_traffic_ratio": {
            # as configured, or all to one version after a promotion or rollback
            (arm,): float(arm == status.all_to) if status.all_to else status.arms[arm].configured
            for arm in NAMES
        },
        "redpp_ab_settled": _one_of(NAMES, _settled(status)),
        "redpp_ab_requests_total": {(arm,): status.arms[arm].requests for arm in NAMES},
        "redpp_ab_failed_over_total": {(arm,): status.arms[arm].failed_over for arm in NAMES},
        "redpp_ab_pairs_total": {(): shadow.pairs if shadow else 0},
        "redpp_ab_dropped_total": {(): shadow.dropped if shadow else 0},
        "redpp_ab_agreement_ratio": {} if agreement is None else {(): agreement},
        "redpp_ab_speedup_ratio": dict(_speedups(status)),
        "redpp_ab_verdict": _one_of(KINDS, deciding(status.findings).verdict.kind),
        "redpp_ab_advice": _one_of(ADVICE_KINDS, status.advice.kind),
        "redpp_ab_advice_reason": {(status.advice.reason,): 1.0},
        "redpp_ab_problems": {(): float(len(status.problems))},
    }


def _settled(status: Status) -> str | None:
    """Return the arm that all users were given; None while they are divided, or the pruned version is shadowed."""
    everything = [arm for arm in NAMES if status.arms[arm].configured == 1 and not status.spec.shadow]
    return status.all_to or next(iter(everything), None)


def _one_of(kinds: Iterable[str], chosen: str | None) -> Samples:
    return {(kind,): float(kind == chosen) for kind in kinds}


def _speedups(status: Status) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield the bounds of the first finding with an interval for each source."""
    seen = set()
    for finding in status.findings:
        verdict = finding.verdict
        if finding.source in seen or verdict.mean is None or math.isinf(verdict.high):
            continue
        seen.add(finding.source)
        for bound, value in (("low", verdict.low), ("mean", verdict.mean), ("high", verdict.high)):
            yield (finding.source, bound), value
