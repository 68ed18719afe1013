"""The frontier's chart draws what it is given, its table has every point, and each stage's change adds up."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from redpp_serve.report.charts import (
    FLOOR,
    LEFT,
    RIGHT,
    TOP,
    Mark,
    Point,
    frontier_chart,
    frontier_points,
    frontier_section,
    share_section,
    thinned,
)
from tests.report.test_text import sample_report

EVIL = '<script>alert("x")</script> & \x00\x1b "quoted\''
AXES = ("MACs", "error")
CURVE = [Mark(0.8, 0.1), Mark(0.2, 0.4), Mark(0.4, 0.2, chosen=True)]


def drawn(svg: str, tag: str, css: str) -> list[ET.Element]:
    return [e for e in ET.fromstring(svg).iter(tag) if css in (e.get("class") or "").split()]


def rows(page: str) -> list[list[str]]:
    found = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    return [row for row in found if row]


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


@pytest.mark.parametrize(
    "marks",
    [
        CURVE,
        [Mark(0.5, 0.02, chosen=True, label=EVIL)],
        [Mark(1.0, 0.0)],
        [Mark(0.5, 3e-9), Mark(0.50001, 1e-9)],
        [Mark(0.1, 40.0), Mark(1.2, 0.0), Mark(math.nan, 1.0), Mark(0.3, math.inf)],
    ],
)
def test_every_chart_is_valid_and_everything_is_inside(marks: list[Mark]) -> None:
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


def test_the_table_has_every_point_with_its_flag() -> None:
    page = frontier_section(sample_report())
    assert rows(page) == [
        ["flag", "MACs", "latency", "error", "predicted error"],
        ["--target macs=0.8", "1.85 G (80.0 %)", "85.0 % [83.5, 87.0]", "1.21 %", "1.09 %"],
        ["--target macs=0.48 (chosen)", "1.10 G (47.6 %)", "60.2 % [58.9, 61.7]", "6.11 %", "5.50 %"],
        ["--target macs=0.25", "578 M (25.0 %)", "–", "29.00 %", "26.10 %"],
    ]
    assert page.count("<svg") == 2 and "on Intel Xeon, 2 cores, batch 1" in page
    for axis in ("MACs kept", "output error", "latency kept"):
        assert axis in page


def test_without_latencies_there_is_one_chart_and_no_column() -> None:
    report = sample_report()
    for point in report["frontier"]["points"]:
        point.update(latency_ratio=None, latency_low=None, latency_high=None, predicted_error=None)
    page = frontier_section(report)
    assert page.count("<svg") == 1 and rows(page)[0] == ["flag", "MACs", "error"] and "in turns" not in page


@pytest.mark.parametrize("frontier", [None, {}, 3, {"points": None}, {"points": []}, {"points": [None, 1]}])
def test_no_frontier_shows_nothing(frontier: Any) -> None:
    assert frontier_section({"frontier": frontier}) == "" and frontier_section({}) == ""


def test_points_of_unknown_cost_come_last_and_show_dashes() -> None:
    page = frontier_section({"frontier": {"points": [{"flag": EVIL}, {"macs_ratio": 0.5}]}})
    assert [row[1:] for row in rows(page)[1:]] == [["– (50.0 %)", "–"], ["–", "–"]]
    assert "<script" not in page and "<svg" not in page


def test_each_stage_shows_its_change_to_the_row_before() -> None:
    page = share_section(sample_report())
    assert rows(page) == [
        ["stage", "error after it", "change", "same top-1 class", "MACs", "time"],
        ["hash", "2.10 %", "+2.10 points", "99.61 %", "2.31 G", "0.41 s"],
        ["reconstruct", "8.80 %", "+6.70 points", "98.10 %", "1.10 G", "21.3 s"],
        ["distil", "6.11 %", "-2.69 points", "99.20 %", "1.10 G", "75.0 s"],
    ]


def test_accuracy_appears_when_a_stage_has_one_and_unknown_errors_break_the_chain() -> None:
    stages = [{"stage": "hash", "error": 0.01, "accuracy": 0.98}, {"stage": EVIL}, {"stage": "distil", "error": 0.02}]
    page = share_section({"stages_share": stages})
    assert rows(page)[0] == ["stage", "error after it", "change", "accuracy"]
    assert [row[2] for row in rows(page)[1:]] == ["+1.00 points", "–", "–"]
    assert "<script" not in page
    assert share_section({}) == share_section({"stages_share": []}) == share_section({"stages_share": 5}) == ""


def test_thinning_keeps_both_ends_the_chosen_and_the_order() -> None:
    points = frontier_points({"frontier": {"points": [{"macs_ratio": k / 20, "chosen": k == 11} for k in range(20)]}})
    assert [p.macs_ratio for p in points] == sorted((p.macs_ratio for p in points), reverse=True)
    for limit in range(3, 20):
        kept = thinned(points, limit)
        assert len(kept) == limit and kept[0] == points[0] and kept[-1] == points[-1]
        assert any(point.chosen for point in kept)
        assert kept == [point for point in points if point in kept]
    assert thinned(points, 50) == points


def test_a_point_reads_only_finite_numbers_and_true() -> None:
    odd = {"macs": "9", "error": math.nan, "chosen": "yes", "flag": None}
    (point,) = frontier_points({"frontier": {"points": [odd]}})
    assert point == Point(None, None, None, None, None, None, None, False, "")
    assert (point.cost, point.time, point.label) == ("–", "–", "–")
