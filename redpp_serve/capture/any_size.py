"""Capture for sizes that differ between requests: what torch.export is told, and whether the network takes them all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.overrides import TorchFunctionMode

from redpp_serve.capture.flat import FlatNetwork
from redpp_serve.capture.inputs import sample
from redpp_serve.capture.refusals import called_here, defined_at, not_capturable, reason
from redpp_serve.capture.torchscript import script_of_one_size
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec, Size
from redpp_serve.graph.sizes import ends, is_varying, resized, sizes_of


def dynamic_axes(inputs: Sequence[InputSpec]) -> list[dict[int, Any]]:
    """Return for each input the dynamic axes of a batch (N, ...), as torch.export takes them."""
    if not is_varying(inputs):
        return [{0: Dim.DYNAMIC} for _ in inputs]
    batch = Dim("batch", min=1)
    dims = {symbol: _dim(size) for symbol, size in sizes_of(inputs).items()}
    return [{0: batch, **{axis + 1: dims[size.symbol] for axis, size in spec.varying}} for spec in inputs]


def _dim(size: Size) -> Any:
    if size.step == 1:
        return Dim(size.symbol, min=size.low, max=size.high)
    rest = size.low % size.step
    steps = Dim(f"steps_{size.symbol}", min=size.low // size.step, max=size.high // size.step)
    return size.step * steps + rest if rest else size.step * steps


def other_sizes(inputs: Sequence[InputSpec]) -> list[list[InputSpec]]:
    """Return the inputs at the smallest and largest sizes, and at one of each in turns; none where no size varies."""
    return [[resized(spec, sizes) for spec in inputs] for sizes in ends(inputs)]


def shapes_in_words(inputs: Sequence[InputSpec]) -> str:
    """Return the shapes of inputs, without the batch."""
    return ", ".join("x".join(map(str, spec.shape)) for spec in inputs)


@torch.no_grad()
def require_any_size(flat: FlatNetwork) -> None:
    """Run a network at its smallest and largest sizes.

    Raises:
        RedppError: it fails at one of them; the text names the module in which it does.
    """
    inputs, module = flat.inputs, flat.network
    if not is_varying(inputs):
        return
    running: list[str] = []
    scripted = isinstance(module, torch.jit.ScriptModule)  # its parts call no hooks
    names = {} if scripted else {part: name or type(part).__name__ for name, part in module.named_modules()}
    hooks = [part.register_forward_pre_hook(lambda part, _: running.append(names[part])) for part in names]
    hooks += [part.register_forward_hook(lambda *_: _left(running)) for part in names]
    try:
        for specs in [inputs, *other_sizes(inputs)]:
            running.clear()
            try:
                flat(*sample(specs, 1, torch.Generator().manual_seed(0)))
            except Exception as error:
                where = f" in {running[-1]}" if running else ""
                failed = f"with inputs of {shapes_in_words(specs)} it fails{where}: {reason(error)}"
                if scripted:
                    raise script_of_one_size(f"{failed}; a trace keeps the sizes of its example") from error
                expected = "a network that takes all sizes of --range; what is named has a fixed one"
                raise not_capturable(failed, expected) from error
    finally:
        for hook in hooks:
            hook.remove()


def batch_as_number(flat: FlatNetwork, export: Callable[[FlatNetwork, tuple[Tensor, ...]], Any]) -> RedppError:
    """Make the refusal of a network that was captured for one batch size; it names the line that fixes the size.

    Args:
        flat: the network.
        export: exports it for any batch size, which fails.
    """
    with _Lengths() as lengths, torch.no_grad(), contextlib.suppress(Exception):
        flat(*sample(flat.inputs, _ODD, torch.Generator().manual_seed(0)))
    if lengths.found:
        where = f", as {lengths.found[0]} does,"
    else:
        where = _fixed_at(lambda: export(flat, sample(flat.inputs, 2, torch.Generator().manual_seed(0))))
    return not_capturable(
        f"forward takes the size of its batch for a number{where or defined_at('', flat.network)} and so was captured "
        "for batches of 2 alone",
        "a forward that leaves the batch open",
        "write x.shape[0], without int(), for len(x), and one call on the whole batch for a loop over it",
    )


def _fixed_at(export: Callable[[], Any]) -> str:
    """Say on which line torch.export learned that a size can be one number only, see `refusals.place`."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415 - takes a second to import

    found: list[str] = []
    own = ShapeEnv._set_replacement

    def noting(env: ShapeEnv, symbol: Any, target: Any, why: str) -> None:
        if target.is_number and (where := called_here()):
            found.append(where)
        own(env, symbol, target, why)

    ShapeEnv._set_replacement = noting  # type: ignore[method-assign, assignment]
    try:
        with torch.no_grad(), contextlib.suppress(Exception):
            export()
    finally:
        ShapeEnv._set_replacement = own  # type: ignore[method-assign]
    return next(iter(found), "")


class _Lengths(TorchFunctionMode):
    """Notes where the length of a tensor is asked for or a loop runs over one, in files of the user."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function."""
        if func in _ASKED and len(args[0].shape) and args[0].shape[0] == _ODD and (where := called_here()):
            self.found.append(f"{_ASKED[func]}{where}")
        return func(*args, **(kwargs or {}))


_ASKED = {Tensor.__len__: "len(x)", Tensor.unbind: "a loop over x"}
_ODD = 5  # a batch that is hardly the size of anything else


def _left(running: list[str]) -> None:
    running.pop()
