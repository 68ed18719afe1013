"""From ``--arch`` to a module without weights: a torchvision or timm name, or a factory in the user's own file."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from redpp_serve.capture.hugging_face import go_offline, transformers_factory
from redpp_serve.capture.sniff import first_line, shorten
from redpp_serve.errors import RedppError

FORMS = "torchvision:NAME, timm:NAME, transformers:CLASS or path/to/file.py:factory"
# Arguments of torchvision's and timm's builders that fetch weights or read them by another loader than this project's.
WEIGHT_ARGS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone", "checkpoint_path")
# Packages whose name differs from what is imported.
_PACKAGES = {
    **{"cv2": "opencv-python-headless", "PIL": "pillow", "sklearn": "scikit-learn", "yaml": "PyYAML"},
    **{"skimage": "scikit-image", "attr": "attrs", "bs4": "beautifulsoup4", "hydra": "hydra-core", "git": "GitPython"},
    **{"segmentation_models_pytorch": "segmentation-models-pytorch", "efficientnet_pytorch": "efficientnet-pytorch"},
    **{"open_clip": "open-clip-torch", "dateutil": "python-dateutil", "absl": "absl-py", "faiss": "faiss-cpu"},
    **{"pytorch_lightning": "pytorch-lightning", "ignite": "pytorch-ignite", "umap": "umap-learn"},
    **{"torch_geometric": "torch-geometric", "dotenv": "python-dotenv", "Crypto": "pycryptodome"},
}
PLACEHOLDERS: list[torch.library.Library] = []  # operators vanish with the Library that defined them


def build(arch: str, arch_args: Mapping[str, Any], folder: Path = Path()) -> nn.Module:
    """Build the module that ``arch`` names, with random weights; nothing is downloaded.

    Args:
        arch: ``torchvision:NAME``, ``timm:NAME``, ``transformers:CLASS`` or ``path/to/file.py:factory``. The
            file runs, as the user named it.
        arch_args: keyword arguments of the builder, such as ``num_classes``.
        folder: where the weights are, and for transformers their config.json.

    Raises:
        RedppError: unknown form, name or factory; a missing library; arguments that ask for weights; a failing builder.
    """
    library, colon, name = arch.partition(":")
    if colon and library == "transformers":
        go_offline()
        factory: Callable[..., Any] = transformers_factory(import_library(library), name, folder)
    elif colon and library in ("torchvision", "timm"):
        if asked := [key for key in WEIGHT_ARGS if key in arch_args]:
            found = f"--arch-args {asked[0]} asks {library} for weights"
            raise RedppError(found, "arguments of the architecture", "leave it out: the weights come from your file")
        factory = (_torchvision if library == "torchvision" else _timm)(name)
    else:
        file, colon, name = arch.rpartition(":")
        if not colon or not file.endswith(".py"):
            raise RedppError(f"--arch {arch} is of no known form", FORMS, "give one of these")
        factory = _from_file(Path(file), name)
    module = _run(f"--arch {arch}", lambda: factory(**arch_args))
    if not isinstance(module, nn.Module):
        found = f"--arch {arch} gave an object of type {type(module).__name__}"
        raise RedppError(found, "a torch.nn.Module", "return the module from the factory")
    return module


def _torchvision(name: str) -> Callable[..., Any]:
    models = import_library("torchvision").models
    names = models.list_models()
    if name not in names:
        raise _unknown("torchvision model", name, names)
    builder = models.get_model_builder(name)
    fixed = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    return lambda **arguments: builder(**fixed, **arguments)


def _timm(name: str) -> Callable[..., Any]:
    timm = import_library("timm")
    if not timm.is_model(name):
        raise _unknown("timm model", name, timm.list_models())
    return lambda **arguments: timm.create_model(name, pretrained=False, **arguments)


def import_library(library: str) -> ModuleType:
    """Import torchvision, timm or transformers, also beside a CPU-only torch.

    Raises:
        RedppError: not installed, or of a release that does not go with this torch.
    """
    prepare_torchvision()
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise not_installed(error, f"--arch {library}:NAME") from error
    except Exception as error:
        do = f"install the {library} release that belongs to torch {torch.__version__}"
        raise RedppError(f"{library} cannot be imported: {first_line(error)}", f"a working {library}", do) from error


def prepare_torchvision() -> None:
    """Define operators that torchvision looks up while it is imported and lacks beside a torch of another build.

    Only detection models call them. Code that may import torchvision itself runs after this.
    """
    spec = None if PLACEHOLDERS or "torchvision" in sys.modules else importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    for compiled in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(compiled))
            return
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    PLACEHOLDERS.append(library)


def _from_file(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise RedppError(f"--arch: {path} does not exist", FORMS, "check the path of the file that defines the network")
    spec = importlib.util.spec_from_file_location(f"redpp_serve_arch_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up here
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # its sibling files; last, so that none of them hides a library
    prepare_torchvision()
    _run(f"--arch: {path}", lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    factory: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(factory):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        mine = [key for key in public if getattr(vars(module)[key], "__module__", None) == spec.name]
        raise _unknown(f"function or class in {path}", name, mine or public)
    return factory


def _run(what: str, call: Callable[[], Any]) -> Any:
    """Run code of the user or a library; turn what it raises into a refusal that names the exception and its line."""
    try:
        return call()
    except RedppError:
        raise
    except ModuleNotFoundError as error:
        raise not_installed(error, what) from error
    except (Exception, SystemExit) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
        do = "correct it, or pass its arguments with --arch-args JSON"
        raise RedppError(f"{what} failed{where}: {first_line(error)}", "code that gives a module", do) from error


def not_installed(error: ModuleNotFoundError, what: str) -> RedppError:
    """Return the error for code that imports what is not there, with the package that holds it."""
    module = error.name or first_line(error)
    package = _PACKAGES.get(module.partition(".")[0], module.partition(".")[0])
    do = f"pip install {package}; or, if {module} is code of your own, put its folder on PYTHONPATH"
    return RedppError(f"{what} needs {module}, which is not installed", "code whose imports are installed", do)


def _unknown(what: str, name: str, names: Iterable[str]) -> RedppError:
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    expected = f"one of {', '.join(close)}" if close else f"one of {len(names)}, such as {shorten(names)}"
    expected = expected if names else "a function or class"
    return RedppError(f"no {what} is named {name!r}", expected, "check the spelling")
