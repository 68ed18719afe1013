"""The dashboards' queries, made from the recording rules, so that no formula is written twice and no rules are needed.

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
# Matchers for series of one version, and for comparisons of versions. `=~` with `.*` for "all" also matches series
# without the label, such as those of targets that carry no label `server`.
_VERSION = ('server=~"$server"', 'model=~"$model"', 'version=~"$version"')
_MATCHERS = {"versions": _VERSION, "models": _VERSION[:2], "A/B tests": _VERSION[1:2]}


def expression(shown: str, about: str) -> str:
    """Return the expression for what a panel shows: a recording rule over Grafana's interval, or an expression."""
    if not _RECORDED.fullmatch(shown):
        return _matched(shown, _MATCHERS[about])
    expressions = {
        rule["record"]: rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    }
    return _matched(_expand(shown, expressions).replace("[5m]", f"[{INTERVAL}]"), _MATCHERS[about])


def _matched(expression: str, matchers: tuple[str, ...]) -> str:
    """Return the expression with label matchers on each of the project's metrics."""

    def add(found: re.Match[str]) -> str:
        own = [found[2]] if found[2] else []
        return f"{found[1]}{{{', '.join([*own, *matchers])}}}"

    return _METRIC.sub(add, expression)


def _expand(name: str, expressions: dict[str, str]) -> str:
    """Expand a recorded name; selectors on it move to the metrics that it is made of, which have all its labels."""

    def inner(found: re.Match[str]) -> str:
        expression = _expand(found[1], expressions)
        return "(" + (_matched(expression, (found[2],)) if found[2] else expression) + ")"

    return re.sub(rf"({_RECORDED.pattern})(?:\{{([^}}]*)\}})?", inner, expressions[name])
