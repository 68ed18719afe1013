"""Pieces of the page that escape what they are given: tables, cards, notes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from redpp_serve.report.formats import DASH, printable


def text_of(value: object) -> str:
    """Untrusted text, made safe for HTML and XML, attributes included."""
    return escape(printable(value))


class Cell(NamedTuple):
    """Plain text of one table cell, the number or text it sorts by, and its CSS class."""

    text: str
    sort: Any = None
    css: str = ""


def _cell(tag: str, cell: Cell | str, css: str) -> str:
    cell = cell if isinstance(cell, Cell) else Cell(cell)
    names = " ".join(part for part in (css, cell.css) if part)
    sort = "" if cell.sort is None else f' data-v="{text_of(cell.sort)}"'
    css = f' class="{names}"' if names else ""
    return f"<{tag}{css}{sort}>{text_of(cell.text)}</{tag.split()[0]}>"


def scroll(label: str, content: str, css: str = "") -> str:
    """Markup in a frame that scrolls by mouse, touch and keys when it is wider than the page."""
    return f'<div class="scroll {css}" role="region" tabindex="0" aria-label="{text_of(label)}">{content}</div>'


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[Cell | str]], kinds: str, css: str = "", frame: str = ""
) -> str:
    """A table whose first column is a row header; without rows, one of dashes.

    `kinds` has one letter a column: t(ext), n(umber), w(ide text), c(ode), f(ixed: never wrapped).
    """
    classes = [{"t": "", "n": "n", "w": "wide", "c": "code", "f": "fixed"}[kind] for kind in kinds]
    columns = "".join(_cell('th scope="col"', title, kind) for title, kind in zip(head, classes))
    body = ""
    for row in rows or [[DASH] * len(head)]:
        first, *rest = (_cell("td" if i else 'th scope="row"', cell, classes[i]) for i, cell in enumerate(row))
        body += f"<tr>{first}{''.join(rest)}</tr>"
    label = f"<caption><span>{text_of(caption)}</span></caption>" if caption else ""
    return scroll(
        caption or ", ".join(head),
        f'<table class="{css}">{label}<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>',
        frame,
    )


def section(title: str, *parts: str) -> str:
    """A card of the page from finished markup, under a plain title."""
    return f"<section><h2>{text_of(title)}</h2>{''.join(parts)}</section>"


def note(line: str, css: str = "soft") -> str:
    """A paragraph of plain text; nothing for an empty one."""
    return f'<p class="{css}">{text_of(line)}</p>' if line else ""
