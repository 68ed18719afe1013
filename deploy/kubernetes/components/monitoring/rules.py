"""Writes ``rules.yaml``, a PrometheusRule of the rules and alerts in ``deploy/prometheus``."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
SOURCES = [HERE.parents[2] / "prometheus" / name for name in ("rules.yml", "alerts.yml")]
HEAD = """# Written by rules.py from deploy/prometheus.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: redpp-serve
  labels: {release: kube-prometheus-stack}  # replaced by RELEASE in model/model.env
spec:
  groups:
"""


def manifest() -> str:
    """Return the text of ``rules.yaml``: the groups as they are, two columns further in."""
    texts = (path.read_text().split("groups:\n", 1)[1] for path in SOURCES)
    return HEAD + "".join(f"  {line}\n" if line else "\n" for text in texts for line in text.splitlines())


if __name__ == "__main__":
    (HERE / "rules.yaml").write_text(manifest())
