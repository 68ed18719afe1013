"""The dashboards: the committed JSON is what the code makes, imports unedited, and asks what Prometheus understands."""

import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from redpp_serve.handlers.metrics import FAMILIES
from tests.support.boards import FOLDER, GPU_ONLY, boards, filled, targets
from tests.support.tools import tool

BOARDS, TARGETS = boards(), list(targets())
AB = {
    "traffic_ratio",
    "requests_total",
    "pairs_total",
    "agreement_ratio",
    "speedup_ratio",
    "verdict",
    "advice",
    "advice_reason",
    "dropped_total",
}


def test_the_committed_json_is_what_the_code_makes(tmp_path: Path) -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed (test extra)")
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import dashboards as d, pathlib\n" + (
        "for name, text in d.dashboards().items(): (pathlib.Path(sys.argv[1]) / name).write_bytes(text.encode())"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in (FOLDER / "dashboards").iterdir()}
    assert made == committed, "run: python deploy/grafana/dashboards.py"


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_a_dashboard_imports_unedited(board: dict) -> None:
    """No number of one Grafana's database, no data source of one Grafana, no field that the import dialogue fills."""
    assert board.get("id") is None and "__inputs" not in board and board["schemaVersion"] >= 39
    source, *others = board["templating"]["list"]
    assert (source["type"], source["name"], source["query"]) == ("datasource", "datasource", "prometheus")
    parts = [*others, *board["panels"], *(t for p in board["panels"] for t in p.get("targets", []))]
    uids = {part["datasource"]["uid"] for part in parts if part.get("type") != "row"}
    assert uids == {"${datasource}"}
    known = {variable["name"] for variable in board["templating"]["list"]} | {"__rate_interval", "__range"}
    text = " ".join(t["expr"] for p in board["panels"] for t in p.get("targets", []))
    text += " ".join(variable["query"] for variable in others)
    assert set(re.findall(r"\$\{?(\w+)", text)) <= known
    assert {variable["name"] for variable in others} <= set(re.findall(r"\$(\w+)", text)), (
        "each variable does something"
    )


def test_versions_and_models_can_be_chosen() -> None:
    names = [variable["name"] for variable in BOARDS["redpp-serving"]["templating"]["list"]]
    assert names == ["datasource", "server", "model", "version"]


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_panels_lie_side_by_side_and_say_what_they_show(board: dict) -> None:
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) and all(ids)
    for panel in board["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["type"] == "row" or (panel["title"] and panel["description"] and panel["targets"])
    for a, b in combinations([panel["gridPos"] for panel in board["panels"]], 2):
        assert (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )


def test_every_query_is_valid(tmp_path: Path) -> None:
    rules = [{"record": f"query:{n}", "expr": filled(target.expr)} for n, target in enumerate(TARGETS)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    run = subprocess.run([tool("promtool"), "check", "rules", path], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(TARGETS)} rules found" in run.stdout


def test_queries_read_metrics_that_exist_and_no_recorded_ones() -> None:
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    exported = {family.name + suffix for family in FAMILIES.values() for suffix in suffixes.get(family.kind, ("",))}
    exported |= {f"redpp_ab_{name}" for name in AB}
    for target in TARGETS:
        used = set(re.findall(r"\bredpp_\w+", target.expr))
        assert used and used <= exported, target
        assert ":redpp_" not in target.expr, "a dashboard needs no rules"
        assert target.expr.count("model=~") == len(re.findall(r"\bredpp_\w+", target.expr)), (
            "the variables apply to all"
        )


def test_every_metric_of_the_table_is_shown() -> None:
    text = " ".join(target.expr for target in TARGETS)
    assert [name for name in (*FAMILIES, *(f"redpp_ab_{name}" for name in AB)) if name not in text] == []


def test_the_list_of_gpu_panels_names_panels() -> None:
    assert {(target.board, target.panel) for target in TARGETS} >= GPU_ONLY


def test_grafana_is_provisioned_with_a_source_and_the_folder() -> None:
    (source,) = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    scrape = yaml.safe_load((FOLDER.parent / "prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["type"] == "prometheus" and source["jsonData"]["timeInterval"] == scrape
    (provider,) = yaml.safe_load((FOLDER / "provisioning/dashboards/redpp-serve.yaml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"].startswith("/var/lib/grafana/dashboards")
