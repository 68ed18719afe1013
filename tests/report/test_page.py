"""The page: self-contained, escaped, complete, and calm about missing keys."""

from __future__ import annotations

import copy
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest

from redpp_serve.report.data import Report
from redpp_serve.report.page import DENSITIES_SHOWN
from redpp_serve.report.page import render as render_report
from redpp_serve.report.text import plan_text
from tests.support.reports import SAMPLE_PLAN, sample_choice, sample_layers, sample_report

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
VOID = {"meta", "br", "!doctype"}


def render(report: dict[str, Any]) -> str:
    """Return the page of a report.json."""
    return render_report(Report.from_json(report))


class _Page(HTMLParser):
    """Collects tags and attributes, and fails on a tag that closes out of order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(1 for name, _ in self.tags if name == tag)


def _poison(value: Any) -> Any:
    """The report with every text, keys of flat tables included, replaced by markup."""
    if isinstance(value, dict):
        return {key: _poison(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_poison(item) for item in value]
    return EVIL if isinstance(value, str) else value


def test_page_is_well_nested_and_has_every_section() -> None:
    page = _Page(render(sample_report()))
    titles = [page.words[i] for i, word in enumerate(page.words) if word.strip()]
    for expected in (
        "digits",
        "Original and pruned",
        "Stages",
        "Verification (256 held-out inputs)",
        "Hashing: predicted and measured",
        "Splitting: both readings of the count",
        "Kept channels",
        "Error per layer",
        "Layers",
        "Other codebooks",
        "Weight densities and their cells",
        "Options",
        "Source",
        "Environment",
        "What was measured where",
        "Frontier: error against cost",
        "What each stage changed",
    ):
        assert expected in titles
    for number in ("1.09 M", "2.31 G", "4.4 MB", "98.40 %", "1.88x [1.85, 1.91]", "18.34 %", "63.52 %", "skipped"):
        assert number in titles


def test_the_environment_lists_every_version_and_says_where_numbers_come_from() -> None:
    cells = dict(re.findall(r"<tr><th[^>]*>([^<]*)</th><td[^>]*>([^<]*)</td></tr>", render(sample_report())))
    expected = {
        "device": "Intel Xeon, 2 cores",
        "threads": "2",
        "redpp-serve": "0.1.0",
        "python": "3.11.7",
        "torch": "2.13.0",
        "numpy": "2.3.1",
    }
    assert {key: cells.get(key) for key in expected} == expected and "versions" not in cells
    where = "Intel Xeon, 2 cores, threads 2, numpy 2.3.1, python 3.11.7, redpp-serve 0.1.0, torch 2.13.0"
    assert cells["hashing errors, output error, agreement"] == f"{where}; 256 held-out inputs"
    assert cells["handler times, latency, throughput"] == f"{where}; through the model server"
    assert cells["latencies of the frontier"] == "Intel Xeon, 2 cores, batch 1; without server"


def test_every_text_is_escaped() -> None:
    evil = _poison(sample_report())
    evil["options"] = evil["environment"] = {EVIL: EVIL}
    page = _Page(render(evil))
    assert page.count("script") == 1 and page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_self_contained() -> None:
    page = _Page(render(sample_report()))
    assert not any({"src", "href", "xlink:href", "srcset", "action"} & set(attributes) for _, attributes in page.tags)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|@import|url\(", render(sample_report()))


def test_every_svg_is_valid_xml_and_ids_are_unique() -> None:
    page = render(_poison(sample_report()))
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(pictures) == 4 + sum(1 for layer in sample_layers() if layer["hash"])
    for picture in pictures:
        ET.fromstring(picture)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_tables_have_header_cells_with_scope() -> None:
    page = _Page(render(sample_report()))
    scopes = [attributes.get("scope") for tag, attributes in page.tags if tag == "th"]
    assert set(scopes) == {"col", "row"}
    assert page.count("figcaption") == page.count("figure") == page.count("svg")


def test_sparse_reports_render_with_dashes() -> None:
    for report in ({}, {"layers": [{}], "stages": [{}], "smoke": [{}]}, {"layers": None, "hash": 1}):
        page = _Page(render(report))
        assert "–" in page.words and not {"None", "nan"} & set(page.words), report


@pytest.mark.exhaustive
@pytest.mark.parametrize("gone", [None, math.nan, "absent"])
def test_any_single_missing_key_renders(gone: Any) -> None:
    """Each key of the report in turn, at every depth, with the lists reduced to one element."""
    full = sample_report()
    for key in ("layers", "stages", "smoke"):
        full[key] = full[key][1:2]
    density = full["layers"][0]["hash"]["density"]
    density.update({key: values[95:105] for key, values in density.items() if key in "xy"})

    def holes(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = node.items() if isinstance(node, dict) else enumerate(node[:2]) if isinstance(node, list) else ()
        return [hole for key, item in items for hole in ([*path, key], *holes(item, (*path, key)))]

    paths = holes(full)
    assert len(paths) > 100
    for path in paths:
        report = copy.deepcopy(full)
        node = report
        for key in path[:-1]:
            node = node[key]
        if gone == "absent":
            del node[path[-1]]
        elif gone is not None and not isinstance(node[path[-1]], (int, float)):
            continue
        else:
            node[path[-1]] = gone
        assert not re.search(r"\b(None|nan)\b", " ".join(_Page(render(report)).words)), path


def test_densities_are_limited_with_a_note() -> None:
    layers = [{**sample_layers()[0], "name": f"layer{i}"} for i in range(DENSITIES_SHOWN + 5)]
    page = render({**sample_report(), "layers": layers})
    assert page.count("<svg") == DENSITIES_SHOWN + 4
    assert f"The first {DENSITIES_SHOWN} of {DENSITIES_SHOWN + 5} layers" in page
    assert "The first" not in render(sample_report())


def card(page: str, title: str) -> list[list[str]]:
    """Return the rows of the first table in the card of that title; none where there is no such card."""
    found = re.search(rf"<h2>{re.escape(title)}</h2>.*?</table>", page, re.S)
    rows = (
        [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", found[0])]
        if found
        else []
    )
    return [row for row in rows if row]


FRONTIER, SHARES = "Frontier: error against cost", "What each stage changed"


def test_the_frontier_has_every_point_with_its_flag() -> None:
    page = render({**sample_report(), "layers": []})
    assert card(page, FRONTIER) == [
        ["flag", "MACs", "latency", "error", "predicted error"],
        ["--target macs=0.8", "1.85 G (80.0 %)", "85.0 % [83.5, 87.0]", "1.21 %", "1.09 %"],
        ["--target macs=0.48 (chosen)", "1.10 G (47.6 %)", "60.2 % [58.9, 61.7]", "6.11 %", "5.50 %"],
        ["--target macs=0.25", "578 M (25.0 %)", "–", "29.00 %", "26.10 %"],
    ]
    assert page.count("<svg") == 2 and "on Intel Xeon, 2 cores, batch 1;" in page


def test_a_frontier_without_latencies_has_one_chart_and_no_column() -> None:
    report = {**sample_report(), "layers": []}
    for point in report["frontier"]["points"]:
        point.update(latency_ratio=None, latency_low=None, latency_high=None, predicted_error=None)
    page = render(report)
    assert page.count("<svg") == 1 and card(page, FRONTIER)[0] == ["flag", "MACs", "error"] and "in turns" not in page


def test_no_frontier_shows_nothing() -> None:
    for frontier in (None, {}, 3, {"points": None}, {"points": []}, {"points": [None, 1]}):
        assert FRONTIER not in render({"frontier": frontier}), frontier
    assert FRONTIER not in render({})


def test_points_of_unknown_cost_come_last_and_show_dashes() -> None:
    page = render({"frontier": {"points": [{"flag": EVIL}, {"macs_ratio": 0.5}]}})
    assert [row[1:] for row in card(page, FRONTIER)[1:]] == [["– (50.0 %)", "–"], ["–", "–"]]
    assert page.count("<script") == 1 and "<svg" not in page


def test_a_point_reads_only_finite_numbers_and_true() -> None:
    odd = {"macs": "9", "error": math.nan, "chosen": "yes", "flag": None}
    assert card(render({"frontier": {"points": [odd]}}), FRONTIER)[1] == ["–", "–", "–"]


def test_each_stage_shows_its_change_to_the_row_before() -> None:
    assert card(render(sample_report()), SHARES) == [
        ["stage", "error after it", "change", "same top-1 class", "MACs", "time"],
        ["hash", "2.10 %", "+2.10 points", "99.61 %", "2.31 G", "0.41 s"],
        ["reconstruct", "8.80 %", "+6.70 points", "98.10 %", "1.10 G", "21.3 s"],
        ["distil", "6.11 %", "-2.69 points", "99.20 %", "1.10 G", "75.0 s"],
    ]


def test_accuracy_appears_when_a_stage_has_one_and_unknown_errors_break_the_chain() -> None:
    stages = [{"stage": "hash", "error": 0.01, "accuracy": 0.98}, {"stage": EVIL}, {"stage": "distil", "error": 0.02}]
    page = render({"stages_share": stages})
    assert card(page, SHARES)[0] == ["stage", "error after it", "change", "accuracy"]
    assert [row[2] for row in card(page, SHARES)[1:]] == ["+1.00 points", "–", "–"]
    assert page.count("<script") == 1
    for nothing in ({}, {"stages_share": []}, {"stages_share": 5}):
        assert SHARES not in render(nothing)


def test_kernels_are_shown_only_where_a_plan_was_made() -> None:
    assert "Engines and kernels" not in _Page(render({})).words
    words = _Page(render({"plan": {"original": SAMPLE_PLAN, "pruned": SAMPLE_PLAN}})).words
    assert {"Engines and kernels", "The original network", "The pruned network", "split 50.00 ms"} <= set(words)
    assert any("3 dense, 1 fused" in word for word in words)
    former = _Page(render({"plan": {"redpp": SAMPLE_PLAN}})).words
    assert "The pruned network" in former and "The redpp network" not in former


def test_names_in_a_plan_cannot_break_out() -> None:
    hostile = "<script>x</script>\x1b[2J\u202e"
    choices = [sample_choice(hostile, 1, hostile, hostile, **{"dense": 1.0, hostile: 1.0, "y" + hostile: 2.0})]
    plan = {**SAMPLE_PLAN, "choices": choices, "batches": [hostile], "device": hostile, "precision": hostile}
    page = _Page(render({"plan": {"pruned": plan, hostile: plan}}))
    assert page.count("script") == 1 and any("<script>" in word for word in page.words)
    assert not any(c in word for word in page.words for c in "\x1b\u202e")
    assert not any(c in plan_text({"pruned": plan}) for c in "\x1b\u202e")


def test_a_damaged_plan_shows_what_is_left() -> None:
    for damage in (
        {"choices": None},
        {"choices": 5},
        {"choices": ["x", None]},
        {"batches": 5},
        {"seconds": "x"},
        {"choices": [{}]},
        {"choices": [sample_choice("a", 1, "dense", "measured", dense=float("nan"))]},
        {"choices": [{**sample_choice("a", 1, "dense", "measured"), "times": {"dense": [1], "b": None}}]},
    ):
        plan = {**SAMPLE_PLAN, **damage}
        assert plan_text({"pruned": plan}) and "Engines and kernels" in render({"plan": {"pruned": plan}}), damage
    assert plan_text({"pruned": 3}) == "" and "Engines and kernels" not in render({"plan": 3})
