"""The page's templates: everything that they print is made printable, and escaped unless it is markup of theirs."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from redpp_serve.errors import printable
from redpp_serve.report.formats import shorten


def _safe(value: Any) -> Any:
    return value if hasattr(value, "__html__") else printable(value)


# The loader finds templates in the package's own folder.
ENVIRONMENT = Environment(
    loader=PackageLoader("redpp_serve.report", "."),
    autoescape=True,
    finalize=_safe,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
ENVIRONMENT.filters["shorten"] = shorten
