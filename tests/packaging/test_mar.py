"""The archive: equal bytes for equal input, and self-contained on a stock server."""

import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.options import Serving
from redpp_serve.packaging.mar import build_mar, check_name, serving_sources
from redpp_serve.packaging.server_config import model_config
from redpp_serve.runtime.plan_cache import SHIPPED
from tests.support.served import SHAPE, archive, artifact, built, expected, npy

CONFIG = model_config(Serving(4, 20, 1))

# Runs in a process where this project cannot be imported, installed or not, but from the archive.
STOCK = """
import importlib, json, sys
from importlib.machinery import PathFinder
from pathlib import Path
folder = Path(sys.argv[1]).resolve()

class ArchiveOnly:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "redpp_serve":
            spec = PathFinder.find_spec(name, [p for p in sys.path if p and Path(p).resolve() == folder])
            if spec is None:
                raise ModuleNotFoundError(name)
            return spec

sys.meta_path = [ArchiveOnly, *(finder for finder in sys.meta_path if "editable" not in repr(finder).lower())]
try:
    import redpp_serve
    sys.exit("the project is importable without the archive")
except ModuleNotFoundError:
    pass
sys.path.append(str(folder))  # where TorchServe puts an unpacked archive
for blocked in ("safetensors", "triton", "prometheus_client", "psutil", "torchvision", "tqdm"):
    sys.modules[blocked] = None

import handler
sys.path.insert(0, str(folder.parent))
from served_context import Context

import redpp_serve
assert Path(redpp_serve.__file__).resolve().is_relative_to(folder.resolve()), redpp_serve.__file__
classes = [c for c in vars(handler).values() if isinstance(c, type) and c.__module__ == "handler"]
assert len(classes) == 1 and not hasattr(handler, "handle"), "TorchServe looks for one class"
service, context = classes[0](), Context(folder)
context.manifest = json.loads((folder / "MAR-INF/MANIFEST.json").read_text())
service.initialize(context)
body = (folder.parent / "x.npy").read_bytes()
print(service.handle([{"body": body}, {"body": b"?"}], context)[0].decode())
loaded = [Path(m.__file__).resolve() for n, m in sys.modules.items() if n.startswith("redpp_serve") and m.__file__]
assert len(loaded) > 8 and all(path.is_relative_to(folder.resolve()) for path in loaded), loaded
"""
CONTEXT = """
class Context:
    def __init__(self, folder):
        self.model_name, self.model_yaml_config = "tiny", {"handler": {"threads": 1}}
        self.system_properties = {"model_dir": str(folder), "gpu_id": None, "batch_size": 2}
    def get_all_request_header(self, idx): return {"Content-Type": "application/octet-stream"}
    def get_request_id(self, idx): return None
    def set_response_status(self, code=200, phrase="", idx=0): assert (code, idx) == (400, 1)
    def set_response_header(self, idx, key, value): assert isinstance(value, str)
    def set_response_content_type(self, idx, value): assert value == "application/json"
"""


def test_the_archive_serves_where_the_project_is_not_installed(tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(io.BytesIO(archive())) as file:
        file.extractall(folder)
    x = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    (tmp_path / "x.npy").write_bytes(npy(x))
    (tmp_path / "served_context.py").write_text(CONTEXT)
    (tmp_path / "stock.py").write_text(STOCK)
    result = subprocess.run(
        [sys.executable, "stock.py", str(folder)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    (output,) = json.loads(result.stdout)["outputs"]
    assert output == pytest.approx(expected("1.0", torch.from_numpy(x)), rel=1e-4, abs=1e-5)


@pytest.mark.exhaustive
def test_an_older_installation_does_not_win_over_the_archive(tmp_path: Path) -> None:
    old, unpacked = tmp_path / "old", tmp_path / "unpacked"
    (old / "redpp_serve").mkdir(parents=True)
    (old / "redpp_serve" / "__init__.py").write_text("raise SystemExit('the old installation was imported')")
    with zipfile.ZipFile(io.BytesIO(archive())) as file:
        file.extractall(unpacked)
    path = f"import sys; sys.path.insert(0, {str(old)!r}); sys.path.append({str(unpacked)!r}); "
    code = f"{path} import handler, redpp_serve; print(redpp_serve.__file__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert Path(result.stdout.strip()).parent.parent == unpacked, result.stderr


def test_equal_input_gives_equal_bytes() -> None:
    assert archive("2.0") == archive("2.0") != archive("1.0")


def test_the_manifest_names_what_is_inside() -> None:
    with zipfile.ZipFile(io.BytesIO(archive("2.0"))) as file:
        model = json.loads(file.read("MAR-INF/MANIFEST.json"))["model"]
        assert model["modelName"] == "tiny" and model["modelVersion"] == "2.0"
        assert file.read(model["serializedFile"]) == artifact("2.0")
        assert file.read(model["configFile"]).decode() == CONFIG
        assert model["handler"] in file.namelist()
        assert {name: file.read(name) for name in serving_sources()} == serving_sources()


def test_the_sources_are_those_that_serving_needs_and_no_more() -> None:
    names = serving_sources()
    assert {
        "redpp_serve/__init__.py",
        "redpp_serve/errors.py",
        "redpp_serve/runtime/model.py",
        "redpp_serve/handlers/torchserve.py",
        "redpp_serve/kernels/__init__.py",
    } <= set(names)
    assert {name.split("/")[1] for name in names} == {
        "__init__.py",
        "errors.py",
        "files.py",
        "variants.py",
        "graph",
        "runtime",
        "handlers",
        "engines",
        "kernels",
    }
    assert {name for name in names if not name.endswith(".py")} == {"redpp_serve/runtime/plans.json"}
    assert names["redpp_serve/runtime/plans.json"] == SHIPPED.read_bytes()


def test_dangerous_names_are_refused_and_plain_ones_taken() -> None:
    for name in ("../x", "1; rm", "", "-x", ".x", "a/b", "a b", "x\n", "é", "a:b"):
        with pytest.raises(RedppError, match="model name"):
            check_name(name)
            pytest.fail(f"{name!r} was taken")
    for name in ("digits", "0", "a-b_c.d"):
        check_name(name)
    with pytest.raises(RedppError, match="model name"):
        build_mar(built(), name="../x", model_config=CONFIG)


def test_a_version_that_torchserve_does_not_take_is_refused() -> None:
    for version in (None, 1.0, "", "1.", "one", "1.0-rc", "1.0\n"):
        wrong = replace(built(), description={**built().description, "version": version})
        with pytest.raises(RedppError, match="an artifact of version"):
            build_mar(wrong, name="tiny", model_config=CONFIG)
            pytest.fail(f"{version!r} was taken")
