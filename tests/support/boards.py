"""The committed dashboards as tests see them: panels, their queries, and Grafana's variables filled in."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
# Panels that show something only where torch sees a GPU.
GPU_ONLY = {("redpp-serving", "GPU memory")}


class Target(NamedTuple):
    """One query of one panel."""

    board: str
    panel: str
    legend: str
    expr: str


def boards() -> dict[str, dict[str, Any]]:
    """Dashboards by their uid."""
    documents = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((FOLDER / "dashboards").glob("*.json"))
    ]
    found = {document["uid"]: document for document in documents}
    assert len(found) == len(documents) >= 2, "uids are unique"
    return found


def targets() -> Iterator[Target]:
    """Every query of every panel."""
    for uid, board in boards().items():
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                yield Target(uid, panel["title"], target["legendFormat"], target["expr"])


def filled(expr: str, interval: str = "1m", **values: str) -> str:
    """The query as Grafana sends it: "all" for each variable that is not among ``values``."""
    expr = re.sub(r"\$(__rate_interval|__range)\b", interval, expr)
    return re.sub(r"\$(\w+)", lambda found: values.get(found[1], ".*"), expr)
