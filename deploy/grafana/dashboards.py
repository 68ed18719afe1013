"""The dashboards as code: ``python deploy/grafana/dashboards.py`` writes ``dashboards/*.json`` anew.

The files import into Grafana 11 unedited: the data source, the server, the model and the version are variables.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
)
from panels import BAD, GOOD, SOURCE, TIMES, bars, heat, lines, number, word
from queries import AB_TEST, INTERVAL, MODEL, matched, recorded

FOLDER = Path(__file__).parent / "dashboards"
OF_VERSION = "{{variant}} {{version}} {{server}}"
SPEED: dict[float, str] = {0: BAD, 1: GOOD}
Rows = dict[str, list[Any]]  # title of a row to panels with their widths set


def dashboards() -> dict[str, str]:
    """Return file names with JSON texts, the same on every call."""
    made = {"redpp-serving.json": _serving(), "redpp-ab.json": _ab_test()}
    return {
        name: json.dumps(board.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, board in made.items()
    }


def _serving() -> builders.Dashboard:
    board = _board("redpp-serving", "redpp-serve: original and pruned version", "Both versions of a model as served.")
    served = 'redpp_requests_total{server=~"$server"'
    board.with_variable(_variable("server", "label_values(redpp_requests_total, server)"))
    board.with_variable(_variable("model", f"label_values({served}}}, model)"))
    board.with_variable(_variable("version", f'label_values({served}, model=~"$model"}}, version)'))
    return _with_rows(
        board,
        {
            "Speed-up now": _now(),
            "Latency": _latency(),
            "Load": _load(),
            "Resources": _resources(),
            "Kernels": _kernels(),
        },
    )


def _now() -> list[Any]:
    paired = matched('redpp_ab_speedup_ratio{bound="%s"}', AB_TEST)
    smaller = "sum by (server, model) ({0}{{variant='original'}}) / sum by (server, model) ({0}{{variant='pruned'}})"
    return [
        number(
            "At equal batch size",
            "Handler time of the original / of the pruned version, for batches of equal size. Above 1 "
            "the pruned version is faster. The fairest figure without an A/B test.",
            TIMES,
            {"{{model}} {{server}}": recorded("model:redpp_speedup_equal_batch:ratio5m", MODEL)},
            SPEED,
        ).span(6),
        number(
            "As served",
            "Handler time for one request, as users got it, whatever the batches.",
            TIMES,
            {"{{model}} {{server}}": recorded("model:redpp_speedup_handler:ratio5m", MODEL)},
            SPEED,
        ).span(4),
        number(
            "Network alone",
            "Time of the network for one request, without parsing and replies.",
            TIMES,
            {"{{model}} {{server}}": recorded("model:redpp_speedup_inference:ratio5m", MODEL)},
            SPEED,
        ).span(4),
        number(
            "A/B test, 95 % interval",
            "From a running A/B test (redpp-serve ab); valid at any moment.",
            TIMES,
            {f"{{{{source}}}} {bound}": paired % bound for bound in ("low", "mean", "high")},
            SPEED,
        )
        .no_value("no A/B test")
        .span(6),
        number(
            "Smaller",
            "Original / pruned version.",
            TIMES,
            {what: matched(smaller.format(f"redpp_model_{what}"), MODEL) for what in ("parameters", "macs", "bytes")},
        ).span(4),
    ]


def _latency() -> list[Any]:
    def percentiles(metric: str) -> dict[str, str]:
        return {f"p{p} {OF_VERSION}": recorded(f"version:redpp_{metric}_seconds:p{p}_5m") for p in (50, 95, 99)}

    def buckets(variant: str) -> str:
        return matched(f"sum by (le) (increase(redpp_handler_seconds_bucket{{variant='{variant}'}}[{INTERVAL}]))")

    return [
        lines(
            "Handler, by version",
            "Time of one batch from parsing to reply, over all workers.",
            "s",
            percentiles("handler"),
            min=0,
        ).span(12),
        lines("Network, by version", "Time of one run of the network.", "s", percentiles("inference"), min=0).span(12),
        heat("Handler of the original", "Batches by the time they took.", buckets("original")).span(12),
        heat("Handler of the pruned version", "Batches by the time they took.", buckets("pruned")).span(12),
        lines(
            "Speed-up",
            "Time of the original / of the pruned version; above 1 the pruned version is faster.",
            TIMES,
            {
                "at equal batch size {{server}}": recorded("model:redpp_speedup_equal_batch:ratio5m", MODEL),
                "as served {{server}}": recorded("model:redpp_speedup_handler:ratio5m", MODEL),
                "network alone {{server}}": recorded("model:redpp_speedup_inference:ratio5m", MODEL),
            },
        ).span(12),
        lines(
            "Speed-up by batch size",
            "Handler time of batches with exactly this number of requests.",
            TIMES,
            {"batch of {{batch}} {{server}}": recorded("batch:redpp_speedup:ratio5m", MODEL)},
        ).span(12),
    ]


def _load() -> list[Any]:
    outcomes = f"sum by (server, version, variant, outcome) (rate(redpp_requests_total[{INTERVAL}]))"
    sizes = "sum by (variant, batch) (increase(redpp_batches_total[$__range]))"
    return [
        lines(
            "Requests",
            "Each second, whatever became of them.",
            "reqps",
            {OF_VERSION: recorded("version:redpp_requests:rate5m")},
            min=0,
        ).span(8),
        lines(
            "Traffic share",
            "Share of the model's requests that each version answered.",
            "percentunit",
            {OF_VERSION: recorded("version:redpp_traffic:ratio5m", MODEL)},
            min=0,
            max=1,
        ).span(8),
        lines(
            "By outcome",
            "bad_request is the client's fault, error the server's.",
            "reqps",
            {f"{{{{outcome}}}} {OF_VERSION}": matched(outcomes)},
            min=0,
        ).span(8),
        lines(
            "Errors",
            "Share of requests that ended in an error of the server.",
            "percentunit",
            {OF_VERSION: recorded("version:redpp_errors:ratio5m")},
            min=0,
        ).span(8),
        lines(
            "Batch size",
            "Mean number of requests in a batch.",
            "none",
            {OF_VERSION: recorded("version:redpp_batch_size:mean5m")},
            min=0,
        ).span(8),
        bars(
            "Batches by size",
            "Batches by number of requests, over the whole time range.",
            "none",
            {"{{batch}} in a batch, {{variant}}": matched(sizes)},
        ).span(8),
    ]


def _resources() -> list[Any]:
    def memory(metric: str) -> str:
        return matched(f"sum by (server, version, variant) ({metric})")

    return [
        lines(
            "CPU",
            "Processor cores that the workers use.",
            "none",
            {OF_VERSION: recorded("version:redpp_worker_cpu:rate5m")},
            min=0,
        ).span(6),
        lines(
            "CPU time of a request",
            "CPU seconds of the workers for one request.",
            "s",
            {OF_VERSION: recorded("version:redpp_worker_cpu_seconds:per_request_5m")},
            min=0,
        ).span(6),
        lines(
            "Memory",
            "Resident memory of the living workers.",
            "bytes",
            {OF_VERSION: memory("redpp_worker_resident_bytes")},
            min=0,
        ).span(6),
        lines(
            "GPU memory",
            "Tensors on the GPU; empty without a GPU.",
            "bytes",
            {
                f"{{{{device}}}} {OF_VERSION}": matched(
                    "sum by (server, version, variant, device) (redpp_device_memory_bytes{device!='cpu'})"
                )
            },
            min=0,
        ).span(6),
    ]


def _kernels() -> list[Any]:
    layers = "max by (server, version, variant, kernel, batch) (redpp_plan_layers)"
    plan = "max by (server, version, variant, device, precision, digest) (redpp_plan_info)"
    return [
        bars(
            "Kernels chosen",
            "Layers that each kernel runs, by batch bucket.",
            "none",
            {f"{{{{kernel}}}}, batch of {{{{batch}}}}, {OF_VERSION}": matched(layers)},
        ).span(14),
        word(
            "Plans in use",
            "Precision and digest of the plan of kernels. All workers of a version should agree.",
            {f"{{{{precision}}}} {{{{digest}}}} {{{{device}}}}, {OF_VERSION}": matched(plan) + " == 1"},
        ).span(10),
    ]


def _ab_test() -> builders.Dashboard:
    board = _board("redpp-ab", "redpp-serve: A/B test", "A running A/B test: redpp-serve ab.")
    board.with_variable(_variable("model", "label_values(redpp_ab_verdict, model)"))
    return _with_rows(board, {"Verdict": _verdict(), "Evidence": _evidence(), "Traffic": _traffic()})


def _verdict() -> list[Any]:
    def bound(name: str) -> str:
        return matched(f'redpp_ab_speedup_ratio{{bound="{name}"}}', AB_TEST)

    return [
        word(
            "Verdict",
            "On the times of the two versions; valid however often you look.",
            {"{{model}}: {{kind}}": matched("redpp_ab_verdict", AB_TEST) + " == 1"},
        ).span(6),
        word(
            "Advice",
            "What to do, from the verdict and the guardrails.",
            {"{{model}}: {{kind}}": matched("redpp_ab_advice", AB_TEST) + " == 1"},
        ).span(6),
        number(
            "Speed-up, 95 % interval",
            "Time of the original / of the pruned version; above 1 the pruned version is faster.",
            TIMES,
            {f"{{{{source}}}} {name}": bound(name) for name in ("low", "mean", "high")},
            SPEED,
        ).span(6),
        number(
            "Agreement",
            "Share of pairs whose outputs agree.",
            "percentunit",
            {"{{model}}": matched("redpp_ab_agreement_ratio", AB_TEST)},
            {0: BAD, 0.99: GOOD},
        ).span(6),
    ]


def _evidence() -> list[Any]:
    def bound(name: str) -> str:
        return matched(f'redpp_ab_speedup_ratio{{bound="{name}"}}', AB_TEST)

    return [
        lines(
            "Speed-up and its interval",
            "The interval narrows as evidence comes in; it decides when it excludes 1 or lies within the margin.",
            TIMES,
            {f"{{{{source}}}} {name}": bound(name) for name in ("low", "mean", "high")},
        ).span(12),
        lines(
            "Agreement",
            "Share of pairs whose outputs agree.",
            "percentunit",
            {"{{model}}": matched("redpp_ab_agreement_ratio", AB_TEST)},
            max=1,
        ).span(6),
        lines(
            "Pairs",
            "Mirrored requests per second: replayed on both versions, and left out because the recorder was busy.",
            "reqps",
            {
                "compared": matched(f"rate(redpp_ab_pairs_total[{INTERVAL}])", AB_TEST),
                "left out": matched(f"rate(redpp_ab_dropped_total[{INTERVAL}])", AB_TEST),
            },
            min=0,
        ).span(6),
    ]


def _traffic() -> list[Any]:
    rate = f"sum by (model, arm) (rate(redpp_ab_requests_total[{INTERVAL}]))"
    share = f"{rate} / on (model) group_left () (sum by (model) (rate(redpp_ab_requests_total[{INTERVAL}])) > 0)"
    return [
        lines(
            "Share of the traffic",
            "Configured and actual shares.",
            "percentunit",
            {"{{arm}}, configured": matched("redpp_ab_traffic_ratio", AB_TEST), "{{arm}}": matched(share, AB_TEST)},
            min=0,
            max=1,
        ).span(12),
        lines(
            "Requests by arm",
            "Requests per second at the gateway.",
            "reqps",
            {"{{arm}}": matched(rate, AB_TEST)},
            min=0,
        ).span(12),
    ]


def _board(uid: str, title: str, text: str) -> builders.Dashboard:
    board = builders.Dashboard(title).uid(uid).description(text).tags(["redpp-serve"]).timezone("browser")
    board.link(builders.DashboardLink("redpp-serve").type(DashboardLinkType.DASHBOARDS).tags(["redpp-serve"]))
    board.time("now-30m", "now").refresh("10s").tooltip(DashboardCursorSync.CROSSHAIR)
    return board.with_variable(builders.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))


def _variable(name: str, query: str) -> builders.QueryVariable:
    made = builders.QueryVariable(name).label(name.capitalize()).datasource(SOURCE).query(query)
    made.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).multi(True).include_all(True).all_value(".*")
    return made.current(VariableOption(selected=True, text=["All"], value=["$__all"]))


def _with_rows(board: builders.Dashboard, rows: Rows) -> builders.Dashboard:
    numbers = count(1)
    for title, made in rows.items():
        board.with_row(builders.Row(title).id(next(numbers)))
        for panel in made:
            board.with_panel(panel.id(next(numbers)).height(5 if title in ("Speed-up now", "Verdict") else 9))
    return board


if __name__ == "__main__":
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")
