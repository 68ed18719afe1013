"""The dashboards' queries, made from the recording rules: no second copy of a formula, and no rules to load.

A recorded name becomes its expression, the rules' five minutes become Grafana's own interval, and every metric gets
the dashboard's variables as label matchers.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

RULES = Path(__file__).parent.parent / "prometheus" / "rules.yml"
INTERVAL = "$__rate_interval"  # at least four scrapes, whatever the zoom
_RECORDED = re.compile(r"\b[a-z]+:redpp_\w+:\w+\b")
_METRIC = re.compile(r"\b(redpp_\w+)(?:\{([^}]*)\})?")
# Matchers of a series that belongs to one version, and of what compares versions. `=~` with `.*` for "all" also
# matches series without the label, as where targets carry no label `server`.
VERSION = ('server=~"$server"', 'model=~"$model"', 'version=~"$version"')
MODEL = VERSION[:2]
EXPERIMENT = ('model=~"$model"',)


def recorded(name: str, matchers: tuple[str, ...] = VERSION) -> str:
    """The expression of a recording rule, over Grafana's interval."""
    expressions = {
        rule["record"]: rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    }
    return matched(_expand(name, expressions).replace("[5m]", f"[{INTERVAL}]"), matchers)


def matched(expression: str, matchers: tuple[str, ...] = VERSION) -> str:
    """The expression with label matchers on each of the project's metrics."""

    def add(found: re.Match[str]) -> str:
        own = [found[2]] if found[2] else []
        return f"{found[1]}{{{', '.join([*own, *matchers])}}}"

    return _METRIC.sub(add, expression)


def _expand(name: str, expressions: dict[str, str]) -> str:
    """Selectors of labels on a recorded name move to the metrics that it is made of, which have all of them."""

    def inner(found: re.Match[str]) -> str:
        expression = _expand(found[1], expressions)
        return "(" + (matched(expression, (found[2],)) if found[2] else expression) + ")"

    return re.sub(rf"({_RECORDED.pattern})(?:\{{([^}}]*)\}})?", inner, expressions[name])
