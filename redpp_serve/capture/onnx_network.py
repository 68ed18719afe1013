"""An ONNX model as a module that torch.export can follow: its calls in order, each by a rule of torch's operators."""

from __future__ import annotations

import inspect
import keyword
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from redpp_serve.capture.inputs import numbered_name
from redpp_serve.capture.onnx_call import Call, Size, UnsupportedError, Value
from redpp_serve.capture.onnx_file import Array, OnnxFile, OnnxInput, OnnxNode, refused, shown
from redpp_serve.capture.onnx_recurrent import RECURRENT
from redpp_serve.capture.onnx_rules import apply
from redpp_serve.capture.sniff import first_line
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec

MOST_ELEMENTS = 1 << 30  # of one value, for one input
_PROBE = 999_983  # a batch whose multiples are no other sizes: a prime
VARYING_BATCH = (
    "export it with a batch that varies: torch.onnx.export(..., dynamic_axes={'input': {0: 'batch'}}), or its "
    "dynamic_shapes"
)


class OnnxNetwork(nn.Module):
    """The network of a simplified file, see `onnx_simplify.simplified`.

    Its constants of floating point are parameters where an operator trains them, other tensors are buffers; both have
    the file's names where these are a module's, else the layer's.

    Attributes:
        path: the file.
        file: what it holds.
        fixed: the batch that the file fixes, None where it leaves it free.
        messages: lines for the user about what was left out.
    """

    def __init__(self, path: Path, file: OnnxFile) -> None:
        super().__init__()
        self.path, self.file = path, file
        self.fixed = _fixed_batch(path, file.inputs)
        self._labels = _labels(file.nodes)
        self._stored: dict[str, str] = {}  # name of a constant -> of its tensor in this module
        self._reshapes: dict[int, tuple[list[int], int]] = {}  # shape for the fixed batch, and where the batch is in it
        self._names = _Names()
        self._device = "cpu"
        self.messages: list[str] = []

    def specs(self, given: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
        """Return the inputs without batch: as the file says, or as the user does where it leaves sizes open.

        Raises:
            RedppError: sizes that only the user knows, or that contradict the file.
        """
        if given and len(given) != len(self.file.inputs):
            found = f"takes {', '.join(map(_described, self.file.inputs))}; {len(given)} --input given"
            raise RedppError(f"{self.path} {found}", "one --input for each, or none", "give all of them in this order")
        specs = []
        for at, value in enumerate(self.file.inputs):
            own = value.shape[1:] if value.shape is not None else None
            shape = given[at].shape if given else own
            if shape is None or any(size is None for size in shape):
                raise RedppError(
                    f"{self.path} leaves sizes of its input {_described(value)} open",
                    "the shape of one input without its batch dimension",
                    "add --input, such as --input 3x224x224, one for each input of the network",
                )
            fits = own is None or (
                len(own) == len(shape) and all(a in (None, b) for a, b in zip(own, shape, strict=True))
            )
            if not fits:
                raise RedppError(
                    f"--input {'x'.join(map(str, shape))} for the input {_described(value)} of {self.path}",
                    "the sizes that the file declares, without the batch",
                    "correct it, or leave out --input where the file declares all sizes",
                )
            sizes = tuple(int(size or 0) for size in shape)
            bare = InputSpec(numbered_name(at), sizes, value.dtype)  # forward's arguments have the names of the file
            specs.append(replace(given[at], name=bare.name, shape=sizes, dtype=value.dtype) if given else bare)
        return tuple(specs)

    def probe(self, specs: Sequence[InputSpec]) -> None:
        """Run on tensors without memory: refuse what has no rule or grows too large, make tensors of the constants.

        In a file for one batch size it also finds the dimension of each constant shape that holds the batch.

        Raises:
            RedppError: naming the operator.
        """
        batch = _PROBE * (self.fixed or 1)
        inputs = [torch.empty(batch, *s.shape, dtype=getattr(torch, s.dtype), device="meta") for s in specs]
        self._device = "meta"
        try:
            with torch.no_grad(), torch.device("meta"):
                self._run(inputs, probing=True)
        finally:
            self._device = "cpu"

    def tensor(self, name: str, array: Array, *, trained: bool) -> Tensor:
        """Return the tensor of a constant of the file, which the first call makes; of other numbers one at a time."""
        if name not in self.file.constants:  # sizes, which are others for another batch
            found = torch.from_numpy(np.array(array))
        else:
            if name not in self._stored:
                self._stored[name] = self._register(name, array, trained)
            holder, _, leaf = self._stored[name].rpartition(".")
            found = getattr(self.get_submodule(holder), leaf)
        return found if self._device == "cpu" else found.to(self._device)

    def _register(self, name: str, array: Array, trained: bool) -> str:
        holder: nn.Module = self
        label = self._labels.get(name, name)
        *path, leaf = [part for part in re.sub(r"[^A-Za-z0-9_.]", "_", label)[-200:].split(".") if part] or ["constant"]
        taken = []
        for part in path:
            while not isinstance(getattr(holder, part, None), nn.Module) and hasattr(holder, part):
                part += "_"  # noqa: PLW2901 - a name that the module uses itself
            if not hasattr(holder, part):
                holder.add_module(part, nn.Module().eval())
            taken.append(part)
            holder = holder.get_submodule(part)
        whole = self._names.free(".".join((*taken, leaf)), lambda name: hasattr(holder, name.rpartition(".")[2]))
        leaf = whole.rpartition(".")[2]
        tensor = torch.from_numpy(np.array(array))
        if trained and array.dtype.kind == "f":
            holder.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            holder.register_buffer(leaf, tensor)
        return whole

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Compute the outputs, by the file's names, for inputs (N, ...)."""
        return dict(zip(self.file.outputs, self._run(inputs), strict=True))

    def _run(self, inputs: Sequence[Tensor], probing: bool = False) -> tuple[Tensor, ...]:
        values: dict[str, Value] = {k: v for k, v in self.file.constants.items() if isinstance(v, np.ndarray)}
        values.update((value.name, x) for value, x in zip(self.file.inputs, inputs, strict=True))
        batch = inputs[0].shape[0]
        for at, node in enumerate(self.file.nodes):
            given = [values[name] if name else None for name in node.inputs]
            call = Call(node, given, self.file.opset, self, None if self.fixed is None else batch)
            try:
                if probing and self.fixed is not None and node.op == "Reshape":
                    self._note_reshape(at, call)
                found = self._reshaped(at, call) if at in self._reshapes else apply(call)
            except (UnsupportedError, RedppError) as error:
                raise self._failed(node, str(error)) from error
            except Exception as error:  # torch's operators raise whatever they do
                if not probing:
                    raise
                raise self._failed(node, f"fails: {first_line(error)}") from error
            results = found if isinstance(found, tuple) else (found,)
            for name, result in zip(node.outputs, results, strict=False):
                if probing and isinstance(result, Tensor) and result.numel() > MOST_ELEMENTS * max(1, batch):
                    raise self._failed(node, f"makes {result.numel() // batch} numbers of one input")
                values[name] = result
        outputs = [values[name] for name in self.file.outputs]
        if any(not isinstance(y, Tensor) for y in outputs):
            raise refused(self.path, "with an output that does not depend on its inputs")
        return tuple(y for y in outputs if isinstance(y, Tensor))

    def _note_reshape(self, at: int, call: Call) -> None:
        """Find the dimension of a constant shape that has to grow with the batch."""
        x, shape = call.value(0), call.value(1)
        held = [axis for axis, size in enumerate(x.shape) if size % _PROBE == 0]
        if not isinstance(x, Tensor) or isinstance(shape, Tensor) or not held:
            return
        if any(size > 0 and size % _PROBE == 0 for size in shape.reshape(-1)):
            return  # it follows the batch by itself
        fixed, own = self.fixed or 1, [size // _PROBE if size % _PROBE == 0 else size for size in x.shape]
        sizes = [own[k] if size == 0 else int(size) for k, size in enumerate(shape.reshape(-1))]
        rest = math.prod(size for size in sizes if size != -1)
        sizes = [math.prod(own) // max(1, rest) if size == -1 else size for size in sizes]
        axis = _axis_of_batch(own, held[0], sizes, fixed)
        if axis is None or sizes[axis] % fixed:
            raise UnsupportedError(f"gives a shape for batches of {fixed} only")
        self._reshapes[at] = sizes, axis

    def _reshaped(self, at: int, call: Call) -> Tensor:
        (sizes, axis), batch = self._reshapes[at], call.batch
        assert batch is not None  # only files for one batch size note reshapes
        grown: list[Size] = list(sizes)
        grown[axis] = sizes[axis] // (self.fixed or 1) * batch
        return call.x().reshape(grown)

    def _failed(self, node: OnnxNode, what: str) -> RedppError:
        where = f" {shown(node.name)!r}" if node.name else ""
        do = VARYING_BATCH if self.fixed is not None else "export that part of the network in another way"
        found = f"whose operator {shown(node.op)}{where} {what}"
        if self.fixed is not None:
            found = f"for batches of {self.fixed} only, {found}"
        return refused(self.path, found, do)


def build_network(path: Path, file: OnnxFile, messages: list[str]) -> OnnxNetwork:
    """Return the module, whose forward takes the inputs by name, as a graph names them."""
    names = _identifiers(value.name for value in file.inputs)

    def forward(self: OnnxNetwork, *inputs: Tensor, **named: Tensor) -> dict[str, Tensor]:
        return OnnxNetwork.forward(self, *inputs, *(named[name] for name in names[len(inputs) :]))

    parameter = inspect.Parameter
    arguments = [parameter(name, parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]
    network: OnnxNetwork = type("OnnxNetwork", (OnnxNetwork,), {"forward": forward})(path, file)
    network.messages = messages
    return network.eval()


def _axis_of_batch(old: Sequence[int], held: int, new: Sequence[int], fixed: int) -> int | None:
    """Return where the batch is after a reshape of one item from ``old`` to ``new``, if it was at ``held`` before.

    It stays where as many numbers lie before it. There, it has a place of its own, or shares that of what follows, as
    when heads are split off; where what follows is kept whole, it has joined what lies before it, until it is given a
    place of its own again.
    """
    before = math.prod(old[:held])
    joined = before * old[held] // fixed  # what lay before it in a dimension that it had joined
    own = [k for k, size in enumerate(new) if size == fixed and math.prod(new[:k]) == joined]
    if own and old[held] > fixed:
        return own[0]
    axis = next((k for k in range(len(new)) if math.prod(new[:k]) == before), None)
    if not axis or new[axis] == old[held]:
        return axis
    kept = (math.prod(old[held + 1 : end]) for end in range(held + 2, len(old) + 1))
    return axis - 1 if new[axis] in kept else axis


def _labels(nodes: Iterable[OnnxNode]) -> dict[str, str]:
    """Return names for the constants of layers that the file numbers only, such as ``onnx::Conv_501``."""
    labels: dict[str, str] = {}
    for node in nodes:
        label = node.scope
        if node.op == RECURRENT:
            for name in node.inputs[3:]:  # ...|weight_ih0: of the first direction
                leaf = name.rpartition("|")[2]
                labels.setdefault(name, f"{label or 'recurrent'}.{leaf}")
            continue
        if node.op not in ("Conv", "ConvTranspose", "Linear") or not label:
            continue
        for name, leaf in zip(node.inputs[1:], ("weight", "bias"), strict=False):
            if name and not name.endswith(f".{leaf}"):
                labels.setdefault(name, f"{label}.{leaf}")
    return labels


def _identifiers(names: Iterable[str]) -> tuple[str, ...]:
    """Return names that Python takes as arguments, each once."""
    taken: dict[str, None] = {}
    made = _Names()
    for name in names:
        word = re.sub(r"\W", "_", name, flags=re.ASCII)[:60] or "input"
        word = f"input_{word}" if not word.isidentifier() or keyword.iskeyword(word) or word == "self" else word
        taken[made.free(word, taken.__contains__)] = None
    return tuple(taken)


class _Names:
    """Makes names that are free: ``name``, or ``name_``, ``name_2``, ``name_3``; many equal ones take linear time."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def free(self, name: str, taken: Callable[[str], bool]) -> str:
        """Return the first name that is not taken."""
        count = self._counts.get(name, 0)
        while taken(found := f"{name}{'_' if count else ''}{count if count > 1 else ''}"):
            count += 1
        self._counts[name] = count
        return found


def _fixed_batch(path: Path, inputs: Sequence[OnnxInput]) -> int | None:
    """Return the first size of all inputs, None where it varies."""
    if any(value.shape == () for value in inputs):
        raise refused(path, "with an input that has no batch dimension")
    sizes = {value.shape[0] for value in inputs if value.shape}
    if len(sizes) > 1:
        raise refused(path, f"whose inputs differ in their first size, the batch: {sizes}", VARYING_BATCH)
    return sizes.pop() if sizes else None


def _described(value: OnnxInput) -> str:
    sizes = "x".join("?" if size is None else str(size) for size in value.shape or ()) or "of unknown shape"
    return f"{shown(value.name)} {sizes}:{value.dtype}"
