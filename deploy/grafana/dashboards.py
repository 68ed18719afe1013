"""Write the dashboards in ``boards.yaml`` as Grafana's JSON: ``python deploy/grafana/dashboards.py``.

The files import into Grafana 11 unedited: the data source, the server, the model and the version are variables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
)
from panels import SOURCE, panel

BOARDS = Path(__file__).with_name("boards.yaml")
FOLDER = Path(__file__).parent / "dashboards"
_LOW = ("Speed-up now", "Verdict")  # rows of single numbers and words


def dashboards() -> dict[str, str]:
    """Return file names with JSON texts, the same on every call."""
    given = yaml.safe_load(BOARDS.read_text(encoding="utf-8"))
    return {
        f"{uid}.json": json.dumps(_board(uid, board).build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for uid, board in given.items()
    }


def _board(uid: str, given: Mapping[str, Any]) -> builders.Dashboard:
    board = builders.Dashboard(given["title"]).uid(uid).description(given["text"])
    board.tags(["redpp-serve"]).timezone("browser")
    board.link(builders.DashboardLink("redpp-serve").type(DashboardLinkType.DASHBOARDS).tags(["redpp-serve"]))
    board.time("now-30m", "now").refresh("10s").tooltip(DashboardCursorSync.CROSSHAIR)
    board.with_variable(builders.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for name, query in given["variables"].items():
        board.with_variable(_variable(name, query))
    numbers = count(1)
    for title, row in given["rows"].items():
        board.with_row(builders.Row(title).id(next(numbers)))
        for one in row:
            board.with_panel(panel(one).id(next(numbers)).height(5 if title in _LOW else 9))
    return board


def _variable(name: str, query: str) -> builders.QueryVariable:
    made = builders.QueryVariable(name).label(name.capitalize()).datasource(SOURCE).query(query)
    made.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).multi(True).include_all(True).all_value(".*")
    return made.current(VariableOption(selected=True, text=["All"], value=["$__all"]))


if __name__ == "__main__":
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")
