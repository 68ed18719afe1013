"""The folders' order: who may import whom, what an import may load, and what lies at the top."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = {"errors", "runtime", "kernels"}
OFFLINE = {"capture", "graph", "pruning", "packaging"}
# For each unit (a folder, or a module beside them) the project's units that it may import.
MAY_IMPORT = {
    "errors": set(),
    "kernels": set(),
    "runtime": {"errors", "kernels"},
    "handlers": {"errors", "runtime", "kernels"},
    "capture": BASE,
    "graph": BASE | {"capture"},
    "pruning": BASE | {"capture", "graph"},
    "report": {"errors"},  # renders a dictionary and knows nothing of who filled it
    "packaging": BASE | OFFLINE | {"__version__", "report", "handlers.preprocess"},  # it writes what the handlers read
    "serving": BASE | OFFLINE,
    "comparison": BASE
    | OFFLINE
    | {"serving", "report", "handlers.preprocess", "handlers"},  # Triton's client parses as handlers do
    "dashboard": {"errors", "report", "serving", "comparison"},
    "experiment": BASE | OFFLINE | {"serving", "comparison"},
    "reference": set(),
}
TOP = {"pyproject.toml", "README.md", "LICENSE", "redpp_serve", "kernels", "handlers", "tests", "deploy", "benchmarks"}
GPU_ONLY = "_triton"  # modules of `kernels` with this suffix are imported when a CUDA tensor comes in
SERVERS = {"triton", "tritonclient", "triton_python_backend_utils", "ts", "torchserve", "model_archiver"}


def sources() -> Iterator[tuple[str, Path]]:
    """Every file of the product with the dotted name that it is imported by."""
    for folder, package in (
        ("redpp_serve", ()),
        ("kernels", ("kernels",)),
        ("handlers", ("handlers",)),
        ("benchmarks/reference", ("reference",)),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*package, *path.relative_to(ROOT / folder).with_suffix("").parts)
            yield ".".join(("redpp_serve", *parts)), path


def imports(name: str, path: Path) -> Iterator[str]:
    """The absolute names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from .. import x` and `from ..report import y` may name a module or what is in one
            yield from (f"{module}.{alias.name}" for alias in node.names)


def unit(name: str) -> str:
    """The unit below ``redpp_serve`` that a dotted name lies in, or the name itself where it lies in none."""
    parts = name.split(".")
    if parts[1] == "handlers" and parts[2:3] == ["preprocess"]:
        return "handlers.preprocess"
    return parts[1]


def gpu_only(name: str) -> bool:
    return unit(name) == "kernels" and name.endswith(GPU_ONLY)


def project_imports(name: str, path: Path) -> Iterator[str]:
    yield from (imported for imported in imports(name, path) if imported.split(".")[0] == "redpp_serve")


MODULES = dict(sources())


def test_the_walk_sees_the_imports() -> None:
    """Else the rules below would hold of nothing."""
    assert {
        "redpp_serve.graph.artifact",
        "redpp_serve.kernels.split.operator",
        "redpp_serve.handlers.torchserve",
        "redpp_serve.reference.resnet",
        "redpp_serve.cli",
    } <= set(MODULES)
    name = "redpp_serve.packaging.package"
    units = {unit(imported) for imported in project_imports(name, MODULES[name])}
    assert {"pruning", "runtime", "errors", "capture", "handlers.preprocess", "__version__"} <= units


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_stands_to_its_left(name: str) -> None:
    own = "handlers" if unit(name) == "handlers.preprocess" else unit(name)
    if own not in MAY_IMPORT:  # the top: cli, demo, inspection and the package itself
        assert name.count(".") == 1, f"{name} lies in a folder without a rule"
        return
    allowed = MAY_IMPORT[own] | {own} | ({"handlers.preprocess"} if own == "handlers" else set())
    wrong = [imported for imported in project_imports(name, MODULES[name]) if unit(imported) not in allowed]
    assert wrong == [], f"{own} may import {sorted(allowed)}"


@pytest.mark.parametrize("name", [name for name in MODULES if unit(name) in OFFLINE | BASE])
def test_the_offline_side_knows_no_server(name: str) -> None:
    loaded = {imported.split(".")[0] for imported in imports(name, MODULES[name])}
    assert loaded & SERVERS <= ({"triton"} if gpu_only(name) else set())


def test_what_archives_carry_needs_torch_alone_to_load() -> None:
    """`runtime` and `kernels` at import time; safetensors is needed to write an artifact, not to read one."""
    allowed = {"torch", "redpp_serve", *sys.stdlib_module_names}
    for name, path in MODULES.items():
        if unit(name) in BASE and not gpu_only(name):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            for node in top:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                relative = isinstance(node, ast.ImportFrom) and node.level
                assert relative or {n.split(".")[0] for n in names} <= allowed, name


IMPORT_ALL = """
import importlib, pkgutil, sys
import redpp_serve
light = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "triton", "ts", "PIL"})
for name in sys.argv[1:]:
    importlib.import_module(name)
servers = sorted({name.split(".")[0] for name in sys.modules} & {"triton", "tritonclient", "ts", "model_archiver"})
import torch
print(light, servers, torch.cuda.is_initialized())
"""


def test_imports_load_no_server_and_touch_no_gpu() -> None:
    names = [
        n.removesuffix(".__init__")
        for n in MODULES
        if not gpu_only(n) and not n.endswith(("__main__", "handlers.torchserve"))
    ]
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[] [] False", run.stderr[-2000:]


def test_the_top_of_the_repository_holds_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == TOP
