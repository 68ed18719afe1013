"""Charts are well-formed, safe with untrusted names, and draw the numbers they are given."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from redpp_serve.report.charts import FLOOR, LEFT, RIGHT, TOP, Mark, error_chart, frontier_chart, kept_chart
from redpp_serve.report.charts import density_chart as draw_density
from redpp_serve.report.data import Density, FrontierPoint, Layer
from redpp_serve.report.tables import thinned

EVIL = '<script>alert("x")</script> & \x00\x1b\ud800 "quoted\''


def kept(name: str, channels: int | None, of: int | None) -> Layer:
    return Layer.from_json({"name": name, "merge": {"kept": channels, "channels": of}})


def errors(name: str, output: float | None, weights: float | None) -> Layer:
    return Layer.from_json({"name": name, "error": output, "hash": {"error": weights}})


def density_chart(identity: str, name: str, density: dict[str, list[float]] | None) -> str:
    return draw_density(identity, name, None if density is None else Density.from_json(density))


def _bars(svg: str, css: str) -> list[ET.Element]:
    return [bar for bar in ET.fromstring(svg).iter("rect") if bar.get("class") == css]


def test_every_svg_is_valid_xml_with_title_and_description() -> None:
    for svg in [
        kept_chart([kept(EVIL, 3, 4), kept("", None, None)]),
        error_chart([errors(EVIL, 0.1, 0.2), errors("none", None, math.nan)]),
        density_chart("d", EVIL, {"x": [0.0, 1.0, 2.0], "y": [0.0, 1.0, 0.0], "edges": [0.5], "modes": [1.0]}),
        kept_chart([]),
        error_chart([]),
    ]:
        root = ET.fromstring(svg)
        ids = {child.get("id"): child for child in root}
        title, description = (ids[name] for name in (root.get("aria-labelledby") or "").split())
        assert (title.tag, description.tag) == ("title", "desc") and title.text and description.text
        assert root.get("role") == "img"
        assert "script" not in {element.tag for element in root.iter()}


def test_kept_bars_have_the_share_as_width() -> None:
    svg = kept_chart([kept("a", 8, 32), kept("b", 32, 32), kept("c", 5, None), kept("d", 0, 8)])
    assert [bar.get("width") for bar in _bars(svg, "kept")] == ["25.00%", "100.00%"]
    assert [t.text for t in ET.fromstring(svg).iter("text")][1::2] == ["8/32", "32/32", "5/–", "0/8"]
    assert "2 layers lost channels" in svg


def test_errors_share_one_scale() -> None:
    svg = error_chart([errors("a", 0.01, 0.04), errors("b", 0.02, None), errors("c", None, None)])
    assert [bar.get("width") for bar in _bars(svg, "error")] == ["25.00%", "50.00%"]
    assert [mark.get("x") for mark in _bars(svg, "mark")] == ["99.50%"]


def test_all_zero_errors_draw_no_bar() -> None:
    assert _bars(error_chart([errors("a", 0.0, 0.0)]), "error") == []


def test_density_draws_each_edge_and_mode_inside_the_range() -> None:
    density = {"x": [-1.0, 0.0, 1.0], "y": [0.0, 2.0, 0.0], "edges": [-5.0, -0.5, 0.5, None], "modes": [-1.0, 0.0, 1.0]}
    root = ET.fromstring(density_chart("d", "w", density))
    paths = {path.get("class"): path.get("d") for path in root.iter("path")}
    assert paths["cells"] == "M80.0 4V110M240.0 4V110"
    assert paths["modes"] == "M0.0 110v8M160.0 110v8M320.0 110v8"
    assert paths["line"] == "M0.0 110.0L160.0 8.0L320.0 110.0"


def test_density_without_a_curve_is_empty() -> None:
    for density in [
        None,
        {},
        {"x": [1.0], "y": [1.0]},
        {"x": [1.0, 1.0], "y": [1.0, 2.0]},
        {"x": [None, 2.0], "y": [1.0, math.inf]},
    ]:
        assert density_chart("d", "w", density) == "", density


AXES = ("MACs", "error")
CURVE = [Mark(0.8, 0.1), Mark(0.2, 0.4), Mark(0.4, 0.2, chosen=True)]


def drawn(svg: str, tag: str, css: str) -> list[ET.Element]:
    return [e for e in ET.fromstring(svg).iter(tag) if css in (e.get("class") or "").split()]


def test_points_stand_where_their_numbers_say_and_join_in_order_of_cost() -> None:
    svg = frontier_chart("f", "Frontier", AXES, CURVE)
    # x runs from 20 % to 80 %, y from 0 to 40 %
    circles = drawn(svg, "circle", "point")
    places = sorted((float(c.get("cx", "").rstrip("%")), float(c.get("cy", ""))) for c in circles)
    third = LEFT + (RIGHT - LEFT) / 3
    assert [x for x, _ in places] == pytest.approx([LEFT, third, RIGHT], abs=0.01)
    assert [y for _, y in places] == pytest.approx([TOP, (TOP + FLOOR) / 2, FLOOR - (FLOOR - TOP) / 4], abs=0.06)
    joins = drawn(svg, "line", "join")
    assert len(joins) == 2 and joins[0].get("x2") == joins[1].get("x1") and joins[0].get("y2") == joins[1].get("y1")
    assert [float(j.get("x1", "").rstrip("%")) for j in joins] == pytest.approx([LEFT, third], abs=0.01)


def test_axes_have_round_labels_and_the_error_starts_at_zero() -> None:
    svg = frontier_chart("f", "Frontier", AXES, [Mark(0.43, 0.031), Mark(0.97, 0.002)])
    words = [t.text for t in ET.fromstring(svg).iter("text")]
    assert words[:2] == ["error", "MACs"]
    assert words[2:] == ["0 %", "1 %", "2 %", "3 %", "4 %", "40 %", "60 %", "80 %", "100 %"]
    assert len(drawn(svg, "line", "rule")) == 4  # and the axis itself


def test_only_the_chosen_one_is_labelled_and_it_lies_on_top() -> None:
    svg = frontier_chart("f", "Frontier", AXES, CURVE)
    assert [t.text for t in drawn(svg, "text", "name")] == ["chosen: 40 %, error 20.00 %"]
    (guide,) = drawn(svg, "line", "guide")
    circles = drawn(svg, "circle", "point")
    assert circles[-1].get("class") == "point chosen" and circles[-1].get("cx") == guide.get("x1")
    assert not drawn(frontier_chart("f", "Frontier", AXES, CURVE[:2]), "text", "name")


def test_intervals_are_drawn_and_stay_inside() -> None:
    svg = frontier_chart("f", "Frontier", AXES, [Mark(0.5, 0.1, 0.38, 0.62), Mark(0.6, 0.05)])
    (whisker,) = drawn(svg, "line", "whisker")
    low, high = (float(whisker.get(key, "").rstrip("%")) for key in ("x1", "x2"))
    assert LEFT <= low < high <= RIGHT


def test_every_chart_is_valid_and_everything_is_inside() -> None:
    for marks in [
        CURVE,
        [Mark(0.5, 0.02, chosen=True, label=EVIL)],
        [Mark(1.0, 0.0)],
        [Mark(0.5, 3e-9), Mark(0.50001, 1e-9)],
        [Mark(0.1, 40.0), Mark(1.2, 0.0), Mark(math.nan, 1.0), Mark(0.3, math.inf)],
    ]:
        svg = frontier_chart("f", EVIL, (EVIL, EVIL), marks)
        root = ET.fromstring(svg)
        assert root.get("role") == "img" and root.get("aria-labelledby") == "f-t f-d"
        assert root[0].tag == "title" and root[1].tag == "desc" and root[1].text
        assert "script" not in {e.tag for e in root.iter()}
        circles = drawn(svg, "circle", "point")
        assert len(circles) == sum(math.isfinite(m.x) and math.isfinite(m.y) for m in marks)
        for circle in circles:
            assert LEFT - 0.01 <= float(circle.get("cx", "").rstrip("%")) <= RIGHT + 0.01
            assert TOP - 0.1 <= float(circle.get("cy", "")) <= FLOOR + 0.1


def test_nothing_to_draw_is_empty() -> None:
    assert frontier_chart("f", "Frontier", AXES, []) == ""
    assert frontier_chart("f", "Frontier", AXES, [Mark(math.nan, 0.1)]) == ""


def test_thinning_keeps_both_ends_the_chosen_and_the_order() -> None:
    points = [FrontierPoint.from_json({"macs_ratio": 1 - k / 20, "chosen": k == 8}) for k in range(20)]
    for limit in range(3, 20):
        kept = thinned(points, limit)
        assert len(kept) == limit and kept[0] == points[0] and kept[-1] == points[-1]
        assert any(point.chosen for point in kept)
        assert kept == [point for point in points if point in kept]
    assert thinned(points, 50) == points
