"""deploy/compose.yaml and what it mounts: valid, complete and closed."""

import copy
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from redpp_serve.ab.spec import parse_split
from redpp_serve.cli import parser
from tests.support.composed import SET, read_compose
from tests.support.manifests import DEPLOY
from tests.support.tools import tool

SERVICES = {
    "torchserve": {"torchserve", "torchserve-exporter", "torchserve-gateway", "prometheus", "grafana"},
    "triton": {"triton", "triton-gateway", "prometheus", "grafana"},
    "watch": {"watch"},
}


def compose(profile: str, variables: dict[str, str] = SET) -> subprocess.CompletedProcess[str]:
    """Compose's own check of the file; needs no container engine."""
    own = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")}
    command = [tool("docker-compose"), "-f", DEPLOY / "compose.yaml", "--profile", profile, "config"]
    return subprocess.run(command, env={**own, **variables}, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The whole file, all profiles."""
    return read_compose()


def problems(document: dict[str, Any]) -> list[str]:
    """Rules for services of one machine in production, as sentences about what breaks them."""
    found = []
    for name, service in document["services"].items():
        if not re.fullmatch(r"[a-z0-9./-]+:v?\d[\w.-]+", service["image"]):
            found.append(f"{name}: the image {service['image']} has no fixed version")
        found += [
            f"{name}: {port} is open to other machines"
            for port in service.get("ports", [])
            if not str(port).startswith("127.0.0.1:")
        ]
        if service.get("cap_drop") != ["ALL"] or service.get("security_opt") != ["no-new-privileges:true"]:
            found.append(f"{name}: has privileges")
        if (
            service.get("privileged")
            or service.get("network_mode")
            or "/var/run/docker.sock" in str(service.get("volumes"))
        ):
            found.append(f"{name}: reaches the host")
        if not service.get("read_only"):
            found.append(f"{name}: can write to its image")
        if not {"cpus", "memory"} <= service.get("deploy", {}).get("resources", {}).get("limits", {}).keys():
            found.append(f"{name}: has no limits")
        if str(service.get("user", "1000")).split(":")[0] in ("0", "root"):
            found.append(f"{name}: runs as root")
        found += [
            f"{name}: writes to {mount}"
            for mount in service.get("volumes", [])
            if mount.startswith(("/", ".")) and not mount.endswith(":ro")
        ]
        found += [
            f"{name}: depends on {other}"
            for other in service.get("depends_on", {})
            if not set(service["profiles"]) <= set(document["services"].get(other, {}).get("profiles", []))
        ]
    return found


def test_the_file_is_valid_and_breaks_no_rule(document: dict[str, Any]) -> None:
    assert problems(document) == []
    for profile, services in SERVICES.items():
        assert {n for n, s in document["services"].items() if profile in s["profiles"]} == services
        done = compose(profile)
        assert done.returncode == 0, done.stderr
        seen = "chosen by the test" if "grafana" in services else "--split-folder=/state/redpp"
        assert seen in done.stdout  # the check saw the whole file


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("image", "redpp-serve/triton:latest", "no fixed version"),
        ("ports", ["8000:8000"], "open to other machines"),
        ("ports", ["0.0.0.0:8000:8000"], "open to other machines"),
        ("cap_drop", [], "has privileges"),
        ("read_only", False, "can write"),
        ("deploy", {}, "no limits"),
        ("user", "0:0", "runs as root"),
        ("network_mode", "host", "reaches the host"),
        ("volumes", ["/srv/dist/tiny:/models:rw"], "writes to"),
        ("depends_on", {"torchserve": {}}, "depends on"),
    ],
)
def test_a_broken_service_is_noticed(document: dict[str, Any], key: str, value: object, message: str) -> None:
    changed = copy.deepcopy(document)
    changed["services"]["triton"][key] = value
    assert any(message in problem for problem in problems(changed))


@pytest.mark.parametrize("missing", SET)
def test_a_missing_variable_is_named(missing: str) -> None:
    done = compose("torchserve", {k: v for k, v in SET.items() if k != missing})
    assert done.returncode != 0 and missing in done.stderr


def test_the_example_names_every_variable() -> None:
    example = set(re.findall(r"^#? ?([A-Z_]+)=", (DEPLOY / "compose.env.example").read_text(), re.MULTILINE))
    assert example == set(re.findall(r"\$\{([A-Z_]+)", (DEPLOY / "compose.yaml").read_text()))


def test_every_mounted_file_exists(document: dict[str, Any]) -> None:
    for service in document["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in document["volumes"] or source == SET["PACKAGE"]


def test_the_servers_are_reached_through_the_gateway_alone(document: dict[str, Any]) -> None:
    services = document["services"]
    assert document["networks"]["serving"]["internal"] is True
    for server in ("torchserve", "triton", "torchserve-exporter"):
        assert "ports" not in services[server] and set(services[server]["networks"]) == {"serving"}
    for server in ("torchserve", "triton"):
        upstream = services[f"{server}-gateway"]["environment"]["REDPP_UPSTREAM"].split()[0]
        exposed = re.search(r"EXPOSE (\d+)", (DEPLOY / f"docker/{server}.Dockerfile").read_text())[1]
        assert upstream == f"{server}:{exposed}"


def test_the_nginx_image_has_the_published_fixes(document: dict[str, Any]) -> None:
    for server in ("torchserve", "triton"):
        version = re.search(r":(\d+)\.(\d+)\.(\d+)-", document["services"][f"{server}-gateway"]["image"])
        assert tuple(map(int, version.groups())) >= (1, 30, 7)


def test_the_watcher_is_started_as_its_command_takes_it_on_the_split_of_the_gateway(document: dict[str, Any]) -> None:
    watch, gateway = (document["services"][name] for name in ("watch", "triton-gateway"))
    parsed = parser().parse_args(watch["command"])
    assert (parsed.command, parsed.auto, parsed.model) == ("ab watch", True, SET["MODEL_NAME"])
    assert str(parsed.split_folder) == gateway["environment"]["REDPP_STATE"] and "gateway:/state" in watch["volumes"]
    assert f"{parse_split(parsed.split).pruned}% pruned;" in gateway["environment"]["REDPP_SPLIT"]
    config = yaml.safe_load((DEPLOY / "docker/prometheus.yml").read_text())
    scraped = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert scraped["redpp-ab"] == [f"watch:{parsed.port}"] and "ports" not in watch
    assert set(watch["networks"]) <= set(document["services"]["prometheus"]["networks"])


def test_prometheus_scrapes_services_that_exist(document: dict[str, Any], tmp_path: Path) -> None:
    path = DEPLOY / "docker/prometheus.yml"
    config = yaml.safe_load(path.read_text())
    targets = [
        t.split(":")[0] for job in config["scrape_configs"] for entry in job["static_configs"] for t in entry["targets"]
    ]
    assert set(targets) <= document["services"].keys()
    (tmp_path / "rules").symlink_to(DEPLOY / "prometheus")  # where the service mounts them
    (tmp_path / "prometheus.yml").write_text(path.read_text())
    done = subprocess.run(
        [tool("promtool"), "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    local = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert {Path(rules).name for rules in config["rule_files"]} == {Path(rules).name for rules in local["rule_files"]}


def test_grafana_finds_its_dashboards_and_prometheus(document: dict[str, Any]) -> None:
    mounts = dict(mount.split(":")[1::-1] for mount in document["services"]["grafana"]["volumes"])
    provisioning = DEPLOY / mounts["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/redpp-serve.yaml").read_text())["providers"]
    assert list((DEPLOY / mounts[provider["options"]["path"]]).glob("*.json"))
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in document["services"]
    shared = set(document["services"]["grafana"]["networks"]) & set(document["services"]["prometheus"]["networks"])
    assert shared == {"front"}
