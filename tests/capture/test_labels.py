"""``--labels``: files that name the classes, and what is refused."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from redpp_serve.capture.labels import read_labels
from redpp_serve.errors import RedppError

NAMES = ("tench", "great white shark", "élan")


@pytest.mark.parametrize(
    "text",
    [
        "tench\ngreat white shark\nélan\n",
        "tench\r\n great  white shark \r\nélan",
        json.dumps(NAMES),
        json.dumps({str(k): name for k, name in reversed(list(enumerate(NAMES)))}),
        json.dumps({str(k): ["n0144", name] for k, name in enumerate(NAMES)}),
        json.dumps({"model_type": "vit", "id2label": {str(k): name for k, name in enumerate(NAMES)}}),
    ],
)
def test_files_of_every_form(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text)
    assert read_labels(str(tmp_path / "labels")) == NAMES


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n\n",
        b"[",
        b"[1, 2]",
        b'{"0": "a", "2": "b"}',
        b'{"1": "a"}',
        b"\xff\xfe",
        b"a\x1b[31m\n",
        b"[[]]",
        b"{}",
        b'{"id2label": 7}',
        b'{"id2label": "tench"}',
    ],
)
def test_other_files_are_refused_in_words(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "labels").write_bytes(data)
    with pytest.raises(RedppError, match="--labels") as refused:
        read_labels(str(tmp_path / "labels"))
    assert str(refused.value).isprintable()
    with pytest.raises(RedppError, match="--labels"):
        read_labels(str(tmp_path / "nothing"))


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_the_libraries_own_names_of_imagenet() -> None:
    for library in ("torchvision", "timm"):
        found = read_labels(library)
        assert len(found) == 1000 and found[0].startswith("tench") and "goldfish" in found[1]
