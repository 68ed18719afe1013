"""The pruned version of another package: the same inputs, or a refusal that names both."""

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from redpp_serve.ab.commands import mixed_folder
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec, Ref
from redpp_serve.packaging.mar import build_mar
from redpp_serve.packaging.server_config import model_config
from tests.support.served import artifact, network, write_archives


def package(folder: Path, name: str, spec: InputSpec | None = None) -> Path:
    write_archives(folder)
    if spec:
        graph = network(1)
        first = replace(graph.nodes[0], args=(Ref(spec.name), *graph.nodes[0].args[1:]))
        graph = replace(graph, inputs=(spec,), nodes=(first, *graph.nodes[1:]))
        data = artifact("2.0", graph, preprocess=None)
        (folder / "pruned.mar").write_bytes(
            build_mar(data, name="tiny", version="2.0", model_config=model_config(4, 20, 1))
        )
    (folder / "report.json").write_text(json.dumps({"name": name}))
    for version in ("1", "2"):
        (folder / "triton" / name / version).mkdir(parents=True)
        (folder / "triton" / name / version / "model.py").write_text(f"{name} {version}")
    (folder / "triton" / name / "config.pbtxt").write_text(name)
    return folder


def test_the_folder_holds_one_version_of_each(tmp_path: Path) -> None:
    first, second = package(tmp_path / "a", "one"), package(tmp_path / "b", "two")
    mixed = mixed_folder(first, second, tmp_path / "mixed")
    assert os.path.samefile(mixed / "original.mar", first / "original.mar")
    assert os.path.samefile(mixed / "pruned.mar", second / "pruned.mar")
    model = mixed / "triton" / "one"
    assert sorted(path.name for path in (mixed / "triton").iterdir()) == ["one"]
    assert (model / "config.pbtxt").read_text() == "one"
    assert ((model / "1" / "model.py").read_text(), (model / "2" / "model.py").read_text()) == ("one 1", "two 2")
    shutil.rmtree(mixed)
    assert (first / "original.mar").exists() and (second / "triton" / "two" / "2" / "model.py").exists()


@pytest.mark.parametrize(
    "spec", [InputSpec("other", (3, 8, 8)), InputSpec("x", (3, 8, 9)), InputSpec("x", (3, 8, 8), "float64")]
)
def test_other_inputs_are_refused(tmp_path: Path, spec: InputSpec) -> None:
    first, second = package(tmp_path / "a", "one"), package(tmp_path / "b", "two", spec)
    with pytest.raises(RedppError) as error:
        mixed_folder(first, second, tmp_path / "mixed")
    assert f"{first} takes x 3x8x8 float32" in error.value.found and str(second) in error.value.found
    assert f"{spec.name} {'x'.join(map(str, spec.shape))} {spec.dtype}" in error.value.found
    assert not (tmp_path / "mixed").exists()


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    first, second = package(tmp_path / "a", "one"), package(tmp_path / "b", "two")
    with pytest.raises(RedppError, match="not a packaged model"):
        mixed_folder(first, tmp_path, tmp_path / "mixed")
    for damage in (b"no zip", b""):
        (second / "pruned.mar").write_bytes(damage)
        with pytest.raises(RedppError, match="pruned.mar cannot be read"):
            mixed_folder(first, second, tmp_path / "mixed")
    with zipfile.ZipFile(second / "pruned.mar", "w") as file:
        file.writestr("x", "y")
    with pytest.raises(RedppError, match="pruned.mar cannot be read"):
        mixed_folder(first, second, tmp_path / "mixed")
