"""The tables of faults: a file for each room, a row for each fault."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TABLES = Path(__file__).parent


@dataclass(frozen=True)
class Fault:
    """A change of the source that a test should notice.

    Attributes:
        room: the table's name.
        name: its name, unique in all tables.
        what: what it does to a user, in one sentence.
        file: the file that it is planted in, relative to the repository.
        text: the text that is replaced; it stands in the file once.
        replaced: the text in its place.
        tests: the files, or tests, that should notice it.
    """

    room: str
    name: str
    what: str
    file: str
    text: str
    replaced: str
    tests: tuple[str, ...]

    def plant(self, root: Path = ROOT) -> str:
        """Return the file's text below ``root`` with the fault in it.

        Raises:
            ValueError: the text does not stand there exactly once, or the fault changes nothing.
        """
        source = (root / self.file).read_text(encoding="utf-8")
        if (times := source.count(self.text)) != 1 or self.text == self.replaced:
            raise ValueError(
                f"fault {self.name} finds its text {times} times in {self.file}, expected once and another text in its "
                f"place: correct tests/faults/{self.room}.toml"
            )
        return source.replace(self.text, self.replaced)


def rooms() -> tuple[str, ...]:
    """Return the names of the tables."""
    return tuple(sorted(path.stem for path in TABLES.glob("*.toml")))


def faults(room: str | None = None) -> list[Fault]:
    """Return the faults of a room, or of all."""
    return [fault for name in ([room] if room else rooms()) for fault in _read(name)]


def _read(room: str) -> list[Fault]:
    table: dict[str, Any] = tomllib.loads((TABLES / f"{room}.toml").read_text(encoding="utf-8"))
    shared = {"file": table.get("file"), "tests": table.get("tests")}
    rows = [{**shared, **row} for row in table["fault"]]
    return [Fault(room, **{**row, "tests": tuple(row["tests"])}) for row in rows]
