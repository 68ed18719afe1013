"""deploy/kubernetes: builds offline, each manifest fits its schema, and all of them fit each other."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from redpp_serve.cli import parser
from tests.support.manifests import DEPLOY, Document, adapted_metrics, build, of_kind, problems
from tests.support.small import ARCH, INPUT, write_model
from tests.support.tools import kubectl, tool

OVERLAYS = sorted(p.name for p in (DEPLOY / "kubernetes/overlays").iterdir())
WEIGHTS = {
    "torchserve": (100, 0),
    "triton": (100, 0),
    "gpu": (100, 0),
    "kserve": (100, 0),
    "split-90-10": (90, 10),
    "promoted": (0, 100),
    "watched": (100, 0),
}


@pytest.fixture(scope="module")
def built() -> dict[str, list[Document]]:
    """The documents of every overlay."""
    return {name: build(DEPLOY / "kubernetes/overlays" / name) for name in OVERLAYS}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_breaks_no_rule(built: dict[str, list[Document]], name: str) -> None:
    assert problems(built[name]) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_weights_of_an_overlay(built: dict[str, list[Document]], name: str) -> None:
    (route,) = of_kind(built[name], "HTTPRoute")
    assert tuple(backend["weight"] for backend in route["spec"]["rules"][-1]["backendRefs"]) == WEIGHTS[name]


@pytest.mark.parametrize("name", ["promoted", "split-90-10"])
def test_promote_and_rollback_change_nothing_but_weights(built: dict[str, list[Document]], name: str) -> None:
    """No pod is touched, so no request in flight is; the original keeps its pods for the way back."""
    before, after = copy.deepcopy(built["triton"]), copy.deepcopy(built[name])
    for documents in (before, after):
        (route,) = of_kind(documents, "HTTPRoute")
        for backend in route["spec"]["rules"][-1]["backendRefs"]:
            del backend["weight"]
    (original, pruned) = (
        scaler["spec"]["behavior"]["scaleDown"] for scaler in of_kind(after, "HorizontalPodAutoscaler")
    )
    assert original.pop("selectPolicy") == "Disabled" and "selectPolicy" not in pruned
    assert before == after


@pytest.mark.parametrize("name", ["split-90-10", "gpu", "watched"])
def test_the_other_overlays_stand_on_either_server(tmp_path: Path, name: str) -> None:
    """As their comments say: the word triton in one line."""
    copied = shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("prometheus"))
    kustomization = copied / "kubernetes/overlays" / name / "kustomization.yaml"
    kustomization.write_text(kustomization.read_text().replace("../triton", "../torchserve"))
    (copied / "kubernetes/model/model.env").write_text("MODEL_NAME=resnet-50\nPACKAGE=7.0.0\nRELEASE=stack\n")
    documents = build(kustomization.parent)
    assert problems(documents) == []
    (route,) = of_kind(documents, "HTTPRoute")
    assert {rule["matches"][0]["path"]["value"] for rule in route["spec"]["rules"]} == {"/predictions/resnet-50"}
    images = {
        c["image"] for d in of_kind(documents, "Deployment") for c in d["spec"]["template"]["spec"]["initContainers"]
    }
    assert images == {"redpp-serve/package:7.0.0"}
    monitor = of_kind(documents, "PodMonitor")[0]
    assert monitor["metadata"]["name"] == "resnet-50" and monitor["metadata"]["labels"] == {"release": "stack"}
    assert monitor["spec"]["podMetricsEndpoints"][0]["relabelings"] == [
        {"targetLabel": "server", "replacement": "torchserve"}
    ]


@pytest.mark.parametrize("name", ["image-volume", "claim"])
@pytest.mark.parametrize("server", ["torchserve", "triton"])
def test_the_other_ways_of_a_package_into_a_pod(tmp_path: Path, name: str, server: str) -> None:
    kubectl((5, 8) if name == "image-volume" else (5, 0))  # 5.5 leaves the image of a volume as it is
    copied = shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("prometheus"))
    overlay = copied / "kubernetes/overlays/own"
    overlay.mkdir()
    text = f"resources: [../{server}]\ncomponents: [../../components/{name}]\nnamespace: redpp-serve\n"
    package = "images: [{name: redpp-package, newName: redpp-serve/package, newTag: 1.0.0}]\n"
    (overlay / "kustomization.yaml").write_text(text + package)
    documents = build(overlay)
    assert problems(documents) == []
    for deployment in of_kind(documents, "Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        (volume,) = (v for v in spec["volumes"] if v["name"] == "models")
        kind = {"image-volume": "image", "claim": "persistentVolumeClaim"}[name]
        assert volume.keys() == {"name", kind} and "initContainers" not in spec
        mounts = [m for c in spec["containers"] for m in c["volumeMounts"] if m["name"] == "models"]
        folder = None if name == "image-volume" else "1.0.0"
        assert {(m["readOnly"], m.get("subPath")) for m in mounts} == {(True, folder)}
    assert [job["metadata"]["name"] for job in of_kind(documents, "Job")] == ["redpp-package-1.0.0"][: name == "claim"]


def test_rules_and_dashboards_are_those_of_prometheus_and_grafana(built: dict[str, list[Document]]) -> None:
    (rule,) = of_kind(built["watched"], "PrometheusRule")
    files = [DEPLOY / "prometheus" / name for name in ("rules.yml", "alerts.yml")]
    groups = [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]

    def plain(text: object) -> str:
        return " ".join(json.dumps(text, sort_keys=True).replace("\\n", " ").split())  # kustomize folds lines anew

    assert plain(rule["spec"]["groups"]) == plain(groups), "run python deploy/kubernetes/components/monitoring/rules.py"
    (boards,) = (d for d in of_kind(built["watched"], "ConfigMap") if d["metadata"]["name"] == "redpp-dashboards")
    assert boards["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert boards["data"] == {p.name: p.read_text() for p in (DEPLOY / "grafana/dashboards").glob("*.json")}


def test_the_watcher_is_started_as_its_command_takes_it(built: dict[str, list[Document]]) -> None:
    (container,) = (
        c
        for d in of_kind(built["watched"], "Deployment")
        for c in d["spec"]["template"]["spec"]["containers"]
        if c["name"] == "watch"
    )
    values = {"NAMESPACE": "redpp-serve", "MODEL_NAME": "model", "PROMETHEUS": "http://p:9090", "PACKAGE": "1.0.0"}
    words = [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in container["args"]]
    parsed = parser().parse_args(words)
    assert parsed.command == "ab watch" and parsed.route == "redpp-serve/model" and parsed.auto
    assert parsed.match == 'namespace="redpp-serve"' and parsed.port == container["ports"][0]["containerPort"]


def job_words(**values: str) -> list[str]:
    """The words that the Job's container gives to redpp-serve."""
    job = yaml.safe_load((DEPLOY / "kubernetes/components/claim/job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert "command" not in container, "the image's own command is redpp-serve"
    return [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in container["args"]]


def test_the_job_packages_as_its_command_takes_it() -> None:
    parsed = parser().parse_args(job_words(VERSION="1.0.0", MODEL_NAME="model"))
    assert (parsed.command, parsed.name, parsed.once) == ("package", "model", True)
    assert parsed.out == Path("/packages/1.0.0") and parsed.file.parent == Path("/source")


@pytest.mark.exhaustive
def test_a_killed_job_goes_on_and_a_finished_one_is_done(tmp_path: Path) -> None:
    """The Job's own words, with the small network for the example's, and folders for its volumes."""
    words = job_words(VERSION="1.0.0", MODEL_NAME="small")
    at = [
        words.index(word) for word in ("/source/model.safetensors", "--arch=torchvision:resnet50", "--input=3x224x224")
    ]
    for index, word in zip(at, (str(write_model(tmp_path)), f"--arch={ARCH}:Small", f"--input={INPUT}"), strict=True):
        words[index] = word
    words = [word.replace("/packages/", f"{tmp_path}/packages/") for word in words]
    limits = [
        "--keep=0.5",
        "--round-to=4",
        "--max-error=2",
        "--time-budget=60",
        "--distil=2",
    ]  # a budget that binds decides by time
    command = [sys.executable, "-m", "redpp_serve.cli", *words, *limits]
    kept = tmp_path / "packages" / ".1.0.0.inputs.safetensors.distil"

    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not kept.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before its end"
    assert kept.exists() and not (tmp_path / "packages" / "1.0.0").exists()

    def again(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=240)

    second = again()
    assert second.returncode == 0, second.stderr
    assert re.search(r"^distil .* (\d+) steps.*; the first \1 by a run that was interrupted", second.stderr, re.M)
    assert not kept.exists() and (tmp_path / "packages" / "1.0.0" / "report.json").exists()
    third = again()
    assert third.returncode == 0 and third.stdout.endswith("holds this package already: nothing was done\n")
    assert not re.search("^(inputs|distil|verify) ", third.stderr, re.M)
    other = again("--seed=1")
    assert other.returncode == 2 and "holds the package of another network" in other.stderr


def test_the_compiled_kernels_of_a_gpu_outlive_its_pods(built: dict[str, list[Document]]) -> None:
    for deployment in of_kind(built["gpu"], "Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        (volume,) = (v for v in spec["volumes"] if v["name"] == "kernels")
        assert volume == {"name": "kernels", "persistentVolumeClaim": {"claimName": "redpp-kernels"}}
        assert {"name": "kernels", "mountPath": "/cache"} in spec["containers"][0]["volumeMounts"]
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_mounted_probe_is_that_of_the_images(built: dict[str, list[Document]]) -> None:
    probes = [d["data"]["probe.py"] for d in of_kind(built["triton"], "ConfigMap") if "probe.py" in d["data"]]
    assert probes == [(DEPLOY / "docker/probe.py").read_text()]


def test_the_adapters_rule_is_a_query(tmp_path: Path) -> None:
    """The adapter fills its templates in; what comes out must be PromQL."""
    assert adapted_metrics() == {"redpp_handler_busy"}
    (rule,) = yaml.safe_load((DEPLOY / "kubernetes/adapter/prometheus-adapter.yaml").read_text())["rules"]
    query = rule["metricsQuery"]
    for template, value in (
        ("Series", "redpp_handler_seconds_sum"),
        ("LabelMatchers", 'namespace="a"'),
        ("GroupBy", "pod"),
    ):
        query = query.replace(f"<<.{template}>>", value)
    rules = {"groups": [{"name": "adapter", "rules": [{"record": rule["name"]["as"], "expr": query}]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    subprocess.run([tool("promtool"), "check", "rules", tmp_path / "rules.yml"], check=True, capture_output=True)


def _container(documents: list[Document]) -> dict[str, Any]:
    return of_kind(documents, "Deployment")[0]["spec"]["template"]["spec"]["containers"][0]


def _first(kind: str) -> Callable[[list[Document]], dict[str, Any]]:
    return lambda documents: of_kind(documents, kind)[0]["spec"]


# What is broken: where, the key, its new value (None: removed), and a word of the problem that must be reported.
MUTATIONS = {
    "a Service's selector": (_first("Service"), "selector", {"variant": "other"}, "selects the pods of []"),
    "a Service for both versions": (
        _first("Service"),
        "selector",
        {"app.kubernetes.io/name": "redpp-serve"},
        "selects the pods of ['model-original'",
    ),
    "a Service's port": (lambda d: _first("Service")(d)["ports"][0], "targetPort", "https", "which no container has"),
    "a budget without pods": (_first("PodDisruptionBudget"), "selector", {"matchLabels": {}}, "selects the pods of []"),
    "a backend's name": (
        lambda d: _first("HTTPRoute")(d)["rules"][2]["backendRefs"][0],
        "name",
        "model-orginal",
        "which is not served",
    ),
    "a backend's port": (
        lambda d: _first("HTTPRoute")(d)["rules"][0]["backendRefs"][0],
        "port",
        8000,
        "which is not served",
    ),
    "the weights": (
        lambda d: _first("HTTPRoute")(d)["rules"][2]["backendRefs"][1],
        "weight",
        20,
        "do not add up to 100",
    ),
    "the header's arm": (
        lambda d: _first("HTTPRoute")(d)["rules"][0]["matches"][0]["headers"][0],
        "value",
        "pruned",
        "sends X-Redpp-Arm",
    ),
    "a path": (
        lambda d: _first("HTTPRoute")(d)["rules"][0]["matches"][0]["path"],
        "value",
        "/v2/models/x/infer",
        "different paths",
    ),
    "a field of the route": (lambda d: _first("HTTPRoute")(d)["rules"][0], "backendRef", [], "backendRef"),
    "a field of the monitor": (
        lambda d: _first("PodMonitor")(d)["podMetricsEndpoints"][0],
        "intervall",
        "15s",
        "intervall",
    ),
    "the monitor's port": (
        lambda d: _first("PodMonitor")(d)["podMetricsEndpoints"][0],
        "port",
        "prometheus",
        "scrapes the port prometheus",
    ),
    "the monitor's pods": (_first("PodMonitor"), "selector", {"matchLabels": {"app": "x"}}, "PodMonitor model selects"),
    "the policy's pods": (
        _first("NetworkPolicy"),
        "podSelector",
        {"matchLabels": {"app": "x"}},
        "guards the pods of []",
    ),
    "an autoscaler's target": (
        lambda d: _first("HorizontalPodAutoscaler")(d)["scaleTargetRef"],
        "name",
        "model",
        "which does not exist",
    ),
    "an autoscaler's metric": (
        lambda d: _first("HorizontalPodAutoscaler")(d)["metrics"][0]["pods"]["metric"],
        "name",
        "redpp_busy",
        "which nothing exports",
    ),
    "a key of a ConfigMap": (lambda d: of_kind(d, "ConfigMap")[0], "data", {"NAME": "model"}, "which does not exist"),
    "a mounted script": (lambda d: of_kind(d, "ConfigMap")[1], "data", {"check.py": ""}, "which nothing mounts"),
    "replicas": (lambda d: of_kind(d, "Deployment")[0]["spec"], "replicas", 2, "has replicas beside an autoscaler"),
    "a liveness that overload fails": (
        lambda d: _container(d)["livenessProbe"]["exec"],
        "command",
        ["python3", "/opt/probe/probe.py"],
        "which overload fails",
    ),
    "another model's pods": (
        lambda d: of_kind(d, "Deployment")[0]["spec"]["template"]["metadata"]["labels"],
        "app.kubernetes.io/instance",
        "other",
        "have not the model's name",
    ),
    "a name": (lambda d: of_kind(d, "PodMonitor")[0]["metadata"], "name", "servers", "has not the model's name model"),
    "the monitor's release": (
        lambda d: of_kind(d, "PodMonitor")[0]["metadata"],
        "labels",
        {"release": "other"},
        "have the labels release",
    ),
    "a policy": (
        lambda d: of_kind(d, "NetworkPolicy")[0]["spec"],
        "podSelector",
        {"matchLabels": {"variant": "original"}},
        "no NetworkPolicy guards model-pruned",
    ),
    "the package's image": (
        lambda d: of_kind(d, "Deployment")[0]["spec"]["template"]["spec"]["initContainers"][0],
        "image",
        "redpp-package",
        "has no fixed version",
    ),
    "a tag": (_container, "image", "redpp-serve/triton:latest", "has no fixed version"),
    "no tag": (_container, "image", "redpp-serve/triton", "has no fixed version"),
    "a typing error": (_container, "imagePullPolice", "Always", "imagePullPolice"),
    "a probe left out": (_container, "livenessProbe", None, "no livenessProbe"),
    "no limits": (_container, "resources", {}, "no limits"),
    "a writable root": (
        lambda d: _container(d)["securityContext"],
        "readOnlyRootFilesystem",
        False,
        "readOnlyRootFilesystem",
    ),
    "more privileges": (
        lambda d: _container(d)["securityContext"],
        "allowPrivilegeEscalation",
        True,
        "allowPrivilegeEscalation",
    ),
    "root": (
        lambda d: of_kind(d, "Deployment")[0]["spec"]["template"]["spec"]["securityContext"],
        "runAsUser",
        0,
        "runs as root",
    ),
    "the version": (
        lambda d: of_kind(d, "Deployment")[1]["spec"]["template"]["metadata"]["labels"],
        "version",
        "1.0",
        "has version 1.0",
    ),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_broken_manifest_is_noticed(built: dict[str, list[Document]], what: str) -> None:
    where, key, value, message = MUTATIONS[what]
    documents = copy.deepcopy(built["triton"])
    target = where(documents)
    assert value is not None or key in target
    target[key] = value
    if value is None:
        del target[key]
    assert any(message in problem for problem in problems(documents)), problems(documents)


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("runtime", "redpp-tritn", "which its runtime does not serve"),
        ("storageUri", "pvc://models", "which does not exist"),
        ("env", [{"name": "VARIANT", "value": "pruned"}], "serves ['pruned']"),
        ("modelFormats", {}, "modelFormats"),
    ],
)
def test_a_broken_inference_service_is_noticed(
    built: dict[str, list[Document]], key: str, value: object, message: str
) -> None:
    documents = copy.deepcopy(built["kserve"])
    of_kind(documents, "InferenceService")[0]["spec"]["predictor"]["model"][key] = value
    assert any(message in problem for problem in problems(documents)), problems(documents)


def test_a_runtimes_container_is_checked_as_a_pods(built: dict[str, list[Document]]) -> None:
    documents = copy.deepcopy(built["kserve"])
    of_kind(documents, "ServingRuntime")[0]["spec"]["containers"][0]["readinesProbe"] = {}
    assert any("readinesProbe" in problem for problem in problems(documents))
