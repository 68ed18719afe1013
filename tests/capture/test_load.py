"""What loads, how checkpoints are unwrapped, and that hostile files are refused without running."""

import contextlib
import hashlib
import random
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from redpp_serve.capture.load import load_file
from redpp_serve.capture.sniff import FileKind
from redpp_serve.errors import RedppError
from tests.attacks import files
from tests.attacks.loaders import loads

ROOT = Path(__file__).parent.parents[1]


def _save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def _assert_same(got: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> None:
    assert got is not None and got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key


@pytest.mark.parametrize("kind", [FileKind.STATE_DICT, FileKind.LEGACY_STATE_DICT, FileKind.SAFETENSORS])
@pytest.mark.parametrize("trust", [True, False])
def test_state_dicts(tmp_path: Path, kind: FileKind, trust: bool) -> None:
    path, state = tmp_path / "x", files.Net().state_dict()
    if kind is FileKind.SAFETENSORS:
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind is FileKind.STATE_DICT)
    loaded = load_file(path, trust=trust)
    assert loaded.kind is kind and loaded.module is None and loaded.exported is None and loaded.messages == []
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    _assert_same(loaded.state_dict, state)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_storages_are_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"weight": torch.zeros(1000)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    for path in (_save(tmp_path / "x.pt", state), tmp_path / "x.safetensors"):
        for limit in (1 << 30, 100):
            monkeypatch.setattr("redpp_serve.capture.load.MAPPED_BYTES", limit)
            loaded = load_file(path, trust=False)
            assert (str(path) in Path("/proc/self/maps").read_text()) == (limit == 100)
            assert loaded.state_dict
            del loaded


def test_compressed_zip_is_not_memory_mapped(tmp_path: Path) -> None:
    state = {"weight": torch.zeros(1000)}
    source = _save(tmp_path / "plain", state)
    path = files.rewritten(source, tmp_path / "x.pt", lambda name, data: data, compress=8)
    _assert_same(load_file(path, trust=False).state_dict, state)


def test_zip_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = _save(tmp_path / "x.pt", files.Net().state_dict())
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_file(path, trust=False).state_dict


@pytest.mark.parametrize("module", [True, False])
def test_file_saved_on_gpu_loads_on_cpu(tmp_path: Path, module: bool) -> None:
    net = files.Net()
    source = _save(tmp_path / "cpu.pt", net if module else net.state_dict())
    path = files.saved_on_gpu(source, tmp_path / "x.pt")
    assert b"cuda:0" in path.read_bytes()
    loaded = load_file(path, trust=module)
    _assert_same(loaded.module.state_dict() if loaded.module else loaded.state_dict, net.state_dict())


def test_metadata_survives(tmp_path: Path) -> None:
    path = _save(tmp_path / "x.pt", nn.DataParallel(files.Net()).state_dict())
    state = load_file(path, trust=False).state_dict
    assert state is not None and state._metadata["module.norm"] == {"version": 2}  # type: ignore[attr-defined]


NET = {"conv.weight": torch.ones(1), "norm.bias": torch.zeros(2)}
EMA = {"conv.weight": torch.full((1,), 2.0), "norm.bias": torch.ones(2)}
OPTIMIZER = {"state": {0: {"step": torch.zeros(1)}}, "param_groups": [{"lr": 0.1}]}
CHECKPOINTS: dict[str, tuple[Any, dict[str, Tensor], str]] = {
    "state_dict": ({"state_dict": NET, "epoch": 3, "optimizer": OPTIMIZER}, NET, "under 'state_dict', not epoch"),
    "model": ({"optimizer": OPTIMIZER, "model": NET}, NET, "under 'model', not optimizer"),
    "model_state_dict": ({"model_state_dict": NET, "optimizer_state_dict": OPTIMIZER}, NET, "under 'model_state_dict'"),
    "net": ({"net": NET}, NET, "took the weights under 'net'"),
    "ema before plain": ({"state_dict": NET, "state_dict_ema": EMA}, EMA, "under 'state_dict_ema', not state_dict"),
    "nested": ({"model": {"state_dict": NET}}, NET, "took the weights under 'state_dict'"),
    "own name": ({"generator": NET, "step": 1}, NET, "under 'generator', not step"),
    "scalar tensor beside": ({"state_dict": NET, "best": torch.tensor(0.9)}, NET, "not best"),
    "numbers beside": ({**NET, "epoch": 3}, NET, "left out entries that are not tensors: epoch"),
    "extra state": ({**NET, "norm._extra_state": 3}, NET, ""),
    "one layer called module": ({"module.w": NET["norm.bias"], "w": NET["norm.bias"]},) * 2 + ("",),
    "ordered": (OrderedDict(NET), NET, ""),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_are_unwrapped(tmp_path: Path, name: str) -> None:
    content, expected, message = CHECKPOINTS[name]
    loaded = load_file(_save(tmp_path / "x.pt", content), trust=False)
    _assert_same(loaded.state_dict, expected)
    assert message in "; ".join(loaded.messages)
    assert bool(message) == bool(loaded.messages)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"generator": NET, "critic": EMA}, "several sets of weights, under the keys generator, critic"),
        ({"epoch": 3, "lr": 0.1}, "no weights, under the keys epoch, lr"),
        ({}, "no weights"),
        (torch.zeros(3), "holds a Tensor"),
        ([NET], "holds a list"),
        ({0: torch.zeros(1)}, "no weights"),
    ],
)
def test_no_weights_by_name(tmp_path: Path, content: Any, found: str) -> None:
    with pytest.raises(RedppError, match=found):
        load_file(_save(tmp_path / "x.pt", content), trust=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64])
def test_weights_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(5)
    bad[3] = value
    content = {"good": torch.ones(2, dtype=dtype), "layer.bad": bad.to(dtype)}
    with pytest.raises(RedppError, match="NaN or infinite numbers in 1 of 2 tensors: layer.bad"):
        load_file(_save(tmp_path / "x.pt", content), trust=False)


def test_nan_in_a_type_without_isfinite(tmp_path: Path) -> None:
    content = {"good": torch.ones(2).to(torch.float8_e4m3fn), "bad": torch.tensor([torch.nan]).to(torch.float8_e4m3fn)}
    with pytest.raises(RedppError, match="in 1 of 2 tensors: bad"):
        load_file(_save(tmp_path / "x.pt", content), trust=False)


def test_names_of_many_bad_tensors_are_shortened(tmp_path: Path) -> None:
    path = _save(tmp_path / "x.pt", {f"t{i}": torch.tensor([float("nan")]) for i in range(20)})
    with pytest.raises(RedppError, match="in 20 of 20 tensors: t0, t1, t2, t3, t4 and 15 more"):
        load_file(path, trust=False)


def test_module_with_nan(tmp_path: Path) -> None:
    net = files.Net()
    net.conv.weight.data[0] = float("nan")
    with pytest.raises(RedppError, match="conv.weight"):
        load_file(_save(tmp_path / "x.pt", net), trust=True)


def test_attention_mask_may_be_infinite(tmp_path: Path) -> None:
    mask = torch.full((4, 4), -torch.inf).triu(1)
    _assert_same(load_file(_save(tmp_path / "x.pt", {"mask": mask}), trust=False).state_dict, {"mask": mask})


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        lambda: torch.ones(2, device="meta"),
    ],
    ids=["sparse", "quantized", "meta"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense(tmp_path: Path, make: Callable[[], Tensor]) -> None:
    with pytest.raises(RedppError, match="(sparse|quantized|missing) tensors: odd"):
        load_file(_save(tmp_path / "x.pt", {"odd": make(), "w": torch.ones(1)}), trust=False)


def test_stride_zero_bomb(tmp_path: Path) -> None:
    path = _save(tmp_path / "x.pt", {"w": torch.ones(1).expand(1 << 40)})
    with pytest.raises(RedppError, match="declares tensors of 4398046511104 bytes"):
        load_file(path, trust=False)


@pytest.mark.parametrize("legacy", [True, False])
def test_module_needs_trust(tmp_path: Path, legacy: bool) -> None:
    net = files.Net()
    path = _save(tmp_path / "x.pt", net, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(RedppError, match=r"attacks\.files\.Net.*--trust-file"):
        load_file(path, trust=False)
    loaded = load_file(path, trust=True)
    assert isinstance(loaded.module, files.Net) and loaded.state_dict is None
    _assert_same(loaded.module.state_dict(), net.state_dict())


def test_module_inside_a_checkpoint(tmp_path: Path) -> None:
    loaded = load_file(_save(tmp_path / "x.pt", {"model": files.Net(), "epoch": 1}), trust=True)
    assert isinstance(loaded.module, files.Net)
    assert loaded.messages == ["took the weights under 'model', not epoch"]


def test_module_of_a_missing_class(tmp_path: Path) -> None:
    source = _save(tmp_path / "y.pt", files.Net(), pickle_protocol=2)
    path = tmp_path / "x.pt"
    gone = files.rewritten(source, path, lambda name, data: data.replace(b"tests.attacks.files", b"attacks.nowhe"))
    with pytest.raises(RedppError, match="needs attacks.*pip install attacks.*PYTHONPATH"):
        load_file(gone, trust=True)


def test_torchscript_and_export_need_trust(tmp_path: Path) -> None:
    script = files.torchscript(tmp_path / "x.pt", files.Net())
    program = files.exported(tmp_path / "y.pt")
    for path in (script, program):
        with pytest.raises(RedppError, match="runs code of the file's choice.*--trust-file"):
            load_file(path, trust=False)
    module = load_file(script, trust=True).module
    assert isinstance(module, torch.jit.ScriptModule)
    loaded = load_file(program, trust=True)
    assert isinstance(loaded.exported, torch.export.ExportedProgram) and loaded.module is None


@pytest.mark.parametrize("attack", ["pickle", "legacy pickle", "torchscript", "export"])
def test_attacks_never_run_without_trust(tmp_path: Path, attack: str) -> None:
    path, marker = tmp_path / "model.pt", tmp_path / "marker"
    if attack == "torchscript":
        files.torchscript(path, files.RunsOnLoad(marker))
    elif attack == "export":
        files.poisoned_export(path, marker)
    else:
        files.poisoned_pickle(path, marker, legacy=attack == "legacy pickle")
    assert not marker.exists()
    with pytest.raises(RedppError, match="--trust-file") as refused:
        load_file(path, trust=False)
    assert not marker.exists()
    assert "pickle" not in attack or "open" in refused.value.found
    with contextlib.suppress(RedppError):  # the attack is a real one: trust, and it runs
        load_file(path, trust=True)
    assert marker.exists()


def test_attack_hidden_from_the_scan_is_still_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the scan ever fooled, the safe reader refuses by itself and nothing falls back to another one."""
    path = files.poisoned_pickle(tmp_path / "x.pt", tmp_path / "marker")
    monkeypatch.setattr("redpp_serve.capture.load.sniff", lambda path: FileKind.STATE_DICT)
    for trust in (True, False):
        with pytest.raises(RedppError, match="cannot be read: UnpicklingError"):
            load_file(path, trust=trust)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["x/data/0", "x/data.pkl"])
def test_flipped_bit(tmp_path: Path, name: str) -> None:
    source = _save(tmp_path / "x", files.Net().state_dict())
    damaged = bytearray(source.read_bytes())
    at = damaged.index(b"PK\x03\x04")
    while not damaged[at + 30 :].startswith(name.encode()):
        at = damaged.index(b"PK\x03\x04", at + 4)
    extra = struct.unpack_from("<H", damaged, at + 28)[0]
    damaged[at + 30 + len(name) + extra + 2] ^= 1
    source.write_bytes(damaged)
    with pytest.raises(RedppError, match="damaged"):
        load_file(source, trust=False)


def test_truncated_legacy_weights(tmp_path: Path) -> None:
    path = _save(tmp_path / "x.pt", files.Net().state_dict(), _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RedppError, match="cannot be read"):
        load_file(path, trust=False)


@pytest.mark.parametrize("legacy", [True, False])
def test_random_damage_is_refused_or_harmless(tmp_path: Path, legacy: bool) -> None:
    whole = _save(tmp_path / "x.pt", NET, _use_new_zipfile_serialization=not legacy).read_bytes()
    rng, refused = random.Random(0), 0
    for trial in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path = tmp_path / f"{trial}.pt"
        path.write_bytes(damaged)
        try:
            load_file(path, trust=False)
        except RedppError:
            refused += 1
    assert refused > 50


def test_kinds_without_a_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(RedppError, match="git lfs pull"):
        load_file(path, trust=True)


@pytest.mark.parametrize("name", files.SAFETENSORS)
def test_hostile_safetensors(tmp_path: Path, name: str) -> None:
    header, data, length = files.SAFETENSORS[name]
    path = files.safetensors(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(RedppError, match="safetensors state_dict that cannot be read"):
        load_file(path, trust=False)


def test_the_maker_of_hostile_safetensors_makes_good_ones_too(tmp_path: Path) -> None:
    path = files.safetensors(tmp_path / "x", {"a": files.entry(0, 8), "b": files.entry(8, 16)}, bytes(16))
    _assert_same(load_file(path, trust=False).state_dict, {"a": torch.zeros(2), "b": torch.zeros(2)})


def test_the_search_finds_loaders() -> None:
    sources = ["x = torch.load(f)", "torch.jit.load(f)", "torch.export.load(f)", "import pickle", "yaml.load(f)"]
    sources += ["from torch import load", "from pickle import loads as p", "np.load(f, allow_pickle=True)"]
    assert all(len(loads(source)) == 1 for source in sources)
    assert loads("'torch.load'  # torch.load\nnp.load(f, allow_pickle=False)\nimport pickletools") == []


def test_one_module_loads_files() -> None:
    found = {}
    for folder in ("redpp_serve", "handlers", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if names := loads(path.read_text()):
                found[str(path.relative_to(ROOT))] = sorted(set(names))
    assert found == {
        "redpp_serve/capture/load.py": ["torch.export.load", "torch.jit.load", "torch.load"],
        "redpp_serve/exporting/formats.py": ["torch.export.load"],  # of the file that it has just written
    }
