"""The Triton model repository: both versions, one configuration, and a copy of the serving code in each version.

Self-contained: it runs on a stock Triton with the Python back end and torch where this project is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import RedppError
from ..runtime.graph import InputSpec
from .mar import ARTIFACT, check_name, serving_sources
from .triton_config import triton_config, warmup_file

CONFIG = "config.pbtxt"
VERSIONS = {"original": "1", "redpp": "2"}  # Triton's versions are whole numbers

_MODEL = f'''"""Entry point of this version. Its own copy of the code comes first: it is what was tested."""

import locale
import sys
from contextlib import suppress
from pathlib import Path

with suppress(locale.Error):
    locale.setlocale(locale.LC_ALL, "")  # the back end starts Python with an ASCII locale
sys.dont_write_bytecode = True  # new files in the repository look to Triton like a changed model
sys.path.insert(0, str(Path(__file__).resolve().parent))

from redpp_serve.handlers.triton import RedppModel  # noqa: E402


class TritonPythonModel(RedppModel):
    """Triton looks for this name."""

    artifact = Path(__file__).resolve().with_name("{ARTIFACT}")
'''


def build_repository(
    name: str, artifacts: Mapping[str, bytes], config: str, sample: Sequence[np.ndarray]
) -> dict[str, bytes]:
    """Path below the repository to bytes, for all files; equal arguments give equal bytes.

    Args:
        name: the model's name in URLs.
        artifacts: of the variants ``original`` and ``redpp``.
        config: text of ``config.pbtxt``, see `triton_config.triton_config`.
        sample: one input without batch for each of the network's; what Triton warms up with.

    Raises:
        RedppError: a name that cannot be used.
    """
    check_name(name)
    files = {f"{name}/{CONFIG}": config.encode()}
    for index, array in enumerate(sample):
        files[f"{name}/warmup/{warmup_file(index)}"] = array.tobytes()
    for variant, version in VERSIONS.items():
        own = {"model.py": _MODEL.encode(), ARTIFACT: artifacts[variant], **serving_sources()}
        files.update({f"{name}/{version}/{path}": content for path, content in own.items()})
    return files


def output_specs(outputs: Mapping[str, Sequence[InputSpec]]) -> tuple[InputSpec, ...]:
    """The outputs as clients name them, which both variants must share.

    Args:
        outputs: for each variant shape without batch and dtype of each output.

    Raises:
        RedppError: the pruned network's differ from the original's.
    """
    original, pruned = (tuple(InputSpec(f"output_{k}", y.shape, y.dtype) for k, y in enumerate(outputs[variant]))
                        for variant in VERSIONS)  # fmt: skip
    if original != pruned:
        raise RedppError(f"outputs {pruned} of the pruned network", f"those of the original, {original}",
                         "report this with the model and the command")  # fmt: skip
    return original


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write them below the folder, which is made where it is missing."""
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
