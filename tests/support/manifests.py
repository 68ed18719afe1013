"""Built Kubernetes manifests, and what must hold between them: a label that matches nothing is no error there."""

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

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
    checks = (_schemas, _names, _selectors, _services, _routes, _autoscalers, _monitors, _policies, _pods)
    checks += (_inference_services, _rights)
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
    import jsonschema  # a second for the grammar of addresses, which workers of other tests are spared
    import kubernetes_validate

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


def _servers(documents: list[Document]) -> dict[str, Document]:
    """Those of the model's two versions."""
    return {name: t for name, t in _templates(documents).items() if "variant" in t["metadata"]["labels"]}


def _selected(documents: list[Document], selector: dict[str, str]) -> list[str]:
    templates = _templates(documents).items()
    return [name for name, template in templates if _matches(selector, template["metadata"]["labels"])]


def _ports(template: Document) -> dict[str, int]:
    return {p["name"]: p["containerPort"] for c in template["spec"]["containers"] for p in c.get("ports", [])}


def _names(documents: list[Document]) -> Iterator[str]:
    """Several models share a namespace: what belongs to one has its name, and selects its pods alone."""
    model = _model(documents)
    shared = {
        ("PrometheusRule", "redpp-serve"),
        ("PersistentVolumeClaim", "redpp-kernels"),
        ("Namespace", "redpp-serve"),
    }
    shared |= {("PersistentVolumeClaim", "redpp-packages"), ("ConfigMap", "redpp-dashboards")}
    for document in documents:
        name = document["metadata"]["name"]
        of_all = (document["kind"], name) in shared or re.fullmatch("redpp-(model|probe)-[a-z0-9]+", name)
        if not of_all and document["kind"] != "Job" and not re.fullmatch(rf"{model}(-.*)?", name):
            yield f"{_name(document)} has not the model's name {model}"
    for name, template in _templates(documents).items():
        if template["metadata"]["labels"].get("app.kubernetes.io/instance") != model:
            yield f"the pods of {name} have not the model's name {model}"


def _model(documents: list[Document]) -> str:
    """The model's name."""
    return _variable(documents, "MODEL_NAME")


def _variable(documents: list[Document], key: str) -> str:
    """A value of model/model.env; empty where there is none."""
    return next((d["data"][key] for d in of_kind(documents, "ConfigMap") if key in d["data"]), "")


def _selectors(documents: list[Document]) -> Iterator[str]:
    """Deployments, Services and disruption budgets mean one version's pods and no other's."""
    for document in of_kind(documents, "Deployment", "Service", "PodDisruptionBudget"):
        selector = document["spec"].get("selector", {})
        selected = _selected(documents, selector if document["kind"] == "Service" else selector.get("matchLabels", {}))
        if selected != [document["metadata"]["name"]]:
            yield f"{_name(document)} selects the pods of {selected}"
    for name, template in _servers(documents).items():
        labels, variant = template["metadata"]["labels"], name.rpartition("-")[2]
        if (variant, labels.get("version")) not in {("original", "1.0"), ("pruned", "2.0")}:
            yield f"Deployment {name} has version {labels.get('version')}"
        if labels.get("variant") != variant:
            yield f"Deployment {name} has variant {labels.get('variant')}"
        for spread in template["spec"]["topologySpreadConstraints"]:
            if _selected(documents, spread["labelSelector"]["matchLabels"]) != [name]:
                yield f"Deployment {name} is spread by other pods"


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
                if [b["name"].removesuffix("-predictor").rpartition("-")[2] for b in backends] != [header["value"]]:
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
        for deployment in of_kind(documents, "Deployment"):
            if deployment["metadata"]["name"] == target["name"] and "replicas" in deployment["spec"]:
                yield f"{_name(deployment)} has replicas beside an autoscaler"
        for metric in scaler["spec"]["metrics"]:
            name = metric["pods"]["metric"]["name"]
            if name not in adapted_metrics():
                yield f"{_name(scaler)} follows {name}, which nothing exports"


def _meant(documents: list[Document], document: Document) -> list[str]:
    """The Deployments that a monitor or a policy is for, by its name: the watcher's, or both versions'."""
    watcher = document["metadata"]["name"].endswith("-watch")
    return sorted(name for name in _templates(documents) if name.endswith("-watch") == watcher)


def _monitors(documents: list[Document]) -> Iterator[str]:
    for monitor in of_kind(documents, "PodMonitor"):
        selected = _selected(documents, monitor["spec"]["selector"]["matchLabels"])
        if sorted(selected) != _meant(documents, monitor):
            yield f"{_name(monitor)} selects the pods of {selected}"
        for name in selected:
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] not in _ports(_templates(documents)[name]):
                    yield f"{_name(monitor)} scrapes the port {endpoint['port']}, which {name} does not have"
    releases = {
        d["metadata"].get("labels", {}).get("release") for d in of_kind(documents, "PodMonitor", "PrometheusRule")
    }
    if releases - {_variable(documents, "RELEASE")}:
        yield f"monitors and rules have the labels release {releases}"


def _policies(documents: list[Document]) -> Iterator[str]:
    for policy in of_kind(documents, "NetworkPolicy"):
        selected = _selected(documents, policy["spec"]["podSelector"]["matchLabels"])
        if sorted(selected) != _meant(documents, policy):
            yield f"{_name(policy)} guards the pods of {selected}"
        ports = {p["port"] for rule in policy["spec"]["ingress"] for p in rule["ports"]}
        for name in selected:
            if not ports <= _ports(_templates(documents)[name]).keys():
                yield f"{_name(policy)} opens {sorted(ports)}, which {name} does not have"
    guarded = [
        n
        for p in of_kind(documents, "NetworkPolicy")
        for n in _selected(documents, p["spec"]["podSelector"]["matchLabels"])
    ]
    yield from (f"no NetworkPolicy guards {name}" for name in _templates(documents) if name not in guarded)


def _rights(documents: list[Document]) -> Iterator[str]:
    """A role names the one object that it is for; a binding and a pod name accounts and roles that exist."""
    routes = [d["metadata"]["name"] for d in of_kind(documents, "HTTPRoute")]
    roles, accounts = ({d["metadata"]["name"] for d in of_kind(documents, kind)} for kind in ("Role", "ServiceAccount"))
    for role in of_kind(documents, "Role"):
        for rule in role["rules"]:
            if rule.get("resourceNames") != routes or rule["resources"] != ["httproutes"]:
                yield f"{_name(role)} is for {rule.get('resourceNames')}"
    for binding in of_kind(documents, "RoleBinding"):
        if binding["roleRef"]["name"] not in roles or {x["name"] for x in binding["subjects"]} - accounts:
            yield f"{_name(binding)} binds what does not exist"
    for name, template in _templates(documents).items():
        account = template["spec"].get("serviceAccountName")
        if account and account not in accounts:
            yield f"{name} runs as {account}, which does not exist"


def _pods(documents: list[Document]) -> Iterator[str]:
    specs = {name: template["spec"] for name, template in _templates(documents).items()}
    specs |= {r["metadata"]["name"]: r["spec"] for r in of_kind(documents, "ServingRuntime")}
    jobs = {j["metadata"]["name"]: j["spec"]["template"]["spec"] for j in of_kind(documents, "Job")}
    for name, spec in {**specs, **jobs}.items():
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        yield from (f"{name}: {problem}" for problem in _volumes(documents, volumes.values(), writes=name in jobs))
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            lasting = name not in jobs and container in spec["containers"]
            yield from (f"{name}: {problem}" for problem in _container(documents, spec, container, volumes))
            yield from (f"{name}: {problem}" for problem in _probes(documents, container, volumes) if lasting)


def _volumes(documents: list[Document], volumes: Any, writes: bool) -> Iterator[str]:
    """Claims and ConfigMaps exist; servers write to no claim but that of compiled kernels."""
    claims = {d["metadata"]["name"] for d in of_kind(documents, "PersistentVolumeClaim")} | {"redpp-source"}
    maps = {d["metadata"]["name"] for d in of_kind(documents, "ConfigMap")}
    for volume in volumes:
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        config = volume.get("configMap", {}).get("name")
        if claim and claim not in claims:
            yield f"no claim {claim}"
        if claim and claim != "redpp-kernels" and not writes and not volume["persistentVolumeClaim"].get("readOnly"):
            yield f"the claim {claim} can be written"
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
    images = [container["image"], *(v["image"]["reference"] for v in volumes.values() if "image" in v)]
    for image in images:
        if not re.fullmatch(r"[a-z0-9./-]+:[0-9][\w.-]*", image):
            yield f"the image {image} has no fixed version"
    if not {"cpu", "memory"} <= container.get("resources", {}).get("limits", {}).keys():
        yield "no limits for CPU and memory"
    yield from _hardened(spec.get("securityContext", {}), container.get("securityContext", {}))


def _probes(documents: list[Document], container: Document, volumes: dict[str, Document]) -> Iterator[str]:
    """Each is there, runs what is mounted, and that for liveness asks for no prediction."""
    maps = {d["metadata"]["name"]: d.get("data", {}) for d in of_kind(documents, "ConfigMap")}
    mounts = {mount["mountPath"]: volumes.get(mount["name"]) for mount in container.get("volumeMounts", [])}
    if "exec" in container.get("livenessProbe", {}) and "alive" not in container["livenessProbe"]["exec"]["command"]:
        yield "the livenessProbe asks for a prediction, which overload fails"
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
        if not model["storageUri"].startswith(tuple(f"{claim}/" for claim in claims)):
            yield f"{_name(service)} reads {model['storageUri']}, which does not exist"
        variants = {e["value"] for e in model["env"] if e["name"] == "VARIANT"}
        if variants != {service["metadata"]["name"].rpartition("-")[2]}:
            yield f"{_name(service)} serves {sorted(variants)}"
