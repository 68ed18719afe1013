"""Panels in this project's style: colours by version, units, and one line of help, as builders of the Grafana SDK."""

from __future__ import annotations

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

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
ORIGINAL, PRUNED, GOOD, BAD = "#8ab8ff", "#f2994a", "#37872d", "#c4162a"
TIMES = "suffix: x"  # unit of a speed-up
Targets = dict[str, str]  # text of the legend to expression


def lines(title: str, text: str, unit: str, targets: Targets, **limits: float) -> timeseries.Panel:
    """Build a panel of values over time; ``limits`` are ``min`` and ``max`` of the axis."""
    legend = (
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.TABLE)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "mean"])
    )
    tooltip = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)
    panel = timeseries.Panel().legend(legend).tooltip(tooltip).line_width(2).fill_opacity(4)
    for name, colour in (("original", ORIGINAL), ("pruned", PRUNED)):
        panel.override_by_regexp(f"/\\b{name}\\b/", [_set("color", {"mode": "fixed", "fixedColor": colour})])
    for start, dash in (("p95", [10, 10]), ("p99", [2, 6])):  # of one colour, told apart by strokes
        panel.override_by_regexp(f"/\\b{start}\\b/", [_set("custom.lineStyle", {"fill": "dash", "dash": dash})])
    for name, value in limits.items():
        getattr(panel, name)(value)
    _fill(panel, title, text, unit, targets)
    return panel


def number(title: str, text: str, unit: str, targets: Targets, colours: dict[float, str] | None = None) -> stat.Panel:
    """Build a panel of the value now; each of ``colours`` holds from its value on, the first one for all below too."""
    panel = stat.Panel().graph_mode(BigValueGraphMode.AREA if len(targets) == 1 else BigValueGraphMode.NONE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).decimals(2)
    if colours:
        panel.thresholds(_thresholds(colours))
    if len(targets) > 1:
        panel.text_mode(BigValueTextMode.VALUE_AND_NAME)
    _fill(panel, title, text, unit, targets)
    return panel


def word(title: str, text: str, targets: Targets) -> stat.Panel:
    """Build a panel with the name of the series that exists now."""
    panel = stat.Panel().text_mode(BigValueTextMode.NAME).graph_mode(BigValueGraphMode.NONE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    _fill(panel, title, text, "none", targets, instant=True)
    return panel


def bars(title: str, text: str, unit: str, targets: Targets) -> bargauge.Panel:
    """Build a panel with a bar for each series, over the dashboard's whole time range."""
    panel = bargauge.Panel().orientation(VizOrientation.HORIZONTAL)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    _fill(panel, title, text, unit, targets, instant=True)
    return panel


def heat(title: str, text: str, expression: str) -> heatmap.Panel:
    """Build a heat map of buckets of seconds over time."""
    panel = heatmap.Panel().calculate(False).y_axis(heatmap.YAxisConfig().unit("s"))
    panel.color(
        heatmap.HeatmapColorOptions()
        .mode(HeatmapColorMode.SCHEME)
        .scheme("Oranges")
        .fill("dark-orange")
        .exponent(0.5)
        .steps(64)
    )
    query = _query("{{le}}", expression, "A").format(PromQueryFormat.HEATMAP)
    return panel.title(title).description(text).datasource(SOURCE).with_target(query)


def _fill(panel: Any, title: str, text: str, unit: str, targets: Targets, instant: bool = False) -> None:
    panel.title(title).description(text).unit(unit).datasource(SOURCE)
    for letter, (legend, expression) in zip("ABCDEFGH", targets.items(), strict=False):
        query = _query(legend, expression, letter)
        panel.with_target(query.instant() if instant else query.range())


def _query(legend: str, expression: str, letter: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(letter).datasource(SOURCE)


def _thresholds(colours: dict[float, str]) -> builders.ThresholdsConfig:
    steps = [Threshold(value=value, color=colour) for value, colour in colours.items()]
    steps[0].value = None
    return builders.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _set(name: str, value: object) -> DynamicConfigValue:
    return DynamicConfigValue(id_val=name, value=value)
