"""A network in training: which of its tensors move, and how; tensors with a codebook keep it.

Weights of layers move by orthogonalised momentum; depthwise and very wide weights, vectors and codebooks by Adam.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, Ref

_DECAYS = 0.9, 0.99  # of Adam's first and second moments
_MOMENTUM = 0.9
_NORM = 10.0  # longest gradient for Adam, with all tensors in units of their own size
_ROUNDS = 5  # of the Newton-Schulz iteration, and its coefficients: odd polynomials that drive singular values to 1
_POLYNOMIAL = 3.4445, -4.7750, 2.0315
_WIDEST_MATRIX = 1024  # shorter side; the iteration costs its square

# For each operator the arguments that are trained where they are stored tensors
_TRAINED = {
    **dict.fromkeys(
        (
            "aten.conv1d.default",
            "aten.conv2d.default",
            "aten.conv3d.default",
            "aten.conv2d.padding",
            "aten.conv1d.padding",
            "aten.conv_transpose1d.default",
            "aten.conv_transpose2d.input",
            "aten.convolution.default",
            "aten.linear.default",
            "aten.batch_norm.default",
        ),
        (1, 2),
    ),
    **dict.fromkeys(("aten.layer_norm.default", "aten.group_norm.default"), (2, 3)),
    **dict.fromkeys(("aten.native_layer_norm.default", "aten.native_group_norm.default"), (1, 2)),
}


class Student:
    """The network in training: its trained tensors as leaves, and the optimiser's state for each parameter.

    A tensor with a codebook has its distinct values as the parameter; the leaf is filled from them after each step.
    """

    def __init__(
        self, graph: Graph, codebooks: frozenset[str], device: str, frozen: frozenset[str] = frozenset()
    ) -> None:
        self._graph = graph
        self.names = [name for name in trained_tensors(graph) if name not in frozen]
        self.leaves = [graph.tensors[name].detach().clone().to(device).requires_grad_() for name in self.names]
        self.tensors = {name: t.detach().to(device) for name, t in graph.tensors.items()}
        self.tensors |= dict(zip(self.names, self.leaves))
        self.shared = [_Shared(leaf.detach()) if n in codebooks else None for n, leaf in zip(self.names, self.leaves)]
        self.parameters = [leaf.detach() if s is None else s.values for s, leaf in zip(self.shared, self.leaves)]
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.matrices = [s is None and is_matrix(leaf) for s, leaf in zip(self.shared, self.leaves)]
        self.second = [p.new_zeros(()) if m else torch.zeros_like(p) for m, p in zip(self.matrices, self.parameters)]
        self.scales = [_scale(leaf.detach()) for leaf in self.leaves]

    def program(self, wanted: Sequence[str]) -> Program:
        """The network with gradients."""
        return Program(self._graph.with_tensors(self.tensors), wanted)

    def learn(self, loss: Tensor, rate: float, step: int) -> bool:
        """One step at ``rate``, in units of each tensor's size; False, and nothing changed, where the loss or a
        gradient is not finite.
        """
        gradients = torch.autograd.grad(loss, self.leaves, allow_unused=True)
        found = [self._gradient(k, g) for k, g in enumerate(gradients)]
        length = torch.stack([(g * s).square().sum() for g, s in zip(found, self.scales)]).sum().sqrt()
        if not bool((loss.detach() + length).isfinite()):
            return False
        shrink = (_NORM / length).clamp_max(1.0)
        for k, (p, g) in enumerate(zip(self.parameters, found)):
            move = self._orthogonal_step(k, g) if self.matrices[k] else self._adam_step(k, g * shrink, step)
            p.sub_(move * (rate * self.scales[k]))
        self._fill()
        return True

    def _adam_step(self, k: int, gradient: Tensor, step: int) -> Tensor:
        b1, b2 = _DECAYS
        self.first[k].lerp_(gradient, 1 - b1)
        self.second[k].lerp_(gradient.square(), 1 - b2)
        size = (self.second[k] / (1 - b2 ** (step + 1))).sqrt_().add_(1e-8 / self.scales[k])
        return self.first[k] / (1 - b1 ** (step + 1)) / size

    def _orthogonal_step(self, k: int, gradient: Tensor) -> Tensor:
        """Muon (Jordan et al., 2024): momentum with all its singular values made nearly equal, of unit mean square.
        A few hundred steps of it do what takes thousands of Adam's.
        """
        self.first[k].lerp_(gradient, 1 - _MOMENTUM)
        move = orthogonalised(gradient.lerp(self.first[k], _MOMENTUM).flatten(1)).view(gradient.shape)
        return move / move.square().mean().sqrt().clamp_min(1e-12)

    def _gradient(self, k: int, gradient: Tensor | None) -> Tensor:
        shared = self.shared[k]
        if gradient is None:
            return torch.zeros_like(self.parameters[k])
        return gradient if shared is None else shared.sum(gradient)

    @torch.no_grad()
    def _fill(self) -> None:
        for leaf, shared in zip(self.leaves, self.shared):
            if shared is not None:
                leaf.copy_(shared.values[shared.index])

    def state(self) -> dict[str, Tensor]:
        """All that a step depends on, by name."""
        parts = {"value": self.parameters, "first": self.first, "second": self.second}
        return {f"{part}{k}": tensor for part, tensors in parts.items() for k, tensor in enumerate(tensors)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self._fill()

    def copy(self) -> list[Tensor]:
        """The trained tensors as they are now."""
        return [leaf.detach().clone() for leaf in self.leaves]

    def graph(self, leaves: Sequence[Tensor] | None = None) -> Graph:
        """The network with those trained tensors (as they are now, by default), where the given one was."""
        values = zip(self.names, self.leaves if leaves is None else leaves)
        return self._graph.with_tensors({n: v.detach().clone().to(self._graph.tensors[n].device) for n, v in values})


class _Shared:
    """A tensor with a codebook: its distinct ``values`` (K,) and their ``index``, of the tensor's shape."""

    def __init__(self, tensor: Tensor) -> None:
        self.values, self.index = torch.unique(tensor, return_inverse=True)
        self._order = self.index.view(-1).argsort(stable=True)
        self._lengths = torch.bincount(self.index.view(-1), minlength=len(self.values))
        self._moves = self.values != 0

    def sum(self, gradient: Tensor) -> Tensor:
        """The gradient of each value: over all its positions, in a fixed order; none for zero."""
        sums = torch.segment_reduce(gradient.reshape(-1)[self._order].double(), "sum", lengths=self._lengths)
        return sums.to(self.values) * self._moves


def is_matrix(weight: Tensor) -> bool:
    """Whether a weight maps several inputs to several outputs (a depthwise one does not) and is not too wide."""
    return weight.dim() > 1 and weight.shape[1] > 1 and 1 < min(len(weight), weight[0].numel()) <= _WIDEST_MATRIX


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix (m, n) with the same singular vectors, its singular values between about 0.7 and 1.2."""
    a, b, c = _POLYNOMIAL
    x = matrix / matrix.norm().clamp_min(1e-30)
    x = x.T if len(x) > x.shape[1] else x
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


def update_macs(graph: Graph) -> int:
    """Multiply-accumulates that one step spends on orthogonalising."""
    weights = [graph.tensors[name] for name in trained_tensors(graph) if is_matrix(graph.tensors[name])]
    sides = [sorted((len(w), w[0].numel())) for w in weights]
    return sum(_ROUNDS * (2 * short**2 * long + short**3) for short, long in sides)


def trained_tensors(graph: Graph) -> list[str]:
    """Stored floating-point tensors that convolutions, Linear and norms use as weight or bias, each once."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        for place in _TRAINED.get(node.op, ()):
            ref = node.args[place] if place < len(node.args) else None
            if isinstance(ref, Ref) and ref.name in graph.tensors and graph.tensors[ref.name].is_floating_point():
                found[ref.name] = None
    return list(found)


def _scale(tensor: Tensor) -> float:
    """The unit in which a tensor moves: its root mean square; biases may be zero, so vectors have at least 0.1."""
    rms = float(tensor.double().square().mean().sqrt()) if tensor.numel() else 1.0
    return max(rms, 0.1 if tensor.dim() < 2 else 1e-6)
