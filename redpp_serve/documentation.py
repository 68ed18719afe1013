"""Writes ``options.md``, the table of every command's options, from the records that define them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from redpp_serve.cli import COMMANDS, EXIT_CODES
from redpp_serve.options import Range, flag_of
from redpp_serve.requirements import COMPARED, HEALTH

PATH = Path(__file__).with_name("options.md")


def documentation() -> str:
    """Return the text of ``options.md``."""
    lines = ["# Commands and options", "", "Written by `python -m redpp_serve.documentation`.", "", f"{EXIT_CODES}."]
    for name, command in COMMANDS.items():
        positional = f" {command.positional.upper()}" if command.positional else ""
        lines += [
            "",
            f"## redpp-serve {name}{positional}",
            "",
            f"{command.help[0].upper()}{command.help[1:]}.",
            "",
            "```sh",
        ]
        lines += [*(f"redpp-serve {example}" for example in command.examples), "```"]
        rows = [row for record in command.records for row in _rows(record)]
        if rows:
            lines += ["", "| option | value | meaning |", "|---|---|---|", *rows]
        if figures := {"compare": COMPARED, "health": HEALTH}.get(name):
            lines += ["", "| figure for `--require` | meaning |", "|---|---|"]
            lines += _figures(figures)
    return "\n".join(lines) + "\n"


def _figures(figures: Mapping[str, str]) -> list[str]:
    """Return a row for each figure, and one for both versions where both have it."""
    rows = []
    for name, meaning in figures.items():
        original = f"original_{name}"
        if original in figures:
            rows.append(f"| `{name}`, `{original}` | {meaning.replace('the pruned', 'the pruned or the original')} |")
        elif not (name.startswith("original_") and name.removeprefix("original_") in figures):
            rows.append(f"| `{name}` | {meaning} |")
    return rows


def _rows(record: type) -> list[str]:
    rows = []
    for item in fields(record):
        if " " in flag_of(item):  # a part of --target
            continue
        takes, metavar = item.metadata["takes"], item.metadata["metavar"] or ""
        values = metavar
        if isinstance(takes, tuple):
            values = ", ".join(f"`{word}`" for word in takes)
        elif isinstance(takes, Range):
            values = f"{metavar}: {takes}"
        cells = (f"`{flag_of(item)}`", values, item.metadata["help"].format(default=item.default))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


if __name__ == "__main__":
    PATH.write_text(documentation(), encoding="utf-8")
