"""Photographs and digits that the benchmark evaluates on, and others, never the same ones, that may be fitted to.

* ``A``: random crops of landscapes, plants and buildings, several of each photograph.
* ``B``: the middles of photographs of objects and animals; some carry labels of ImageNet.
* ``digits``: handwritten digits with labels.

Each photograph belongs to one half: `evaluation_set` never shows what `fitting_images` has shown. The half follows from
the photograph's name, so that a missing package does not move the others; of near duplicates only one is used.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.real_sources import cache_folder, debian_package, python_package

SIDE = 224
RECIPE = 1  # raise it when a change of this file changes pixels: stored sets of older recipes are made again
CROPS = 4  # of each photograph in A
EVALUATED = {"A": 0.5, "B": 0.6}  # share of the photographs; the others may be fitted to
ALIKE = 0.95  # correlation of two photographs' thumbnails above which they count as one
_LEAST = 150  # pixels of the shorter side: anything below is an icon
_LANDSCAPES = {
    "lomiri-wallpapers-16.04": """Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Wine_by_Jakkub_Mede
        aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich
        life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi seeding_by_Clements_Engelhardt
        sunset_by_Aitzol_Berasategi Picture_0B_by_freespace Picture_1A_by_freespace""",
    "lomiri-wallpapers-20.04": "Infinite-Sea_by_Aury88 Kleiber_by_Lukas_Baubkus",
    "mate-backgrounds": """Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood
        YellowFlower""",
    "plasma-workspace-wallpapers": """Autumn BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey
        Kite OneStandsOut Path summer_1am""",
}
_BOXES = {"A": ("explore_monuments",)}  # of GCompris, by set
_BOXES["B"] = ("categorization", "erase", "explore_farm_animals", "explore_world_animals", "explore_world_music")
_OPENCV = """aloeL apple baboon basketball1 board box box_in_scene building butterfly chicky_512 fruits home left
    leuvenA licenseplate_motion messi5 orange rubberwhale1 squirrel_cls stuff sudoku 000 002 plant"""
_SKIMAGE = {  # and the classes that count as right
    "astronaut": (),
    "camera": (),
    "chelsea": (281, 282, 285),  # tabby, tiger cat, Egyptian cat
    "coffee": (504, 967),  # coffee mug, espresso
    "motorcycle_left": (665, 670),  # moped, motor scooter
    "rocket": (657, 744, 812),  # missile, projectile, space shuttle
}


@dataclass(frozen=True)
class Photograph:
    """One photograph as a file holds it.

    Attributes:
        name: unique, without folders of this machine.
        read: returns the file's bytes.
        labels: classes of ImageNet that count as right; none where nobody has labelled it.
    """

    name: str
    read: Callable[[], bytes]
    labels: tuple[int, ...] = ()

    def open(self) -> Image.Image:
        """Return the pixels in RGB."""
        return Image.open(io.BytesIO(self.read())).convert("RGB")


@dataclass(frozen=True)
class EvaluationSet:
    """Inputs (n, ...) as the network takes them, and the right classes of each; none where they are not known."""

    name: str
    inputs: Tensor
    labels: tuple[tuple[int, ...], ...]

    @property
    def digest(self) -> str:
        """Tells sets apart that were made of other photographs."""
        return hashlib.sha256(self.inputs.numpy().tobytes()).hexdigest()[:12]


def is_evaluated(name: str, share: float) -> bool:
    """Say whether the photograph of this name belongs to the evaluation half, to which ``share`` of all names fall."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2**32


def without_copies(photographs: Sequence[Photograph], thumbnails: Sequence[np.ndarray]) -> list[Photograph]:
    """Return the photographs whose thumbnail, of equal shapes, does not correlate with that of an earlier one."""
    kept: list[Photograph] = []
    seen: list[np.ndarray] = []
    for photograph, thumbnail in zip(photographs, thumbnails, strict=True):
        flat = thumbnail.astype(np.float64).ravel() - thumbnail.mean()
        flat /= max(float(np.linalg.norm(flat)), 1e-9)
        if all(float(flat @ other) < ALIKE for other in seen):
            kept.append(photograph)
            seen.append(flat)
    return kept


def split_by_photograph(photographs: Sequence[Photograph], share: float) -> tuple[list[Photograph], list[Photograph]]:
    """Return the photographs to evaluate on and those that may be fitted to, each in an order that names decide."""
    ordered = sorted(photographs, key=lambda p: hashlib.sha256(p.name.encode()[::-1]).digest())
    evaluated = [p for p in ordered if is_evaluated(p.name, share)]
    return evaluated, [p for p in ordered if not is_evaluated(p.name, share)]


@cache
def photographs(which: str) -> tuple[list[Photograph], list[Photograph]]:
    """Return both halves of the photographs of set ``A`` or ``B``; a photograph of both sets counts for A."""
    found: dict[str, list[Photograph]] = {"A": list(_landscapes()), "B": list(_objects())}
    kept = set(stored("names", lambda: np.array(_distinct([*found["A"], *found["B"]]))).tolist())
    return split_by_photograph([p for p in found[which] if p.name in kept], EVALUATED[which])


def _distinct(everything: Sequence[Photograph]) -> list[str]:
    thumbnails = [np.asarray(p.open().resize((16, 16), Image.Resampling.BOX)) for p in everything]
    return [p.name for p in without_copies(everything, thumbnails)]


def _landscapes() -> Iterator[Photograph]:
    for package, names in _LANDSCAPES.items():
        files = [f for f in sorted(debian_package(package).rglob("*")) if f.suffix in (".jpg", ".png")]
        for name in names.split():
            folder = f"/{name}/contents/images/"
            sizes = [f for f in files if (f.stem == name or folder in str(f)) and not f.is_symlink()]
            best = max(sizes, key=lambda f: f.stat().st_size)
            yield Photograph(f"{package}/{name}", best.read_bytes)
    yield from _boxed("A")
    yield _of_sklearn("china.jpg")


def _objects() -> Iterator[Photograph]:
    yield from _boxed("B")
    yield _of_sklearn("flower.jpg")
    for file in sorted((python_package("foolbox") / "data").glob("imagenet_*.jpg")):
        yield Photograph(f"foolbox/{file.stem}", file.read_bytes, (int(file.stem.rpartition("_")[2]),))
    yield Photograph("imgaug/quokka", (python_package("imgaug") / "quokka.jpg").read_bytes)
    for name, labels in _SKIMAGE.items():
        file = next((python_package("skimage") / "data").glob(f"{name}.*"))
        yield Photograph(f"skimage/{name}", file.read_bytes, labels)
    files = {f.stem: f for f in sorted(_opencv().rglob("*")) if f.suffix in (".jpg", ".png")}
    for name in _OPENCV.split():
        yield Photograph(f"opencv/{name}", files[name].read_bytes)


def _opencv() -> Path:
    return debian_package("opencv-doc") / "usr/share/doc/opencv-doc/examples"


def _of_sklearn(file: str) -> Photograph:
    spec = find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    return Photograph(f"sklearn/{file}", (Path(spec.origin).parent / "datasets/images" / file).read_bytes)


def _boxed(which: str) -> Iterator[Photograph]:
    for stem in _BOXES[which]:
        box = next(debian_package("gcompris-qt-data").rglob(f"{stem}.rcc")).read_bytes()
        for k, data in enumerate(webp_images(box)):
            if min(Image.open(io.BytesIO(data)).size) >= _LEAST:
                yield Photograph(f"gcompris/{stem}-{k:03}", lambda data=data: data)


def webp_images(box: bytes) -> Iterator[bytes]:
    """Yield the WebP files that lie uncompressed in a resource file of Qt, in their order."""
    at = box.find(b"RIFF")
    while at >= 0:
        size = struct.unpack_from("<I", box, at + 4)[0] + 8
        whole = box[at + 8 : at + 12] == b"WEBP" and at + size <= len(box)
        if whole:
            yield box[at : at + size]
        at = box.find(b"RIFF", at + (size if whole else 4))


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


def random_crop(image: Image.Image, rng: np.random.Generator, least: float = 0.35) -> np.ndarray:
    """Return a square (SIDE, SIDE, 3) uint8 at random; its side is ``least`` to 1 of the image's shorter one."""
    side = round(min(image.size) * float(rng.uniform(least, 1.0)))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
    return _resized(image, (left, top, left + side, top + side))


def middle(image: Image.Image) -> np.ndarray:
    """Return the middle (SIDE, SIDE, 3) uint8, 7/8 of the shorter side, as EfficientNet-Lite is evaluated."""
    side = min(image.size) * SIDE / (SIDE + 32)
    left, top = ((extent - side) / 2 for extent in image.size)
    return _resized(image, (left, top, left + side, top + side))


def _resized(image: Image.Image, box: tuple[float, float, float, float]) -> np.ndarray:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def stored(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array that an earlier run has made, or make and keep it."""
    path = cache_folder() / "sets" / f"{name}-{RECIPE}.npy"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, make())
        partial.rename(path)
    return np.load(path, allow_pickle=False)


def _pixels_to_input(pixels: np.ndarray) -> Tensor:
    """(n, 3, SIDE, SIDE) of what EfficientNet-Lite takes, from bytes (n, SIDE, SIDE, 3)."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128


@cache
def evaluation_set(name: str) -> EvaluationSet:
    """Return the set ``A``, ``B`` or ``digits``."""
    if name == "digits":
        inputs, labels = digits()
        rows = [k for k in range(len(labels)) if k % 10]
        return EvaluationSet(name, inputs[rows], tuple((int(labels[k]),) for k in rows))
    chosen = photographs(name)[0]
    if name == "B":
        pixels = stored("evaluation-B", lambda: np.stack([middle(p.open()) for p in chosen]))
        return EvaluationSet(name, _pixels_to_input(pixels), tuple(p.labels for p in chosen))
    pixels = stored("evaluation-A", lambda: np.stack([crop for p in chosen for crop in _crops(p, "evaluation")]))
    return EvaluationSet(name, _pixels_to_input(pixels), ((),) * len(pixels))


@cache
def check_set(network: str) -> EvaluationSet:
    """Return every labelled input of both halves, to check an original on that nothing has touched yet."""
    if network == "digit":
        inputs, labels = digits()
        return EvaluationSet("check", inputs, tuple((int(label),) for label in labels))
    known = [p for half in photographs("B") for p in half if p.labels]
    pixels = np.stack([middle(p.open()) for p in known])
    return EvaluationSet("check", _pixels_to_input(pixels), tuple(p.labels for p in known))


def _crops(photograph: Photograph, purpose: str) -> list[np.ndarray]:
    rng, image = _generator(f"{purpose} {photograph.name}"), photograph.open()
    return [random_crop(image, rng) for _ in range(CROPS)]


@cache
def fitting_images(network: str, count: int) -> Tensor:
    """Return unlabelled inputs (count, ...) for a network, of the half that is never evaluated.

    Photographs alternate between A and B. Each comes once, then once more by another crop, and so on.
    """
    if network == "digit":
        inputs = digits()[0][::10]
        return inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:count]]
    landscapes, objects = (photographs(which)[1] for which in "AB")
    return _pixels_to_input(stored(f"fitting-{count}", lambda: _fitting_pixels(landscapes, objects, count)))


def _fitting_pixels(landscapes: Sequence[Photograph], objects: Sequence[Photograph], count: int) -> np.ndarray:
    turns = [landscapes[k // 2 % len(landscapes)] if k % 2 else objects[k // 2 % len(objects)] for k in range(count)]
    seen: dict[str, int] = {}
    made = []
    for photograph in turns:
        again = seen[photograph.name] = seen.get(photograph.name, -1) + 1
        made.append(random_crop(photograph.open(), _generator(f"fitting {again} {photograph.name}"), 0.5))
    return np.stack(made)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return 5,000 handwritten digits (5000, 1, 28, 28) in the middle of an empty field, and their classes.

    They are normalised as the network was trained. It is right on 97.00 % of them.
    """
    sheet = np.asarray(Image.open(next(_opencv().rglob("digits.png"))).convert("L"))
    cells = sheet.reshape(50, 20, 100, 20).transpose(0, 2, 1, 3).reshape(5000, 1, 20, 20)
    pixels = np.pad(cells, ((0, 0), (0, 0), (4, 4), (4, 4)))
    return (torch.from_numpy(pixels).float() / 255 - 0.1307) / 0.3081, torch.arange(5000) // 500
