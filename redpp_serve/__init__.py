"""Data-free pruning of trained PyTorch networks, packaged and measured on a model server.

The verbs of the command line as functions: `capture_file`, `prune`, `package`, `compare`. They are imported when
first used, so that ``import redpp_serve`` stays light; each archive carries a copy of this file.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_LAZY = {
    "capture_file": "redpp_serve.capture",
    "prune": "redpp_serve.pruning.pipeline",
    "Options": "redpp_serve.options",
    "package": "redpp_serve.packaging.package",
    "compare": "redpp_serve.comparison.folder",
    "RedppError": "redpp_serve.errors",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'redpp_serve' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
