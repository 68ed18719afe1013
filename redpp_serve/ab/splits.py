"""Where a deployment keeps its split: in a Gateway API route on Kubernetes, in files beside nginx with compose.

Both keep the journal of the test beside the split, so that a watcher that is started again knows what it did, and sees
where somebody else has moved users.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from redpp_serve.ab.gateway import switch, switched
from redpp_serve.ab.spec import TrafficSplit, Users, parse_split, split_at
from redpp_serve.ab.state import write_json
from redpp_serve.errors import RedppError
from redpp_serve.variants import NAMES, ORIGINAL, PRUNED

ANNOTATION = "redpp-serve/ab-test"
JOURNAL = "watch.json"
_GROUP, _VERSION, _PLURAL = "gateway.networking.k8s.io", "v1", "httproutes"
_ARM = re.compile(rf"-({'|'.join(NAMES)})(?:-predictor)?\Z")  # the end of a Service's name; KServe adds a word
_TIMEOUT_S = (5.0, 20.0)  # to connect, and for an answer
Rule = dict[str, dict[str, Any]]  # arm -> its backend reference


@dataclass(frozen=True)
class Found:
    """What was read.

    Attributes:
        users: where users go.
        journal: what a watcher has left there; empty where none has.
        document: what `write` needs of it.
    """

    users: Users
    journal: dict[str, Any]
    document: Any = None


class Split(Protocol):
    """The split of a deployment."""

    def __str__(self) -> str: ...

    def read(self) -> Found:
        """Return where users go now.

        Raises:
            RedppError: it cannot be read, or is no such split.
        """

    def write(self, found: Found, users: str, journal: dict[str, Any]) -> None:
        """Move users, unless somebody else has changed anything since ``found`` was read.

        Args:
            found: what `read` returned.
            users: an arm, or a split, in the form of the journal.
            journal: takes the place of the former one.

        Raises:
            RedppError: nothing was changed.
        """


class Route:
    """The weights of an HTTPRoute, changed only where it is still as it was read (its ``resourceVersion``).

    A rule whose backends are one Service of each arm, named ``...-original`` and ``...-pruned``, divides users; where
    there are several, all of them are changed. Other rules are left alone.

    Args:
        name: ``NAMESPACE/NAME``.

    Raises:
        RedppError: the name has another form, or there is no cluster to ask.
    """

    def __init__(self, name: str) -> None:
        self._namespace, _, self._name = name.partition("/")
        if not self._namespace or not self._name or "/" in self._name:
            raise RedppError(f"--route {name}", "a namespace and a name", "write for example redpp-serve/model")
        try:
            from kubernetes import client, config  # noqa: PLC0415 (optional, and no other command needs it)
        except ImportError as error:
            raise RedppError(
                "--route without the package kubernetes", "it", "pip install redpp-serve[watch]"
            ) from error
        try:
            configuration = client.Configuration()
            if "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
                config.load_incluster_config(client_configuration=configuration)
            else:
                config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)
        except config.ConfigException as error:
            raise RedppError(
                f"no cluster: {error}", "a kubeconfig, or a pod with a service account", "set KUBECONFIG"
            ) from error
        configuration.retries = False
        self._api = client.CustomObjectsApi(client.ApiClient(configuration))

    def __str__(self) -> str:
        return f"HTTPRoute {self._namespace}/{self._name}"

    def read(self) -> Found:
        """Return the route's weights; see `Split`."""
        route = self._ask("get")
        found = {_users(rule) for rule in self._rules(route)}
        if len(found) != 1:
            raise RedppError(
                f"{self} has {'rules with different weights' if found else 'no rule for both arms'}",
                "rules that divide between a Service ...-original and a Service ...-pruned, alike",
                "see kubectl get httproute -o yaml",
            )
        text = (route["metadata"].get("annotations") or {}).get(ANNOTATION, "{}")
        return Found(found.pop(), _journal(text, f"the annotation {ANNOTATION} of {self}"), route)

    def write(self, found: Found, users: str, journal: dict[str, Any]) -> None:
        """Change the weights and the annotation in one request; see `Split`."""
        route = json.loads(json.dumps(found.document))
        for rule in self._rules(route) if users != str(found.users) else ():
            for arm, weight in zip(NAMES, _weights(_as_split(users)), strict=True):
                rule[arm]["weight"] = weight
        annotations = route["metadata"].get("annotations") or {}
        route["metadata"]["annotations"] = {**annotations, ANNOTATION: json.dumps(journal)}
        self._ask("replace", body=route)

    def _ask(self, what: str, **more: Any) -> dict[str, Any]:
        from kubernetes.client import ApiException  # noqa: PLC0415
        from urllib3.exceptions import HTTPError  # noqa: PLC0415 (what the client is made with)

        call = getattr(self._api, f"{what}_namespaced_custom_object")
        where = {"namespace": self._namespace, "plural": _PLURAL, "name": self._name}
        try:
            answer: dict[str, Any] = call(_GROUP, _VERSION, **where, **more, _request_timeout=_TIMEOUT_S)
        except ApiException as error:
            if error.status == 409:
                raise RedppError(f"{self} was changed meanwhile", "it as it was read", "look again") from error
            raise RedppError(
                f"the API server refuses {what} of {self}: {error.status} {error.reason}",
                "the rights of deploy/kubernetes/components/watch",
                "see its role",
            ) from error
        except (HTTPError, OSError) as error:
            raise RedppError(f"the API server does not answer: {error}", "an answer", "see the cluster") from error
        return answer

    @staticmethod
    def _rules(route: dict[str, Any]) -> Iterator[Rule]:
        for rule in route.get("spec", {}).get("rules") or ():
            backends = rule.get("backendRefs") or []
            named = {match[1]: b for b in backends if (match := _ARM.search(b["name"]))}
            if len(backends) == len(named) == len(NAMES):
                yield named


def _users(rule: Rule) -> Users:
    weights = [int(rule[arm].get("weight", 1)) for arm in NAMES]
    if min(weights) < 0 or not any(weights):
        raise RedppError(f"a route with the weights {weights}", "one above 0", "set them")
    split = split_at((Decimal(100 * weights[1]) / sum(weights)).quantize(Decimal("0.01")).normalize())
    return Users(_only_arm(split), parse_split(f"{split.original:f}:{split.pruned:f}"))


def _only_arm(split: TrafficSplit) -> str | None:
    return {Decimal(0): ORIGINAL.name, Decimal(100): PRUNED.name}.get(split.pruned)


def _as_split(users: str) -> TrafficSplit:
    return {ORIGINAL.name: split_at(Decimal(0)), PRUNED.name: split_at(Decimal(100))}.get(users) or parse_split(users)


def _weights(split: TrafficSplit) -> tuple[int, int]:
    """Return whole numbers in the ratio of a split, such as 90 and 10, or 995 and 5."""
    scale = next(scale for scale in (1, 10, 100) if (split.pruned * scale) % 1 == 0)
    return int(split.original * scale), int(split.pruned * scale)


class SplitFiles:
    """The files by which ``deploy/nginx`` divides and promotes; the split itself is fixed in nginx's configuration.

    Args:
        folder: the test's, such as ``/state/redpp``.
        split: the split in nginx's configuration.
    """

    def __init__(self, folder: Path, split: TrafficSplit) -> None:
        self._folder, self._split = folder, split

    def __str__(self) -> str:
        return f"nginx with {self._folder}"

    def read(self) -> Found:
        """Return what the files say; see `Split`. A folder that is gone gives all users the original."""
        path = self._folder / JOURNAL
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            text = "{}"
        except OSError as error:
            raise RedppError(f"{path} cannot be read: {error}", "what a watcher wrote", "see its rights") from error
        return Found(Users(switched(self._folder), self._split), _journal(text, str(path)))

    def write(self, found: Found, users: str, journal: dict[str, Any]) -> None:
        """Move users, then write the journal; see `Split`. What nginx's configuration fixes cannot be changed."""
        if str(self.read().users) != str(found.users):
            raise RedppError(f"{self} was changed meanwhile", "it as it was read", "look again")
        if users not in (*NAMES, str(found.users)):
            raise RedppError(f"{self} cannot divide users {users}", f"{self._split}", "leave --ramp out")
        try:
            if users != str(found.users):
                switch(self._folder, users)
            write_json(self._folder / JOURNAL, journal)
        except OSError as error:
            raise RedppError(f"{self} cannot be changed: {error}", "a folder to write to", "see its rights") from error


class Unchanged:
    """A split that nobody can ask: the one that the user says is in force.

    Args:
        split: it.
    """

    def __init__(self, split: TrafficSplit) -> None:
        self._split = split

    def __str__(self) -> str:
        return "its servers"

    def read(self) -> Found:
        """Return the split; see `Split`."""
        return Found(Users(_only_arm(self._split), self._split), {})

    def write(self, found: Found, users: str, journal: dict[str, Any]) -> None:
        """Do nothing: only without ``--auto`` is there such a split."""


def split_of(route: str | None, folder: Path | None, split: TrafficSplit) -> Split:
    """Return the split of a route, else that of nginx's files, else one that is known and stays."""
    if route:
        return Route(route)
    return SplitFiles(folder, split) if folder else Unchanged(split)


def _journal(text: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise RedppError(f"{where} is no journal", "what a watcher wrote", "remove it to begin the test anew")
    return document
