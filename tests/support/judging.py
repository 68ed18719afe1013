"""Two networks held against each other on one set of inputs."""

from collections.abc import Sequence

from torch import Tensor

from redpp_serve.graph.graph import Graph
from redpp_serve.pruning.judge import Difference, Reference


def compare_outputs(original: Graph, other: Graph, inputs: Sequence[Tensor]) -> Difference:
    """Run both networks over the inputs (images, ...)."""
    return Reference(original, inputs).compare(other)
