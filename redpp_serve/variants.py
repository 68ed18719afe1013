"""The two versions of a packaged network, and what each is called in archives, servers, metrics and reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variant:
    """One of the two versions.

    Attributes:
        name: the word that people, metric labels, headers and reports use.
        version: the version in TorchServe's URLs and in the artifact.
        triton_version: the version in the model repository of Triton Inference Server, which takes whole numbers.
        former_name: the name in packages written before release 0.2.
    """

    name: str
    version: str
    triton_version: str
    former_name: str

    @property
    def archive(self) -> str:
        """The file name of the TorchServe archive in a packaged folder."""
        return f"{self.name}.mar"

    def archive_in(self, folder: Path) -> Path:
        """Return where this version's archive is, or would be, in a packaged folder of this or the former release."""
        today, former = folder / self.archive, folder / f"{self.former_name}.mar"
        return former if former.exists() and not today.exists() else today


ORIGINAL = Variant("original", "1.0", "1", "original")
PRUNED = Variant("pruned", "2.0", "2", "redpp")
VARIANTS = (ORIGINAL, PRUNED)
NAMES = (ORIGINAL.name, PRUNED.name)


def canonical_name(name: str) -> str:
    """Translate a variant's name as an older package writes it to today's; leave any other text as it is."""
    return next((variant.name for variant in VARIANTS if name == variant.former_name), name)
