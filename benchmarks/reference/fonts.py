"""The fonts task: letters and digits of Debian's fonts, drawn by Pillow into 1x32x32 bytes.

``python -m redpp_serve.reference.fonts`` draws 40,000 training images (``build/fonts_train.npz``, not kept), 2,000
held-out ones and a sample of 512 training images (both kept, so that benchmarks need no font). Rotation, shear,
scale, shift, fragments of other glyphs at the border, unequal grey values and noise. Fonts are split by family: a
family of the held-out images has no font in the training set (``fonts.json`` lists both sides). An image depends on
the seed, on its index and on the font files alone. `PACKAGES` are the Debian packages to install.

Classes: the ten digits, the capitals, and the lower-case letters that do not look like their capitals.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from redpp_serve.reference import FOLDER

CLASSES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
MEAN, STD = 0.26, 0.22
SIZE = 32
TRAINING, HELD_OUT, SAMPLE = 40_000, 2_000, 512
TRAINING_FILE = FOLDER / "build" / "fonts_train.npz"
PACKAGES = tuple(
    f"fonts-{name}"
    for name in [
        "adf-accanthis",
        "adf-baskervald",
        "adf-berenis",
        "adf-gillius",
        "adf-ikarius",
        "adf-irianis",
        "adf-libris",
        "adf-mekanus",
        "adf-romande",
        "adf-solothurn",
        "adf-switzera",
        "adf-tribun",
        "adf-universalis",
        "adf-verana",
        "anonymous-pro",
        "arapey",
        "averia-sans-gwf",
        "averia-serif-gwf",
        "b612",
        "cabin",
        "cantarell",
        "cardo",
        "century-catalogue",
        "clear-sans",
        "comfortaa",
        "comic-neue",
        "courier-prime",
        "croscore",
        "crosextra-caladea",
        "crosextra-carlito",
        "dejavu-core",
        "dejavu-extra",
        "dosis",
        "ebgaramond",
        "essays1743",
        "fantasque-sans",
        "fanwood",
        "firacode",
        "freefont-ttf",
        "georgewilliams",
        "go",
        "goudybookletter",
        "hack",
        "inconsolata",
        "inter",
        "jetbrains-mono",
        "junction",
        "junicode",
        "jura",
        "karla",
        "lato",
        "league-mono",
        "league-spartan",
        "liberation",
        "lindenhill",
        "linuxlibertine",
        "lobstertwo",
        "manrope",
        "monofur",
        "mononoki",
        "national-park",
        "oldstandard",
        "open-sans",
        "opendyslexic",
        "oxygen",
        "paratype",
        "play",
        "prociono",
        "quattrocento",
        "quicksand",
        "roboto-slab",
        "roboto-unhinted",
        "routed-gothic",
        "sil-andika",
        "sil-charis",
        "sil-gentiumplus",
        "sora",
        "stix",
        "tuffy",
        "urw-base35",
        "vollkorn",
        "yanone-kaffeesatz",
    ]
)
# Clones of the same few designs (Helvetica, Times, Courier, Lato, ...) under many names; never held out.
_CLONED = ("arim", "c059", "cala", "carl", "cous", "free", "lato", "libe", "nimb", "p052", "switz", "tino", "urw")
_UNFIT = (
    "math",
    "symbol",
    "dingbat",
    "d050000l",
    "caps",
    "smcp",
    " sc",
    "-sc",
    "outline",
    "shadow",
    "initial",
    "unslanted",
)
_DRAWN_AT = 56  # pixels of an em, before the glyph is scaled down


@dataclass(frozen=True)
class Font:
    """A font file and the family that decides its side of the split: the first word of the name inside the file."""

    path: str
    family: str


def installed(packages: Sequence[str] = PACKAGES) -> list[Font]:
    """Fonts of Debian's ``packages`` in which all classes have glyphs of their own, by path.

    Raises:
        RuntimeError: a package is not installed, or this is not a Debian system.
    """
    try:
        listed = subprocess.run(["dpkg-query", "-L", *packages], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        what = f"font packages are missing; on Debian: apt-get install --no-install-recommends {' '.join(packages)}"
        raise RuntimeError(what) from error
    paths = {line for line in listed.splitlines() if line.endswith((".ttf", ".otf")) and "/share/fonts/" in line}
    fonts = []
    for path in sorted(paths):
        if not any(part in Path(path).stem.lower() for part in _UNFIT) and (family := _family(path)):
            fonts.append(Font(path, family))
    return fonts


def _family(path: str) -> str:
    """The family of a usable font, or '' where glyphs are missing or lower case looks like capitals."""
    font = _open(path)
    name = font.getname()[0] or ""
    if not name or any(part in name.lower() for part in _UNFIT):
        return ""
    missing = _shape(font, "\uffff")
    shapes = {c: shape for c in CLASSES if (shape := _shape(font, c)) is not None}
    unknown = missing is not None and any(np.array_equal(shape, missing) for shape in shapes.values())
    if unknown or len(shapes) < len(CLASSES):
        return ""
    for lower in "abdefghnqrt":  # small capitals
        a, b = (shapes[c] / 255 for c in (lower, lower.upper()))
        if np.minimum(a, b).sum() > 0.85 * np.maximum(a, b).sum():
            return ""
    return name.lower().replace("-", " ").split()[0]


def split(families: Sequence[str], share: float = 0.2) -> set[str]:
    """The families that are held out: about ``share`` of those that are no clones, chosen by a hash of the name's first
    four letters, so that relatives (stix and stixgeneral) stay together."""
    draw = {f: int(hashlib.sha256(f[:4].encode()).hexdigest()[:8], 16) / 16**8 for f in families}
    return {f for f in draw if draw[f] < share and not f.startswith(_CLONED)}


def render(fonts: Sequence[Font], count: int, seed: int, workers: int = 1) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 (count, 1, 32, 32), labels int64 (count,) and the family of each image; every class equally often.

    Families are drawn with equal weight, then a font of the family.
    """
    by_family: dict[str, list[str]] = {}
    for font in fonts:
        by_family.setdefault(font.family, []).append(font.path)
    families = sorted(by_family)
    rng = np.random.default_rng(seed)
    chosen = [families[i] for i in rng.integers(len(families), size=count)]
    paths = [by_family[f][rng.integers(len(by_family[f]))] for f in chosen]
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    jobs = [(seed, i, paths[i], int(labels[i])) for i in sorted(range(count), key=paths.__getitem__)]
    images: Iterable[np.ndarray]
    if workers == 1:
        images = map(_draw, jobs)
    else:
        with ProcessPoolExecutor(workers) as pool:
            images = list(pool.map(_draw, jobs, chunksize=256))
    out = np.empty((count, 1, SIZE, SIZE), np.uint8)
    for (_, index, _, _), image in zip(jobs, images, strict=True):
        out[index, 0] = image
    return out, labels.astype(np.int64), chosen


def _draw(job: tuple[int, int, str, int]) -> np.ndarray:
    """One image (32, 32): the glyph, fragments of others at the border, grey values, noise."""
    seed, index, path, label = job
    rng = np.random.default_rng((seed, index))
    canvas = _place(path, CLASSES[label], rng.uniform(-2.0, 2.0, 2), rng)
    for _ in range(rng.integers(0, 4)):
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(18, 23)
        at = distance * np.array([np.cos(angle), np.sin(angle)])
        canvas = np.maximum(canvas, rng.uniform(0.5, 1.0) * _place(path, CLASSES[rng.integers(len(CLASSES))], at, rng))
    dark, bright = rng.uniform(0, 90), rng.uniform(150, 255)
    tilt = rng.uniform(-25, 25, 2) @ np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].reshape(2, -1)
    image = dark + (bright - dark) * canvas + tilt.reshape(SIZE, SIZE)
    image += rng.normal(0, rng.uniform(4, 30), (SIZE, SIZE))
    return image.round().clip(0, 255).astype(np.uint8)


def _place(path: str, char: str, at: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A glyph turned, sheared and scaled, its middle ``at`` pixels (x, y) off the image's: (32, 32) in 0..1."""
    from PIL import Image

    glyph = _glyph(path, char)
    middle = np.array(glyph.size) / 2
    angle, shear = rng.uniform(-0.3, 0.3), rng.uniform(-0.25, 0.25)
    scale = rng.uniform(0.75, 1.15, 2) * rng.uniform(0.38, 0.62) * 2  # twice the size: averaged down below
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.linalg.inv(turn @ np.array([[1, shear], [0, 1]]) @ np.diag(scale))
    offset = middle - matrix @ (SIZE + 2 * at)
    rows = (*matrix[0], offset[0], *matrix[1], offset[1])
    double = glyph.transform((2 * SIZE, 2 * SIZE), Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)
    return np.asarray(double.reduce(2), np.float32) / 255


@lru_cache(128)
def _open(path: str) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(path, _DRAWN_AT, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(512)
def _glyph(path: str, char: str) -> Any:
    """A glyph's mask, cut to its ink, with a margin of two pixels."""
    from PIL import Image, ImageDraw

    font = _open(path)
    left, top, right, bottom = font.getbbox(char)
    image = Image.new("L", (max(1, round(right - left)) + 4, max(1, round(bottom - top)) + 4))
    ImageDraw.Draw(image).text((2 - left, 2 - top), char, fill=255, font=font)
    return image


def _shape(font: Any, char: str) -> np.ndarray | None:
    """A glyph's ink, stretched to 32x32; None where there is none."""
    from PIL import Image

    mask = font.getmask(char, "L")
    if not mask.getbbox():
        return None
    image = Image.frombytes("L", mask.size, bytes(mask)).crop(mask.getbbox())
    return np.asarray(image.resize((SIZE, SIZE)), np.float32)


def make(workers: int) -> dict[str, Any]:
    """Draw and write all three files; the summary that ``fonts.json`` keeps."""
    fonts = installed()
    held = split([f.family for f in fonts])
    sides = {"train": [f for f in fonts if f.family not in held], "held_out": [f for f in fonts if f.family in held]}
    TRAINING_FILE.parent.mkdir(exist_ok=True)
    images, labels, _ = render(sides["train"], TRAINING, seed=1, workers=workers)
    np.savez_compressed(TRAINING_FILE, inputs=images, labels=labels)
    np.savez_compressed(FOLDER / "fonts_sample.npz", inputs=images[:SAMPLE], labels=labels[:SAMPLE])
    held_images, held_labels, _ = render(sides["held_out"], HELD_OUT, seed=2, workers=workers)
    np.savez_compressed(FOLDER / "fonts_held_out.npz", inputs=held_images, labels=held_labels)
    summary = {
        "classes": CLASSES,
        "mean": images.mean() / 255,
        "std": images.std() / 255,
        **{side: {"fonts": len(some), "families": sorted({f.family for f in some})} for side, some in sides.items()},
    }
    (FOLDER / "fonts.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    start = time.perf_counter()
    made = make(parser.parse_args().workers)
    for side in ("train", "held_out"):
        print(f"{side}: {made[side]['fonts']} fonts of {len(made[side]['families'])} families")
    print(f"mean {made['mean']:.3f}  std {made['std']:.3f}  {time.perf_counter() - start:.0f} s")
