"""What pruning did to the function, measured: exact stages in float64, lossy ones on inputs no fit has seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.archives import ZIP_ERRORS, check_arrays
from redpp_serve.errors import GateFailed, RedppError
from redpp_serve.graph.class_scores import class_outputs, may_hold_classes
from redpp_serve.graph.executor import Program, output_types
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import Layer
from redpp_serve.graph.ranges import outside
from redpp_serve.graph.weights import KernelSplit
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.kernels import split_conv2d
from redpp_serve.options import Options
from redpp_serve.pruning.judge import Difference, Reference, not_finite
from redpp_serve.pruning.matching import smooth_noise

NEXT_STEPS = (
    "keep more of the multiply-accumulates (see the frontier; --keep-point packages one of its points), give a few "
    "unlabelled --inputs or --moments, fine-tune the network, or serve it as it is at a lower --precision: compact "
    "networks often gain more from that than from pruning; a lower limit packages it all the same"
)
_CHUNK = 8  # inputs that are run at once
EXACT = 1e-9  # relative, in float64: re-association moves results by 1e-16 times the length of the sums


@torch.no_grad()
def layer_errors(reference: Reference, other: Graph, layers: Sequence[Layer]) -> dict[str, float]:
    """Return the relative output error of each layer whose output has kept its shape, over at most 16 inputs."""
    names = [layer.node.name for layer in layers]
    original, pruned = Program(reference.original, names), Program(other, names)
    lost, norm = torch.zeros(2, len(names), dtype=torch.float64)
    comparable = [True] * len(names)
    for chunk in zip(*(torch.split(x[:16].cpu(), 4) for x in reference.inputs), strict=True):
        for k, (x, y) in enumerate(zip(original(*chunk), pruned(*chunk), strict=True)):
            if x.shape == y.shape:
                lost[k] += (x.double() - y.double()).square().sum()
                norm[k] += x.double().square().sum()
            else:
                comparable[k] = False
    errors = (lost / norm.clamp_min(1e-300)).sqrt().tolist()
    return {layer.name: e for layer, e, usable in zip(layers, errors, comparable, strict=True) if usable}


def exact_error(before: Graph, after: Graph, graph: Graph, seed: int) -> float:
    """Return the relative difference of two float64 networks on two inputs of noise, as ``graph`` declares them."""
    probe = tuple(x.double() if x.is_floating_point() else x for x in smooth_noise(graph.inputs, 2, seed))
    with default_dtype(torch.float64):  # also for tensors that forward makes without naming a type
        return relative_error(casting_to_double(before), casting_to_double(after), probe)


@torch.no_grad()
def relative_error(before: Graph, after: Graph, inputs: Sequence[Tensor]) -> float:
    """Return the norm of the difference of all outputs over the norm of those of ``before``."""
    first, second = Program(before), Program(after)
    lost = norm = 0.0
    for chunk in zip(*(torch.split(x, _CHUNK) for x in inputs), strict=True):
        for x, y in zip(first(*chunk), second(*chunk), strict=True):
            lost += float((x.double() - y.double()).square().sum())
            norm += float(x.double().square().sum())
    return float((lost / max(norm, 1e-300)) ** 0.5)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make floats of this type wherever a call names none, as a division of integers does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def casting_to_double(graph: Graph) -> Graph:
    """Return the same float64 network, also where it casts to a floating type of its own."""

    def wide(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    nodes = (
        replace(node, args=tuple(map(wide, node.args)), kwargs={k: wide(v) for k, v in node.kwargs.items()})
        for node in graph.nodes
    )
    return replace(graph, nodes=tuple(nodes))


@torch.no_grad()
def split_error(layer: Layer, weight: Tensor, split: KernelSplit, seed: int) -> float:
    """Return the relative error, in float64, of a split layer against the dense one on one random patch.

    The split must also give the weight (n_out, n_in / groups, *kernel) back bit by bit; anything else is an error of 1.
    The taps of a kernel of any dimension lie in one column.
    """
    rebuilt = split.rebuild().view(weight.shape)
    if not torch.equal(rebuilt, weight):
        return 1.0
    weight = weight.double().reshape(*weight.shape[:2], -1, 1)
    n_in, taps = weight.shape[1] * layer.groups, weight.shape[2]
    x = torch.randn(1, n_in, taps, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    geometry = ([1, 1], [0, 0], [1, 1], layer.groups)
    dense = F.conv2d(x, weight, None, *geometry)
    kernels = split.kernels.double().reshape(-1, taps, 1)
    got = split_conv2d(x, kernels, split.channel, split.index, split.sign, None, *geometry)
    return float((got - dense).norm() / dense.norm().clamp_min(1e-300))


def require_exact(step: str, error: float) -> None:
    """Check that an exact step has left the function as it was.

    Args:
        step: the step's name, as a subject.
        error: relative, measured in float64.

    Raises:
        GateFailed: the error is more than re-association of sums explains.
        RedppError: there is no error because the network gives no numbers.
    """
    if error != error:  # NaN
        raise not_finite("noise")
    if not error <= EXACT:
        raise GateFailed(
            f"{step} changed the network's function by {error:.2e} (relative, float64)",
            f"at most {EXACT:g}, re-association error",
            "report this with the model; use --exclude meanwhile",
        )


@dataclass(frozen=True)
class VerifyData:
    """Labelled inputs to measure accuracy with.

    Attributes:
        inputs: tensors as the network takes them, (images, ...) for each of its inputs.
        labels: (images,) int64.
        output: position of the network's output that holds the class scores.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor
    output: int = 0

    @torch.no_grad()
    def accuracy(self, graph: Graph) -> float:
        """Return the share of inputs whose largest logit is their label."""
        program = Program(graph)
        right = 0
        for *chunk, labels in zip(*(torch.split(x, 32) for x in (*self.inputs, self.labels)), strict=True):
            right += int((program(*chunk)[self.output].argmax(1) == labels).sum())
        return right / len(self.labels)


def load_verify_data(path: Path, graph: Graph, preprocess: Preprocess | None) -> VerifyData:
    """Read ``inputs`` (batch first) and ``labels`` from an .npz file.

    Inputs of type uint8 are image bytes of the network's size: they are normalised as ``preprocess`` says and the
    server does, and divided by 255 where nothing says. Other types are taken as they are.

    Raises:
        RedppError: the file is not readable, or does not fit the network.
    """
    expected = "an .npz file with arrays 'inputs' (batch first) and 'labels' (one integer for each)"
    try:
        check_arrays(path, any_ratio=True)
        with np.load(path, allow_pickle=False) as file:
            inputs, labels = file["inputs"], file["labels"]
    except (*ZIP_ERRORS, LookupError, TypeError, AttributeError) as error:
        raise RedppError(
            f"--verify-data {path} cannot be read: {error}", expected, "write it with numpy.savez"
        ) from error
    output = _labelled_output(graph)
    spec = graph.inputs[0]
    shaped = inputs.ndim > 0 and inputs.shape[1:] == spec.shape and labels.shape == inputs.shape[:1] and len(labels) > 0
    if len(graph.inputs) != 1 or not shaped:
        raise RedppError(
            f"--verify-data {path} holds inputs {inputs.shape} and labels {labels.shape}",
            f"inputs (N, {', '.join(map(str, spec.shape))}) and labels (N,)",
            "match the --input shape",
        )
    if inputs.dtype.kind not in "fiub" or labels.dtype.kind not in "iu":
        raise RedppError(
            f"--verify-data {path} holds inputs of type {inputs.dtype} and labels of type {labels.dtype}",
            "numbers, and the integer class of each",
            "convert them before numpy.savez",
        )
    x = torch.from_numpy(np.ascontiguousarray(inputs))
    if x.dtype == torch.uint8 and getattr(torch, spec.dtype).is_floating_point:
        x = x.float() / 255 if preprocess is None else torch.from_numpy(preprocess.values(x.numpy()))
    x = x.to(getattr(torch, spec.dtype))
    if wrong := outside(spec, x):
        raise RedppError(f"--verify-data {path} holds inputs with {wrong}", "what the network can read", "correct it")
    return VerifyData((x,), torch.from_numpy(labels.astype(np.int64)), output)


def _labelled_output(graph: Graph) -> int:
    """Return the position of the output that labels are compared with: class scores, or what alone may hold them.

    Raises:
        RedppError: no output may, or several and nobody says which.
    """
    told, wide = class_outputs(graph), may_hold_classes(graph)
    found = [name for name in told if told[name]][:1] or [name for name in wide if wide[name]]
    if len(found) == 1:
        return graph.output_names.index(found[0])
    if found:
        raise RedppError(
            f"--verify-data with a network whose outputs {', '.join(found)} may hold class scores",
            "the output that the labels belong to",
            f"add --classes {found[0]}, or another of them",
        )
    shapes = (f"{name} (N{''.join(f', {n}' for n in shape[1:])})" for name, (shape, _) in output_types(graph).items())
    raise RedppError(
        f"--verify-data with a network of outputs {', '.join(shapes)}",
        "class scores of shape (N, classes)",
        "leave out --verify-data and gate on --max-error",
    )


def check_gate(
    options: Options, difference: Difference, accuracy: tuple[float, float] | None, floors: bool = True
) -> None:
    """Compare the measured numbers with the user's limits.

    Args:
        options: hold the limits.
        difference: between the networks' outputs.
        accuracy: of both networks, where there is data.
        floors: whether a floor holds where the user has set no limit.

    Raises:
        GateFailed: naming the first number that missed its limit.
    """
    limit = options.floor_error if floors else options.max_error
    least = options.floor_agreement if floors else options.min_agreement or 0.0
    if limit is not None and not difference.error <= limit:
        raise GateFailed(
            f"the relative output error is {difference.error:.4f} on the worst family of inputs",
            f"at most {limit:g} (--max-error)",
            NEXT_STEPS,
        )
    if options.min_agreement is not None and difference.agreement is None:
        raise GateFailed(
            "no output of the network is a classification, so there is no top-1 agreement",
            f"at least {options.min_agreement:g} (--min-agreement)",
            "name the output that holds class scores with --classes, or gate on --max-error instead",
        )
    if difference.agreement is not None and difference.agreement < least:
        raise GateFailed(
            f"the top-1 agreement is {difference.top1} on the worst family of inputs",
            f"at least {least:g} (--min-agreement)",
            NEXT_STEPS,
        )
    if options.max_accuracy_drop is not None and accuracy is not None:
        drop = 100 * (accuracy[0] - accuracy[1])
        if drop > options.max_accuracy_drop:
            raise GateFailed(
                f"accuracy falls by {drop:.2f} points, from {accuracy[0]:.2%} to {accuracy[1]:.2%}",
                f"at most {options.max_accuracy_drop:g} points (--max-accuracy-drop)",
                "keep more channels (--keep) or allow a larger drop",
            )
