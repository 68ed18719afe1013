"""Architectures by name and from the user's file, and strict loading of weights into them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from redpp_serve.capture.arch import build
from redpp_serve.capture.checkpoints import load_into
from redpp_serve.capture.load import load_file
from redpp_serve.errors import RedppError
from tests.attacks.files import Net

SOURCE = """
from dataclasses import dataclass
from torch import nn
import sibling_of_the_network

@dataclass
class Config:
    width: int = 4

class Net(nn.Module):
    def __init__(self, width=Config().width):
        super().__init__()
        self.layer = nn.Linear(2, width)

def small(): return Net(sibling_of_the_network.WIDTH)
def number(): return 3
def broken():
    raise KeyError("no config")
def leaves(): raise SystemExit(1)
CONSTANT = 1
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "sibling_of_the_network.py").write_text("WIDTH = 2\n")
    path = tmp_path / "network.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(autouse=True)
def _same_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_class_and_function_in_a_file(source: Path) -> None:
    assert build(f"{source}:Net", {}).layer.out_features == 4  # type: ignore[union-attr]
    assert build(f"{source}:Net", {"width": 7}).layer.out_features == 7  # type: ignore[union-attr]
    assert build(f"{source}:small", {}).layer.out_features == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Nett", "named 'Nett'. Expected: one of Net"),
        ("CONSTANT", "function or class in .* named 'CONSTANT'"),
        ("number", "gave an object of type int. Expected: a torch.nn.Module"),
        ("broken", "failed at network.py:18: KeyError: 'no config'"),
        ("leaves", "failed at network.py:19: SystemExit: 1"),
        ("", "named ''. Expected: one of .*Net"),
    ],
)
def test_bad_factories(source: Path, name: str, found: str) -> None:
    with pytest.raises(RedppError, match=found):
        build(f"{source}:{name}", {})


def test_bad_arguments_files_and_forms(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RedppError, match="unexpected keyword argument 'depth'.*--arch-args"):
        build(f"{source}:Net", {"depth": 3})
    with pytest.raises(RedppError, match="missing.py does not exist"):
        build("missing.py:Net", {})
    (tmp_path / "wrong.py").write_text("def f(:\n")
    with pytest.raises(RedppError, match="wrong.py failed.*SyntaxError"):
        build(f"{tmp_path / 'wrong.py'}:f", {})
    for arch in ("resnet50", "keras:resnet50", "network.py", ""):
        with pytest.raises(
            RedppError, match="of no known form. Expected: torchvision:NAME, timm:NAME, transformers:CLASS or path"
        ):
            build(arch, {})


def test_torchvision() -> None:
    torch.manual_seed(0)
    module = build("torchvision:squeezenet1_1", {"num_classes": 5})
    assert module.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    with pytest.raises(RedppError, match="no torchvision model is named 'resnte50'. Expected: one of .*resnet50"):
        build("torchvision:resnte50", {})


@pytest.mark.exhaustive
def test_a_fresh_process_imports_torchvision_for_a_pickled_module(tmp_path: Path) -> None:
    """Placeholders of its operators are defined once, and only when torchvision is asked for."""
    path = tmp_path / "x.pt"
    torch.save(build("torchvision:squeezenet1_1", {}), path)
    code = (
        "import sys, pathlib; from redpp_serve.capture.load import load_file; import redpp_serve.capture.arch as arch;"
        "assert 'torchvision' not in sys.modules and not arch.PLACEHOLDERS;"
        "print(type(load_file(pathlib.Path(sys.argv[1]), trust=True).module).__name__);"
        "arch.build('torchvision:squeezenet1_1', {}); arch.build('torchvision:squeezenet1_0', {});"
        "import torchvision; assert len(arch.PLACEHOLDERS) <= 1"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout.strip() == "SqueezeNet"


def test_backbone_weights_are_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> None:
        raise AssertionError("fetched weights")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert build("torchvision:lraspp_mobilenet_v3_large", {})


@pytest.mark.parametrize("arch", ["torchvision:resnet18", "timm:resnet18"])
@pytest.mark.parametrize("argument", ["weights", "pretrained", "checkpoint_path"])
def test_arguments_that_ask_for_weights_are_refused(arch: str, argument: str) -> None:
    with pytest.raises(RedppError, match=f"{argument} asks"):
        build(arch, {argument: "DEFAULT"})


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_missing_library_names_the_pip_command(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("redpp_serve.capture.arch.importlib.import_module", missing)
    with pytest.raises(RedppError, match="What to do: pip install (torchvision|timm)"):
        build(f"{library}:resnet18", {})


def test_timm() -> None:
    build("torchvision:squeezenet1_1", {})  # timm imports torchvision, which needs its operators first
    pytest.importorskip("timm")
    module = build("timm:resnet10t", {"num_classes": 3})
    assert module.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    for name in ("resnte50", "hf-hub:timm/resnet50"):
        with pytest.raises(RedppError, match="no timm model is named .*resnet50"):
            build(f"timm:{name}", {})


def test_load_into_copies_every_tensor() -> None:
    source, target = Net(), Net()
    source.norm.running_mean.fill_(3)  # type: ignore[union-attr]
    assert load_into(target, source.state_dict()) == []
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_load_into_lists_what_does_not_fit() -> None:
    state = Net().state_dict()
    state["conv.weight"] = torch.zeros(4, 2, 3, 3)
    state["extra"] = torch.zeros(1)
    del state["norm.bias"]
    with pytest.raises(RedppError) as error:
        load_into(Net(), state)
    assert "1 missing: norm.bias" in error.value.found
    assert "1 unexpected: extra" in error.value.found
    assert "1 of another shape: conv.weight is 4x2x3x3, not 4x1x3x3" in error.value.found
    del state["conv.weight"]
    with pytest.raises(RedppError, match="2 missing: conv.weight, norm.bias; 1 unexpected: extra"):
        load_into(Net(), state)


def test_load_into_shortens_lists() -> None:
    wide = nn.Sequential(*(nn.Linear(1, 1) for _ in range(10)))
    with pytest.raises(RedppError, match="20 missing: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 15 more"):
        load_into(wide, {})


def test_load_into_tells_conversions_and_forgives_counters() -> None:
    state = {k: v.half() for k, v in Net().state_dict().items() if not k.endswith("num_batches_tracked")}
    target = Net()
    assert load_into(target, state) == ["converted weights from float16 to float32"]
    assert target.conv.weight.dtype is torch.float32
    assert torch.equal(target.conv.weight, state["conv.weight"].float())


def test_modules_that_insist_on_version_numbers(tmp_path: Path) -> None:
    """MNASNet raises unless the state_dict says by which version of its code it was written."""
    module = build("torchvision:mnasnet0_5", {})
    torch.save(module.state_dict(), tmp_path / "x.pt")
    loaded = load_file(tmp_path / "x.pt", trust=False).state_dict
    assert loaded is not None and load_into(module, loaded) == []
    assert load_into(module, dict(loaded)) == []  # as from safetensors, which keeps none


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("cv2", "opencv-python-headless"),
        ("skimage.io", "scikit-image"),
        ("open_clip", "open-clip-torch"),
        ("not_there_at_all", "not_there_at_all"),
    ],
)
def test_imports_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)  # type: ignore[arg-type]
    inside = f"def Net():\n    import {module}\n"
    for source in (f"import {module}\ndef Net(): pass\n", inside):
        (tmp_path / "net.py").write_text(source)
        with pytest.raises(
            RedppError, match=f"needs {module.partition('.')[0]}[.a-z]*, which is not installed.*pip install {package};"
        ):
            build(f"{tmp_path / 'net.py'}:Net", {})


@pytest.mark.exhaustive
@pytest.mark.parametrize("library", ["torchvision.models", "timm"])
def test_a_fresh_process_runs_a_file_that_imports_torchvision(tmp_path: Path, library: str) -> None:
    (tmp_path / "inner.py").write_text(f"import {library}\nfrom torch import nn\nclass Net(nn.Linear): pass\n")
    (tmp_path / "net.py").write_text("from inner import Net\n")
    code = "import sys; from redpp_serve.capture.arch import build; print(build(sys.argv[1], {'in_features': 1, "
    code += "'out_features': 1}))"
    command = [sys.executable, "-c", code, f"{tmp_path / 'net.py'}:Net"]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert done.stdout.startswith("Net(in_features=1"), done.stderr
