"""What torch demands of every operator: its own checks, export, compilation, and packages for other processes.

An operator that is registered without a place in `kernel_cases.CALLS` and in `Net` fails here.
"""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import torch._inductor
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from redpp_serve import kernels
from tests.support import tools
from tests.support.kernel_cases import CALLS, build_split, operator, quantised_weight

SHAPE = (4, 8, 7)


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("redpp::").split(".")[0] for name in names if name.startswith("redpp::")}


class Net(nn.Module):
    """Every operator once, as a pruned network on its kernels holds them."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Buffer(torch.randn(8, 4, 3, 3, generator=g) / 6)
        self.taps = nn.Buffer(torch.randn(8, 1, 3, 3, generator=g) / 3)
        split = build_split(quantised_weight((8, 8, 3, 3), g).float() / 9)
        # Not `kernels`: AOTInductor's C++ has a variable of that name beside those of the buffers.
        self.unique, self.channel, self.index, self.sign = map(nn.Buffer, split)
        self.rows = nn.Buffer(torch.randn(12, 8, generator=g))
        self.indices = nn.Buffer(kernels.pack_indices(torch.randint(0, 9, (10, 12), generator=g)))
        self.codebook, self.bias = nn.Buffer(torch.randn(9, generator=g)), nn.Buffer(torch.randn(10, generator=g))
        split = build_split(quantised_weight((5, 10, 1, 1), g).float())
        self.values, self.owner = nn.Buffer(split.kernels.flatten()), nn.Buffer(split.channel)
        self.at, self.signs = nn.Buffer(split.index), nn.Buffer(split.sign)

    def forward(self, x: Tensor) -> Tensor:
        y = kernels.fused_conv2d(x, self.weight, activation="relu", padding=1)
        y = y + kernels.depthwise_conv2d(y, self.taps, activation="hardswish", padding=1)
        y = kernels.split_conv2d(y, self.unique, self.channel, self.index, self.sign, padding=1).mean((2, 3))
        y = kernels.fused_linear(y, self.rows, residual=kernels.fused_linear(y, self.rows), activation="silu")
        y = kernels.codebook_linear(y, self.indices, self.codebook, self.bias, activation="relu")
        return kernels.split_linear(y, self.values, self.owner, self.at, self.signs)


def batch(n: int) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


@pytest.fixture(scope="module")
def cold_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torch's compiler with nothing compiled before. Without a C++ compiler: skipped, or failed as `tools` does."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        (pytest.fail if os.environ.get(tools.REQUIRED) else pytest.skip)("there is no C++ compiler: install g++")
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def exported(net: Net) -> ExportedProgram:
    return torch.export.export(net, (batch(2),), dynamic_shapes=({0: Dim("batch")},), strict=False)


def called(program: ExportedProgram) -> set[str]:
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {name.removeprefix("redpp.").removesuffix(".default") for name in targets if name.startswith("redpp.")}


def test_every_operator_has_its_cases_and_its_place_in_the_network(exported: ExportedProgram) -> None:
    assert registered() == set(CALLS) == called(exported)
    assert all(callable(getattr(kernels, name)) for name in CALLS)


@pytest.mark.parametrize("op", CALLS)
def test_torch_accepts_the_operator(op: str) -> None:
    call = next(call for _, call in CALLS[op](torch.bfloat16))
    torch.library.opcheck(operator(op), call.arguments)


@pytest.mark.exhaustive
@pytest.mark.parametrize("op", CALLS)
def test_torch_accepts_the_operator_in_every_case(op: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        for _, call in CALLS[op](dtype):
            torch.library.opcheck(operator(op), call.arguments)


@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.exhaustive), False])
def test_export_with_a_dynamic_batch_and_back_from_a_file(net: Net, strict: bool) -> None:
    program = torch.export.export(net, (batch(2),), dynamic_shapes=({0: Dim("batch")},), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file)
    assert called(again) == registered()
    for n in (1, 2, 5):
        assert torch.equal(again.module()(batch(n)), net(batch(n)))


def test_traces_without_graph_breaks_and_runs_in_inference_mode(net: Net) -> None:
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for n in (2, 3):
        torch.testing.assert_close(compiled(batch(n)), net(batch(n)))
    with torch.inference_mode():
        found = net(batch(2))
    torch.testing.assert_close(found, net(batch(2)))


@pytest.mark.exhaustive
def test_compiles_without_graph_breaks(net: Net, cold_compiler: None) -> None:
    """By inductor, for any batch at once."""
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for n in (2, 5):
        torch.testing.assert_close(compiled(batch(n)), net(batch(n)), rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive
def test_a_package_of_aotinductor_runs_once_the_operators_are_known(
    net: Net, exported: ExportedProgram, cold_compiler: None, tmp_path: Path
) -> None:
    """Also in another process: there it needs the operators, which `import redpp_serve.kernels` registers."""
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "net.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for n in (1, 2, 5):
        torch.testing.assert_close(loaded(batch(n)), net(batch(n)), rtol=1e-4, atol=1e-4)
    torch.save((batch(3), net(batch(3))), tmp_path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", _FRESH, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


_FRESH = """
import sys, torch, torch._inductor
x, expected = torch.load(sys.argv[1] + "/expected.pt")
try:
    torch._inductor.aoti_load_package(sys.argv[1] + "/net.pt2")
except RuntimeError as error:
    assert "redpp::" in str(error), error
else:
    sys.exit("it must not load before the operators are known")
import redpp_serve.kernels
loaded = torch._inductor.aoti_load_package(sys.argv[1] + "/net.pt2")
torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
"""
