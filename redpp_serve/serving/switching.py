"""Which version answers requests that name none: moved on a running server without losing a request.

TorchServe has a default version. Triton Inference Server gives such requests to the highest number. Version 1 is the
original and 2 the pruned network, so they would always get the pruned one, and without version 2 nobody could compare.
Therefore Triton sees a third version, a link to the original's folder: while it is loaded, requests without a version
go to the original; promoting unloads it, rolling back loads it again. Versions 1 and 2 stay loaded and keep their
processes throughout, Triton finishes the requests of a version before it ends it, and hands out a new version only once
it is ready, so no request fails. The price is one more process of the original as long as it is the default.

The third version alternates between two numbers: one that has died is replaced by the other before it goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from redpp_serve.errors import RedppError
from redpp_serve.loopback import NO_ANSWER, ask
from redpp_serve.serving.running import Running
from redpp_serve.variants import NAMES, ORIGINAL, VARIANTS

TRITON_VERSIONS = tuple(variant.triton_version for variant in VARIANTS)
STAND_INS = ("3", "4")  # numbers for the original above both
_Reply = TypeVar("_Reply")
_TIMEOUT_S = 120.0  # a rollback on Triton loads a version


def switch(running: Running, variant: str) -> None:
    """Send requests that name no version to ``original`` or ``pruned`` from now on.

    Raises:
        RedppError: the server refuses or does not answer.
    """
    if running.kind == "torchserve":
        version = running.versions[NAMES.index(variant)]
        _manage(running, "PUT", f"/models/{running.name}/{version}/set-default")
    else:
        load_triton_versions(running, triton_versions(variant))


def triton_versions(default: str) -> tuple[str, ...]:
    """Return the versions that Triton has to load so that requests without one go to ``original`` or ``pruned``."""
    return (*TRITON_VERSIONS, STAND_INS[0]) if default == ORIGINAL.name else TRITON_VERSIONS


def loaded_triton_versions(running: Running, timeout_s: float = _TIMEOUT_S) -> set[str]:
    """Return the versions that Triton calls ready.

    Raises:
        RedppError: it does not answer.
    """
    if not running.grpc:  # a server that a release of before has started
        index = _manage(running, "POST", "/v2/repository/index", {}, timeout_s)
        return {entry["version"] for entry in index if entry["name"] == running.name and entry.get("state") == "READY"}

    def ask_index(client: Any) -> Any:
        return client.get_model_repository_index(headers=running.headers["management"], client_timeout=timeout_s)

    found = _over_grpc(running, ask_index, "does not answer")
    return {entry.version for entry in found.models if entry.name == running.name and entry.state == "READY"}


def load_triton_versions(running: Running, versions: Iterable[str]) -> None:
    """Have Triton load these versions and no other.

    The rest of the configuration is what the model was loaded with: only then do versions that stay keep their
    processes.

    Raises:
        RedppError: it refuses or does not answer.
    """
    config = json.dumps({**running.model_config, "version_policy": {"specific": {"versions": sorted(versions)}}})
    if not running.grpc:
        document = {"parameters": {"config": config}}
        _manage(running, "POST", f"/v2/repository/models/{running.name}/load", document)
        return

    def load(client: Any) -> None:
        headers = running.headers["management"]
        client.load_model(running.name, headers=headers, config=config, client_timeout=_TIMEOUT_S)

    _over_grpc(running, load, f"does not load {running.name}")


def _over_grpc(running: Running, request: Callable[[Any], _Reply], problem: str) -> _Reply:
    """Ask Triton over gRPC: over HTTP a question that waits for a version to load holds users' connections up.

    Those are the connections that share a thread with it.
    """
    from tritonclient.grpc import InferenceServerClient  # noqa: PLC0415 - optional
    from tritonclient.utils import InferenceServerException  # noqa: PLC0415

    try:
        with InferenceServerClient(running.grpc) as client:
            return request(client)
    except InferenceServerException as error:
        raise _failure(running, f"{problem}: {error}") from error


def _manage(running: Running, method: str, path: str, document: Any = None, timeout_s: float = _TIMEOUT_S) -> Any:
    """Ask the management API, and return the reply's document, None for an empty one."""
    body = None if document is None else json.dumps(document).encode()
    headers = running.headers["management"]
    try:
        status, reply = ask(running.management_url + path, headers, method=method, body=body, timeout_s=timeout_s)
        if status == 200:
            return json.loads(reply) if reply.strip() else None
        problem = f"answers {status}: {reply.decode(errors='replace')[:300]}"
    except (*NO_ANSWER, ValueError) as error:
        problem = f"does not answer: {error}"
    raise _failure(running, problem)


def _failure(running: Running, problem: str) -> RedppError:
    return RedppError(
        f"the server for {running.folder} {problem}",
        "a reply of its management API",
        "see what redpp-serve serve printed; start it again if it has ended",
    )
