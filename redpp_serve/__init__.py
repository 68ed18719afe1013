"""Data-free pruning of trained PyTorch networks, packaged and measured on a model server.

The verbs of the command line are functions here: `capture_file`, `prune`, `package` and `compare`; `load` gives a
packaged network back as a module. Each is imported when it is first used, so that ``import redpp_serve`` stays light;
each archive carries a copy of this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redpp_serve.capture import capture_file
    from redpp_serve.comparison.folder import compare
    from redpp_serve.errors import RedppError
    from redpp_serve.exporting.module import load
    from redpp_serve.graph.graph import InputSpec
    from redpp_serve.options import Options
    from redpp_serve.packaging.package import package
    from redpp_serve.pruning.pipeline import prune

__version__ = "0.2.0"
__all__ = ["InputSpec", "Options", "RedppError", "__version__", "capture_file", "compare", "load", "package", "prune"]

_MODULES = {
    "capture_file": "redpp_serve.capture",
    "compare": "redpp_serve.comparison.folder",
    "load": "redpp_serve.exporting.module",
    "InputSpec": "redpp_serve.graph.graph",
    "Options": "redpp_serve.options",
    "package": "redpp_serve.packaging.package",
    "prune": "redpp_serve.pruning.pipeline",
    "RedppError": "redpp_serve.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'redpp_serve' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
