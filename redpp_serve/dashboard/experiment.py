"""The card of a running A/B test, from the gauges that it exports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redpp_serve.dashboard.history import Window
from redpp_serve.dashboard.scraping import VARIANTS, Key
from redpp_serve.dashboard.words import NAMES
from redpp_serve.report.formats import DASH, exact, percent

_SOURCES = {"shadow": "shadow, same requests", "split": "split traffic"}
_VERDICTS = {
    "faster": "The pruned model is faster",
    "slower": "The pruned model is slower",
    "equivalent": "No difference that matters",
    "undecided": "Undecided so far",
}
_ADVICE = {
    "promote": "Promote the pruned model",
    "rollback": "Roll back to the original",
    "wait": "Wait for more requests",
}


def experiment(gauges: Mapping[Key, float], window: Window) -> dict[str, Any] | None:
    """Verdict, advice, traffic share, agreement and intervals; None where no A/B test runs."""
    if not any(key.name.startswith("redpp_ab_") for key in gauges):
        return None
    intervals = [found for source in _SOURCES if (found := _interval(gauges, source))]
    kind = _current(gauges, "redpp_ab_verdict", _VERDICTS)
    text = _VERDICTS.get(kind, "No verdict yet")
    if basis := next((each for each in intervals if _agrees(each, kind)), None):
        text += f": {basis['low']:.2f} to {basis['high']:.2f} times as fast"
    advice = _current(gauges, "redpp_ab_advice", _ADVICE)
    return {
        "verdict": text,
        "kind": kind,
        "advice": _ADVICE.get(advice, "No advice yet"),
        "advice_kind": advice,
        "intervals": intervals,
        "shares": _shares(gauges),
        "rows": _rows(gauges, window),
    }


def _current(gauges: Mapping[Key, float], name: str, kinds: Mapping[str, str]) -> str:
    return next((kind for kind in kinds if gauges.get(Key(name, "", kind), 0.0) >= 1), "")


def _agrees(interval: Mapping[str, Any], kind: str) -> bool:
    """Whether a verdict can rest on an interval: with two sources, it may rest on the other one."""
    if kind in ("faster", "slower"):
        return bool(interval["low"] > 1 if kind == "faster" else interval["high"] < 1)
    return kind in _VERDICTS and bool(interval["low"] <= 1 <= interval["high"])


def _interval(gauges: Mapping[Key, float], source: str) -> dict[str, Any] | None:
    bounds = ("low", "mean", "high")
    found = {bound: gauges.get(Key("redpp_ab_speedup_ratio", "", f"{source} {bound}")) for bound in bounds}
    if any(value is None or value < 0 for value in found.values()):
        return None
    text = f"{found['mean']:.2f}x ({found['low']:.2f} to {found['high']:.2f})"
    return {"label": _SOURCES[source], "text": text, **found}


def _shares(gauges: Mapping[Key, float]) -> list[dict[str, Any]]:
    """Configured shares; empty where they are not exported."""
    found = [gauges.get(Key("redpp_ab_traffic_ratio", "", arm)) for arm in VARIANTS]
    known = [min(max(value, 0.0), 1.0) for value in found if value is not None]
    if len(known) < len(VARIANTS):
        return []
    return [
        {"arm": arm, "share": share, "text": f"{NAMES[arm]} {100 * share:.0f} %"} for arm, share in zip(VARIANTS, known)
    ]


def _rows(gauges: Mapping[Key, float], window: Window) -> list[list[str]]:
    sent = [window.total("redpp_ab_requests_total", "", arm) for arm in VARIANTS]
    total = sum(sent)
    parts = [f"{NAMES[arm]} {100 * n / total:.1f} %" for arm, n in zip(VARIANTS, sent)] if total else ["no traffic"]
    rows = [["share of the requests in this window", " and ".join(parts)]]
    pairs = gauges.get(Key("redpp_ab_pairs_total", ""))
    if pairs:
        agreement = gauges.get(Key("redpp_ab_agreement_ratio", ""))
        rows += [
            ["pairs compared", exact(pairs)],
            ["outputs that agree", DASH if agreement is None else percent(agreement)],
        ]
    if dropped := gauges.get(Key("redpp_ab_dropped_total", "")):
        rows.append(["requests not compared, recorder busy", exact(dropped)])
    return rows
