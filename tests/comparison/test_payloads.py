"""Requests from a package's or the user's inputs: of one item, of any size, and of several items."""

import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from redpp_serve.comparison.client import Payload
from redpp_serve.comparison.payloads import batched, by_sizes, folder_payloads, read_payloads
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import build
from redpp_serve.graph.graph import Graph, InputSpec, Size
from redpp_serve.handlers.payload import parse, parse_items
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.packaging.mar import ARTIFACT, read_artifact

BINARY = "application/octet-stream"


def test_the_packages_own_inputs_are_requests(packaged: Path) -> None:
    payloads = folder_payloads(packaged)
    with np.load(packaged / "inputs.npz") as file:
        kept = file["x"]
    assert len(payloads) == len(kept) == 16 and {p.content_type for p in payloads} == {BINARY}
    assert (np.load(io.BytesIO(payloads[3].body)) == kept[3]).all()


def test_several_inputs_travel_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", image=np.zeros((2, 1, 4, 4), "float32"), vector=np.arange(6.0).reshape(2, 3))
    _, second = folder_payloads(tmp_path)
    with np.load(io.BytesIO(second.body)) as file:
        assert set(file.files) == {"image", "vector"} and file["vector"].tolist() == [3, 4, 5]


def test_bytes_of_images_travel_as_images(tmp_path: Path) -> None:
    for shape, mode in (((2, 1, 4, 6), "L"), ((2, 3, 4, 6), "RGB")):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        np.savez(tmp_path / "data.npz", inputs=pixels, labels=[4, 2])
        channels = shape[1]
        payloads = read_payloads(
            tmp_path / "data.npz", Preprocess(mode, 4, 6, (0.5,) * channels, (0.5,) * channels, upright=True)
        )
        image = Image.open(io.BytesIO(payloads[1].body))
        assert (image.format, image.mode, image.size, payloads[1].label) == ("PNG", mode, (6, 4), 2)
        assert (np.asarray(image).reshape(4, 6, -1).transpose(2, 0, 1) == pixels[1]).all(), mode


@pytest.mark.parametrize("size", [(4, 6), (9, 7)])
@pytest.mark.parametrize("mode", ["RGB", "BGR", "L"])
@pytest.mark.parametrize("layout", ["CHW", "HWC"])
def test_bytes_of_images_keep_their_channels(tmp_path: Path, size: tuple[int, int], mode: str, layout: str) -> None:
    channels = 1 if mode == "L" else 3
    zoom = Preprocess(mode, 4, 6, (0.5,) * channels, (0.5,) * channels, "crop", (8, 12), layout=layout)
    for preprocess in (zoom, replace(zoom, resize=None)):
        shape = (2, channels, *size) if layout == "CHW" else (2, *size, channels)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        np.savez(tmp_path / "data.npz", inputs=pixels)
        body = read_payloads(tmp_path / "data.npz", preprocess)[1].body
        (got,) = parse({"body": body}, (InputSpec("x", preprocess.shape),), preprocess)
        if size == (4, 6):
            assert (got.numpy() == preprocess.values(pixels[1])).all()
        else:
            image = preprocess.as_picture(pixels[1])
            assert image is not None and (np.asarray(Image.open(io.BytesIO(body))) == image).all()


def test_bytes_travel_as_numbers_where_the_server_would_fill_images_up(tmp_path: Path) -> None:
    mirror = Preprocess("RGB", 4, 6, (0.5,) * 3, (0.5,) * 3, "mirror", multiple=2)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", inputs=pixels)
    body = read_payloads(tmp_path / "data.npz", mirror)[1].body
    (got,) = parse({"body": body}, (InputSpec("x", (3, 4, 6)),), mirror)
    assert (got.numpy() == mirror.values(pixels[1])).all()


def test_bytes_for_a_network_without_images_travel_as_numbers(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 4, 6), np.uint8)
    np.savez(tmp_path / "data.npz", inputs=pixels)
    assert np.load(io.BytesIO(read_payloads(tmp_path / "data.npz")[0].body)).dtype == np.uint8


def test_bytes_that_are_no_images_travel_as_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", inputs=np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert np.load(io.BytesIO(read_payloads(tmp_path / "data.npz")[1].body)).tolist() == [3, 4, 5]


def test_a_folder_of_files_is_sent_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "b.PNG").write_bytes(b"png")
    (tmp_path / "a.JSON").write_bytes(b"[1]")
    (tmp_path / "notes.txt").write_text("no input")
    (tmp_path / "sub.png").mkdir()
    assert [(p.body, p.content_type) for p in read_payloads(tmp_path)] == [
        (b"[1]", "application/json"),
        (b"png", BINARY),
    ]


def test_inputs_that_cannot_be_sent_are_refused(tmp_path: Path) -> None:
    writers: list[Callable[[Path], object]] = [
        lambda path: None,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 cut"),
        lambda path: path.write_text("text"),
        lambda path: np.savez(path, x=np.zeros(3), y=np.zeros(3)),
        lambda path: np.savez(path, inputs=np.array([{}], dtype=object)),
        lambda path: np.savez(path, inputs=np.float32(1)),
        lambda path: np.savez(path, inputs=np.zeros((0, 3), "float32")),
        lambda path: path.mkdir(),
        lambda path: np.savez(path, inputs=np.zeros((3, 2), "float32"), labels=[1]),
        lambda path: np.savez(path, inputs=np.zeros((1, 2), "float32"), labels=[1.5]),
    ]
    for index, write in enumerate(writers):
        (tmp_path / str(index)).mkdir()
        path = tmp_path / str(index) / "data.npz"
        write(path)
        with pytest.raises(RedppError, match=r"data\.npz"):
            read_payloads(path)


PICTURE = InputSpec("x", (3, 8, 8), varying=((1, Size("H", 4, 16, 4)), (2, Size("W", 4, 16, 4))))
IDS, MASK = (
    InputSpec(name, (6,), "int64", ranges=((0, high),), varying=((0, Size("L", 1, 30)),))
    for name, high in (("ids", 9), ("mask", 1))
)


def sized(folder: Path, *specs: InputSpec) -> Path:
    """Write a package's inputs and original, which returns its first input, of networks whose sizes vary."""
    graph = Graph(specs, {}, (), (specs[0].name,))
    with zipfile.ZipFile(folder / "original.mar", "w") as file:
        file.writestr(ARTIFACT, build(graph, {}).data)
    numbers = {spec.name: np.ones((16, *spec.shape), spec.dtype) for spec in specs}
    np.savez(folder / "inputs.npz", **numbers)
    return folder


def test_requests_of_a_network_whose_sizes_vary_are_a_mix(tmp_path: Path) -> None:
    payloads = folder_payloads(sized(tmp_path, PICTURE), 3)
    shapes = [np.load(io.BytesIO(p.body)).shape for p in payloads]
    assert shapes[:3] == [(3, 8, 8), (3, 4, 4), (3, 16, 16)] and len(set(shapes)) > 5
    assert [p.sizes for p in payloads[:3]] == ["H=8 W=8", "H=4 W=4", "H=16 W=16"]
    assert payloads == folder_payloads(tmp_path, 3) != folder_payloads(tmp_path, 4)


def test_words_of_many_lengths_come_with_masks_that_hide_some(tmp_path: Path) -> None:
    for payload in folder_payloads(sized(tmp_path, IDS, MASK), 0):
        with np.load(io.BytesIO(payload.body)) as file:
            ids, mask = file["ids"], file["mask"]
        assert ids.shape == mask.shape and ids.min() >= 0 and ids.max() <= 9
        assert set(mask.tolist()) == ({0, 1} if len(mask) > 1 else {1})


def test_the_users_inputs_may_have_any_size_that_is_declared(tmp_path: Path) -> None:
    artifact = read_artifact(sized(tmp_path, IDS, MASK) / "original.mar")
    (tmp_path / "requests").mkdir()
    for length in (1, 7, 29):
        np.savez(tmp_path / "requests" / f"{length:02}.npz", ids=np.arange(length) % 10, mask=np.ones(length, int))
    found = by_sizes(read_payloads(tmp_path / "requests"), artifact)
    assert [p.sizes for p in found] == ["L=1", "L=6", "L=30"]
    np.savez(tmp_path / "requests" / "31.npz", ids=np.zeros(31, int), mask=np.ones(31, int))
    with pytest.raises(RedppError, match=r"input 4 of 4: .*shape \(31,\).*L of 1\.\.30"):
        by_sizes(read_payloads(tmp_path / "requests"), artifact)


def test_several_inputs_in_one_request(packaged: Path) -> None:
    artifact, alone = read_artifact(packaged / "original.mar"), folder_payloads(packaged)
    several = batched(alone, artifact, 5)
    with np.load(packaged / "inputs.npz") as file:
        kept = file["x"]
    assert len(several) == 3 and {p.items for p in several} == {5}  # of 16: one is left over
    assert (np.load(io.BytesIO(several[1].body)) == kept[5:10]).all()
    (whole,) = parse_items({"body": several[1].body}, artifact.graph.inputs, None).tensors
    assert whole.shape == (5, 1, 12, 12)
    (more,) = batched(alone, artifact, 40)
    assert (np.load(io.BytesIO(more.body))[16:32] == kept).all()


def test_images_and_labels_in_one_request(packaged: Path, tmp_path: Path) -> None:
    """Images become arrays, also alone, so that batches differ in their size alone; labels stay where they can."""
    artifact = read_artifact(packaged / "original.mar")
    preprocess = Preprocess.from_json(artifact.description["preprocess"])
    pixels = np.random.default_rng(0).integers(0, 256, (4, 1, 12, 12), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", inputs=pixels, labels=[4, 3, 2, 1])
    images = read_payloads(tmp_path / "data.npz", preprocess)
    assert images[0].body.startswith(b"\x89PNG")
    one, two = batched(images, artifact, 1), batched(images, artifact, 2)
    assert [p.label for p in one] == [4, 3, 2, 1] and [p.label for p in two] == [None, None]
    assert np.load(io.BytesIO(one[2].body)).shape == (1, 1, 12, 12)
    expected = np.stack([preprocess.values(pixels[k]) for k in (2, 3)])
    assert np.abs(np.load(io.BytesIO(two[1].body)) - expected).max() < 1e-6


def test_inputs_of_several_sizes_are_no_batch(tmp_path: Path) -> None:
    artifact = read_artifact(sized(tmp_path, PICTURE) / "original.mar")
    with pytest.raises(RedppError, match="batches with inputs of several sizes.*--inputs"):
        batched(folder_payloads(tmp_path), artifact, 2)
    with pytest.raises(RedppError, match="input 2 of 2: 3 bytes of no known kind"):
        batched([folder_payloads(tmp_path)[0], Payload(b"abc", BINARY)], artifact, 2)
