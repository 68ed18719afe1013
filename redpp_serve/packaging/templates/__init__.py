"""The text files of a package, as jinja2 templates in this folder."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_ENVIRONMENT = Environment(  # plain text: nothing to escape
    loader=PackageLoader("redpp_serve.packaging.templates", "."),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(name: str, /, **values: Any) -> str:
    """Return the text of the file ``name``, such as ``config.properties``, from its template."""
    return _ENVIRONMENT.get_template(f"{name}.j2").render(values)
