"""The page: self-contained, escaped, complete, and calm about missing keys; and the writer of both files."""

from __future__ import annotations

import copy
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import redpp_serve.report as report_package
from redpp_serve.errors import RedppError
from redpp_serve.report import write_reports
from redpp_serve.report.html import DENSITIES_SHOWN, render
from tests.report.test_text import sample_layers, sample_report

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
VOID = {"meta", "br", "!doctype"}


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


@pytest.mark.parametrize("report", [{}, {"layers": [{}], "stages": [{}], "smoke": [{}]}, {"layers": None, "hash": 1}])
def test_sparse_reports_render_with_dashes(report: dict[str, Any]) -> None:
    page = _Page(render(report))
    assert "–" in page.words and not {"None", "nan"} & set(page.words)


@pytest.mark.parametrize("gone", [None, math.nan, "absent"])
def test_any_single_missing_key_renders(gone: Any) -> None:
    """Each key of the report in turn, at every depth, with the lists reduced to one element."""
    full = sample_report()
    for key in ("layers", "stages", "smoke"):
        full[key] = full[key][1:2]

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


def test_write_reports_writes_finite_sorted_json(tmp_path: Path) -> None:
    report = {**sample_report(), "zz": np.float32(0.5), "aa": [math.nan, math.inf, np.int64(3), (1, True)]}
    write_reports(report, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    content = (folder / "report.json").read_text(encoding="utf-8")
    loaded = json.loads(content)
    assert (loaded["aa"], loaded["zz"]) == ([None, None, 3, [1, True]], 0.5)
    assert list(loaded) == sorted(loaded) and content.startswith('{\n "aa": [\n')
    assert (folder / "report.html").read_text(encoding="utf-8") == render(loaded)


def test_write_reports_is_deterministic_and_replaces(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    write_reports(sample_report(), tmp_path)
    first = (tmp_path / "report.json").read_bytes(), (tmp_path / "report.html").read_bytes()
    write_reports(dict(reversed(sample_report().items())), tmp_path)
    assert first == ((tmp_path / "report.json").read_bytes(), (tmp_path / "report.html").read_bytes())


def test_a_failed_write_leaves_the_old_report_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_package.os, "replace", fail)
    with pytest.raises(RedppError, match="No space left on device"):
        write_reports(sample_report(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_unknown_types_are_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not set"):
        write_reports({"x": {1}}, tmp_path)
    assert list(tmp_path.iterdir()) == []
