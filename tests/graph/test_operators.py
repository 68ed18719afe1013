"""The allow-list: every name resolves, and nothing else does."""

import operator
from typing import Any

import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph import operators as ops
from redpp_serve.graph.operators import ALLOWED, resolve
from redpp_serve.graph.recurrent import SEQUENCES

HOSTILE = [
    "__class__",
    "aten.__class__",
    "aten.__init__.__globals__",
    "py.exec",
    "py.eval",
    "py.__import__",
    "py.attrgetter",
    "py.methodcaller",
    "operator.add",
    "os.system",
    "torch.load",
    "aten.from_file.default",
    "aten.from_file",
    "aten",
    "aten.",
    "",
    ".",
    "py.",
    "py.add.__self__",
    "aten.add.Tensor.__class__",
    "aten.add",
    "prim.device.default",
    "aten.set_.source_Storage",
    "aten.save.default",
    "mkldnn._convolution_pointwise.default",
    "aten.rand.default",
    "aten.dropout.default",
    "aten.empty.memory_format",
    "aten.relu_.default",
    "aten.as_strided.default",
]


def test_every_operator_exists_in_this_torch() -> None:
    missing = []
    for op in sorted(ALLOWED):
        try:
            assert callable(resolve(op))
        except RedppError:
            missing.append(op)
    assert missing == []


def test_nothing_else_resolves() -> None:
    for op in HOSTILE:
        with pytest.raises(KeyError):
            pytest.fail(f"{op!r} resolves to {resolve(op)}")


def test_what_a_name_resolves_to() -> None:
    assert resolve("aten.relu.default") is torch.ops.aten.relu.default
    assert resolve("py.floordiv") is operator.floordiv


def aten_schemas() -> dict[str, torch._C.FunctionSchema]:
    return {op: overload(op)._schema for op in sorted(ALLOWED) if op.startswith("aten.")}


def overload(op: str) -> Any:
    """The operator of torch itself, which for a recurrent one `resolve` puts a check before."""
    _, name, kind = op.split(".")
    return getattr(getattr(torch.ops.aten, name), kind)


def test_no_operator_changes_its_arguments() -> None:
    for op, schema in aten_schemas().items():
        assert not any(a.alias_info and a.alias_info.is_write for a in schema.arguments), op


def test_no_operator_is_random_or_reads_unwritten_memory() -> None:
    drawing = {"rand", "normal", "bernoulli", "dropout", "multinomial", "uniform", "empty"}
    assert [op for op in aten_schemas() if any(word in op for word in drawing)] == []
    tagged = [op for op in aten_schemas() if torch.Tag.nondeterministic_seeded in overload(op).tags]
    # attention drops out where told to, which a network in eval mode does not; the check of a recurrent one forbids it
    assert set(tagged) <= {"aten.scaled_dot_product_attention.default"} | SEQUENCES


def test_no_operator_touches_files_or_strings_of_code() -> None:
    text = ("str", "Optional[str]")
    names = {a.name for schema in aten_schemas().values() for a in schema.arguments if str(a.type) in text}
    modes = {"rounding_mode", "approximate", "indexing", "mode", "padding", "pad_mode", "norm", "side", "interpolation"}
    assert names <= modes | {"equation", "reduce", "driver", "UPLO"}


def test_an_operator_that_this_torch_lacks_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "ALLOWED", ALLOWED | {"aten.not_there.default", "aten.relu.not_there"})
    for op in ("aten.not_there.default", "aten.relu.not_there"):
        with pytest.raises(RedppError, match=rf"torch {torch.__version__[:4]}.* has no operator {op}"):
            resolve(op)
