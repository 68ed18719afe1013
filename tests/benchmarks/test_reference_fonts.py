"""The letters: deterministic, fonts split by family, and every glyph where its label says."""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import pytest

from redpp_serve.reference import FOLDER, fonts

SUBSET = ("fonts-dejavu-core", "fonts-liberation", "fonts-lato", "fonts-stix")  # enough of them for a test


@lru_cache(1)
def some_fonts() -> list[fonts.Font]:
    found = []
    for package in SUBSET:
        try:
            found += fonts.installed([package])
        except RuntimeError:
            continue
    return found


@pytest.fixture
def drawn_with() -> list[fonts.Font]:
    if not some_fonts():
        pytest.skip(f"none of the font packages {', '.join(SUBSET)} is installed")
    return some_fonts()


def test_images_depend_on_the_seed_alone(drawn_with: list[fonts.Font]) -> None:
    images, labels, families = fonts.render(drawn_with, 60, seed=3)
    again = fonts.render(drawn_with, 60, seed=3, workers=2)
    other = fonts.render(drawn_with, 60, seed=4)
    assert images.shape == (60, 1, 32, 32) and images.dtype == np.uint8
    assert np.array_equal(images, again[0]) and np.array_equal(labels, again[1]) and families == again[2]
    assert not np.array_equal(images, other[0]) and not np.array_equal(labels, other[1])


def test_classes_are_balanced_and_images_show_a_glyph(drawn_with: list[fonts.Font]) -> None:
    images, labels, _ = fonts.render(drawn_with, 2 * len(fonts.CLASSES), seed=0)
    assert np.bincount(labels).tolist() == [2] * len(fonts.CLASSES)
    middle = images[:, 0, 6:26, 6:26].astype(float)
    spread = np.percentile(middle, 99, axis=(1, 2)) - np.percentile(middle, 10, axis=(1, 2))
    assert (spread > 40).all()


def test_relatives_stay_on_one_side_and_clones_are_not_held_out() -> None:
    stems = ("abcd", "efgh", "ijkl", "mnop", "qrst", "uvwx")
    families = [f"{stem}{suffix}" for stem in stems for suffix in ("", "sans", "mono")]
    families += ["liberation", "freesans", "tinos", "nimbus"]
    for share in (0.2, 0.5, 0.9):
        held = fonts.split(families, share)
        assert not held & {"liberation", "freesans", "tinos", "nimbus"}
        assert len(held) % 3 == 0  # a stem's three families go together
    assert fonts.split(families, 0.9) and fonts.split(families, 0.0) == set()


def test_the_drawn_files_came_from_disjoint_families() -> None:
    summary = json.loads((FOLDER / "fonts.json").read_text())
    train, held = (set(summary[side]["families"]) for side in ("train", "held_out"))
    assert train and held and not train & held
    assert fonts.split(sorted(train | held)) == held  # what the code would choose today
    assert summary["classes"] == fonts.CLASSES and len(set(fonts.CLASSES)) == 47
    assert summary["mean"] == pytest.approx(fonts.MEAN, abs=0.02)
    assert summary["std"] == pytest.approx(fonts.STD, abs=0.02)


def test_missing_packages_are_named() -> None:
    with pytest.raises(RuntimeError, match="apt-get install .*fonts-of-no-package"):
        fonts.installed(["fonts-of-no-package"])


def test_symbols_and_small_capitals_are_left_out(drawn_with: list[fonts.Font]) -> None:
    names = " ".join(font.path.lower() for font in drawn_with)
    assert "math" not in names and "symbol" not in names and "caps" not in names
