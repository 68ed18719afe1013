"""A package as release 0.1 wrote it: the pruned version's archive is named redpp.mar, its variant 'redpp'."""

import json
import shutil
import zipfile
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "golden" / "package_0_1.zip"


def former_package(folder: Path) -> tuple[Path, dict[str, list[float]]]:
    """Unpack the package below ``folder``.

    Returns:
        The packaged folder, and for each archive the network's output for the folder's sample, as release 0.1 gave it.
    """
    with zipfile.ZipFile(PACKAGE) as file:
        file.extractall(folder)
    versions = folder / "small" / "triton" / "small"
    # Both versions carry the same code; the test file holds it once.
    shutil.copytree(versions / "1" / "redpp_serve", versions / "2" / "redpp_serve")
    return folder / "small", json.loads((folder / "outputs.json").read_text())
