"""Which version answers requests that name none: moved on a running server without losing one of them."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from redpp_serve.errors import RedppError
from redpp_serve.loopback import ask
from redpp_serve.serving.running import Running
from redpp_serve.serving.server import VARIANTS

_TIMEOUT_S = 120.0  # a rollback on Triton loads a version


def switch(running: Running, variant: str) -> None:
    """Requests that name no version go to that variant, ``original`` or ``pruned``, from now on.

    Raises:
        RedppError: the server refuses or does not answer.
    """
    if running.kind == "torchserve":
        version = running.versions[VARIANTS.index(variant)]
        _manage(running, "PUT", f"/models/{running.name}/{version}/set-default")
    else:
        from redpp_serve.serving.triton_server import load_request, versions_for

        versions = versions_for(variant)
        _manage(
            running, "POST", f"/v2/repository/models/{running.name}/load", load_request(running.model_config, versions)
        )


def default_variant(running: Running) -> str:
    """Where requests that name no version go now: ``original`` or ``pruned``.

    Raises:
        RedppError: the server does not answer.
    """
    if running.kind == "torchserve":
        version = _manage(running, "GET", f"/models/{running.name}")[0]["modelVersion"]
        return VARIANTS[running.versions.index(version)]
    from redpp_serve.serving.triton_server import loaded_versions, variant_of

    return variant_of(loaded_versions(_manage(running, "POST", "/v2/repository/index", b"{}"), running.name))


def _manage(running: Running, method: str, path: str, body: bytes | None = None) -> Any:
    """The reply's document, None for an empty one."""
    port = urlsplit(running.management_url).port
    assert port is not None
    try:
        status, reply = ask(port, path, running.headers["management"], method, body, _TIMEOUT_S)
        if status == 200:
            return json.loads(reply) if reply.strip() else None
        problem = f"answers {status}: {reply.decode(errors='replace')[:300]}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        problem = f"does not answer: {error}"
    raise RedppError(
        f"the server for {running.folder} {problem}",
        "a reply of its management API",
        "see what redpp-serve serve printed; start it again if it has ended",
    )
