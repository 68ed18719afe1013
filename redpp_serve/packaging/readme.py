"""The README of a packaged model: the exact commands that serve it and ask it something."""

from __future__ import annotations

from collections.abc import Sequence

from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.packaging.samples import sample_name
from redpp_serve.packaging.templates import render
from redpp_serve.packaging.triton_repository import TYPES
from redpp_serve.variants import ORIGINAL, PRUNED


def readme(name: str, inputs: Sequence[InputSpec], preprocess: Preprocess | None) -> str:
    """Return the text for a model of that name."""
    return render(
        "README.md",
        name=name,
        inputs=inputs,
        preprocess=preprocess,
        example=sample_name(inputs),
        types={dtype: word.removeprefix("TYPE_") for dtype, word in TYPES.items()},
        numbers=lambda values: ", ".join(f"{value:g}" for value in values),
        original=ORIGINAL,
        pruned=PRUNED,
    )
