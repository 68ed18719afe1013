"""deploy/compose.yaml with its variables filled in, read here: what Compose prints differs from version to version."""

import re
from typing import Any

import yaml

from tests.support.manifests import DEPLOY

SET = {"MODEL_NAME": "tiny", "PACKAGE": "/srv/dist/tiny", "GRAFANA_PASSWORD": "chosen by the test"}


def read_compose() -> dict[str, Any]:
    """The document, with `SET` and the file's own defaults."""

    def fill(match: re.Match[str]) -> str:
        return SET[match[1]] if match[1] in SET else match[2]

    return yaml.safe_load(re.sub(r"\$\{([A-Z_]+)(?::[-?]([^}]*))?\}", fill, (DEPLOY / "compose.yaml").read_text()))
