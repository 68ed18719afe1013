"""`--observe`: what a server is told so that the original adds up moments, and what is refused before it starts."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.handlers.wire import OBSERVE_FILE_VARIABLE, OBSERVE_VARIABLE
from redpp_serve.variants import ORIGINAL

_OBSERVER = "redpp_serve/runtime/observer.py"


@dataclass(frozen=True)
class Observing:
    """How a server observes.

    Attributes:
        every: how many requests to the original there are for each that is observed, on average.
        file: where the sums are added up, absolute.
    """

    every: int
    file: Path

    def environment(self) -> dict[str, str]:
        """Return the variables that tell the handlers."""
        return {OBSERVE_VARIABLE: str(self.every), OBSERVE_FILE_VARIABLE: str(self.file)}

    def lines(self) -> list[str]:
        """Return what the user should know."""
        share = "each request" if self.every == 1 else f"one request in {self.every}"
        return [
            f"observing: of {share} to the original, second moments of what its layers read are added up; no input and "
            f"no output is kept",
            f"moments  {self.file}   for redpp-serve package --moments",
        ]


def observing(folder: Path, every: int | None, file: Path | None) -> Observing | None:
    """Check that a packaged folder's original can be observed; None where ``every`` is.

    Args:
        folder: the packaged folder.
        every: how many requests there are for each that is observed.
        file: where the sums go; by default a file beside the folder, since what is in it may be handed on.

    Raises:
        RedppError: an archive of an earlier release, or a file that the sums cannot be added to.
    """
    if every is None:
        return None
    from redpp_serve.packaging.mar import read_artifact  # noqa: PLC0415  (torch)
    from redpp_serve.runtime.moments_file import check_file  # noqa: PLC0415

    folder = folder.resolve()
    file = (file or folder.with_name(f"{folder.name}.moments.safetensors")).absolute()
    archive = ORIGINAL.archive_in(folder)
    graph = read_artifact(archive).graph
    with zipfile.ZipFile(archive) as content:
        known = _OBSERVER in content.namelist()
    if not known:
        raise RedppError(
            f"--observe with {archive} of an earlier release",
            "an archive whose handler can observe",
            "package the model again, or leave out --observe",
        )
    check_file(file, graph)
    return Observing(every, file)
