"""Prometheus' configuration, rules and alerts under promtool; a changed rule makes the unit tests fail."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from redpp_serve.ab import supervisor
from redpp_serve.ab.spec import Spec, parse_split
from redpp_serve.handlers.metrics import FAMILIES
from redpp_serve.loopback import Ports, TritonPorts, consecutive_ports
from tests.support.tools import tool

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
RULES = [
    rule
    for name in ("rules.yml", "alerts.yml")
    for group in yaml.safe_load((FOLDER / name).read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True, timeout=60)


def unit_tests(name: str, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    return promtool("test", "rules", folder / "tests" / name)


def test_the_configuration_and_its_rules_are_valid() -> None:
    run = promtool("check", "config", "--lint-fatal", FOLDER / "prometheus.yml")
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(RULES) - len(ALERTS)} rules found" in run.stdout and f"{len(ALERTS)} rules found" in run.stdout


@pytest.mark.parametrize("name", ["rules.yml", "alerts.yml"])
def test_they_do_what_their_unit_tests_expect(name: str) -> None:
    run = unit_tests(name)
    assert run.returncode == 0 and "SUCCESS" in run.stdout, run.stdout + run.stderr


def test_every_rule_and_every_alert_has_a_unit_test() -> None:
    text = "".join(path.read_text() for path in (FOLDER / "tests").glob("*.yml"))
    named = {rule.get("record") or rule["alert"] for rule in RULES}
    assert [name for name in named if name not in text] == []


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("rules.yml", "histogram_quantile(0.95", "histogram_quantile(0.5"),
        ("rules.yml", '{outcome="error"}', ""),
        ("rules.yml", " > 0)", ")"),  # NaN where nothing was served
        ("rules.yml", "by (server, model, variant, batch)", "by (model, variant, batch)"),  # mixes two servers
        ("rules.yml", '* ignoring (variant) (batch:redpp_batches:rate5m{variant="pruned"} > 0)', ""),
        (
            "rules.yml",
            "model:redpp_speedup_handler:ratio5m\n        expr: >-\n          variant:redpp_handler_seconds",
            "model:redpp_speedup_handler:ratio5m\n        expr: >-\n          1 * variant:redpp_inference_seconds",
        ),
        ("alerts.yml", "ratio5m < 1\n", "ratio5m > 1\n"),
        ("alerts.yml", "* 300 >= 30", "* 300 >= 0"),
        ("alerts.yml", 'or ignoring (variant) 0 * variant:redpp_errors:ratio5m{variant="pruned"}', ""),
        ("alerts.yml", "> 0.01", "> 0.001"),
        ("alerts.yml", "for: 5m", "for: 0m"),
        ("alerts.yml", " and redpp_ab_pairs_total >= 100", ""),
        ("alerts.yml", ">= 20\n", ">= 0\n"),
        ("alerts.yml", "[5m]) > 0)", "[5m]) >= 0)"),
        ("alerts.yml", '{kind="rollback"}', '{kind="promote"}'),
        ("alerts.yml", ' and max_over_time(up{job=~"redpp-.+"}[1d]) == 1', ""),
    ],
)
def test_a_changed_rule_is_noticed(tmp_path: Path, name: str, old: str, new: str) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "prometheus")
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    run = unit_tests(name, folder)
    assert run.returncode == 1 and "FAILED" in run.stdout + run.stderr
    assert "got:" in run.stdout + run.stderr, "it must fail for its values, not because it cannot be read"


@pytest.mark.parametrize("alert", ALERTS.values(), ids=ALERTS)
def test_an_alert_says_what_to_do(alert: dict) -> None:
    assert alert["for"] and alert["labels"]["severity"] in ("warning", "critical")
    assert all(alert["annotations"][key].strip() for key in ("summary", "description", "action"))


def test_the_scraped_ports_are_those_of_the_commands_it_names() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    scraped = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    served = {
        "torchserve": consecutive_ports(Ports, 8080).exporter,
        "triton": consecutive_ports(TritonPorts, 8000).metrics,
    }
    for kind, port in served.items():
        spec = Spec(Path("dist"), None, kind, parse_split("90:10"), None, shadow=False, port=8088)
        gateway, server = supervisor._ports(spec)
        behind = server.exporter if isinstance(server, Ports) else server.metrics
        assert scraped[f"redpp-{kind}"] == [f"127.0.0.1:{port}", f"127.0.0.1:{behind}"]
        assert scraped["redpp-ab"] == [f"127.0.0.1:{gateway.metrics}"]


def test_rules_read_metrics_that_exist() -> None:
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    exported = {family.name + suffix for family in FAMILIES.values() for suffix in suffixes.get(family.kind, ("",))}
    used = set(re.findall(r"(?<!:)\bredpp_(?!ab_)\w+\b(?!:)", " ".join(rule["expr"] for rule in RULES)))
    assert used and used <= exported


def test_the_readme_names_every_metric_and_only_rules_that_exist() -> None:
    text = (FOLDER.parent / "README.md").read_text()
    assert set(re.findall(r"\w+:redpp_\w+:\w+", text)) <= {rule.get("record") for rule in RULES}
    named = set(re.findall(r"\bredpp_\w+", text)) | {"redpp_model" + part for part in ("_macs", "_bytes")}
    assert set(FAMILIES) <= named
