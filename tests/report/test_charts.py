"""Charts are well-formed, safe with untrusted names, and draw the numbers they are given."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from redpp_serve.report.charts import ErrorRow, KeptRow, density_chart, error_chart, kept_chart

EVIL = '<script>alert("x")</script> & \x00\x1b\ud800 "quoted\''


def _bars(svg: str, css: str) -> list[ET.Element]:
    return [bar for bar in ET.fromstring(svg).iter("rect") if bar.get("class") == css]


@pytest.mark.parametrize(
    "svg",
    [
        kept_chart("k", [KeptRow(EVIL, 3, 4), KeptRow("", None, None)]),
        error_chart("e", [ErrorRow(EVIL, 0.1, 0.2), ErrorRow("none", None, math.nan)]),
        density_chart("d", EVIL, {"x": [0.0, 1.0, 2.0], "y": [0.0, 1.0, 0.0], "edges": [0.5], "modes": [1.0]}),
        kept_chart("k", []),
        error_chart("e", []),
    ],
)
def test_every_svg_is_valid_xml_with_title_and_description(svg: str) -> None:
    root = ET.fromstring(svg)
    ids = {child.get("id"): child for child in root}
    title, description = (ids[name] for name in (root.get("aria-labelledby") or "").split())
    assert (title.tag, description.tag) == ("title", "desc") and title.text and description.text
    assert root.get("role") == "img"
    assert "script" not in {element.tag for element in root.iter()}


def test_kept_bars_have_the_share_as_width() -> None:
    svg = kept_chart("k", [KeptRow("a", 8, 32), KeptRow("b", 32, 32), KeptRow("c", 5, None), KeptRow("d", 0, 8)])
    assert [bar.get("width") for bar in _bars(svg, "kept")] == ["25.00%", "100.00%"]
    assert [t.text for t in ET.fromstring(svg).iter("text")][1::2] == ["8/32", "32/32", "5/–", "0/8"]
    assert "2 layers lost channels" in svg


def test_errors_share_one_scale() -> None:
    svg = error_chart("e", [ErrorRow("a", 0.01, 0.04), ErrorRow("b", 0.02, None), ErrorRow("c", None, None)])
    assert [bar.get("width") for bar in _bars(svg, "error")] == ["25.00%", "50.00%"]
    assert [mark.get("x") for mark in _bars(svg, "mark")] == ["99.50%"]


def test_all_zero_errors_draw_no_bar() -> None:
    assert _bars(error_chart("e", [ErrorRow("a", 0.0, 0.0)]), "error") == []


def test_density_draws_each_edge_and_mode_inside_the_range() -> None:
    density = {"x": [-1.0, 0.0, 1.0], "y": [0.0, 2.0, 0.0], "edges": [-5.0, -0.5, 0.5, None], "modes": [-1.0, 0.0, 1.0]}
    root = ET.fromstring(density_chart("d", "w", density))
    paths = {path.get("class"): path.get("d") for path in root.iter("path")}
    assert paths["cells"] == "M80.0 4V110M240.0 4V110"
    assert paths["modes"] == "M0.0 110v8M160.0 110v8M320.0 110v8"
    assert paths["line"] == "M0.0 110.0L160.0 8.0L320.0 110.0"


@pytest.mark.parametrize(
    "density",
    [None, {}, {"x": [1.0], "y": [1.0]}, {"x": [1.0, 1.0], "y": [1.0, 2.0]}, {"x": [None, 2.0], "y": [1.0, math.inf]}],
)
def test_density_without_a_curve_is_empty(density: dict[str, list[float]] | None) -> None:
    assert density_chart("d", "w", density) == ""
