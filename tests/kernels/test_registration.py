"""Several copies of the package in one process share the operators; different signatures are refused."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch

from redpp_serve import kernels
from redpp_serve.kernels.registration import register


def test_a_copy_outside_the_package_works_beside_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "carried_kernels"
    shutil.copytree(Path(kernels.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    spec = importlib.util.spec_from_file_location("carried_kernels", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "carried_kernels", copy)
    spec.loader.exec_module(copy)
    assert copy.split_linear is not kernels.split_linear
    args = (torch.ones(1, 1), torch.tensor([3.0]), torch.tensor([0]), torch.tensor([[0]], dtype=torch.int32))
    found = copy.split_linear(*args, torch.tensor([[-1]], dtype=torch.int8))
    assert found.tolist() == [[-3.0]]


def test_another_signature_under_the_same_name_is_refused() -> None:
    with pytest.raises(RuntimeError, match="already defined.*separate processes"):
        register("split_linear", "(Tensor x) -> Tensor", cpu=torch.neg, cuda=torch.neg, fake=torch.neg)
