"""How a network that has no graph is refused: what is wrong, in which module, on which line of its forward, what to do.

The module is named as in the network, ``layer1.0``, and the network itself by its class. The line is the innermost one
of the user's own code; modules of torch alone have none.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from redpp_serve.errors import RedppError

_LIBRARIES = tuple(str(Path(file).parent) for file in (torch.__file__, np.__file__, Path(__file__).parent))
_PYTHON = sysconfig.get_path("stdlib")
_WRAPPERS = ("torch.export", "torch._export", "redpp_serve.capture.")  # where modules around the user's are defined
_LINE = re.compile(r'File "([^"]+)", line (\d+)')
_ADVICE = "change forward accordingly, or package a part of the network that fits"
_EXPORT_YOURSELF = "rewrite the part of forward that is named, or export the network yourself and pass the .pt2 file"

# What is expected, and what to do.
_KEEPS_SHAPES = (
    "a forward in which no shape depends on values, as those of x[mask] and x.nonzero() do",
    "keep the shape: write torch.where(condition, x, value), multiply by the mask, or take a fixed number with topk",
)
_KEEPS_TENSORS = (
    "a forward that keeps what it computes in tensors",
    "calculate with the tensor itself, x.amax((1, 2, 3), keepdim=True) for x.max().item(), and write "
    "torch.where(condition, a, b) for a decision",
)
_IS_DETERMINED = (
    "a forward that gives the same result for the same input",
    "leave the random numbers out in eval mode (if self.training), or hand them in as an input of their own",
)
_DECIDES_BY_WHERE = (
    "a forward that does not decide by values",
    "compute both results and write torch.where(condition, a, b)",
)
_GIVES_SIZES = (
    "a forward whose sizes do not depend on values",
    "give the size as a number, as in F.one_hot(x, num_classes=10)",
)
_STACKS = ("a forward that keeps what it computes in tensors", "write torch.stack([a, b]) for torch.tensor([a, b])")
_IS_DENSE = (
    "dense tensors of one shape",
    "write it with ordinary tensors: padded to one length, with the lengths or a mask as an input of their own",
)
_STAYS_IN_TORCH = (
    "a forward that calculates with functions of torch",
    "write torch.clamp(x, 0, 1) for np.clip(x, 0, 1), x.clone() for copy.deepcopy(x), and keep tensors to the end",
)
# Operators that have no place in a graph.
_INSTEAD = (
    (r"nonzero|masked_select|argwhere|unique|aten\.index\.|repeat_interleave\.Tensor", _KEEPS_SHAPES),
    (r"\.item\.|_local_scalar_dense|tolist", _KEEPS_TENSORS),
    (r"^cond$|while_loop", _DECIDES_BY_WHERE),
    (r"nested|sparse|jagged|mkldnn", _IS_DENSE),
)
# What torch.export says, and what it means.
_MEANT = (
    (r"tolist", "forward makes a list of a tensor's numbers", _KEEPS_TENSORS),
    (r"specialized integer", "forward takes a size from values, which is data-dependent", _GIVES_SIZES),
    (r"data-dependent|unbacked", "forward decides by values (data-dependent control flow)", _DECIDES_BY_WHERE),
    (r"numpy|np\.ndarray", "forward leaves torch for NumPy", _STAYS_IN_TORCH),
    (
        r"data pointer|map_ is not|access storage|FakeTensor\.__new__",
        "forward reads the memory of a tensor",
        _STAYS_IN_TORCH,
    ),
    (r"data is not allocated", "forward makes a tensor of numbers that it computes", _STACKS),
    (r"_nested_tensor", "forward makes a nested tensor", _IS_DENSE),
)


def not_capturable(found: str, expected: str, do: str = _ADVICE) -> RedppError:
    """Make the refusal of a network whose forward does what a graph cannot hold."""
    return RedppError(f"the network cannot be captured: {found}", expected, do)


def not_exported(error: Exception, network: nn.Module) -> RedppError:
    """Make the refusal of a network that torch.export cannot follow."""
    said = first_words(error)
    found, (expected, do) = next(
        ((meant, advice) for words, meant, advice in _MEANT if re.search(words, said)),
        (said, ("a forward that torch.export follows, tensors in and tensors out", _EXPORT_YOURSELF)),
    )
    where = raised_at(error) or defined_at("", network)
    return RedppError(f"torch.export cannot capture the network: {found}{where}", expected, do)


def without_place(operator: str, where: str) -> RedppError:
    """Make the refusal of an operator that a graph cannot hold, with what to write instead.

    Args:
        operator: its name.
        where: see `place`.
    """
    allowed = "operators of the allow-list (graph/operators.py), which compute the same for the same inputs", _ADVICE
    expected, do = next((advice for names, advice in _INSTEAD if re.search(names, operator)), allowed)
    return not_capturable(f"operator {operator}{where} has no place in an artifact", expected, do)


def random_result(operator: str, where: str) -> RedppError:
    """Make the refusal of an operator that draws random numbers, at a `place`."""
    return not_capturable(
        f"operator {operator}{where} draws random numbers, so that its result is random", *_IS_DETERMINED
    )


def shape_by_value(operator: str, where: str) -> RedppError:
    """Make the refusal of an operator whose result has a shape that depends on values, at a `place`."""
    found = f"the shape of what operator {operator}{where} gives depends on values"
    return not_capturable(found, *_KEEPS_SHAPES)


def reason(error: BaseException) -> str:
    """Return the first line of an exception's text, and the module and the line of the user's code that raised it."""
    return first_words(error) + raised_at(error)


def first_words(error: BaseException) -> str:
    """Return the first line of an exception's text, or its type where there is none."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]


def raised_at(error: BaseException) -> str:
    """Say in which module and on which line an exception was raised, or the one that it was raised for, see `place`."""
    while error.__traceback__ is not None:
        if found := called_at(traceback.walk_tb(error.__traceback__)):
            return found
        former = error.__cause__ or error.__context__
        if former is None:
            break
        error = former
    return ""


def called_at(frames: Iterable[tuple[FrameType, int]]) -> str:
    """Say in which module and on which line of the user's code the innermost of some frames is, see `place`."""
    modules, line = [], ""
    for frame, number in frames:
        file, owner = frame.f_code.co_filename, frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not isinstance(owner, torch.jit.ScriptModule):
            modules.append(owner)
        if Path(file).is_file() and _is_users(file):
            line = f" ({Path(file).name}:{number})"
    if not modules:
        return line
    inside = _is_wrapper(type(modules[0]))
    names = {part: _own_name(name, inside) for name, part in modules[0].named_modules()}
    inner = [part for part in modules if part in names and not _is_wrapper(type(part))]
    return (f" in module {names[inner[-1]] or type(inner[-1]).__name__}" if inner else "") + line


def called_here() -> str:
    """Say in which module and on which line of the user's code the caller was called, see `place`."""
    return called_at(reversed(list(traceback.walk_stack(inspect.currentframe()))))


def place(node: fx.Node) -> str:
    """Say in which module and on which line a call was made: `` in module layer1.0 (net.py:31)``, empty if unknown."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    inside = bool(stack) and _is_wrapper(stack[0][1])
    named = [_own_name(path, inside) or _class_name(kind) for path, kind in stack if not _is_wrapper(kind)]
    lines = _LINE.findall(node.meta.get("stack_trace") or "")
    own = [f"{Path(file).name}:{line}" for file, line in lines if _is_users(file)]
    return (f" in module {named[-1]}" if named else "") + (f" ({own[-1]})" if own else "")


def defined_at(name: str, module: nn.Module) -> str:
    """Name a module of the user's, and the line on which its forward begins, as `place` does."""
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    own = code is not None and _is_users(code.co_filename)
    line = f" ({Path(code.co_filename).name}:{code.co_firstlineno})" if code is not None and own else ""
    return f" in module {name or type(module).__name__}{line}"


def _is_users(file: str) -> bool:
    """Return whether a file may hold a forward of the user's: it is none of torch, NumPy, this package or Python."""
    return (
        not file.startswith("<")
        and not file.startswith(_LIBRARIES)
        and (not file.startswith(_PYTHON) or "-packages" in file)
    )


def _class_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def _is_wrapper(kind: Any) -> bool:
    return (kind.__module__ if isinstance(kind, type) else str(kind)).startswith(_WRAPPERS)


def _own_name(name: str, inside: bool) -> str:
    """Return a part's name in the user's network, which may lie inside of what is exported, see `flat.FlatNetwork`."""
    name = re.sub(r"^(L\['self'\]\.?)?(_export_root\.?)?", "", name)
    return re.sub(r"^network(\.|$)", "", name) if inside else name


@contextlib.contextmanager
def without_dumps() -> Iterator[None]:
    """Keep what torch writes to the terminal before it raises, its generated code above all, from users' eyes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
