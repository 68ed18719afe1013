"""Which versions Triton Inference Server has loaded, and how requests without a version find theirs.

Triton gives a request that names no version to the highest number. Version 1 is the original and 2 the pruned network,
so such requests would always get the pruned one, and without version 2 nobody could compare. Therefore the server sees
a third version, a link to the original's folder: while it is loaded, requests without a version go to the original;
promoting unloads it, rolling back loads it again. Versions 1 and 2 stay loaded and keep their processes throughout,
Triton finishes the requests of a version before it ends it, and hands out a new version only once it is ready, so no
request fails. The price is one more process of the original as long as it is the default.

The third version alternates between two numbers: one that has died is replaced by the other before it goes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

VERSIONS = ("1", "2")  # of the original and of the pruned network
STAND_INS = ("3", "4")  # numbers for the original above both


def versions_for(variant: str) -> tuple[str, ...]:
    """The versions to load so that requests without one go to ``original`` or ``redpp``."""
    return (*VERSIONS, STAND_INS[0]) if variant == "original" else VERSIONS


def variant_of(loaded: Iterable[str]) -> str:
    """Where requests without a version go while these versions are loaded."""
    return "original" if set(loaded) & set(STAND_INS) else "redpp"


def loaded_versions(index: list[dict[str, str]], name: str) -> set[str]:
    """The versions that answer, from the document of Triton's repository index."""
    return {entry["version"] for entry in index if entry["name"] == name and entry.get("state") == "READY"}


def load_request(config: dict[str, Any], versions: Iterable[str]) -> bytes:
    """The body that has Triton load these versions and no other. ``config`` is what the model was loaded with: Triton
    keeps the processes of versions that stay only where nothing else in it differs."""
    policy = {"specific": {"versions": sorted(versions)}}
    return json.dumps({"parameters": {"config": json.dumps({**config, "version_policy": policy})}}).encode()
