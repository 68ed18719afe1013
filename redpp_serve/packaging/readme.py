"""The README of a packaged model: the exact commands that serve it and ask it something."""

from __future__ import annotations

from collections.abc import Sequence

from redpp_serve.graph.graph import InputSpec, numbered_outputs
from redpp_serve.graph.sizes import in_words
from redpp_serve.handlers.image_files import NAMES
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.packaging.samples import sample_name
from redpp_serve.packaging.templates import render
from redpp_serve.packaging.triton_repository import TYPES
from redpp_serve.variants import ORIGINAL, PRUNED


def readme(
    name: str, inputs: Sequence[InputSpec], preprocess: Preprocess | None, outputs: Sequence[str] = ("output_0",)
) -> str:
    """Return the text for a model of that name, with outputs of these names."""
    return render(
        "README.md",
        name=name,
        inputs=inputs,
        preprocess=preprocess,
        outputs=outputs,
        named=tuple(outputs) != numbered_outputs(len(outputs)),
        example=sample_name(inputs),
        types={dtype: word.removeprefix("TYPE_") for dtype, word in TYPES.items()},
        image_names=NAMES,
        in_words=in_words,
        original=ORIGINAL,
        pruned=PRUNED,
    )
