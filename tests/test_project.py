"""The repository as a whole: what an import loads, what a wheel holds, what lies at the top, which version."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import redpp_serve

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
TOP = {"pyproject.toml", "README.md", "LICENSE", "redpp_serve", "kernels", "handlers", "tests", "deploy", "benchmarks"}
SUBPACKAGES = {
    "kernels": "redpp_serve/kernels",
    "handlers": "redpp_serve/handlers",
    "benchmarks/reference": "redpp_serve/reference",
}
GPU_ONLY = re.compile(r"redpp_serve\.kernels\..*(kernel|decode)$")  # in the Triton language: imported for CUDA tensors
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
IMPORT_ALL = """
import importlib, sys
import redpp_serve
light = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "triton", "ts", "PIL"})
for name in sys.argv[1:]:
    importlib.import_module(name)
servers = sorted({name.split(".")[0] for name in sys.modules} & {"triton", "tritonclient", "ts", "model_archiver"})
import torch
print(light, servers, torch.cuda.is_initialized())
"""


def modules() -> list[str]:
    """Every module of the product under the name that it is imported by."""
    found = []
    for folder, package in {"redpp_serve": "redpp_serve", **SUBPACKAGES}.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (package / path.relative_to(ROOT / folder)).with_suffix("").parts
            found.append(".".join(parts).removesuffix(".__init__"))
    return found


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_imports_load_no_server_and_touch_no_gpu() -> None:
    starts_something = ("__main__", "handlers.torchserve", "reference.train")
    names = [name for name in modules() if not GPU_ONLY.fullmatch(name) and not name.endswith(starts_something)]
    assert {"redpp_serve.graph.artifact", "redpp_serve.kernels.split.operator", "redpp_serve.cli"} <= set(names)
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[] [] False", run.stderr[-2000:]


def test_a_wheel_holds_every_package_and_its_data() -> None:
    setuptools = SETTINGS["tool"]["setuptools"]
    packages = {name for name in modules() if (path := folder_of(name)).is_dir() and (path / "__init__.py").exists()}
    assert set(setuptools["packages"]) == packages
    missing = []
    for name in tracked():
        package = next(
            (p for p in sorted(packages, key=len, reverse=True) if (ROOT / name).is_relative_to(folder_of(p))), None
        )
        if package and not name.endswith((".py", ".md")):
            patterns = setuptools["package-data"].get(package, [])
            inside = (ROOT / name).relative_to(folder_of(package))
            missing += [] if any(inside.match(pattern) for pattern in patterns) else [name]
    assert missing == [], "name them in [tool.setuptools.package-data]"


def folder_of(name: str) -> Path:
    path = name.replace(".", "/")
    for folder, package in SUBPACKAGES.items():
        if path == package or path.startswith(f"{package}/"):
            return ROOT / folder / path.removeprefix(package).lstrip("/")
    return ROOT / path


def test_the_version_heads_the_changelog() -> None:
    text = (ROOT / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)$", text, re.M)[0] == redpp_serve.__version__


def test_the_public_names_are_there() -> None:
    for name in redpp_serve.__all__:
        assert getattr(redpp_serve, name) is not None, name


def test_the_top_of_the_repository_holds_nothing_else() -> None:
    top = {name.split("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} == TOP


def test_environment_variables_are_in_the_table() -> None:
    table = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    used = set()
    for name in tracked():
        if name.startswith(("redpp_serve/", "handlers/", "kernels/")) and name.endswith(".py"):
            used |= set(re.findall(r"[\"'](REDPP_[A-Z_]+)[\"']", (ROOT / name).read_text(encoding="utf-8")))
    assert used and {name for name in used if f"`{name}`" not in table} == set()


def test_extras_that_the_project_names_are_its_own() -> None:
    """pip only warns of one that does not exist."""
    texts = [p.read_text(encoding="utf-8") for folder in ("redpp_serve", "deploy", "handlers", "benchmarks", "tests")
             for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md", ".yml", ".yaml")]  # fmt: skip
    texts += [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "pyproject.toml")]
    named = {
        extra for text in texts for found in re.findall(r"redpp-serve\[([\w,]+)\]", text) for extra in found.split(",")
    }
    assert {"serve", "engines", "load"} <= named <= set(SETTINGS["project"]["optional-dependencies"])
