"""A systemd unit that runs a command of this program, and starts it again when it was killed."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.files import write_atomically

_KEPT = re.compile(r"PATH|VIRTUAL_ENV|XDG_(STATE|CACHE)_HOME|LD_LIBRARY_PATH|OMP_NUM_THREADS|REDPP_.*")


@dataclass(frozen=True)
class Unit:
    """A service of a user's systemd.

    Attributes:
        name: its name, without ``.service``.
        words: the program's arguments, such as ``serve dist/model``.
        outlives: its processes serve users on when the program is killed, and the next start takes them over.
    """

    name: str
    words: Sequence[str]
    outlives: bool

    def text(self) -> str:
        """Return the unit file, which runs in this working folder with this environment's variables of the program."""
        command = " ".join(_quoted(word) for word in (sys.executable, "-m", "redpp_serve.cli", *self.words))
        kept = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _KEPT.fullmatch(name)]
        # systemd itself would end what outlives the program, at its death and when memory runs out.
        kill = "process" if self.outlives else "mixed"
        lines = [
            "[Unit]",
            f"Description=redpp-serve {_escaped(shlex.join(self.words))}",
            "After=network.target",
            "",
            "[Service]",
            "Type=exec",
            f"WorkingDirectory={_escaped(os.getcwd())}",
            *(f"Environment={_quoted(variable)}" for variable in kept),
            f"ExecStart={command}",
            "Restart=on-failure",
            "RestartSec=1",
            f"KillMode={kill}",
            "OOMPolicy=continue",
            "TimeoutStopSec=90",
            "",
            "[Install]",
            "WantedBy=default.target",
        ]
        return "\n".join(lines) + "\n"

    def install(self) -> list[str]:
        """Write the unit where the user's systemd looks for it; return lines that say so, and how to start it.

        Raises:
            RedppError: it cannot be written.
        """
        base = os.environ.get("XDG_CONFIG_HOME", "")
        try:
            folder = (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "systemd" / "user"
            path = folder / f"{self.name}.service"
            write_atomically(path, self.text())
        except (OSError, RuntimeError) as error:
            raise RedppError(
                f"the unit cannot be written: {error}", "a home with room for it", "print it with --systemd"
            ) from error
        return [
            f"written {path}",
            f"start   systemctl --user daemon-reload && systemctl --user enable --now {self.name}",
            "stay    loginctl enable-linger, so that it also runs while you are logged out",
        ]


def unit_of(command: str, folder: Path, arguments: Sequence[str]) -> Unit:
    """Return the unit that runs a command.

    Args:
        command: ``serve`` or ``ab start``.
        folder: the packaged folder, which names the unit.
        arguments: the program's arguments as they were given, ``--systemd`` among them.
    """
    words, given = [], iter(arguments)
    for word in given:
        if word.partition("=")[0] != "--systemd":
            words.append(word)
        elif word == "--systemd" and (following := next(given, None)) is not None:
            words += [] if following in ("print", "install") else [following]
    outlives = command == "ab start"
    if outlives and "--foreground" not in words:
        words.append("--foreground")
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", folder.resolve().name)
    return Unit(f"redpp-{command.split()[0]}-{plain}", words, outlives)


def _quoted(word: str) -> str:
    """Return a word as systemd reads it: quoted, with neither specifiers nor variables of its own."""
    inner = _escaped(word).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{inner}"'


def _escaped(text: str) -> str:
    return text.replace("%", "%%").replace("\n", " ")
