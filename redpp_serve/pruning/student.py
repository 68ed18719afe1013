"""Train a network: which of its tensors move, and how. Tensors with a codebook keep it.

Weights of layers move by orthogonalised momentum (Muon); depthwise and very wide weights, vectors and codebooks move
by Adam. Every tensor moves in units of its own size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, Ref
from redpp_serve.graph.layers import CONVOLUTIONS, LINEAR, TRANSPOSED

_DECAYS = 0.9, 0.99  # of Adam's first and second moments
_MOMENTUM = 0.9
_NORM = 10.0  # longest gradient for Adam, with all tensors in units of their own size
_ROUNDS = 5  # of the Newton-Schulz iteration
_POLYNOMIAL = 3.4445, -4.7750, 2.0315  # its coefficients: an odd polynomial that drives singular values to 1
_WIDEST_MATRIX = 1024  # shorter side; the iteration costs its square

# Positions of the arguments that are trained, by operator
_TRAINED = {
    **dict.fromkeys(
        (*CONVOLUTIONS, *TRANSPOSED, LINEAR, "aten.convolution.default", "aten.batch_norm.default"), (1, 2)
    ),
    **dict.fromkeys(("aten.layer_norm.default", "aten.group_norm.default"), (2, 3)),
    **dict.fromkeys(("aten.native_layer_norm.default", "aten.native_group_norm.default"), (1, 2)),
}


class Student:
    """A network in training.

    Args:
        graph: network to start from; it does not change.
        codebooks: names of tensors whose equal values stay equal and whose zeros stay zero.
        device: where to train.
        frozen: names of tensors that must not change.
    """

    def __init__(
        self, graph: Graph, codebooks: frozenset[str], device: str, frozen: frozenset[str] = frozenset()
    ) -> None:
        self._graph, self.device = graph, device
        names = [name for name in trained_tensors(graph) if name not in frozen]
        self.parameters = {name: Parameter(graph.tensors[name].to(device), name in codebooks) for name in names}
        self._tensors = {name: tensor.detach().to(device) for name, tensor in graph.tensors.items()}
        self._tensors |= {name: parameter.leaf for name, parameter in self.parameters.items()}

    def program(self, wanted: Sequence[str]) -> Program:
        """Return the network, with gradients, as a program for the values named by ``wanted``."""
        return Program(self._graph.with_tensors(self._tensors), wanted)

    def learn(self, loss: Tensor, rate: float, step: int) -> bool:
        """Take one step; return False, with nothing changed, where the loss or a gradient is not finite.

        Args:
            loss: scalar to lower.
            rate: length of the step, in units of each tensor's size.
            step: number of steps taken before.
        """
        parameters = list(self.parameters.values())
        found = torch.autograd.grad(loss, [p.leaf for p in parameters], allow_unused=True)
        gradients = [p.gradient(g) for p, g in zip(parameters, found, strict=True)]
        squares = [(g * p.scale).square().sum() for p, g in zip(parameters, gradients, strict=True)]
        length = torch.stack(squares).sum().sqrt()
        if not bool((loss.detach() + length).isfinite()):
            return False
        shrink = (_NORM / length).clamp_max(1.0)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.move(gradient, shrink, rate, step)
        return True

    def state(self) -> dict[str, Tensor]:
        """Return everything that a step depends on, by name."""
        parts: dict[str, Tensor] = {}
        for k, p in enumerate(self.parameters.values()):
            parts |= {f"value{k}": p.value, f"first{k}": p.first, f"second{k}": p.second}
        return parts

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`, which may hold other tensors too."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        for parameter in self.parameters.values():
            parameter.fill()

    def copy(self) -> list[Tensor]:
        """Return the trained tensors as they are now."""
        return [parameter.leaf.detach().clone() for parameter in self.parameters.values()]

    def graph(self, tensors: Sequence[Tensor]) -> Graph:
        """Return the network with the trained tensors from `copy`, where the given one was."""
        old, values = self._graph.tensors, zip(self.parameters, tensors, strict=True)
        return self._graph.with_tensors({name: value.to(old[name].device) for name, value in values})


class Parameter:
    """A tensor in training, and its optimiser's state.

    Attributes:
        leaf: the tensor that the network computes with.
        value: what moves: the leaf itself, or the distinct values (K,) of its codebook.
        by_muon: whether it moves by orthogonalised momentum, else by Adam.
        first, second: moments of the gradient, of the value's shape; Muon has no second one.
        scale: size of the tensor, the unit of its steps.
    """

    def __init__(self, tensor: Tensor, has_codebook: bool) -> None:
        self.leaf = tensor.detach().clone().requires_grad_()
        self.codebook = Codebook(self.leaf.detach()) if has_codebook else None
        self.value = self.codebook.values if self.codebook else self.leaf.detach()
        self.by_muon = not has_codebook and is_matrix(tensor)
        self.first = torch.zeros_like(self.value)
        self.second = self.value.new_zeros(()) if self.by_muon else torch.zeros_like(self.value)
        self.scale = _scale(self.leaf.detach())

    def gradient(self, gradient: Tensor | None) -> Tensor:
        """Return the gradient of the value for that of the leaf, which is None where no loss depends on it."""
        if gradient is None:
            return torch.zeros_like(self.value)
        return self.codebook.sum(gradient) if self.codebook else gradient

    @torch.no_grad()
    def move(self, gradient: Tensor, shrink: Tensor, rate: float, step: int) -> None:
        """Take one step of length ``rate``; Adam takes its gradient times ``shrink``."""
        move = self._muon_step(gradient) if self.by_muon else self._adam_step(gradient * shrink, step)
        self.value.sub_(move * (rate * self.scale))
        self.fill()

    def fill(self) -> None:
        """Bring the leaf up to date with the codebook."""
        if self.codebook:
            self.leaf.detach().copy_(self.value[self.codebook.index])

    def _adam_step(self, gradient: Tensor, step: int) -> Tensor:
        b1, b2 = _DECAYS
        self.first.lerp_(gradient, 1 - b1)
        self.second.lerp_(gradient.square(), 1 - b2)
        size = (self.second / (1 - b2 ** (step + 1))).sqrt_().add_(1e-8 / self.scale)
        return self.first / (1 - b1 ** (step + 1)) / size

    def _muon_step(self, gradient: Tensor) -> Tensor:
        """Muon (Jordan et al., 2024): momentum with all its singular values made nearly equal, of unit mean square.

        A few hundred of its steps do what takes Adam thousands.
        """
        self.first.lerp_(gradient, 1 - _MOMENTUM)
        move = orthogonalised(gradient.lerp(self.first, _MOMENTUM).flatten(1)).view(gradient.shape)
        return move / move.square().mean().sqrt().clamp_min(1e-12)


class Codebook:
    """Distinct ``values`` (K,) of a tensor, and their ``index`` in the tensor's shape."""

    def __init__(self, tensor: Tensor) -> None:
        self.values, self.index = torch.unique(tensor, return_inverse=True)
        self._order = self.index.view(-1).argsort(stable=True)
        self._lengths = torch.bincount(self.index.view(-1), minlength=len(self.values))
        self._moves = self.values != 0

    def sum(self, gradient: Tensor) -> Tensor:
        """Return each value's gradient: the sum over its positions, in a fixed order; 0 for the value zero."""
        sums = torch.segment_reduce(gradient.reshape(-1)[self._order].double(), "sum", lengths=self._lengths)
        result: Tensor = sums.to(self.values) * self._moves
        return result


def is_matrix(weight: Tensor) -> bool:
    """Tell whether a weight maps several inputs to several outputs (a depthwise one does not) and is not too wide."""
    return weight.dim() > 1 and weight.shape[1] > 1 and 1 < min(len(weight), weight[0].numel()) <= _WIDEST_MATRIX


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return a matrix (m, n) with the same singular vectors, and singular values between about 0.7 and 1.2."""
    a, b, c = _POLYNOMIAL
    x: Tensor = matrix / matrix.norm().clamp_min(1e-30)
    x = x.T if len(x) > x.shape[1] else x
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


def update_macs(graph: Graph) -> int:
    """Count the multiply-accumulates that one step spends on orthogonalising."""
    weights = [graph.tensors[name] for name in trained_tensors(graph) if is_matrix(graph.tensors[name])]
    sides = [sorted((len(w), w[0].numel())) for w in weights]
    return sum(_ROUNDS * (2 * short**2 * long + short**3) for short, long in sides)


def trained_tensors(graph: Graph) -> list[str]:
    """Name the stored floating-point tensors that convolutions, Linear and norms use as weight or bias, each once."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        for place in _TRAINED.get(node.op, ()):
            ref = node.args[place] if place < len(node.args) else None
            if isinstance(ref, Ref) and ref.name in graph.tensors and graph.tensors[ref.name].is_floating_point():
                found[ref.name] = None
    return list(found)


def _scale(tensor: Tensor) -> float:
    """Root mean square of a tensor; a bias may be all zero, so vectors have at least 0.1."""
    rms = float(tensor.double().square().mean().sqrt()) if tensor.numel() else 1.0
    return max(rms, 0.1 if tensor.dim() < 2 else 1e-6)
