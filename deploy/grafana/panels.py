"""Panels in this project's style: colours by version, units, and one line of help, as builders of the Grafana SDK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    TooltipDisplayMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import DataSourceRef, DynamicConfigValue, Threshold, ThresholdsMode
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from queries import expression

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
ORIGINAL, PRUNED = "#8ab8ff", "#f2994a"
_COLOURS = {"good": "#37872d", "bad": "#c4162a"}


def panel(given: Mapping[str, Any]) -> Any:
    """Build a panel from its entry in ``boards.yaml``.

    Args:
        given: its ``kind``, see below, ``title``, ``text`` (the help), ``width`` (of 24) and ``series`` (legend ->
            recording rule or expression); for some kinds a ``unit``, ``min`` and ``max`` of the axis, ``colours`` (each
            holds from its value on, the first one for all below too), and the text for an ``empty`` panel.
    """
    kind = given["kind"]
    made = {"lines": _lines, "number": _number, "word": _word, "bars": _bars, "heat": _heat}[kind](given)
    made.title(given["title"]).description(given["text"]).datasource(SOURCE).span(given["width"])
    if kind != "heat":
        made.unit(given.get("unit", "none"))
    for letter, (legend, shown) in zip("ABCDEFGH", given["series"].items(), strict=False):
        query = prometheus.Dataquery().expr(expression(shown, given.get("about", "versions")))
        query.legend_format(legend).ref_id(letter).datasource(SOURCE)
        if kind == "heat":
            query.format(PromQueryFormat.HEATMAP)
        else:
            query.instant() if kind in ("word", "bars") else query.range()
        made.with_target(query)
    return made


def _lines(given: Mapping[str, Any]) -> timeseries.Panel:
    """Show values over time."""
    legend = (
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.TABLE)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "mean"])
    )
    tooltip = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)
    made = timeseries.Panel().legend(legend).tooltip(tooltip).line_width(2).fill_opacity(4)
    for name, colour in (("original", ORIGINAL), ("pruned", PRUNED)):
        made.override_by_regexp(f"/\\b{name}\\b/", [_set("color", {"mode": "fixed", "fixedColor": colour})])
    for start, dash in (("p95", [10, 10]), ("p99", [2, 6])):  # of one colour, told apart by strokes
        made.override_by_regexp(f"/\\b{start}\\b/", [_set("custom.lineStyle", {"fill": "dash", "dash": dash})])
    for name in ("min", "max"):
        if name in given:
            getattr(made, name)(given[name])
    return made


def _number(given: Mapping[str, Any]) -> stat.Panel:
    """Show the value now."""
    several = len(given["series"]) > 1
    made = stat.Panel().graph_mode(BigValueGraphMode.NONE if several else BigValueGraphMode.AREA)
    made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).decimals(2)
    if colours := given.get("colours"):
        steps = [Threshold(value=value, color=_COLOURS[colour]) for value, colour in colours.items()]
        steps[0].value = None
        made.thresholds(builders.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    if several:
        made.text_mode(BigValueTextMode.VALUE_AND_NAME)
    return made.no_value(given["empty"]) if "empty" in given else made


def _word(given: Mapping[str, Any]) -> stat.Panel:
    """Show the name of the series that exists now."""
    made = stat.Panel().text_mode(BigValueTextMode.NAME).graph_mode(BigValueGraphMode.NONE)
    return made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def _bars(given: Mapping[str, Any]) -> bargauge.Panel:
    """Show a bar for each series, over the dashboard's whole time range."""
    made = bargauge.Panel().orientation(VizOrientation.HORIZONTAL)
    return made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def _heat(given: Mapping[str, Any]) -> heatmap.Panel:
    """Show buckets of seconds over time."""
    made = heatmap.Panel().calculate(False).y_axis(heatmap.YAxisConfig().unit("s"))
    return made.color(
        heatmap.HeatmapColorOptions()
        .mode(HeatmapColorMode.SCHEME)
        .scheme("Oranges")
        .fill("dark-orange")
        .exponent(0.5)
        .steps(64)
    )


def _set(name: str, value: object) -> DynamicConfigValue:
    return DynamicConfigValue(id_val=name, value=value)
