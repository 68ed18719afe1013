"""Several copies of the package in one process share the operators; different schemas are refused."""

import importlib
import sys

import pytest
import torch

import redpp_serve
from redpp_serve import kernels
from redpp_serve.kernels.registration import register


def test_a_second_copy_of_the_package_works_beside_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redpp_serve, "kernels", kernels)
    for name in [name for name in sys.modules if name.startswith("redpp_serve.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    copy = importlib.import_module("redpp_serve.kernels")
    assert copy.split_linear is not kernels.split_linear
    args = (torch.ones(1, 1), torch.tensor([3.0]), torch.tensor([0]), torch.tensor([[0]], dtype=torch.int32))
    for package in (copy, kernels):
        assert package.split_linear(*args, torch.tensor([[-1]], dtype=torch.int8)).tolist() == [[-3.0]]


def test_another_schema_under_the_same_name_is_refused() -> None:
    with pytest.raises(RuntimeError, match="already defined.*separate processes"):
        register(
            *("split_linear", "(Tensor x) -> Tensor"),
            check=lambda x: x.shape,
            reference=torch.neg,
            kernel="redpp_serve.kernels.split.kernel",
            allocate=torch.Tensor.new_empty,
        )
