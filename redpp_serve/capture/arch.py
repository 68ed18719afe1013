"""From ``--arch`` to a module without weights: a torchvision or timm name, or a factory in the user's own file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from redpp_serve.capture.sniff import first_line, shorten
from redpp_serve.errors import RedppError

FORMS = "torchvision:NAME, timm:NAME or path/to/file.py:factory"
# Arguments of torchvision's and timm's builders that fetch weights or read them by another loader than this project's.
WEIGHT_ARGS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone", "checkpoint_path")
PLACEHOLDERS: list[torch.library.Library] = []  # operators vanish with the Library that defined them


def build(arch: str, arch_args: Mapping[str, Any]) -> nn.Module:
    """Build the module that ``arch`` names, with random weights; nothing is downloaded.

    Args:
        arch: ``torchvision:NAME``, ``timm:NAME`` or ``path/to/file.py:factory``. The file runs, as the user named it.
        arch_args: keyword arguments of the builder, such as ``num_classes``.

    Raises:
        RedppError: unknown form, name or factory; a missing library; arguments that ask for weights; a failing builder.
    """
    library, colon, name = arch.partition(":")
    if colon and library in ("torchvision", "timm"):
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


def load_into(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    whose: str = "the architecture",
    do: str = "give the --arch and --arch-args (num_classes, ...) that the weights were trained with",
) -> list[str]:
    """Copy ``state_dict`` into ``module``: every name and shape must match.

    Batch-norm counters (``num_batches_tracked``) may be missing: old files lack them and evaluation does not read them.

    Returns:
        Messages for the user, such as a change of precision.

    Raises:
        RedppError: missing or unexpected names, or other shapes, the first five of each.
    """
    own = module.state_dict()
    shapes = [
        f"{key} is {_shape(value)}, not {_shape(own[key])}"
        for key, value in state_dict.items()
        if isinstance(own.get(key), Tensor) and own[key].shape != value.shape
    ]
    if shapes:
        missing, unexpected = [k for k in own if k not in state_dict], [k for k in state_dict if k not in own]
    else:
        missing, unexpected = _copy(module, own, state_dict)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    parts = [
        f"{len(names)} {what}: {shorten(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if parts:
        found = f"the weights do not fit {whose}; {'; '.join(parts)}"
        raise RedppError(found, "the same names and shapes", do)
    changed = sorted({f"{v.dtype} to {own[k].dtype}" for k, v in state_dict.items() if _differs(v, own.get(k))})
    return [f"converted weights from {change}".replace("torch.", "") for change in changed]


def preprocess_hints(network: object) -> dict[str, Any] | None:
    """Return the preprocessing that a timm module was trained with, or None if the network does not say.

    Returns:
        ``mean`` and ``std`` per channel in units of a 0..1 image, ``size`` as (channels, height, width).
    """
    config = getattr(network, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not all(config.get(key) for key in ("mean", "std", "input_size")):
        return None
    return {"mean": list(config["mean"]), "std": list(config["std"]), "size": list(config["input_size"])}


def _copy(module: nn.Module, own: dict[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return missing and unexpected names, after modules have renamed what old files call otherwise."""
    holder = OrderedDict(state_dict)
    # safetensors keeps no version numbers, and some modules insist on them
    holder._metadata = getattr(state_dict, "_metadata", None) or own._metadata  # type: ignore[attr-defined]
    try:
        result = module.load_state_dict(holder, strict=False)
    except Exception as error:
        do = "give the --arch and --arch-args that the weights were trained with"
        found = f"the module refuses the weights: {first_line(error)}"
        raise RedppError(found, "weights of this module", do) from error
    return list(result.missing_keys), list(result.unexpected_keys)


def _differs(value: Tensor, own: Tensor | None) -> bool:
    return own is not None and own.dtype != value.dtype


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


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
    """Import torchvision or timm, also beside a CPU-only torch.

    Raises:
        RedppError: not installed, or of a release that does not go with this torch.
    """
    if library == "timm":
        import_library("torchvision")  # timm imports it too, and would meet the undefined operators
    try:
        try:
            return importlib.import_module(library)
        except RuntimeError as error:
            if PLACEHOLDERS or "torchvision::" not in str(error):
                raise
            _define_detection_operators()
            return importlib.import_module(library)
    except ModuleNotFoundError as error:
        missing = error.name or library
        expected = "the library that this network comes from"
        raise RedppError(f"{missing} is not installed", expected, f"pip install {missing}") from error
    except Exception as error:
        do = f"install the {library} release that belongs to torch {torch.__version__}"
        raise RedppError(f"{library} cannot be imported: {first_line(error)}", f"a working {library}", do) from error


def _define_detection_operators() -> None:
    """Define operators that torchvision looks up while importing and lacks beside a torch of another build.

    Only detection models call them. The half-imported package is forgotten, so that it can start afresh.
    """
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    PLACEHOLDERS.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _from_file(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise RedppError(f"--arch: {path} does not exist", FORMS, "check the path of the file that defines the network")
    spec = importlib.util.spec_from_file_location(f"redpp_serve_arch_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up here
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # its sibling files; last, so that none of them hides a library
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
    except (Exception, SystemExit) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
        do = "correct it, or pass its arguments with --arch-args JSON"
        raise RedppError(f"{what} failed{where}: {first_line(error)}", "code that gives a module", do) from error


def _unknown(what: str, name: str, names: Iterable[str]) -> RedppError:
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    expected = f"one of {', '.join(close)}" if close else f"one of {len(names)}, such as {shorten(names)}"
    expected = expected if names else "a function or class"
    return RedppError(f"no {what} is named {name!r}", expected, "check the spelling")
