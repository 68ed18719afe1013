"""Inputs and outputs as people write them: dicts, tuples, lists, records and keywords, each tensor under a name."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from redpp_serve.capture import capture_file
from redpp_serve.capture.export import capture
from redpp_serve.capture.flat import flat_network
from redpp_serve.capture.inputs import parse_input
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import build, load
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from tests.support.captures import quick  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("quick")


class Pair(NamedTuple):
    image: Tensor
    meta: Tensor


@dataclass
class Batch:
    image: Tensor
    meta: Tensor
    scale: float = 2.0


class Output(OrderedDict[str, Any]):
    """A dict whose keys are attributes too, as libraries of transformers return."""


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.t, self.h = nn.Conv2d(3, 4, 3), nn.Linear(7, 4), nn.Linear(4, 3)

    def rest(self, image: Tensor, meta: Tensor) -> Tensor:
        return self.h(self.f(image).mean((2, 3)) + self.t(meta))  # type: ignore[no-any-return]


def of(forward: Callable[..., Any]) -> nn.Module:
    """A network with this forward."""
    return type("Network", (Base,), {"forward": forward})().eval()  # type: ignore[no-any-return]


def specs(words: str) -> list[Any]:
    return [parse_input(word, k) for k, word in enumerate(words.split())]


def taken(network: nn.Module, words: str, constants: dict[str, Any] | None = None) -> Graph:
    """The captured graph of a network with those inputs, with its artifact loaded again."""
    graph = capture(network, specs(words), [], constants)
    assert load(build(graph, {}).data).graph.output_names == graph.output_names
    return graph


def names(graph: Graph) -> list[str]:
    return [spec.name for spec in graph.inputs]


BOTH, NAMED, PLACED = "image=3x8x8 meta=7", "batch.image=3x8x8 batch.meta=7", "3x8x8 7"
TAKES: dict[str, tuple[Callable[..., Any], str, list[str]]] = {
    "arguments": (lambda self, image, meta: self.rest(image, meta), PLACED, ["image", "meta"]),
    "arguments by name": (lambda self, image, meta: self.rest(image, meta), BOTH, ["image", "meta"]),
    "arguments by name, turned": (
        lambda self, image, meta: self.rest(image, meta),
        "meta=7 image=3x8x8",
        ["meta", "image"],
    ),
    "keywords": (lambda self, *, image, meta: self.rest(image, meta), BOTH, ["image", "meta"]),
    "keywords in order": (lambda self, *, image, meta: self.rest(image, meta), PLACED, ["image", "meta"]),
    "one of each": (lambda self, image, *, meta: self.rest(image, meta), PLACED, ["image", "meta"]),
    "any keywords": (lambda self, **kw: self.rest(kw["image"], kw["meta"]), BOTH, ["image", "meta"]),
    "any arguments": (lambda self, *xs: self.rest(xs[0], xs[1]), PLACED, ["xs.0", "xs.1"]),
    "any arguments by place": (lambda self, *xs: self.rest(*xs), "xs.0=3x8x8 xs.1=7", ["xs.0", "xs.1"]),
    "any arguments by other names": (lambda self, *xs: self.rest(*xs), BOTH, ["image", "meta"]),
    "a dict": (lambda self, batch: self.rest(batch["image"], batch["meta"]), BOTH, ["image", "meta"]),
    "a dict by its name": (
        lambda self, batch: self.rest(batch["image"], batch["meta"]),
        NAMED,
        ["batch.image", "batch.meta"],
    ),
    "a dict beside an argument": (
        lambda self, image, batch: self.rest(image, batch["meta"]),
        "image=3x8x8 batch.meta=7",
        ["image", "batch.meta"],
    ),
    "a dict in a dict": (
        lambda self, batch: self.rest(batch["views"]["image"], batch["meta"]),
        "views.image=3x8x8 meta=7",
        ["views.image", "meta"],
    ),
    "a pair": (lambda self, pair: self.rest(pair[0], pair[1]), PLACED, ["pair.0", "pair.1"]),
    "a pair by place": (lambda self, pair: self.rest(*pair), "pair.0=3x8x8 pair.1=7", ["pair.0", "pair.1"]),
    "a pair by other names": (lambda self, pair: self.rest(pair[0], pair[1]), BOTH, ["image", "meta"]),
    "a tuple in a tuple": (lambda self, x: self.rest(x[0][0], x[1]), "x.0.0=3x8x8 x.1=7", ["x.0.0", "x.1"]),
    "a list": (lambda self, xs: self.rest(*xs.copy()), PLACED, ["xs.0", "xs.1"]),
    "an object with attributes": (lambda self, batch: self.rest(batch.image, batch.meta), BOTH, ["image", "meta"]),
    "what is left at its default": (
        lambda self, image, meta, targets=None, mode="a": self.rest(image, meta),
        PLACED,
        ["image", "meta"],
    ),
}


@pytest.mark.parametrize(("forward", "words", "expected"), TAKES.values(), ids=TAKES)
def test_how_forward_takes_its_inputs(forward: Callable[..., Any], words: str, expected: list[str]) -> None:
    network = of(forward)
    graph = taken(network, words)
    assert names(graph) == expected
    given = {"image": torch.randn(3, 3, 8, 8), "meta": torch.randn(3, 7)}
    x = [given["image" if len(spec.shape) == 3 else "meta"] for spec in graph.inputs]
    with torch.no_grad():
        torch.testing.assert_close(Program(graph)(*x)[0], network.rest(given["image"], given["meta"]))  # type: ignore[operator]


def test_annotated_records_are_made() -> None:
    def record(self: Any, batch: Batch) -> Tensor:
        return self.rest(batch.image, batch.meta) * batch.scale  # type: ignore[no-any-return]

    def pair(self: Any, pair: Pair) -> Tensor:
        return self.rest(pair.image, pair.meta)  # type: ignore[no-any-return]

    for forward in (record, pair):
        assert names(taken(of(forward), BOTH)) == ["image", "meta"]
        argument = forward.__code__.co_varnames[1]
        assert names(taken(of(forward), PLACED)) == [f"{argument}.0", f"{argument}.1"]


def test_a_captured_name_is_a_name_to_capture_with() -> None:
    """A fine-tuned network is captured again with the names that the package keeps."""
    for forward, words, _ in TAKES.values():
        flat = flat_network(of(forward), specs(words), {})
        assert flat_network(of(forward), flat.inputs, {}).inputs == flat.inputs


def test_constants_go_beside_the_inputs() -> None:
    def forward(self: Any, scale: float, image: Tensor, mode: str, meta: Tensor, *, twice: bool = False) -> Tensor:
        assert mode == "sum"
        return self.rest(image, meta) * (scale * 2 if twice else scale)  # type: ignore[no-any-return]

    network, x = of(forward), (torch.randn(2, 3, 8, 8), torch.randn(2, 7))
    constants = {"mode": "sum", "scale": 3.0, "twice": True}
    for words in (PLACED, BOTH):
        graph = taken(network, words, constants)
        torch.testing.assert_close(Program(graph)(*x)[0], network.rest(*x) * 6)  # type: ignore[operator]
    keyed = of(lambda self, batch: self.rest(batch["image"], batch["meta"]) * batch["scale"])
    torch.testing.assert_close(
        Program(taken(keyed, BOTH, {"scale": 4}))(*x)[0],
        keyed.rest(*x) * 4,  # type: ignore[operator]
    )


def test_scripted_networks_take_names_and_dicts() -> None:
    class Scripted(Base):
        def forward(self, batch: dict[str, Tensor], bias: float = 0.0) -> tuple[Tensor, Tensor]:
            y = self.h(self.f(batch["image"]).mean((2, 3)) + self.t(batch["meta"])) + bias
            return y, y * 2

    network = torch.jit.script(Scripted().eval())
    graph = taken(network, BOTH)
    x = {"image": torch.randn(3, 3, 8, 8), "meta": torch.randn(3, 7)}
    with torch.no_grad():
        for mine, theirs in zip(Program(graph)(*(x[name] for name in names(graph))), network(x), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_exported_programs_take_names_in_any_order() -> None:
    network = of(lambda self, batch, scale: {"y": self.rest(batch["image"], batch["meta"]) * scale, "none": None})
    batch = torch.export.Dim("n")
    x = {"image": torch.randn(2, 3, 8, 8), "meta": torch.randn(2, 7)}
    shapes = ({"image": {0: batch}, "meta": {0: batch}}, None)
    exported = torch.export.export(network, (x, 2.0), dynamic_shapes=shapes)
    messages: list[str] = []
    for words in (PLACED, "batch.meta=7 batch.image=3x8x8"):
        graph = capture(exported, specs(words), messages)
        assert (names(graph), graph.output_names) == (["batch_image", "batch_meta"], ("y",)) or "." in words
        torch.testing.assert_close(Program(graph)(x["image"], x["meta"])[0], network.rest(**x) * 2)  # type: ignore[operator]
    assert "none (None)" in messages[0]


# --- outputs ---

RETURNS: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...]]] = {
    "a tensor": (lambda y: y, ("output_0",)),
    "a pair": (lambda y: (y, y * 2), ("output_0", "output_1")),
    "a list": (lambda y: [y, y * 2], ("output_0", "output_1")),
    "a dict": (lambda y: {"boxes": y, "scores": y * 2}, ("boxes", "scores")),
    "an ordered dict": (
        lambda y: Output(logits=y, hidden_states=(y * 2, y * 3)),
        ("logits", "hidden_states.0", "hidden_states.1"),
    ),
    "a named tuple": (lambda y: Pair(y, y * 2), ("image", "meta")),
    "a dataclass": (lambda y: Batch(y, y * 2), ("image", "meta")),
    "nested": (lambda y: {"out": y, "aux": [y * 2, {"deep": y * 3}]}, ("out", "aux.0", "aux.1.deep")),
    "a pair with a dict": (lambda y: (y, {"aux": y * 2}), ("output_0", "output_1.aux")),
    "None beside": (lambda y: (y, None), ("output_0",)),
    "None first": (lambda y: (None, y), ("output_1",)),
    "numbers and texts beside": (lambda y: {"y": y, "count": 3, "kind": "a", "share": 0.5, "ok": True}, ("y",)),
    "a size beside": (lambda y: (y, y.shape[0]), ("output_0",)),
    "an object beside": (lambda y: (y, SimpleNamespace(cache=1)), ("output_0",)),
    "torch's own record": (lambda y: y.max(1), ("values", "indices")),
    "keys that no server takes": (lambda y: {"a b/c": y, "ü": y * 2, 3: y * 4}, ("a_b_c", "_", "output_3")),
    "keys that become one": (lambda y: {"a b": y, "a/b": y * 2}, ("a_b", "a_b_output")),
    "the same twice": (lambda y: {"a": y, "b": y}, ("a", "b")),
}


@pytest.mark.parametrize(("returns", "expected"), RETURNS.values(), ids=RETURNS)
def test_what_forward_returns(returns: Callable[[Tensor], Any], expected: tuple[str, ...]) -> None:
    network = of(lambda self, x: returns(self.h(x)))
    graph = taken(network, "4")
    assert graph.output_names == expected
    with torch.no_grad():
        y = network.h(x := torch.randn(3, 4))  # type: ignore[operator]
        leaves = _tensors(returns(y))
    for mine, theirs in zip(Program(graph)(x), leaves, strict=True):
        torch.testing.assert_close(mine, theirs)


def _tensors(value: Any) -> Sequence[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Batch):
        return [value.image, value.meta]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [leaf for part in parts for leaf in _tensors(part)]


def test_an_output_may_be_an_input_or_a_constant_of_each_row() -> None:
    network = of(lambda self, x: {"x": x, "y": self.h(x), "prior": self.h.bias.expand(x.shape[0], -1)})
    graph = taken(network, "x=4")
    assert graph.output_names == ("x_output", "y", "prior")
    x = torch.randn(3, 4)
    assert Program(graph)(x)[0] is x and Program(graph)(x)[2].shape == (3, 3)


def test_what_is_left_out_is_said() -> None:
    messages: list[str] = []
    network = of(lambda self, x: {"y": self.h(x), "aux": None, "n": 3, "kind": "a", "cache": SimpleNamespace()})
    capture(network, specs("4"), messages)
    assert messages == [
        "left out of the outputs, since they are no tensors: aux (None), n (the number 3), kind (the text 'a'), "
        "cache (of type SimpleNamespace)"
    ]


# --- refusals ---

REFUSED: dict[str, tuple[Callable[..., Any], str, list[str]]] = {
    "a dict without names": (
        lambda self, batch: self.rest(batch["image"], batch["meta"]),
        PLACED,
        ["forward((batch.0, batch.1))", "(batch)", "--input NAME=3x8x8"],
    ),
    "a key that is not there": (
        lambda self, batch: self.rest(batch["image"], batch["metadata"]),
        BOTH,
        ["forward({'image': image, 'meta': meta}): 'metadata'", "(batch)"],
    ),
    "an argument that is not there": (
        lambda self, image, meta: self.rest(image, meta),
        "image=3x8x8 mta=7",
        ["no call of forward(image, meta) fits"],
    ),
    "too many": (lambda self, image: self.f(image).mean((2, 3)), BOTH, ["rejects a batch of inputs", "(image)"]),
    "a name beside none": (lambda self, image, meta: self.rest(image, meta), "image=3x8x8 7", ["--input NAME=7"]),
    "a name twice": (lambda self, image, meta: self.rest(image, meta), "a=3x8x8 a=7", ["--input a"]),
    "a name inside another": (lambda self, image, meta: self.rest(image, meta), "a=3x8x8 a.b=7", ["--input a.b"]),
    "half weights": (lambda self, image: self.half().f(image), "image=3x8x8", ["--input 3x8x8:half"]),
}


@pytest.mark.parametrize(("forward", "words", "says"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_what_was_tried(forward: Callable[..., Any], words: str, says: list[str]) -> None:
    with pytest.raises(RedppError) as caught:
        capture(of(forward), specs(words), [])
    for part in says:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["=3x8x8", "a b=3", "1a=3", "a..b=3", ".a=3", "a/b=3", "a="])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(RedppError):
        parse_input(text, 0)


def test_names_keep_their_case() -> None:
    assert parse_input("Batch.pixel_Values-1=3X8:BF16", 0).name == "Batch.pixel_Values-1"


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(8)), nn.LazyBatchNorm1d()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.f(x))  # type: ignore[no-any-return]


def test_a_lazy_network_without_weights_is_refused() -> None:
    with pytest.raises(RedppError, match=r"f.0.weight has no weights: its module is lazy"):
        capture(Lazy().eval(), specs("3x8x8"), [])


def test_a_lazy_module_without_weights_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    torch.save(Lazy(), tmp_path / "lazy.pt")
    with pytest.raises(RedppError, match="its module is lazy and has never run"):
        capture_file(tmp_path / "lazy.pt", specs("3x8x8"), trust=True)
