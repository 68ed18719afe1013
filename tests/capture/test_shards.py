"""Weights in several files, and folders as Hugging Face's libraries write them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from redpp_serve.capture import capture_file
from redpp_serve.capture.arch import build
from redpp_serve.capture.checkpoints import load_into
from redpp_serve.capture.hugging_face import suggested_arch
from redpp_serve.capture.load import load_file
from redpp_serve.capture.sniff import FileKind
from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec
from redpp_serve.inspection import describe_file

PARTS = {"one-00001-of-00002.safetensors": ("a.weight",), "one-00002-of-00002.safetensors": ("a.bias", "b.weight")}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2, bias=False)})


def write(folder: Path, binary: bool = False, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """Write `network` in two files with their index."""
    state, files = network().state_dict(), {}
    for name, held in PARTS.items():
        file = name.replace(".safetensors", ".bin") if binary else name
        tensors = {key: state[key] for key in held}
        torch.save(tensors, folder / file) if binary else save_file(tensors, folder / file)
        files.update(dict.fromkeys(held, file))
    index = {"metadata": {"total_size": 88}, "weight_map": files}
    if change:
        change(index)
    path = folder / ("pytorch_model.bin.index.json" if binary else "model.safetensors.index.json")
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_several_files(tmp_path: Path, binary: bool, folder: bool) -> None:
    index = write(tmp_path, binary)
    loaded = load_file(tmp_path if folder else index, trust=False)
    assert loaded.kind is FileKind.INDEX and loaded.state_dict is not None
    for name, value in network().state_dict().items():
        assert torch.equal(loaded.state_dict[name], value)
    assert "2 files" in loaded.messages[0]
    assert describe_file(tmp_path if folder else index).facts["kind"] == FileKind.INDEX.value


def test_a_part_alone(tmp_path: Path) -> None:
    index = write(tmp_path)
    for call in (lambda path: load_file(path, trust=False), describe_file):
        with pytest.raises(RedppError, match="part 1 of 2") as refused:
            call(tmp_path / "one-00001-of-00002.safetensors")
        assert str(index) in refused.value.do
    save_file(network().state_dict(), tmp_path / "x-00001-of-00001.safetensors")
    assert load_file(tmp_path / "x-00001-of-00001.safetensors", trust=False).state_dict


def test_the_digest_is_of_all_files(tmp_path: Path) -> None:
    index = write(tmp_path)
    first = load_file(index, trust=False).sha256
    save_file({"a.weight": torch.zeros(4, 3)}, tmp_path / "one-00001-of-00002.safetensors")
    assert load_file(index, trust=False).sha256 != first


OUTSIDE = ("../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x", "..", "", ".", "a\nb", "a\x00b", "C:\\x")


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    index = write(tmp_path, change=lambda index: index["weight_map"].update({"a.bias": name}))
    with pytest.raises(RedppError, match="lead out of its folder"):
        load_file(index, trust=False)


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing file": (lambda i: i["weight_map"].update({"c": "two.safetensors"}), "not there: two.safetensors"),
    "missing tensor": (lambda i: i["weight_map"].update({"c": next(iter(PARTS))}), "lacks tensors.*: c"),
    "no map": (lambda i: i.update(weight_map=["weight_map"]), "no weight_map"),
    "numbers": (lambda i: i.update(weight_map={"a": 1}), "no weight_map"),
    "empty": (lambda i: i.update(weight_map={}), "no weight_map"),
    "many files": (lambda i: i.update(weight_map={str(k): f"{k}.bin" for k in range(2000)}), "names 2000 files"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_indices(tmp_path: Path, name: str) -> None:
    change, found = BAD[name]
    with pytest.raises(RedppError, match=found):
        load_file(write(tmp_path, change=change), trust=False)


def test_an_index_of_indices(tmp_path: Path) -> None:
    index = write(tmp_path, change=lambda index: index["weight_map"].update({"c": "again.index.json"}))
    (tmp_path / "again.index.json").write_bytes(index.read_bytes())
    with pytest.raises(RedppError, match="again.index.json, an index too"):
        load_file(index, trust=False)


def test_a_bad_index_of_text(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    for text in ('{"weight_map": ', '{"weight_map": ' + "[" * 100_000, '{"weight_map": {}'):
        path.write_text(text)
        with pytest.raises(RedppError, match="is no JSON"):
            load_file(path, trust=False)


def test_code_in_a_part_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path, binary=True)
    torch.save(network(), tmp_path / "one-00001-of-00002.bin")
    with pytest.raises(RedppError, match="pickled module"):
        load_file(index, trust=True)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors", "diffusion_pytorch_model.safetensors"])
def test_a_folder_with_one_file(tmp_path: Path, name: str) -> None:
    save_file(network().state_dict(), tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert load_file(tmp_path, trust=False).kind is FileKind.SAFETENSORS


def test_a_folder_with_several(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(network().state_dict(), tmp_path / name)
    with pytest.raises(RedppError, match="directory.*a.safetensors, b.safetensors"):
        load_file(tmp_path, trust=False)


@pytest.mark.parametrize(
    ("config", "arch"),
    [
        ({"architectures": ["ResNetForImageClassification"]}, "--arch transformers:ResNetForImageClassification"),
        ({"architecture": "resnet10t", "num_classes": 3}, "--arch timm:resnet10t"),
        ({}, "--arch torchvision:NAME"),
    ],
)
def test_the_architecture_that_a_folder_names(tmp_path: Path, config: dict[str, Any], arch: str) -> None:
    save_file(network().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(RedppError, match=arch):
            capture_file(path, [])


class Small(nn.Module):
    """A network of the stand-in."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(config["width"], config["width"]) for _ in range(config["depth"]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package in place of transformers, which reads config.json and may not go online."""
    package = ModuleType("transformers")

    class AutoConfig:
        @staticmethod
        def from_pretrained(folder: str, *, local_files_only: bool, trust_remote_code: bool, **changes: Any) -> Any:
            assert local_files_only and not trust_remote_code
            return {**json.loads(Path(folder, "config.json").read_text()), **changes}

    class AutoModel:
        @staticmethod
        def from_config(config: Any) -> nn.Module:
            return Small(config)

    package.AutoConfig, package.AutoModel, package.Small = AutoConfig, AutoModel, Small  # type: ignore[attr-defined]
    package.function = len  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", package)
    return package


def save_small(folder: Path, **config: Any) -> None:
    save_file(Small({"width": 4, "depth": 2}).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"width": 4, "depth": 2, **config}))


@pytest.mark.parametrize("name", ["AutoModel", "Small"])
def test_classes_of_transformers(tmp_path: Path, stand_in: ModuleType, name: str) -> None:
    save_small(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        got = capture_file(path, [InputSpec("x", (4,))], arch=f"transformers:{name}")
        assert len(got.graph.tensors) == 4
    wide = build(f"transformers:{name}", {"depth": 3}, tmp_path)
    assert len(wide.layers) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Nothing", "function", "__class__", "", "a.b", "AutoModel()"])
def test_names_that_transformers_lacks(tmp_path: Path, stand_in: ModuleType, name: str) -> None:
    save_small(tmp_path)
    with pytest.raises(RedppError, match="no network that is named"):
        build(f"transformers:{name}", {}, tmp_path)


CONFIGS: dict[str, tuple[str | dict[str, Any], str]] = {
    "wide": ({"width": 1 << 13}, "more than .* numbers, and its files have"),
    "wider than memory": ({"width": 1 << 40}, "numbers beyond any network: width"),
    "deep": ({"depth": 10**8}, "more than .* numbers, and its files have"),
    "deeper": ({"layers": {"depth": 10**12}}, "beyond any network: layers.depth"),
    "nested": ("[" * 100_000, "no JSON object"),
    "list": ("[1]", "no JSON object"),
    "cut": ("{", "no JSON object"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configurations(
    tmp_path: Path, stand_in: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redpp_serve.capture.hugging_face._MAX_PARAMETERS", 1000)
    content, found = CONFIGS[name]
    save_small(tmp_path, **(content if isinstance(content, dict) else {}))
    if isinstance(content, str):
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RedppError, match=found):
        build("transformers:Small", {}, tmp_path)


def test_no_configuration(tmp_path: Path, stand_in: ModuleType) -> None:
    with pytest.raises(RedppError, match="no config.json"):
        build("transformers:Small", {}, tmp_path)


@pytest.mark.exhaustive
def test_a_folder_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_type": "basic"}))
    (tmp_path / "pad.txt").write_bytes(bytes(10_000))
    net = build("transformers:AutoModelForImageClassification", {}, tmp_path)
    net.save_pretrained(tmp_path, max_shard_size="3KB")  # type: ignore[operator]
    for name in ("AutoModelForImageClassification", "ResNetForImageClassification"):
        got = capture_file(tmp_path, [InputSpec("pixel_values", (3, 32, 32))], arch=f"transformers:{name}")
        assert got.graph.outputs


CLIP = {
    "model_type": "clip",
    "architectures": ["CLIPModel"],
    "projection_dim": 12,
    "vision_config": {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 32, "patch_size": 16, "projection_dim": 12},
    },
    "text_config": {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"vocab_size": 50, "max_position_embeddings": 7, "projection_dim": 12, "eos_token_id": 49},
    },
}


@pytest.fixture
def clip(tmp_path: Path) -> nn.Module:
    """A network of two encoders, saved with its configuration."""
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(CLIP))
    (tmp_path / "pad.txt").write_bytes(bytes(100_000))
    torch.manual_seed(0)
    whole = build("transformers:CLIPModel", {}, tmp_path).eval()
    save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, tmp_path / "model.safetensors")
    return whole


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", ["Vision", "Text"])
def test_an_encoder_of_clip_is_taken_from_the_file_of_both(tmp_path: Path, clip: nn.Module, part: str) -> None:
    ids, pixels = torch.randint(0, 49, (2, 7)), torch.randn(2, 3, 32, 32)
    ids[:, -1] = 49
    spec, x = {
        "Vision": (InputSpec("pixel_values", (3, 32, 32)), pixels),
        "Text": (InputSpec("input_ids", (7,), "int64"), ids),
    }[part]
    with torch.no_grad():
        both = clip(input_ids=ids, pixel_values=pixels)
    for ending in ("WithProjection", ""):
        got = capture_file(tmp_path, [spec], arch=f"transformers:CLIP{part}Model{ending}")
        assert any("entries of other networks in the file" in line for line in got.messages)
        outputs = dict(zip(got.graph.output_names, Program(got.graph)(x), strict=True))
        if ending:
            found = outputs[f"{'image' if part == 'Vision' else 'text'}_embeds"]
            wanted = both["image_embeds" if part == "Vision" else "text_embeds"]
            torch.testing.assert_close(found / found.norm(dim=-1, keepdim=True), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_clip_as_a_whole_is_refused_with_its_parts_by_name(tmp_path: Path, clip: nn.Module) -> None:
    inputs = [InputSpec("input_ids", (7,), "int64"), InputSpec("pixel_values", (3, 32, 32))]
    with pytest.raises(RedppError, match="CLIPVisionModelWithProjection or --arch transformers:CLIPTextModelWith"):
        capture_file(tmp_path, inputs, arch="transformers:CLIPModel")


def test_a_part_needs_all_of_its_own_entries() -> None:
    module, others = nn.Linear(3, 2), {"other.weight": torch.ones(4)}
    both = {**{f"mine.{name}": value for name, value in nn.Linear(3, 2).state_dict().items()}, **others}
    assert load_into(module, both, part=True)[-1].startswith("left out 1 entries of other networks")
    assert torch.equal(module.weight, both["mine.weight"])
    with pytest.raises(RedppError, match="holds 1 more: other.weight"):
        load_into(nn.Linear(3, 2), both)
    del both["mine.bias"]
    with pytest.raises(RedppError, match="2 missing: weight, bias; 2 unexpected: mine.weight, other.weight"):
        load_into(nn.Linear(3, 2), both, part=True)


@pytest.mark.parametrize(
    ("config", "arch"),
    [
        ({"architectures": ["BertModel"]}, "transformers:BertModel"),
        ({"architecture": "resnet18.a1_in1k"}, "timm:resnet18.a1_in1k"),
        ({"architecture": "\x1b]0;owned\x07"}, None),
        ({"architecture": "x; rm -rf ~"}, None),
        ({"architectures": ["$(id)"]}, None),
        ({"architectures": [7], "architecture": 7}, None),
    ],
)
def test_only_plain_names_are_suggested(tmp_path: Path, config: dict[str, Any], arch: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert suggested_arch(tmp_path) == arch
