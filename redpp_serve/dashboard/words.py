"""The headline: one sentence that says what the numbers say, also when there are none."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from redpp_serve.dashboard.history import Window
from redpp_serve.dashboard.scraping import VARIANTS, Target
from redpp_serve.dashboard.speedups import HANDLER, Ratio, equal_batch_ratio, noise, percentile_ratio, same_bucket
from redpp_serve.report.formats import exact, milliseconds, printable, rate, shorten

NAMES = {"original": "original", "pruned": "pruned"}
_EVEN = 0.02  # ratios nearer to 1 are not called faster or slower


class Headline(NamedTuple):
    """``state``: faster, slower, even, waiting or down."""

    text: str
    detail: str
    state: str


def last(window: Window) -> str:
    """'last 60 s', or '15 min' from two minutes on: the span that the numbers are really from."""
    return f"last {window.span:.0f} s" if window.span < 120 else f"last {window.span / 60:.0f} min"


def span(low: float, high: float, scale: float = 1.0, unit: str = "") -> str:
    """'2.00 to 2.83 ms', or 'above 4096 ms' without an upper end."""
    digits = 2 if scale * low < 100 else 0
    start = f"{scale * low:.{digits}f}"
    found = f"above {start}" if math.isinf(high) else f"{start} to {scale * high:.{digits}f}"
    return f"{found} {unit}".rstrip()


def headline(model: str, window: Window, targets: Sequence[Target], down_s: float) -> Headline:
    """The first that applies: no answer, no metrics, no traffic, traffic of one version, which is faster.

    Args:
        model: served name.
        targets: in the state of the last scrape.
        down_s: seconds since a server of the model answered.
    """
    serving = [target for target in targets if target.serves] or targets
    if all(target.problem for target in serving):
        why = shorten(serving[0].problem, 120) if serving else "no address"
        since = f"For {down_s:.0f} s: " if down_s >= 1 else ""
        detail = f"{since}{why}. The page goes on by itself when it is back."
        return Headline("The server does not answer", detail, "down")
    if not any(target.serves for target in targets):
        return Headline(f"No metrics of {shorten(model, 60)} so far", _others(targets), "waiting")
    batches = {variant: window.total(f"{HANDLER}_count", variant) for variant in VARIANTS}
    busy = [variant for variant in VARIANTS if batches[variant] > 0]
    if not busy:
        when = f"in the {last(window)}" if window.span >= 1 else "yet"
        return Headline(f"No traffic {when}", "Requests to both versions show which is faster.", "waiting")
    if len(busy) == 1:
        return _one_only(window, busy[0])
    return _faster(window, batches["original"], batches["pruned"])


def _others(targets: Sequence[Target]) -> str:
    others: Collection[str] = sorted({name for target in targets for name in target.others})
    if not others:
        return "The address answers, without a version of this model. They show up as soon as they are served."
    return f"The address has metrics of {', '.join(shorten(name, 40) for name in list(others)[:5])}."


def _one_only(window: Window, variant: str) -> Headline:
    p50 = window.quantile(HANDLER, variant, 0.5)
    answers = rate(window.rate("redpp_requests_total", variant, "ok"))
    return Headline(
        f"Only the {NAMES[variant]} model had traffic ({last(window)})",
        f"Handler time p50 {milliseconds(p50 and 1000 * p50.value)}, {answers} answers. "
        "Requests to both versions show which is faster.",
        "waiting",
    )


def _faster(window: Window, original: float, pruned: float) -> Headline:
    shared, mean = same_bucket(window, 0.5), equal_batch_ratio(window)
    counts = f"From {exact(original)} and {exact(pruned)} batches."
    error = noise(window)
    if mean and error is not None and abs(math.log(mean.value)) < 2 * error:
        return Headline(
            f"No clear difference between the versions ({last(window)})",
            f"{_pair('Mean handler time at equal batch size', mean)} At {mean.value:.2f} times, give or "
            f"take {200 * error:.1f} %, the difference can be noise. {counts}",
            "even",
        )
    if shared and mean:
        where = span(shared.low, shared.high, 1000, "ms")
        return _sentence(
            mean,
            f"mean at equal batch size, {last(window)}",
            f"{_pair('Mean handler time', mean)} The p50 of both lie in one bucket, {where}, "
            f"and cannot be told apart. {counts}",
        )
    ratio = percentile_ratio(window, 0.5)
    if ratio is None:
        return Headline("The handler's times are too short to compare", counts, "waiting")
    bounds = span(ratio.low or 0.0, math.inf if ratio.high is None else ratio.high)
    detail = f"{_pair('Handler time p50', ratio)} Within bucket precision the factor is {bounds}. {counts}"
    return _sentence(ratio, f"p50, {last(window)}", detail)


def _pair(what: str, ratio: Ratio) -> str:
    return f"{what}: original {milliseconds(1000 * ratio.original)}, pruned {milliseconds(1000 * ratio.pruned)}."


def _sentence(ratio: Ratio, basis: str, detail: str) -> Headline:
    if abs(ratio.value - 1) < _EVEN:
        return Headline(f"Both versions answer equally fast ({basis})", detail, "even")
    state = "faster" if ratio.value > 1 else "slower"
    return Headline(f"The pruned model answers {ratio.value:.2f} times as fast ({basis})", detail, state)


def source_text(target: Target) -> str:
    """The state of one metrics URL in words."""
    return f"down: {printable(shorten(target.problem, 120))}" if target.problem else "answers"
