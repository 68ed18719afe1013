"""Built Kubernetes manifests, and what must hold between them: a label that matches nothing is no error there."""

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from redpp_serve.handlers.metrics import FAMILIES
from tests.support.tools import tool

DEPLOY = Path(__file__).parents[2] / "deploy"
SCHEMAS = {p.stem: json.loads(p.read_text()) for p in (Path(__file__).parent.parent / "schemas").glob("*.json")}
Document = dict[str, Any]


def build(overlay: Path) -> list[Document]:
    """What ``kubectl apply -k`` would send to the cluster."""
    done = subprocess.run([tool("kubectl"), "kustomize", overlay], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    """Those of these kinds, in order."""
    return [d for d in documents if d["kind"] in kinds]


def problems(documents: list[Document]) -> list[str]:
    """Every rule that the manifests break, as sentences; empty when all is well."""
    checks = (_schemas, _selectors, _services, _routes, _autoscalers, _monitors, _policies, _pods, _inference_services)
    return [problem for check in checks for problem in check(documents)]


def _name(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def _schemas(documents: list[Document]) -> Iterator[str]:
    for document in documents:
        message = _schema_problem(json.dumps(document))
        if message:
            yield f"{_name(document)}: {message}"


@cache
def _schema_problem(text: str) -> str | None:
    document = json.loads(text)
    own = SCHEMAS.get(document["kind"].lower())
    pods = [document] if own is None else []
    try:
        if own is not None:
            jsonschema.validate(document, own)
        if document["kind"] == "ServingRuntime":  # its containers are a pod's
            spec = {key: document["spec"][key] for key in ("containers", "volumes") if key in document["spec"]}
            pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "runtime"}, "spec": spec}]
        for pod in pods:
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        return error.message
    return None


def _matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()


def _templates(documents: list[Document]) -> dict[str, Document]:
    """Pod templates by the name of their Deployment."""
    return {d["metadata"]["name"]: d["spec"]["template"] for d in of_kind(documents, "Deployment")}


def _selected(documents: list[Document], selector: dict[str, str]) -> list[str]:
    templates = _templates(documents).items()
    return [name for name, template in templates if _matches(selector, template["metadata"]["labels"])]


def _ports(template: Document) -> dict[str, int]:
    return {p["name"]: p["containerPort"] for c in template["spec"]["containers"] for p in c.get("ports", [])}


def _selectors(documents: list[Document]) -> Iterator[str]:
    """Deployments, Services and disruption budgets mean one version's pods and no other's."""
    for document in of_kind(documents, "Deployment", "Service", "PodDisruptionBudget"):
        selector = document["spec"].get("selector", {})
        selected = _selected(documents, selector if document["kind"] == "Service" else selector.get("matchLabels", {}))
        if selected != [document["metadata"]["name"]]:
            yield f"{_name(document)} selects the pods of {selected}"
    for name, template in _templates(documents).items():
        labels = template["metadata"]["labels"]
        if (name, labels.get("version")) not in {("model-original", "1.0"), ("model-pruned", "2.0")}:
            yield f"Deployment {name} has version {labels.get('version')}"
        if labels.get("variant") != name.removeprefix("model-"):
            yield f"Deployment {name} has variant {labels.get('variant')}"


def _services(documents: list[Document]) -> Iterator[str]:
    templates = _templates(documents)
    for service in of_kind(documents, "Service"):
        template = templates.get(service["metadata"]["name"])
        for port in service["spec"]["ports"]:
            if template and port["targetPort"] not in _ports(template):
                yield f"{_name(service)} sends to the port {port['targetPort']}, which no container has"


def _routes(documents: list[Document]) -> Iterator[str]:
    served = {(s["metadata"]["name"], p["port"]) for s in of_kind(documents, "Service") for p in s["spec"]["ports"]}
    served |= {(f"{i['metadata']['name']}-predictor", 80) for i in of_kind(documents, "InferenceService")}
    for route in of_kind(documents, "HTTPRoute"):
        asked = set()
        for rule in route["spec"]["rules"]:
            backends = rule["backendRefs"]
            missing = {(b["name"], b["port"]) for b in backends} - served
            if missing:
                yield f"{_name(route)} sends to {sorted(missing)}, which is not served"
            if len(backends) > 1 and sum(b.get("weight", 1) for b in backends) != 100:
                yield f"{_name(route)} has weights that do not add up to 100"
            for header in (h for m in rule["matches"] for h in m.get("headers", [])):
                asked.add(header["value"])
                if [b["name"].split("-")[1] for b in backends] != [header["value"]]:
                    yield f"{_name(route)} sends {header['name']}: {header['value']} to {backends[0]['name']}"
        if asked != {"original", "pruned"}:
            yield f"{_name(route)} lets the header ask for {sorted(asked)}"
        if len({m["path"]["value"] for rule in route["spec"]["rules"] for m in rule["matches"]}) != 1:
            yield f"{_name(route)} has rules with different paths"


@cache
def adapted_metrics() -> set[str]:
    """Names that the adapter's rules make out of families that the handlers export."""
    made = set()
    for rule in yaml.safe_load((DEPLOY / "kubernetes/adapter/prometheus-adapter.yaml").read_text())["rules"]:
        series = re.match(r"[a-z_]+", rule["seriesQuery"])[0]
        family = FAMILIES.get(series) or FAMILIES.get(re.sub(r"_(sum|count|bucket)$", "", series))
        if family and re.fullmatch(rule["name"]["matches"], series):
            made.add(rule["name"]["as"])
    return made


def _autoscalers(documents: list[Document]) -> Iterator[str]:
    for scaler in of_kind(documents, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        if target["kind"] != "Deployment" or target["name"] not in _templates(documents):
            yield f"{_name(scaler)} scales {target['kind']} {target['name']}, which does not exist"
        for metric in scaler["spec"]["metrics"]:
            name = metric["pods"]["metric"]["name"]
            if name not in adapted_metrics():
                yield f"{_name(scaler)} follows {name}, which nothing exports"


def _monitors(documents: list[Document]) -> Iterator[str]:
    for monitor in of_kind(documents, "PodMonitor"):
        selected = _selected(documents, monitor["spec"]["selector"]["matchLabels"])
        if sorted(selected) != sorted(_templates(documents)):
            yield f"{_name(monitor)} selects the pods of {selected}"
        for name in selected:
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] not in _ports(_templates(documents)[name]):
                    yield f"{_name(monitor)} scrapes the port {endpoint['port']}, which {name} does not have"


def _policies(documents: list[Document]) -> Iterator[str]:
    for policy in of_kind(documents, "NetworkPolicy"):
        selected = _selected(documents, policy["spec"]["podSelector"]["matchLabels"])
        if sorted(selected) != sorted(_templates(documents)):
            yield f"{_name(policy)} guards the pods of {selected}"
        ports = {p["port"] for rule in policy["spec"]["ingress"] for p in rule["ports"]}
        for name in selected:
            if not ports <= _ports(_templates(documents)[name]).keys():
                yield f"{_name(policy)} opens {sorted(ports)}, which {name} does not have"


def _pods(documents: list[Document]) -> Iterator[str]:
    specs = {name: template["spec"] for name, template in _templates(documents).items()}
    specs |= {r["metadata"]["name"]: r["spec"] for r in of_kind(documents, "ServingRuntime")}
    for name, spec in specs.items():
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        yield from (f"{name}: {problem}" for problem in _volumes(documents, volumes.values()))
        for container in spec["containers"]:
            yield from (f"{name}: {problem}" for problem in _container(documents, spec, container, volumes))


def _volumes(documents: list[Document], volumes: Any) -> Iterator[str]:
    claims = {d["metadata"]["name"] for d in of_kind(documents, "PersistentVolumeClaim")}
    maps = {d["metadata"]["name"] for d in of_kind(documents, "ConfigMap")}
    for volume in volumes:
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        config = volume.get("configMap", {}).get("name")
        if claim and claim not in claims:
            yield f"no claim {claim}"
        if config and config not in maps:
            yield f"no ConfigMap {config}"


def _container(
    documents: list[Document], spec: Document, container: Document, volumes: dict[str, Document]
) -> Iterator[str]:
    maps = {d["metadata"]["name"]: d.get("data", {}) for d in of_kind(documents, "ConfigMap")}
    mounts = {mount["mountPath"]: volumes.get(mount["name"]) for mount in container.get("volumeMounts", [])}
    yield from (f"{path} mounts a volume that does not exist" for path, volume in mounts.items() if volume is None)
    for variable in container.get("env", []):
        reference = variable.get("valueFrom", {}).get("configMapKeyRef")
        if reference and reference["key"] not in maps.get(reference["name"], {}):
            yield f"{variable['name']} comes from {reference['name']}/{reference['key']}, which does not exist"
    if not re.fullmatch(r"[a-z0-9./-]+:[0-9][\w.-]*", container["image"]):
        yield f"the image {container['image']} has no fixed version"
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        program = container.get(kind, {}).get("exec", {}).get("command", [None, None])[1]
        mounted = mounts.get(str(Path(program).parent)) if program else None
        files = maps.get((mounted or {}).get("configMap", {}).get("name"), {})
        if program and not program.startswith("/opt/redpp/") and Path(program).name not in files:
            yield f"the {kind} runs {program}, which nothing mounts"
    server = container["name"] != "exporter"
    yield from (
        f"no {kind}"
        for kind in ("startupProbe", "readinessProbe", "livenessProbe")
        if kind not in container and (server or kind != "startupProbe")
    )
    if not {"cpu", "memory"} <= container.get("resources", {}).get("limits", {}).keys():
        yield "no limits for CPU and memory"
    yield from _hardened(spec.get("securityContext", {}), container.get("securityContext", {}))


def _hardened(pod: Document, container: Document) -> Iterator[str]:
    """What the restricted pod security standard asks for, and a root file system that cannot be written."""
    both = {**pod, **container}
    expected = {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    for key, value in expected.items():
        if both.get(key) != value:
            yield f"securityContext {key} is {both.get(key)}, expected {value}"
    if not both.get("runAsUser"):
        yield "runs as root"


def _inference_services(documents: list[Document]) -> Iterator[str]:
    runtimes = {r["metadata"]["name"]: r["spec"] for r in of_kind(documents, "ServingRuntime")}
    claims = {f"pvc://{d['metadata']['name']}" for d in of_kind(documents, "PersistentVolumeClaim")}
    for service in of_kind(documents, "InferenceService"):
        model = service["spec"]["predictor"]["model"]
        runtime = runtimes.get(model["runtime"], {"supportedModelFormats": [], "protocolVersions": []})
        if model["modelFormat"] not in runtime["supportedModelFormats"]:
            yield f"{_name(service)} has the format {model['modelFormat']}, which its runtime does not serve"
        if model["protocolVersion"] not in runtime["protocolVersions"]:
            yield f"{_name(service)} speaks {model['protocolVersion']}, which its runtime does not"
        if model["storageUri"] not in claims:
            yield f"{_name(service)} reads {model['storageUri']}, which does not exist"
        variants = {e["value"] for e in model["env"] if e["name"] == "VARIANT"}
        if variants != {service["metadata"]["name"].removeprefix("model-")}:
            yield f"{_name(service)} serves {sorted(variants)}"
