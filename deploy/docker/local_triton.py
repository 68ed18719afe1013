"""Copy the Triton Inference Server that redpp-serve uses on this machine into a folder, for `try.sh`.

``python3 local_triton.py FOLDER`` makes ``bin/tritonserver``, ``lib/`` and the Python back end. Python's own library is
left to the image.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from redpp_serve.serving.triton_binary import find_triton

_PROGRAM = """#!/bin/sh
exec /opt/tritonserver/lib/tritonserver "$@" --backend-directory=/opt/tritonserver/backends --allow-gpu-metrics=false
"""


def main(folder: Path) -> None:
    binary = find_triton(print)
    for name in ("bin", "lib", "backends/python"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(binary.program, folder / "lib" / "tritonserver")
    for path in binary.python_backend:
        shutil.copy(path, folder / "backends/python" / path.name)
    for libraries in binary.libraries:
        for path in (path for path in libraries.glob("*.so*") if not path.name.startswith("libpython")):
            shutil.copy(path, folder / "lib" / path.name)
    program = folder / "bin" / "tritonserver"
    program.write_text(_PROGRAM)
    program.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
