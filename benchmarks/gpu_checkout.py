"""Makes the project importable from a checkout that nobody installed; import it before any module of the project.

An installation maps `redpp_serve.kernels`, `.handlers` and `.reference` to the folders that hold them. Without one,
those folders are put on the package's path.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if find_spec("redpp_serve") is None:
    sys.path.insert(0, str(ROOT))
if find_spec("redpp_serve.kernels") is None:
    import redpp_serve

    redpp_serve.__path__ += [str(ROOT), str(ROOT / "benchmarks")]
