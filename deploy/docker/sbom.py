"""Write what this image holds as a CycloneDX document: Python's packages and the distribution's."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote


def python_packages() -> Iterator[dict[str, Any]]:
    """Yield a component for each package that this Python finds."""
    for found in importlib.metadata.distributions():
        name, version = found.metadata["Name"], found.version
        purl = f"pkg:pypi/{quote(name.lower().replace('_', '-'))}@{quote(version)}"
        yield {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def debian_packages() -> Iterator[dict[str, Any]]:
    """Yield a component for each package of the distribution."""
    with open("/etc/os-release", encoding="utf-8") as file:
        system = dict(line.rstrip().replace('"', "").split("=", 1) for line in file if "=" in line)["ID"]
    form = "${Package}\t${Version}\t${Architecture}\n"
    listed = subprocess.run(["dpkg-query", "--show", "--showformat", form], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        name, version, architecture = line.split("\t")
        purl = f"pkg:deb/{system}/{quote(name)}@{quote(version)}?arch={architecture}"
        yield {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def document(image: str) -> dict[str, Any]:
    """Return the document; it says nothing of time, so that equal images have equal ones."""
    components = {part["bom-ref"]: part for part in (*python_packages(), *debian_packages())}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": image, "name": image}},
        "components": [components[key] for key in sorted(components)],
    }


if __name__ == "__main__":
    print(json.dumps(document(sys.argv[1]), indent=1))
