"""Which outputs of a network hold class scores, so that their largest entry is an answer that two networks can share.

A graph does not say so: a Linear at the end gives class scores, coordinates or an embedding alike. The owner's word
decides; else a softmax at the end, the words in the names of the output and of the layer that gives it, and the
absence of what speaks against it. In doubt an output holds none, and only its error is told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import output_types
from redpp_serve.graph.graph import Graph, Node, Ref

NO_CLASSES = "none"  # the owner's word for a network without class scores
_SOFTMAX = frozenset({"aten.softmax.int", "aten.log_softmax.int", "aten._softmax.default", "aten._log_softmax.default"})
_DECIDES = _SOFTMAX | {"aten.argmax.default", "aten.topk.default", "aten.max.dim", "aten.sigmoid.default"}
_LAYOUT = frozenset(
    f"aten.{name}"
    for name in (
        *("reshape.default", "view.default", "flatten.using_ints", "clone.default", "contiguous.default"),
        *("squeeze.dim", "squeeze.dims", "to.dtype"),
    )
)
_SCALE = frozenset(
    f"aten.{name}" for name in ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "mul.Scalar", "div.Scalar")
)
_RELU = "aten.relu.default"
_POOLED = {"aten.mean.dim", _RELU}
_PRODUCT = frozenset({"aten.matmul.default", "aten.mm.default", "aten.addmm.default"})
_CLASSES = frozenset(
    [
        *("class", "classes", "classifier", "classification", "cls", "logit", "logits", "score", "scores"),
        *("prob", "probs", "probability", "probabilities", "category", "categories", "label", "labels", "softmax"),
    ]
)
_OTHERS = frozenset(
    [
        *("affine", "age", "anchor", "anchors", "angle", "angles", "box", "boxes", "bbox", "bboxes", "code", "coord"),
        *("coords", "coordinates", "delta", "deltas", "depth", "emb", "embed", "embedding", "embeddings", "embeds"),
        *("feat", "feats", "feature", "features", "hidden", "keypoint", "keypoints", "kpt", "kpts", "landmark"),
        *(
            "landmarks",
            "latent",
            "loc",
            "location",
            "locations",
            "logvar",
            "mu",
            "offset",
            "offsets",
            "pooled",
            "pooler",
        ),
        *(
            "pose",
            "position",
            "positions",
            "proj",
            "projection",
            "quat",
            "quaternion",
            "reg",
            "regression",
            "regressor",
        ),
        *("rotation", "sigma", "state", "std", "theta", "translation", "value", "var", "variance", "velocity", "xyz"),
    ]
)


def class_outputs(graph: Graph) -> dict[str, bool]:
    """Tell for each output, by name, whether it holds class scores."""
    if graph.classes is not None:
        return {name: name in graph.classes for name in graph.output_names}
    wide = may_hold_classes(graph)
    found = _Evidence(graph)
    return {
        name: wide[name] and found.of(name, value)
        for name, value in zip(graph.output_names, graph.outputs, strict=True)
    }


def class_value(graph: Graph) -> str | None:
    """Return the value of the first output that holds class scores; None where none does."""
    scores = class_outputs(graph)
    named = zip(graph.output_names, graph.outputs, strict=True)
    return next((value for name, value in named if scores[name]), None)


def may_hold_classes(graph: Graph) -> dict[str, bool]:
    """Tell for each output, by name, whether it has the form of class scores: floats of shape (N, 2 or more)."""
    return {
        name: len(shape) == 2 and shape[1] > 1 and dtype.is_floating_point
        for name, (shape, dtype) in output_types(graph).items()
    }


def check_classes(graph: Graph, names: tuple[str, ...]) -> frozenset[str]:
    """Return the outputs that the owner says hold class scores; ``none`` alone says that there are none.

    Raises:
        RedppError: no output has such a name, or none of the form of class scores.
    """
    if names == (NO_CLASSES,) and NO_CLASSES not in graph.output_names:
        return frozenset()
    wide = may_hold_classes(graph)
    if unknown := [name for name in names if not wide.get(name)]:
        kind = "is no output" if unknown[0] not in wide else "is not of shape (N, classes) and a floating type"
        fitting = [name for name, fits in wide.items() if fits]
        raise RedppError(
            f"--classes {unknown[0]} {kind} of the network",
            f"one of {', '.join(fitting)}" if fitting else f"{NO_CLASSES}: no output has the form of class scores",
            "correct or leave out --classes",
        )
    return frozenset(names)


class _Evidence:
    """What a graph tells about its outputs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._nodes: Mapping[str, Node] = {node.name: node for node in graph.nodes}
        self._users = graph.users()

    def of(self, name: str, value: str) -> bool:
        """Tell whether an output of the form of class scores holds them."""
        if self._softmax(value):
            return True
        words = _words(name)
        if words & (_OTHERS | _CLASSES):
            return not words & _OTHERS
        layer, activated = self._layer(value)
        if layer is None:
            return False
        words = _words(layer)
        if words & (_OTHERS | _CLASSES):
            return bool(words & _CLASSES)
        return not activated and self._is_the_end(value)

    def _is_the_end(self, value: str) -> bool:
        """Return whether all other outputs only lie on the way to this one, as features lie on the way to classes."""
        return set(self.graph.outputs) <= self.graph.needed_for([value])

    def _softmax(self, name: str) -> bool:
        while name in self._nodes:
            node = self._nodes[name]
            if node.op in _SOFTMAX:
                return True
            if node.op not in _LAYOUT or not isinstance(node.args[0], Ref):
                return False
            name = node.args[0].name
        return False

    def _layer(self, name: str) -> tuple[str | None, bool]:
        """Return the name of the weight of the layer that gives a value, and whether an activation follows it.

        Between the two lie changes of layout, scales and shifts by constants, and poolings, which may be of what a ReLU
        gives. There is none where the value or one on the way is read by anything that goes on computing.
        """
        activated = pooled = False
        readers = 0  # nobody may read the output, and one the values on the way
        while name in self._nodes:
            node = self._nodes[name]
            if len({user.name for user in self._users.get(name, []) if user.op not in _DECIDES}) > readers:
                break
            if (weight := _weight(node, self.graph)) is not None:
                return weight, activated
            values = [ref for ref in node.refs() if ref not in self.graph.tensors]
            pooled = pooled or "pool" in node.op or node.op == "aten.mean.dim"
            activated = activated or node.op == _RELU
            passed = node.op in _LAYOUT | _SCALE or (pooled and (node.op in _POOLED or "pool" in node.op))
            if not passed or len(values) != 1:
                break
            readers, name = 1, values[0]
        return None, activated


def _weight(node: Node, graph: Graph) -> str | None:
    """Return the name of the stored weight that a layer multiplies by; None for what is no layer."""
    if not ("aten.linear." in node.op or ".conv" in node.op or node.op in _PRODUCT):
        return None
    stored = [name for name in node.refs() if name in graph.tensors]
    weights = [name for name in stored if graph.tensors[name].dim() > 1]
    return weights[0] if weights else None


def _words(name: str) -> frozenset[str]:
    """Return the words of a name, split at dots, underscores, digits and capitals."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return frozenset(word.lower() for word in re.split(r"[^A-Za-z]+", spaced) if word)
