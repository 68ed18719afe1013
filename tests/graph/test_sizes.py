"""Sizes that differ between requests: which fit, which is nearest, and what inputs share."""

import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import build, load
from redpp_serve.graph.graph import Graph, InputSpec, Size
from redpp_serve.graph.sizes import disagreement, ends, fits, in_words, largest, nearest, resized

HEIGHT, WIDTH, LENGTH = Size("H", 32, 128, 32), Size("W", 8, 17), Size("L", 5, 25, 10)
PICTURE = InputSpec("x", (3, 64, 10), varying=((1, HEIGHT), (2, WIDTH)))
IDS, MASK = (InputSpec(name, (15,), "int64", varying=((0, LENGTH),)) for name in ("ids", "mask"))
SQUARE = InputSpec("x", (1, 64, 64), varying=((1, HEIGHT), (2, HEIGHT)))


def test_declared_sizes_fit_and_no_others():
    assert [fits(PICTURE, (3, h, 8)) for h in (0, 31, 32, 48, 128, 160)] == [False, False, True, False, True, False]
    assert not any(fits(PICTURE, shape) for shape in ((1, 32, 8), (3, 32), (3, 32, 18), (3, 32, 8, 1), ()))
    assert [n for n in range(40) if fits(IDS, (n,))] == [5, 15, 25]
    assert fits(SQUARE, (1, 96, 96)) and not fits(SQUARE, (1, 96, 64))
    assert fits(InputSpec("x", (3, 4)), (3, 4)) and not fits(InputSpec("x", (3, 4)), (3, 5))


def test_the_nearest_size():
    assert nearest(PICTURE, (3, 1000, 1)) == (3, 128, 8) and nearest(PICTURE, (9, 81, 12)) == (3, 96, 12)
    assert nearest(SQUARE, (1, 40, 88)) == (1, 64, 64)
    assert largest(PICTURE) == (3, 128, 17) and largest(InputSpec("x", (2,))) == (2,)


def test_the_ends_of_all_sizes():
    assert ends([PICTURE]) == [{"H": 32, "W": 8}, {"H": 128, "W": 17}, {"H": 32, "W": 17}]
    assert ends([IDS, MASK]) == [{"L": 5}, {"L": 25}] and ends([InputSpec("x", (2,))]) == []
    assert resized(PICTURE, {"W": 17, "Z": 1}).shape == (3, 64, 17)


def test_inputs_that_share_a_symbol_have_one_size():
    assert disagreement([IDS, MASK], [(5,), (5,)]) is None
    assert disagreement([IDS, MASK], [(5,), (15,)]) == "L of 5 and of 15 in one request"


def test_an_artifact_keeps_the_sizes_and_refuses_wrong_ones():
    specs = (PICTURE, IDS)
    graph = Graph(specs, {}, (), ("x",))
    assert load(build(graph, {}).data).graph.inputs == specs
    assert in_words(PICTURE) == "3xHxW, H of 32..128/32, W of 8..17"
    for wrong in (Size("H", 0, 4), Size("H", 5, 4), Size("H", 1, 4, 0), Size(5, 1, 4), Size("H", True, 4)):
        forged = Graph((InputSpec("x", (3,), varying=((0, wrong),)),), {}, (), ("x",))
        with pytest.raises(RedppError, match="cannot be read"):
            load(build(forged, {}).data)
    with pytest.raises(RedppError, match="cannot be read"):
        load(build(Graph((InputSpec("x", (3,), varying=((1, WIDTH),)),), {"t": torch.zeros(1)}, (), ("x",)), {}).data)
