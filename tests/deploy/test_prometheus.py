"""Prometheus' configuration, rules and alerts under promtool; a changed rule makes the unit tests fail."""

import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from redpp_serve.ab.parts import choose_ports
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
    """Run promtool; its two streams come as one, in order."""
    command = [tool("promtool"), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)


def test_the_configuration_and_its_rules_are_valid() -> None:
    run = promtool("check", "config", "--lint-fatal", FOLDER / "prometheus.yml")
    assert run.returncode == 0, run.stdout
    assert f"{len(RULES) - len(ALERTS)} rules found" in run.stdout and f"{len(ALERTS)} rules found" in run.stdout


def test_rules_and_alerts_pass_their_unit_tests() -> None:
    run = promtool("test", "rules", *(FOLDER / "tests" / name for name in ("rules.yml", "alerts.yml")))
    assert run.returncode == 0 and run.stdout.count("SUCCESS") == 2, run.stdout


def test_every_rule_and_every_alert_has_a_unit_test() -> None:
    text = "".join(path.read_text() for path in (FOLDER / "tests").glob("*.yml"))
    named = {rule.get("record") or rule["alert"] for rule in RULES}
    assert [name for name in named if name not in text] == []


# Faults in the rules: file, text, and what takes its place.
FAULTS = [
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
    ("alerts.yml", ' unless on (instance, model) redpp_ab_settled{arm="original"} == 1', ""),
    ("alerts.yml", 'settled{arm="original"}', 'settled{arm="pruned"}'),
    ("alerts.yml", 'settled{arm="original"} == 1', 'settled{arm="original"}'),
    ("alerts.yml", "redpp_ab_problems > 0", "redpp_ab_problems >= 0"),
    ("alerts.yml", ' and max_over_time(up{job=~"redpp-.+"}[1h]) == 1', ""),
]


@pytest.mark.parametrize(
    "faults", [FAULTS[::5], pytest.param(FAULTS, marks=pytest.mark.exhaustive)], ids=["some", "all"]
)
def test_a_changed_rule_is_noticed(tmp_path: Path, faults: list[tuple[str, str, str]]) -> None:
    """One promtool runs the unit tests of all faults."""
    tests = []
    for number, (name, old, new) in enumerate(faults):
        folder = shutil.copytree(FOLDER, tmp_path / str(number))
        text = (folder / name).read_text()
        assert old in text, old
        (folder / name).write_text(text.replace(old, new))
        tests.append(folder / "tests" / name)
    run = promtool("test", "rules", *tests)
    # A fault must be noticed by its values ("got:"), not because the rules cannot be read.
    results = run.stdout.split("Unit Testing:")[1:]
    assert len(results) == len(faults)
    missed = [
        fault for fault, result in zip(faults, results, strict=True) if "FAILED" not in result or "got:" not in result
    ]
    assert run.returncode == 1 and missed == []


def test_an_alert_says_what_to_do() -> None:
    for name, alert in ALERTS.items():
        assert alert["for"] and alert["labels"]["severity"] in ("warning", "critical"), name
        assert all(alert["annotations"][key].strip() for key in ("summary", "description", "action")), name


def test_the_scraped_ports_are_those_of_the_commands_it_names() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    scraped = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    served = {
        "torchserve": consecutive_ports(Ports, 8080).exporter,
        "triton": consecutive_ports(TritonPorts, 8000).metrics,
    }
    torchserve = Spec(Path("dist"), None, "torchserve", parse_split("90:10"), None, shadow=False, port=8088)
    for kind, port in served.items():
        spec = Spec(Path("dist"), None, kind, parse_split("90:10"), None, shadow=False, port=8088)
        gateway, first = choose_ports(spec)
        assert first is not None
        behind = consecutive_ports(Ports, first).exporter
        if kind == "triton":
            behind = consecutive_ports(TritonPorts, first).metrics
        assert scraped[f"redpp-{kind}"] == [f"127.0.0.1:{port}", f"127.0.0.1:{behind}"]
        assert scraped["redpp-ab"] == [f"127.0.0.1:{gateway.metrics}"]
        other = consecutive_ports(Ports, choose_ports(torchserve)[1] or 0)
        taken = {*asdict(gateway).values(), *asdict(other).values()}
        assert kind == "torchserve" or behind not in taken, "Triton's job would scrape what TorchServe has there"


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
