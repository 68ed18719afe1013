"""How a network that has no graph is refused: what is wrong, in which module, and on which line of its forward."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import fx, nn

from redpp_serve.errors import RedppError

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent.parent)
_LINE = re.compile(r'File "([^"]+)", line (\d+)')
_ADVICE = "change forward accordingly, or package a part of the network that fits"


def not_capturable(found: str, expected: str, do: str = _ADVICE) -> RedppError:
    """Make the refusal of a network whose forward does what a graph cannot hold."""
    return RedppError(f"the network cannot be captured: {found}", expected, do)


def reason(error: BaseException) -> str:
    """Return the first line of an exception's text, and the module and the line of the user's code that raised it."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300] + _raised_in(error) + _raised_at(error)


def place(node: fx.Node) -> str:
    """Say in which module and on which line a call was made: `` in module layer1.0 (net.py:31)``, empty if unknown."""
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    name = _own_name(modules[-1]) if modules else ""
    lines = _LINE.findall(node.meta.get("stack_trace") or "")
    own = [f"{Path(file).name}:{line}" for file, line in lines if not file.startswith((_TORCH, _OURS))]
    return (f" in module {name}" if name else "") + (f" ({own[-1]})" if own else "")


def _raised_in(error: BaseException) -> str:
    """Say in which part of a network an exception was raised: `` in module layer1.0``, empty if in no named one."""
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [o for o in owners if isinstance(o, nn.Module) and not isinstance(o, torch.jit.ScriptModule)]
    names = {part: _own_name(name) for name, part in modules[0].named_modules()} if modules else {}
    inner = [names[part] for part in modules if part in names]
    return f" in module {inner[-1]}" if inner and inner[-1] else ""


def _own_name(name: str) -> str:
    """Return a part's name in the user's network, which is a part of what is exported, see `flat.FlatNetwork`."""
    return re.sub(r"^(L\['self'\]\.?)?(_export_root\.?)?(network(\.|$))?", "", name)


def _raised_at(error: BaseException) -> str:
    return own_line(traceback.extract_tb(error.__traceback__))


def own_line(frames: Sequence[traceback.FrameSummary]) -> str:
    """Say which line of the user's code is the innermost of a stack: `` (net.py:31)``, empty if there is none."""
    own = [f for f in frames if Path(f.filename).is_file() and not f.filename.startswith((_TORCH, _OURS))]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


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
